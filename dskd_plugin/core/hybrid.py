"""GOLD: ids that two vocabularies share compared id by id, all others by rank.

Shape letters as in core/segments.py: B segments, V ids of a side; O shared ids, W the others of a side.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dskd_plugin.core.divergences import js, log_probs
from dskd_plugin.core.segments import SegmentCompare, Side


class HybridCompare(SegmentCompare):
    """Jensen-Shannon divergence on matched ids plus L1 distance of the sorted probabilities of all others.

        a JS(p[O], q[O]) + b sum over k of |p_(k) - q_(k)|,   q(v) = q_1(v) q_2(y_2) ... q_n(y_n)

    q_1: the distribution at the segment's first token; y: the tokens that stand there, so that probabilities of a span
    are those of the whole span. Nothing is renormalised; the shorter side is padded with probability 0.
    teacher_share: beta in (0, 1), the teacher's weight in the mixture. weights: (a, b), >= 0. student_ids_O,
    teacher_ids_O: ids that mean the same. student_ids, teacher_ids: how many real ids there are.
    Returns [B], in part nats, in part a sum of probabilities. The gradient reaches all of the student's tokens.
    ValueError when the ids do not pair up.
    Source: GOLD, in TRL (trl.experimental.gold): groups merged as observed, hybrid loss.
    """

    def __init__(
        self,
        teacher_share: float,
        temperature: float,
        weights: tuple[float, float],
        student_ids_O: Tensor,
        teacher_ids_O: Tensor,
        *,
        student_ids: int,
        teacher_ids: int,
    ) -> None:
        if student_ids_O.shape != teacher_ids_O.shape:
            raise ValueError(
                f"matched ids: expected as many of the student as of the teacher, got {len(student_ids_O)} and "
                f"{len(teacher_ids_O)}. Give pairs."
            )
        self.temperature = temperature
        self._teacher_share, self._weights = teacher_share, weights
        self._matched = student_ids_O, teacher_ids_O
        self._others = _beyond(student_ids_O, student_ids), _beyond(teacher_ids_O, teacher_ids)

    def __call__(self, *, student: Side, teacher: Side, paired_B: Tensor) -> Tensor:
        own_BV, their_BV = (
            log_probs(side.logits_BV, temperature=self.temperature) + side.others_B[:, None]
            for side in (student, teacher)
        )
        matched, others = self._weights
        own_ids_O, their_ids_O = self._matched
        of_matched_B = js(
            student_NV=own_BV.index_select(1, own_ids_O),
            teacher_NV=their_BV.index_select(1, their_ids_O),
            teacher_share=self._teacher_share,
        )
        own_BW, their_BW = (
            log_BV.index_select(1, ids_W).exp() for log_BV, ids_W in zip((own_BV, their_BV), self._others, strict=True)
        )
        return matched * of_matched_B + others * _apart_by_rank(own_BW, their_BW)


def _apart_by_rank(own_BW: Tensor, their_BW: Tensor) -> Tensor:
    """L1 distance of two rows of numbers, each sorted from the largest, the shorter padded with 0. Returns [B]."""
    both = min(own_BW.shape[1], their_BW.shape[1])
    own_BK, their_BK = (x_BW.topk(both, dim=1).values for x_BW in (own_BW, their_BW))
    # What the longer side has beyond the other meets zeros, so that its sum is enough and it need not be sorted.
    beyond_B = own_BW.sum(1) - own_BK.sum(1) + their_BW.sum(1) - their_BK.sum(1)
    return (own_BK - their_BK).abs().sum(1) + beyond_B


def _beyond(ids_O: Tensor, number: int) -> Tensor:
    """The ids from 0 to number - 1 that are none of these."""
    beyond_V = torch.ones(number, dtype=torch.bool, device=ids_O.device)
    beyond_V[ids_O] = False
    return beyond_V.nonzero()[:, 0]
