"""Distillation on the few shared ids that the student finds likeliest at a row.

Shape letters: N rows, V ids of the student, U ids of the teacher, O ids that both vocabularies share, K of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dskd_plugin.core.divergences import Divergence, log_probs


@dataclass(frozen=True)
class TopSharedCompare:
    """dist of the two distributions given that the id is one of the K shared ids that the student ranks highest.

        S = the K ids of O with the largest z_s,   dist(softmax(z_s[S] / tau), softmax(z_t[S] / tau))

    size: K >= 2, on one id alone both sides are certain; all of O where there are fewer. student_ids_O, teacher_ids_O:
    the same tokens, overlap.Overlap. S is chosen anew at each row and step and has no gradient; of equal logits any
    may be taken. Ids outside S get no gradient.
    Called with whole logits it gives [N] nats; `ids` and `of_logits` give the same where the teacher's logits of S
    alone are made. ValueError when the ids do not pair up or are fewer than two.
    Source: strict top-k, arXiv 2610.08448.
    """

    divergence: Divergence
    temperature: float
    size: int
    student_ids_O: Tensor
    teacher_ids_O: Tensor

    def __post_init__(self) -> None:
        if self.student_ids_O.shape != self.teacher_ids_O.shape or len(self.student_ids_O) < 2:
            raise ValueError(
                f"shared ids: expected as many shared ids of the student as of the teacher and at least two, "
                f"got {len(self.student_ids_O)} and {len(self.teacher_ids_O)}. Compare by rank what shares no tokens."
            )
        if self.size < 2:
            raise ValueError(f"size: expected at least 2, got {self.size}. On one id both sides are certain.")

    def __call__(self, *, student_NV: Tensor, teacher_NV: Tensor) -> Tensor:
        student_ids_NK, teacher_ids_NK = self.ids(student_NV)
        return self.of_logits(
            student_NK=student_NV.gather(1, student_ids_NK), teacher_NK=teacher_NV.gather(1, teacher_ids_NK)
        )

    @torch.no_grad()
    def ids(self, student_NV: Tensor) -> tuple[Tensor, Tensor]:
        """S of each row by the student's logits: ids of the student and of the teacher, [N, K] each."""
        shared_NO = student_NV.detach().index_select(1, self.student_ids_O)
        places_NK = shared_NO.topk(min(self.size, shared_NO.shape[1]), dim=1, sorted=False).indices
        return self.student_ids_O[places_NK], self.teacher_ids_O[places_NK]

    def of_logits(self, *, student_NK: Tensor, teacher_NK: Tensor) -> Tensor:
        """The distance from the logits of S. The gradient reaches the student's alone."""
        return self.divergence(
            student_NV=log_probs(student_NK, temperature=self.temperature),
            teacher_NV=log_probs(teacher_NK.detach(), temperature=self.temperature),
        )
