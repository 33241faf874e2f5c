"""Approximate likelihood matching: how likely each side finds the very text of a segment.

Shape letters as in core/segments.py: B segments, U ids of the teacher.
"""

from __future__ import annotations

from torch import Tensor

from dskd_plugin.core.divergences import binary_kl
from dskd_plugin.core.segments import SegmentCompare, Side, token_values


class LikelihoodCompare(SegmentCompare):
    """KL of two events at each segment, pair or span: that its text is said next, or that it is not.

        binary_kl of p_T^(1 / tau) and p_S^(1 / tau),   p = product of the probabilities of the segment's tokens

    softening: tau > 0, which keeps the likelihood of a long text away from 0. ends_U, least_end: see `SegmentCompare`.
    Returns [B] nats. The gradient reaches all of the student's tokens.
    Source: approximate likelihood matching, arXiv 2503.20083.
    """

    whole_teacher = False
    temperature = 1.0

    def __init__(self, softening: float, ends_U: Tensor | None = None, least_end: float = 0.0) -> None:
        self._softening = softening
        self.ends_U, self.least_end = ends_U, least_end

    def __call__(self, *, student: Side, teacher: Side, paired_B: Tensor) -> Tensor:
        own_B = token_values(student.logits_BV, student.ids_B, reads=self.reads, temperature=self.temperature)
        return binary_kl(student_C=own_B + student.others_B, teacher_C=teacher.others_B, temperature=self._softening)
