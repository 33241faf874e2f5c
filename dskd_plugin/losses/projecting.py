"""What the losses with projectors share: least-squares maps between the two spaces from the two output heads.

Shapes: d student width, D teacher width, V ids.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from dskd_plugin.core.heads import Head
from dskd_plugin.core.objective import Objective
from dskd_plugin.core.overlap import Overlap
from dskd_plugin.core.projectors import head_map
from dskd_plugin.losses.base import DistillationLoss
from dskd_plugin.models import gathered


class Projecting(DistillationLoss):
    """What the two alignments of dskd share: maps between the spaces from the two heads.

    top_vocab: solve for the k shared tokens of lowest student id alone. Ids of BPE follow the order of its merges and
        those of SentencePiece falling frequency, so these are the k most frequent ones.
    """

    teacher_head: Head

    def __init__(
        self,
        student: nn.Module,
        objective: Objective,
        *,
        overlap: Overlap,
        top_vocab: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(student, objective, **options)
        device = self.teacher_head.weight_VD.device
        self._ids = overlap.student_ids_O[:top_vocab].to(device), overlap.teacher_ids_O[:top_vocab].to(device)

    @staticmethod
    def _effective(head: Head) -> Tensor:
        """Rows that map a hidden state to logits, logit scale included."""
        return head.weight_VD if head.scale == 1.0 else head.weight_VD * head.scale

    @torch.no_grad()
    def _ideal_t2s(self, init: str) -> Tensor | None:
        """Least-squares map [D, d] of the teacher's states into the student's space; None for a random start."""
        parameters = list(self.student_and_head[1].parameters())
        if init == "random" or parameters[0].device.type == "meta":
            return None
        student_ids, teacher_ids = self._ids
        with gathered(parameters):
            student = self._effective(self.student_head())
            device = self.teacher_head.weight_VD.device
            return head_map(self._effective(self.teacher_head), student.to(device), teacher_ids, student_ids)

    @torch.no_grad()
    def _ideal_s2t(self, student_head: Head, teacher_gram_inverse: Tensor) -> Tensor:
        """Least-squares map [d, D] of the student's states into the teacher's space."""
        student_ids, teacher_ids = self._ids
        with _full_fp32():
            return head_map(
                self._effective(student_head),
                self._effective(self.teacher_head),
                student_ids,
                teacher_ids,
                target_gram_inverse=teacher_gram_inverse,
                dtype=torch.float32,
            )


@contextlib.contextmanager
def _full_fp32() -> Iterator[None]:
    """No TF32 in the products of a least-squares map: its error grows with the square of a condition number."""
    matmul = torch.backends.cuda.matmul
    # torch 2.9 renamed the switch and refuses to read the old name once the new one was used.
    name, full = ("fp32_precision", "ieee") if hasattr(matmul, "fp32_precision") else ("allow_tf32", False)
    kept = getattr(matmul, name)
    setattr(matmul, name, full)
    try:
        yield
    finally:
        setattr(matmul, name, kept)
