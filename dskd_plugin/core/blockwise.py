"""The objective in row blocks: nothing of the size rows x vocabulary is ever held.

Shape letters as in objective.py: R response rows, N rows with a teacher partner, M teacher rows (cross-model
attention), V ids of a head, T terms.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dskd_plugin.core.events import Exact
from dskd_plugin.core.heads import Head, head_logits, logits_at
from dskd_plugin.core.objective import (
    RATES,
    TERMS,
    Compare,
    Objective,
    Rows,
    Spans,
    Sums,
    TeacherRows,
    projected_student,
    projected_teacher,
    row_masks,
    span_sums,
    span_term,
    student_space_sums,
    teacher_rows,
    teacher_space_sums,
    term_weights,
)
from dskd_plugin.core.reduce import keep_rows
from dskd_plugin.core.segments import Others, SegmentCompare, token_values
from dskd_plugin.core.support import SupportCompare

# Bounds what fp16 must hold in a block's head gradient, a sum over rows: 64 times a hidden state.
_ROWS_AT_FULL_WEIGHT = 64


@torch.no_grad()
def teacher_argmax(teacher_NE: Tensor, teacher_head: Head, *, block_elements: int) -> Tensor:
    """The teacher's most likely real id at each row. Returns [N] int64, without gradient."""
    return _argmax(teacher_NE, _for_compute(teacher_head), block_elements)


@torch.no_grad()
def agreement_of(
    projected_Nd: Tensor, student_head: Head, label_N: Tensor, *, block_elements: int, event_V: Tensor | None = None
) -> Tensor:
    """Where rows in the student's space predict the label: argmax of head_s over the real ids == label.

    label_N: student ids, -1 for none (never agrees); or events, with the event of each student id in event_V.
    Returns [N] bool, without gradient.
    """
    predicted_N = _argmax(projected_Nd, _for_compute(student_head), block_elements)
    return (predicted_N if event_V is None else event_V[predicted_N]) == label_N


@torch.no_grad()
def token_log_probs(hidden_ND: Tensor, head: Head, ids_N: Tensor, *, block_elements: int) -> Tensor:
    """Log-probability of one id at each row, at temperature 1 over all V rows of the head, as ce has it.

    Returns [N] nats, <= 0, fp32 or wider, without gradient.
    """
    head = _for_compute(head)
    found_N = torch.empty(len(hidden_ND), dtype=_wide(head.weight_VD), device=hidden_ND.device)
    with _no_autocast(hidden_ND.device):
        for block in _blocks(len(hidden_ND), _block_rows(block_elements, head)):
            logits_BV = head_logits(hidden_ND[block], head)
            found_N[block] = -torch.nn.functional.cross_entropy(logits_BV, ids_N[block], reduction="none")
    return found_N


