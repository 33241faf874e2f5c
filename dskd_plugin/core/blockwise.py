"""The objective in row blocks: nothing of the size rows x vocabulary is ever held.

Shape letters as in objective.py: R response rows, N rows with a teacher partner, M teacher rows (cross-model
attention), V ids of a head, T terms.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dskd_plugin.core.events import Exact
from dskd_plugin.core.heads import Head
from dskd_plugin.core.objective import Compare, Objective, Sums
from dskd_plugin.core.readings import segment_values
from dskd_plugin.core.reduce import keep_rows
from dskd_plugin.core.rows import Rows, row_masks
from dskd_plugin.core.segments import Others, SegmentCompare
from dskd_plugin.core.teacher_rows import TeacherRows
from dskd_plugin.core.terms import projected_student, projected_teacher, span_sums
from dskd_plugin.core.top_shared import TopSharedCompare
from dskd_plugin.core.walk import Stage, Walk


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
    engine: Callable[..., Walk] = Walk,
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
        span_kl = terms.span_term

    Gradients: ce, t2s_kd and span_kl reach student_RD and the student's head, t2s_ce reaches t2s_Dd alone, s2t_kd
    reaches student_RD alone. Teacher rows, teacher head and s2t_dD never get one.
    t2s_Dd, s2t_dD: [D, d] and [d, D]; None where the objective does not use that space.
    divisors_T: rows per term over the whole optimizer step in the order of TERMS (counts summed over micro-batches and
    ranks); a term with divisor 0 is 0.
    block_elements: rows x vocabulary entries at a time, up to 10 fp32 tensors of that size with gradients.
    Returns (loss, sums): loss a scalar attached to student_RD, head weight, head bias and t2s_Dd even where a
    term is left out (gradient 0); sums name -> (sum in nats, count) for TERMS, detached, 0 and 0 for a term left out,
    and for RATES: (rows where the argmaxes agree, rows), and with exact alone, in nats, how much likelier than the
    student the target finds the event of the gold id, teacher_lead, and the projected teacher the gold id inside its
    event, t2s_inside, over rows whose event has several ids. With gradients disabled only values are computed.
    Under projectors_alone only ce reaches student_RD and the student's head; t2s_ce still reaches t2s_Dd.
    Values and gradients are both computed in the forward, one block after another, which needs the divisors
    beforehand; the backward only scales them, once per input. No second derivatives.
    Products are taken in the dtype of the weights, or in autocast's where it is on; sums in fp32 or wider.
    engine: what computes the sums of a block, here and in the functions below.
    Source: arXiv 2504.11426, section 3 (v2), with the terms divided outside.
    """
    walk = engine(rows, student_head, teacher_head, objective, divisors_T, block_elements, len(rows))

    def teacher(block: slice) -> TeacherRows | None:
        return walk.read_teacher(block, walk.constant_teacher_head, soft_labels=soft_labels, exact=exact)

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
    engine: Callable[..., Walk] = Walk,
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
    walk = engine(rows, student_head, teacher_head, objective, divisors_T, block_elements, longest, True)

    walk.sweep(len(rows), walk.student_space, sliced=("student_RD", "t2s_Nd"), whole=("weight_VD", "bias_V"))
    if objective.in_teacher_space:
        s2t_M = rows.s2t_M
        if s2t_M is None:
            raise ValueError(
                "rows.s2t_M: expected a bool tensor over the teacher rows with cross-model attention, got None. "
                "Set it where a student row of the same sample exists."
            )

        def teacher(block: slice) -> TeacherRows:
            return walk.read_states(keep_rows(teacher_MD[block].detach(), s2t_M[block]))

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
    engine: Callable[..., Walk] = Walk,
) -> tuple[Tensor, Sums]:
    """Methods sft, kd, overlap_kd, bpm, uld and mined, in blocks like dskd_loss and with its divisors and result.

        loss = (1 - r) ce / div_ce + r (kd / div_kd + c span_kl / div_span);   sft: ce / div_ce
        kd   = compare(z, sg(z_t)) at the first N rows, over the real ids of both heads

    compare: from baselines.py, an EventCompare, a TopSharedCompare or, for rows with places, a PrefixCompare. It and
    teacher_head may be None for sft.
    Gradients reach student_RD and the student's head, nothing of the teacher.
    """
    # A few rows of the teacher's head are read: neither its size nor a copy in the dtype of products matters.
    few = isinstance(compare, TopSharedCompare)
    walk = engine(rows, student_head, None if few else teacher_head, objective, divisors_T, block_elements, len(rows))
    read_head = teacher_head if few else walk.teacher_head

    def teacher(block: slice) -> TeacherRows | None:
        if compare is None or read_head is None:
            return None
        return walk.read_teacher(block, read_head, compare=compare)

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
    walk = Walk(rows, student_head, teacher_head, objective, divisors_T, block_elements, len(rows))
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
        return walk.read_teacher(block, walk.constant_teacher_head)

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
