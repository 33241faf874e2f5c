"""The row-block engine: sweeps over blocks of rows in which values and gradients are computed at once.

Shape letters as in objective.py; T terms.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dskd_plugin.core.heads import Head, head_logits
from dskd_plugin.core.objective import RATES, TERMS, Objective, Sums, term_weights
from dskd_plugin.core.readings import token_log_probs
from dskd_plugin.core.row_blocks import blocks, for_compute, no_autocast, rows_of_block, wide
from dskd_plugin.core.rows import Rows, Spans
from dskd_plugin.core.teacher_rows import TeacherRows, teacher_rows
from dskd_plugin.core.terms import span_term, student_space_sums, teacher_space_sums

# Bounds what fp16 must hold in a block's head gradient, a sum over rows: 64 times a hidden state.
_ROWS_AT_FULL_WEIGHT = 64


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


class Walk:
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
        self.student_head = for_compute(student_head.detach())
        self.teacher_head = None if teacher_head is None else for_compute(teacher_head.detach())
        self.dtype = wide(self.student_head.weight_VD)
        heads = [head for head in (self.student_head, self.teacher_head) if head is not None]
        self.block_rows = min(rows_of_block(block_elements, *heads), max(1, longest))
        shares = objective.shares(s2t_is_learned=s2t_is_learned)
        self.moving = frozenset(shares)
        self.weights_T = term_weights(divisors_T, shares).to(rows.student_RD.device, self.dtype)
        self.sweeps: list[_Sweep] = []
        self.known: Sums = {}
        self.pull_R: Tensor | None = None
        # While a run collects gradients: what has some so far, and what each sum of a block weighs in them.
        self.gradients: dict[str, Tensor] = {}
        self.relative_T = torch.zeros_like(self.weights_T)
        # Tensors of the block with gradients that its stage knows already.
        self.handed: list[tuple[Tensor, Tensor]] = []
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

    def read_teacher(self, block: slice, head: Head, **reads: Any) -> TeacherRows | None:
        """What the stages of a block read of the teacher, see `teacher_rows`."""
        return teacher_rows(self.rows.block(block), head, self.objective, **reads)

    def read_states(self, teacher_KD: Tensor) -> TeacherRows:
        """All of the teacher's distributions at some states."""
        return TeacherRows(head_logits(teacher_KD, self.constant_teacher_head.real()))

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
        gradient_VD = self.gradients.get("weight_VD")
        return student_space_sums(
            replace(self.rows.block(block), student_RD=student_RD),
            student_head=replace(self.student_head, weight_VD=weight_VD, bias_V=bias_V, gradient_VD=gradient_VD),
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
        self.sweeps.append(_Sweep(list(blocks(rows, self.block_rows, start)), stages, teacher, sliced, whole))

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
        self.gradients = gradients
        computed = self.inputs | {"weight_VD": self.student_head.weight_VD, "bias_V": self.student_head.bias_V}
        leaves = {name: _leaf(x, flags[name]) for name, x in computed.items()}
        # Weights of order 1 in the blocks, the small rest in wide precision: fp16 gradients would underflow.
        scale = self.weights_T.max() * max(1.0, self.block_rows / _ROWS_AT_FULL_WEIGHT)
        self.relative_T = self.weights_T / torch.where(scale > 0, scale, 1)
        sums_K2 = self.weights_T.new_zeros(len(TERMS + RATES), 2)
        for name, pair in self.known.items():
            sums_K2[TERMS.index(name)] = torch.stack(pair)
        for sweep in self.sweeps:
            for block in sweep.blocks:
                given = {name: leaves[name] for name in sweep.whole}
                given |= {name: _leaf(_part(leaves[name], block), flags[name]) for name in sweep.sliced}
                with torch.no_grad(), no_autocast(sums_K2.device):
                    teacher = None if sweep.teacher is None else sweep.teacher(block)
                for stage in sweep.stages:
                    with torch.set_grad_enabled(any(wanted)), no_autocast(sums_K2.device):
                        sums = stage(block, teacher, **given)
                        total = sums_K2.new_zeros(())
                        for i, name in enumerate(TERMS + RATES):
                            if name in sums:
                                sums_K2[i] += torch.stack(sums[name]).detach()
                                if name in self.moving:
                                    total = total + self.relative_T[i] * sums[name][0]
                        if total.requires_grad:
                            self.handed.append((total, torch.ones_like(total)))
                        _add_gradients(self.handed, given, gradients, sweep.sliced, block)
                        self.handed = []
        self.gradients = {}
        sums_T = sums_K2[: len(TERMS), 0]
        loss = torch.where(self.weights_T > 0, self.weights_T * sums_T, 0).sum()
        return loss, sums_K2, scale, [gradients.get(name) for name in self.inputs]


class _BlockwiseLoss(torch.autograd.Function):
    """Hands the gradients of the walk to autograd, scaled by whatever multiplies the loss."""

    @staticmethod
    def forward(ctx: Any, walk: Walk, *inputs: Tensor | None) -> tuple[Tensor, Tensor]:
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
    handed: list[tuple[Tensor, Tensor]],
    given: Mapping[str, Tensor | None],
    gradients: Mapping[str, Tensor],
    sliced: tuple[str, ...],
    block: slice,
) -> None:
    """Add one block's gradients: those of sliced tensors in their place, the others to the whole.

    That of the student's head is there already, see `Head.gradient_VD`.
    """
    leaves = {name: leaf for name, leaf in given.items() if name in gradients and leaf is not None}
    if not handed or not leaves:
        return
    known = [gradient for _, gradient in handed]
    found = torch.autograd.grad([x for x, _ in handed], list(leaves.values()), known, allow_unused=True)
    for name, part in zip(leaves, found, strict=True):
        if part is not None:
            (gradients[name][block] if name in sliced else gradients[name]).add_(part)


def _leaf(x: Tensor | None, wanted: bool) -> Tensor | None:
    return None if x is None else x.detach().requires_grad_(wanted)


def _part(x: Tensor | None, block: slice) -> Tensor | None:
    return None if x is None else x[block]


def _scaled(gradient: Tensor | None, factor: Tensor, dtype: torch.dtype) -> Tensor | None:
    if gradient is None:
        return None
    return torch.mul(gradient, factor, out=torch.empty_like(gradient, dtype=dtype))
