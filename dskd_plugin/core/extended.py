"""SimCT: the shared ids and, for each span of text, one more entry that stands for the span as a whole.

Shape letters as in core/segments.py: B segments, V ids of a side; O ids that both vocabularies share.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dskd_plugin.core.divergences import Divergence, log_probs
from dskd_plugin.core.overlap import check_shared
from dskd_plugin.core.segments import SegmentCompare, Side


@dataclass(frozen=True)
class ExtendedCompare(SegmentCompare):
    """dist over the shared ids at a pair, over the shared ids and the span itself at a span.

        z = [z_1(o) for the shared o, (z_1(y_1) + ... + z_n(y_n)) / n],   dist(softmax(z_s / tau), softmax(z_t / tau))

    y: the n tokens that a side has in the span, z_k its logits where it predicts the k-th. At a pair the last entry is
    left out on both sides.
    student_ids_O, teacher_ids_O: the same tokens, overlap.Overlap. Returns [B] nats. The gradient reaches all of the
    student's tokens. ValueError when the ids do not pair up or are none.
    Source: SimCT, arXiv 2605.07711, which has the reverse KL.
    """

    divergence: Divergence
    temperature: float
    student_ids_O: Tensor
    teacher_ids_O: Tensor

    reads = "logits"

    def __post_init__(self) -> None:
        check_shared(self.student_ids_O, self.teacher_ids_O)

    def __call__(self, *, student: Side, teacher: Side, paired_B: Tensor) -> Tensor:
        return self.divergence(
            student_NV=self._log_probs(student, self.student_ids_O, paired_B),
            teacher_NV=self._log_probs(teacher, self.teacher_ids_O, paired_B),
        )

    def _log_probs(self, side: Side, ids_O: Tensor, paired_B: Tensor) -> Tensor:
        """Log-probabilities of the shared ids and of the span, [B, O + 1]."""
        scaled_BV = side.logits_BV if self.temperature == 1.0 else side.logits_BV / self.temperature
        own_B = (scaled_BV.gather(1, side.ids_B[:, None])[:, 0] + side.others_B) / side.sizes_B
        own_B = own_B.masked_fill(paired_B, -torch.inf)
        return log_probs(torch.cat([scaled_BV.index_select(1, ids_O), own_B[:, None]], dim=1), temperature=1.0)
