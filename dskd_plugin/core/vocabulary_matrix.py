"""X-Token: the student's distribution said in the teacher's vocabulary, by a sparse matrix between the ids.

Shape letters: N rows, V ids of the student, U ids of the teacher, E entries of the matrix, M ids of the teacher that
have an entry, K of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from dskd_plugin.core.divergences import Divergence, log_probs
from dskd_plugin.core.events import masses

MOST_PIECES = 4
_FALL = 0.1  # weight of a piece relative to the one before it


@dataclass(frozen=True)
class VocabularyMatrix:
    """W [V, U] by its entries: student_E, teacher_E int64, weights_E > 0; those of a student's id sum to 1.

    Source: X-Token, arXiv 2605.21699.
    """

    student_E: Tensor
    teacher_E: Tensor
    weights_E: Tensor

    def to(self, device: torch.device) -> Self:
        return type(self)(self.student_E.to(device), self.teacher_E.to(device), self.weights_E.to(device))

    def best_pairs(self, least: float) -> tuple[Tensor, Tensor]:
        """One-to-one pairs (student, teacher) of each id's largest entry where that is at least `least`.

        Of several ids with one partner that of the largest entry has it, then the lowest id.
        """
        best: dict[int, tuple[float, int]] = {}
        entries = zip(self.student_E.tolist(), self.teacher_E.tolist(), self.weights_E.tolist(), strict=True)
        for own, theirs, weight in entries:
            if weight > best.get(own, (0.0, -1))[0]:
                best[own] = weight, theirs
        taken: dict[int, tuple[float, int]] = {}
        for own, (weight, theirs) in sorted(best.items()):
            if weight >= least and weight > taken.get(theirs, (0.0, -1))[0]:
                taken[theirs] = weight, own
        pairs = sorted((own, theirs) for theirs, (_, own) in taken.items())
        device = self.student_E.device
        pairs_O2 = torch.tensor(pairs, dtype=torch.long, device=device).view(-1, 2)
        return pairs_O2[:, 0].contiguous(), pairs_O2[:, 1].contiguous()


def vocabulary_matrix(shared: Mapping[int, int], pieces: Mapping[int, Sequence[int]]) -> VocabularyMatrix:
    """W from the ids that mean the same and the pieces of all others.

    shared: student id -> teacher id, weight 1. pieces: student id -> the teacher's ids that spell it, of which the
    first four count, each a tenth of the one before it; not read for a shared id.
    """
    entries: list[tuple[int, int, float]] = [(own, theirs, 1.0) for own, theirs in shared.items()]
    for own, spelled in pieces.items():
        if own not in shared and spelled:
            weights = [_FALL**k for k in range(len(spelled[:MOST_PIECES]))]
            entries += [(own, theirs, weight / sum(weights)) for theirs, weight in zip(spelled, weights, strict=False)]
    entries.sort()
    return VocabularyMatrix(
        torch.tensor([own for own, _, _ in entries], dtype=torch.long),
        torch.tensor([theirs for _, theirs, _ in entries], dtype=torch.long),
        torch.tensor([weight for _, _, weight in entries], dtype=torch.float64),
    )


class MatrixCompare:
    """dist of both sides in the teacher's vocabulary, on the K ids that the teacher finds likeliest.

        dist((q W)[S] / sum of (q W)[S], softmax(z_t[S] / tau)),   q = softmax(z_s / tau)

    S: of the ids that W reaches the K with the largest z_t; the student cannot say the others. size: K >= 1, all where
    there are fewer. Returns [N] nats; the gradient reaches the student's logits.
    ValueError for a matrix without an entry.
    Source: P-KL of X-Token, arXiv 2605.21699.
    """

    def __init__(self, divergence: Divergence, temperature: float, matrix: VocabularyMatrix, size: int) -> None:
        if not len(matrix.student_E):
            raise ValueError("matrix: expected at least one entry, got none. Give pairs or pieces.")
        self._divergence, self._temperature, self._size = divergence, temperature, size
        self._student_E, self._log_E = matrix.student_E, matrix.weights_E.log()
        self._reached_M, self._of_E = torch.unique(matrix.teacher_E, return_inverse=True)

    def __call__(self, *, student_NV: Tensor, teacher_NV: Tensor) -> Tensor:
        own_NV = log_probs(student_NV, temperature=self._temperature)
        said_NE = own_NV.index_select(1, self._student_E) + self._log_E.to(own_NV.dtype)
        own_NM = masses(said_NE, self._of_E, len(self._reached_M))
        their_NM = teacher_NV.detach().index_select(1, self._reached_M)
        if self._size < their_NM.shape[1]:
            likeliest_NK = their_NM.topk(self._size, dim=1, sorted=False).indices
            own_NM, their_NM = own_NM.gather(1, likeliest_NK), their_NM.gather(1, likeliest_NK)
        return self._divergence(
            student_NV=log_probs(own_NM, temperature=1.0),
            teacher_NV=log_probs(their_NM, temperature=self._temperature),
        )