@torch.no_grad()
def segment_values(
    hidden_ND: Tensor,
    head: Head,
    ids_N: Tensor,
    compare: SegmentCompare,
    *,
    block_elements: int,
    of_V: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """What a method reads of one token at each row, see segments.token_values: over the real ids of the head.

    Logits need no product with the whole head. of_V: bool, ids whose joint probability is wanted as well, where
    log-probabilities are read; at temperature 1. Returns [N] and that probability, [N] or [0], fp32 or wider, without
    gradient.
    """
    head = _for_compute(head).real()
    found_N = torch.empty(len(hidden_ND), dtype=_wide(head.weight_VD), device=hidden_ND.device)
    mass_N = torch.empty_like(found_N if of_V is not None else found_N[:0])
    with _no_autocast(hidden_ND.device):
        if compare.reads == "logits":
            found_N = logits_at(hidden_ND, head, ids_N[:, None], elements=block_elements)[:, 0] / compare.temperature
            return found_N, mass_N
        for block in _blocks(len(hidden_ND), _block_rows(block_elements, head)):
            logits_BV = head_logits(hidden_ND[block], head)
            found_N[block] = token_values(logits_BV, ids_N[block], reads=compare.reads, temperature=compare.temperature)
            if of_V is not None:
                mass_N[block] = torch.softmax(logits_BV, dim=1)[:, of_V].sum(1)
    return found_N, mass_N


def dskd_loss(
    rows: Rows,
    *,
    student_head: Head,
    teacher_head: Head,
    t2s_Dd: Tensor | None,
    s2t_dD: Tensor | None,
    objective: Objective,
    divisors_T: Tensor,
    block_elements: int,
    soft_labels: Compare | None = None,
    exact: Exact | None = None,
) -> tuple[Tensor, Sums]:
    """Method dskd on paired rows (identity or exact token alignment), in blocks of max(1, block_elements // V) rows.

        loss = (1 - r) ce / div_ce + r (t2s_kd / div + t2s_ce / div + s2t_kd / div + c span_kl / div)
               and, with unpaired_ce, + r ce_unpaired / div_ce

        ce      = CE(z, gold)                    all V rows of the head, temperature 1
        t2s_ce  = CE(z_t2s, label)               the same;  z_t2s = head_s(H W_t2s)
                  or soft_labels(z_t2s, sg(z_t)) where that is given
        t2s_kd  = dist(z, sg(z_t2s))             the student's vocab_size real ids, objective.temperature
                  or dist(z, events.exact_target) where exact is given; t2s_ce then labels events:
                  -log mass of the event of argmax z_t, or soft_labels
        s2t_kd  = dist(z_s2t, sg(z_t))           the teacher's real ids;  z_s2t = head_t(h W_s2t)
        span_kl = objective.span_term

    Gradients: ce, t2s_kd and span_kl reach student_RD and the student's head, t2s_ce reaches t2s_Dd alone, s2t_kd
    reaches student_RD alone. Teacher rows, teacher head and s2t_dD never get one.
    t2s_Dd, s2t_dD: [D, d] and [d, D]; None where the objective does not use that space.
    divisors_T: rows per term over the whole optimizer step in the order of TERMS (counts summed over micro-batches and
    ranks); a term with divisor 0 is 0.
    block_elements: rows x vocabulary entries at a time, up to 10 fp32 tensors of that size with gradients.
    Returns (loss, sums): loss a scalar attached to student_RD, head weight, head bias and t2s_Dd even where a
    term is left out (gradient 0); sums name -> (sum in nats, count) for TERMS, detached, 0 and 0 for a term left out,
    and for RATES: (rows where the argmaxes agree, rows), and for t2s_inside, with exact alone, how much likelier, in
    nats, the projected teacher finds the gold id inside its event than the student does, over rows whose event has
    several ids. With gradients disabled only values are computed.
    Under projectors_alone only ce reaches student_RD and the student's head; t2s_ce still reaches t2s_Dd.
    Values and gradients are both computed in the forward, one block after another, which needs the divisors
    beforehand; the backward only scales them, once per input. No second derivatives.
    Products are taken in the dtype of the weights, or in autocast's where it is on; sums in fp32 or wider.
    Source: arXiv 2504.11426, section 3 (v2), with the terms divided outside.
    """
    walk = _Walk(rows, student_head, teacher_head, objective, divisors_T, block_elements, len(rows))

    def teacher(block: slice) -> TeacherRows | None:
        part = walk.rows.block(block)
        return teacher_rows(part, walk.constant_teacher_head, objective, soft_labels=soft_labels, exact=exact)

    def student_space(block: slice, teacher: TeacherRows | None, *, t2s_Dd: Tensor | None, **of_student: Any) -> Sums:
        part = walk.rows.block(block)
        t2s_Nd = None
        if objective.in_student_space and part.pairs > 0 and t2s_Dd is not None:
            t2s_Nd = projected_teacher(part, t2s_Dd)
        return walk.student_space(block, teacher, t2s_Nd=t2s_Nd, soft_labels=soft_labels, exact=exact, **of_student)

    def teacher_space(block: slice, teacher: TeacherRows | None, *, student_RD: Tensor, **_: Any) -> Sums:
        if teacher is None:
            return {}
        part = replace(walk.rows.block(block), student_RD=student_RD)
        assert s2t_dD is not None
        mask_N = row_masks(part, objective)["s2t_kd"]
        return walk.teacher_space(projected_student(part, s2t_dD, mask_N), teacher, mask_N)

    stages: tuple[Stage, ...] = (student_space, teacher_space) if objective.in_teacher_space else (student_space,)
    walk.sweep(len(rows), *stages, teacher=teacher, sliced=("student_RD",), whole=("weight_VD", "bias_V", "t2s_Dd"))
    return walk.loss(t2s_Dd=t2s_Dd)


def cma_loss(
    rows: Rows,
    *,
    t2s_Nd: Tensor | None,
    s2t_MD: Tensor | None,
    teacher_MD: Tensor,
    student_head: Head,
    teacher_head: Head,
    objective: Objective,
    divisors_T: Tensor,
    block_elements: int,
) -> tuple[Tensor, Sums]:
    """Method dskd with cross-model attention, in blocks like dskd_loss and with its loss, divisors and result.

        ce      = CE(z, gold)
        t2s_ce  = CE(z_t2s, gold)                z_t2s = head_s(t2s_Nd) at the first N rows, label_N >= 0
        t2s_kd  = dist(z, sg(z_t2s))             the same rows, those of agree_N with the agreement mask
        s2t_kd  = dist(z_s2t, sg(z_t))           z_s2t = head_t(s2t_MD) at the M teacher rows, s2t_M

    rows: label_N the gold ids, or -1; s2t_M which teacher rows count, required in the teacher's space.
    t2s_Nd, s2t_MD: attend.CrossModelAttention's rows in the student's and in the teacher's space, each None where the
    objective does not use that space. teacher_MD: the teacher's states.
    Gradients: ce and t2s_kd reach student_RD and the student's head. t2s_ce reaches t2s_Nd, and through it the
    projectors t2s and query. s2t_kd reaches s2t_MD, and through it the projectors s2t and query and the student's
    states that s2t_MD was made of. The heads in z_t2s and z_s2t and the teacher get none.
    Under projectors_alone t2s_kd and the span term weigh nothing and s2t_kd stays, for its projector: make s2t_MD
    from detached states then. The loss is attached to every given tensor.
    Source: arXiv 2406.17328 (DSKD v1), values of the mixture as in arXiv 2504.11426.
    """
    longest = max(len(rows), len(teacher_MD))
    walk = _Walk(rows, student_head, teacher_head, objective, divisors_T, block_elements, longest, True)

    walk.sweep(len(rows), walk.student_space, sliced=("student_RD", "t2s_Nd"), whole=("weight_VD", "bias_V"))
    if objective.in_teacher_space:
        s2t_M = rows.s2t_M
        if s2t_M is None:
            raise ValueError(
                "rows.s2t_M: expected a bool tensor over the teacher rows with cross-model attention, got None. "
                "Set it where a student row of the same sample exists."
            )

        def teacher(block: slice) -> TeacherRows:
            kept_MD = keep_rows(teacher_MD[block].detach(), s2t_M[block])
            return TeacherRows(head_logits(kept_MD, walk.constant_teacher_head.real()))

        def teacher_space(block: slice, teacher: TeacherRows | None, *, s2t_MD: Tensor) -> Sums:
            assert teacher is not None
            return walk.teacher_space(s2t_MD, teacher, s2t_M[block])

        walk.sweep(len(teacher_MD), teacher_space, teacher=teacher, sliced=("s2t_MD",))
    return walk.loss(t2s_Nd=t2s_Nd, s2t_MD=s2t_MD)


def baseline_loss(
    rows: Rows,
    *,
    student_head: Head,
    teacher_head: Head | None,
    compare: Compare | None,
    objective: Objective,
    divisors_T: Tensor,
    block_elements: int,
) -> tuple[Tensor, Sums]:
    """Methods sft, kd, overlap_kd, bpm, uld and mined, in blocks like dskd_loss and with its divisors and result.

        loss = (1 - r) ce / div_ce + r (kd / div_kd + c span_kl / div_span);   sft: ce / div_ce
        kd   = compare(z, sg(z_t)) at the first N rows, over the real ids of both heads

    compare: from baselines.py, an EventCompare, a SupportCompare or, for rows with places, a PrefixCompare. It and
    teacher_head may be None for sft.
    Gradients reach student_RD and the student's head, nothing of the teacher.
    """
    # A few rows of the teacher's head are read: neither its size nor a copy in the dtype of products matters.
    few = isinstance(compare, SupportCompare)
    walk = _Walk(rows, student_head, None if few else teacher_head, objective, divisors_T, block_elements, len(rows))
    read_head = teacher_head if few else walk.teacher_head

    def teacher(block: slice) -> TeacherRows | None:
        if compare is None or read_head is None:
            return None
        return teacher_rows(walk.rows.block(block), read_head, objective, compare=compare)

    def student_space(block: slice, teacher: TeacherRows | None, **of_student: Any) -> Sums:
        return walk.student_space(block, teacher, compare=compare, **of_student)

    walk.sweep(len(rows), student_space, teacher=teacher, sliced=("student_RD",), whole=("weight_VD", "bias_V"))
    return walk.loss()


def segment_loss(
    rows: Rows,
    *,
    student_head: Head,
    teacher_head: Head,
    compare: SegmentCompare,
    objective: Objective,
    divisors_T: Tensor,
    block_elements: int,
) -> tuple[Tensor, Sums]:
    """Methods that compare segments, in blocks like dskd_loss and with its divisors and result.

        loss = (1 - r) ce / div_ce + r kd / div_kd
        kd   = compare(student, sg(teacher)) of each segment

    rows: those of the open tokens first, see segments.Segments. A first pass without gradient reads the student's other
    tokens; a second one compares, and finds the derivative by what was read; the rows of a third hand it on to their
    logits. Gradients reach student_RD at all tokens of a segment and the student's head, nothing of the teacher.
    """
    assert rows.segments is not None
    segments, opens = rows.segments, rows.pairs
    walk = _Walk(rows, student_head, teacher_head, objective, divisors_T, block_elements, len(rows))
    values_P, _ = segment_values(
        walk.rows.student_RD[segments.others_P],
        walk.student_head,
        rows.labels_R[segments.others_P],
        compare,
        block_elements=block_elements,
    )
    others_G = span_sums(values_P, segments.of_P, opens)
    # One more than there are segments: for rows that are no other token.
    pull_G = torch.zeros(opens + 1, dtype=walk.dtype, device=values_P.device)
    segment_R = torch.full_like(rows.labels_R, opens)
    segment_R[segments.others_P] = segments.of_P

    def teacher(block: slice) -> TeacherRows | None:
        if not compare.whole_teacher:
            return TeacherRows(walk.rows.student_RD.new_zeros(block.stop - block.start, 0))
        return teacher_rows(walk.rows.block(block), walk.constant_teacher_head, objective)

    def of_opens(block: slice, teacher: TeacherRows | None, **of_student: Any) -> Sums:
        others_B = others_G[block].to(walk.dtype).requires_grad_(torch.is_grad_enabled())
        bound = segments.bound(compare, block, rows.labels_R[block], others_B)
        sums = walk.student_space(block, teacher, compare=bound, **of_student)
        if "kd" in sums and "kd" in walk.moving and others_B.requires_grad:
            (found_B,) = torch.autograd.grad(sums["kd"][0], others_B, retain_graph=True, allow_unused=True)
            pull_G[block] = 0 if found_B is None else found_B
        return sums

    def of_others(block: slice, teacher: TeacherRows | None, **of_student: Any) -> Sums:
        others = Others(pull_G[segment_R[block]], compare)
        return walk.student_space(block, teacher, others=others, **of_student)

    walk.sweep(opens, of_opens, teacher=teacher, sliced=("student_RD",), whole=("weight_VD", "bias_V"))
    walk.sweep(len(rows), of_others, start=opens, sliced=("student_RD",), whole=("weight_VD", "bias_V"))
    return walk.loss()


Stage = Callable[..., Sums]
"""stage(block, teacher, **tensors): sums of a block, as functions of the tensors that the sweep hands over."""


@dataclass(frozen=True)
class _Sweep:
    """One pass over rows, with the block of each sliced tensor and the whole of the others.

    stages: take the block one after the other, so that one's tensors are gone before the next. teacher: what they all
    read of the teacher, made once for the block.
    """

    blocks: list[slice]
    stages: tuple[Stage, ...]
    teacher: Callable[[slice], TeacherRows | None] | None
    sliced: tuple[str, ...]
    whole: tuple[str, ...]


class _Walk:
    """The engine: sweeps over row blocks in which values and gradients are computed at once.

    rows, student_head, teacher_head: constants, in the dtype of their products.
    """

    def __init__(
        self,
        rows: Rows,
        student_head: Head,
        teacher_head: Head | None,
        objective: Objective,
        divisors_T: Tensor,
        block_elements: int,
        longest: int,
        s2t_is_learned: bool = False,
    ) -> None:
        """longest: rows of the longest sweep."""
        self.inputs: dict[str, Tensor | None] = {
            "student_RD": rows.student_RD,
            "weight_VD": student_head.weight_VD,
            "bias_V": student_head.bias_V,
        }
        self.objective = objective
        self.rows = replace(rows, student_RD=rows.student_RD.detach())
        self.student_head = _for_compute(student_head.detach())
        self.teacher_head = None if teacher_head is None else _for_compute(teacher_head.detach())
        self.dtype = _wide(self.student_head.weight_VD)
        heads = [head for head in (self.student_head, self.teacher_head) if head is not None]
        self.block_rows = min(_block_rows(block_elements, *heads), max(1, longest))
        shares = objective.shares(s2t_is_learned=s2t_is_learned)
        self.moving = frozenset(shares)
        self.weights_T = term_weights(divisors_T, shares).to(rows.student_RD.device, self.dtype)
        self.sweeps: list[_Sweep] = []
        self.known: Sums = {}
        self.pull_R: Tensor | None = None
        self.gradient_VD: Tensor | None = None  # of the student's head, while a run collects it
        if "span_kl" in objective.terms and rows.spans is not None:
            self._measure_spans(rows.spans, block_elements)

    def _measure_spans(self, spans: Spans, block_elements: int) -> None:
        """A first pass without gradient: a span's rows lie in several blocks, and its derivative needs all of them."""
        log_probs_P = token_log_probs(
            self.rows.student_RD[spans.rows_P],
            self.student_head,
            self.rows.labels_R[spans.rows_P],
            block_elements=block_elements,
        )
        moves = torch.is_grad_enabled() and "span_kl" in self.moving
        log_probs_P.requires_grad_(moves)
        total, count = span_term(spans, log_probs_P, temperature=self.objective.span_temperature)
        self.known["span_kl"] = (total.detach(), count)
        if moves:
            (pull_P,) = torch.autograd.grad(total, log_probs_P)
            self.pull_R = pull_P.new_zeros(len(self.rows)).index_add(0, spans.rows_P, pull_P)

    @property
    def constant_teacher_head(self) -> Head:
        """The teacher's head, in the dtype of its products, where the objective reads it."""
        assert self.teacher_head is not None
        return self.teacher_head

    def student_space(
        self,
        block: slice,
        teacher: TeacherRows | None,
        *,
        student_RD: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        **more: Any,
    ) -> Sums:
        """The sums of a block over the student's vocabulary, as functions of these tensors."""
        return student_space_sums(
            replace(self.rows.block(block), student_RD=student_RD),
            student_head=replace(self.student_head, weight_VD=weight_VD, bias_V=bias_V, gradient_VD=self.gradient_VD),
            objective=self.objective,
            teacher=teacher,
            pull_R=None if self.pull_R is None else self.pull_R[block],
            **more,
        )

    def teacher_space(self, s2t_KD: Tensor, teacher: TeacherRows, mask_K: Tensor) -> Sums:
        """The sums of a block over the teacher's vocabulary."""
        return teacher_space_sums(
            s2t_KD, teacher=teacher, mask_K=mask_K, head=self.constant_teacher_head, objective=self.objective
        )

    def sweep(
        self,
        rows: int,
        *stages: Stage,
        teacher: Callable[[slice], TeacherRows | None] | None = None,
        sliced: tuple[str, ...],
        whole: tuple[str, ...] = (),
        start: int = 0,
    ) -> None:
        """Add a pass over rows start to rows - 1, see `_Sweep`."""
        self.sweeps.append(_Sweep(list(_blocks(rows, self.block_rows, start)), stages, teacher, sliced, whole))

    def loss(self, **more: Tensor | None) -> tuple[Tensor, Sums]:
        """The loss and its sums; more: the inputs by name beside the student's rows and head."""
        self.inputs |= more
        tensors = tuple(self.inputs.values())
        if torch.is_grad_enabled():
            apply: Callable[..., tuple[Tensor, Tensor]] = _BlockwiseLoss.apply
            loss, sums_K2 = apply(self, *tensors)
        else:
            loss, sums_K2, _, _ = self.run((False,) * len(tensors))
        return loss, {name: (sums_K2[i, 0], sums_K2[i, 1]) for i, name in enumerate(TERMS + RATES)}

    def run(self, wanted: tuple[bool, ...]) -> tuple[Tensor, Tensor, Tensor, list[Tensor | None]]:
        """Loss, sums [terms and rates, 2], scale, and the gradients of loss / scale for the wanted inputs."""
        flags = dict(zip(self.inputs, wanted, strict=True))
        by_row = {name for sweep in self.sweeps for name in sweep.sliced}
        gradients = {
            name: torch.zeros_like(x, dtype=x.dtype if name in by_row else torch.promote_types(x.dtype, torch.float32))
            for name, x in self.inputs.items()
            if flags[name] and x is not None
        }
        self.gradient_VD = gradients.get("weight_VD")
        computed = self.inputs | {"weight_VD": self.student_head.weight_VD, "bias_V": self.student_head.bias_V}
        leaves = {name: _leaf(x, flags[name]) for name, x in computed.items()}
        # Weights of order 1 in the blocks, the small rest in wide precision: fp16 gradients would underflow.
        scale = self.weights_T.max() * max(1.0, self.block_rows / _ROWS_AT_FULL_WEIGHT)
        relative_T = self.weights_T / torch.where(scale > 0, scale, 1)
        sums_K2 = self.weights_T.new_zeros(len(TERMS + RATES), 2)
        for name, pair in self.known.items():
            sums_K2[TERMS.index(name)] = torch.stack(pair)
        for sweep in self.sweeps:
            for block in sweep.blocks:
                given = {name: leaves[name] for name in sweep.whole}
                given |= {name: _leaf(_part(leaves[name], block), flags[name]) for name in sweep.sliced}
                with torch.no_grad(), _no_autocast(sums_K2.device):
                    teacher = None if sweep.teacher is None else sweep.teacher(block)
                for stage in sweep.stages:
                    with torch.set_grad_enabled(any(wanted)), _no_autocast(sums_K2.device):
                        sums = stage(block, teacher, **given)
                        total = sums_K2.new_zeros(())
                        for i, name in enumerate(TERMS + RATES):
                            if name in sums:
                                sums_K2[i] += torch.stack(sums[name]).detach()
                                if name in self.moving:
                                    total = total + relative_T[i] * sums[name][0]
                        if total.requires_grad:
                            _add_gradients(total, given, gradients, sweep.sliced, block)
        self.gradient_VD = None
        sums_T = sums_K2[: len(TERMS), 0]
        loss = torch.where(self.weights_T > 0, self.weights_T * sums_T, 0).sum()
        return loss, sums_K2, scale, [gradients.get(name) for name in self.inputs]


class _BlockwiseLoss(torch.autograd.Function):
    """Hands the gradients of the walk to autograd, scaled by whatever multiplies the loss."""

    @staticmethod
    def forward(ctx: Any, walk: _Walk, *inputs: Tensor | None) -> tuple[Tensor, Tensor]:
        loss, sums_K2, scale, gradients = walk.run(ctx.needs_input_grad[1:])
        ctx.save_for_backward(scale, *gradients)
        ctx.dtypes = [None if x is None else x.dtype for x in inputs]
        ctx.mark_non_differentiable(sums_K2)
        return loss, sums_K2

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, loss_gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        scale, *gradients = ctx.saved_tensors
        factor = scale * loss_gradient
        return (None, *(_scaled(g, factor, dtype) for g, dtype in zip(gradients, ctx.dtypes, strict=True)))


def _add_gradients(
    total: Tensor,
    given: Mapping[str, Tensor | None],
    gradients: Mapping[str, Tensor],
    sliced: tuple[str, ...],
    block: slice,
) -> None:
    """Add one block's gradients: those of sliced tensors in their place, the others to the whole.

    That of the student's head is there already, see `Head.gradient_VD`.
    """
    leaves = {name: leaf for name, leaf in given.items() if name in gradients and leaf is not None}
    found = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    for name, part in zip(leaves, found, strict=True):
        if part is not None:
            (gradients[name][block] if name in sliced else gradients[name]).add_(part)


def _argmax(hidden_ND: Tensor, head: Head, block_elements: int) -> Tensor:
    """The most likely real id at each row."""
    real = head.real()
    predicted_N = torch.empty(len(hidden_ND), dtype=torch.long, device=hidden_ND.device)
    with _no_autocast(hidden_ND.device):
        for block in _blocks(len(hidden_ND), _block_rows(block_elements, real)):
            predicted_N[block] = head_logits(hidden_ND[block], real).argmax(-1)
    return predicted_N


def _block_rows(block_elements: int, *heads: Head) -> int:
    return max(1, block_elements // max(head.weight_VD.shape[0] for head in heads))


def _blocks(rows: int, block_rows: int, first: int = 0) -> Iterator[slice]:
    for start in range(first, rows, block_rows):
        yield slice(start, min(start + block_rows, rows))


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _for_compute(head: Head) -> Head:
    """The head in the dtype of its products: autocast's for an fp32 weight where that is on, else its own."""
    device = head.weight_VD.device.type
    if head.weight_VD.dtype != torch.float32 or not torch.is_autocast_enabled(device):
        return head
    return replace(head, weight_VD=head.weight_VD.to(torch.get_autocast_dtype(device)))


def _no_autocast(device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, enabled=False)


def _leaf(x: Tensor | None, wanted: bool) -> Tensor | None:
    return None if x is None else x.detach().requires_grad_(wanted)


def _part(x: Tensor | None, block: slice) -> Tensor | None:
    return None if x is None else x[block]


def _scaled(gradient: Tensor | None, factor: Tensor, dtype: torch.dtype) -> Tensor | None:
    if gradient is None:
        return None
    return torch.mul(gradient, factor, out=torch.empty_like(gradient, dtype=dtype))
