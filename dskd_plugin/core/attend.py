"""Cross-model attention (CMA): each row of one model sees all rows of the other model in the same sample.

Shape letters: N student rows, M teacher rows, n and m those of one sample, d and D widths of student and teacher.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dskd_plugin.core.projectors import linear_map
from dskd_plugin.core.row_blocks import no_autocast, wide


@dataclass(frozen=True)
class Attention:
    """Who attends to whom, before the softmax; sample after sample.

    scores: [n, m] for each sample with rows on both sides, fp32 or wider.
    student_order, teacher_order: the rows of these samples, in the order of scores.
    student_rows, teacher_rows: N and M.
    """

    scores: tuple[Tensor, ...]
    student_order: Tensor
    teacher_order: Tensor
    student_rows: int
    teacher_rows: int


def partnered(sample_N: Tensor, sample_M: Tensor) -> Tensor:
    """Rows of N whose sample has rows of M; a negative number is no sample. Returns [N] bool."""
    return torch.isin(sample_N, sample_M) & (sample_N >= 0)


class CrossModelAttention(nn.Module):
    """The three learned maps of cross-model attention, without biases.

        A = P_q([e(x); e(y)]_student) N([e(x); e(y)]_teacher)^T / sqrt(2 D)            per sample, [n, m]
        t2s rows = softmax over teacher rows of A   (P_t2s(N(H) + N(e(argmax))))       [n, d]
        s2t rows = softmax over student rows of A^T (P_s2t(h))                         [m, D]

    x the input token at a row, y its target, e the input embeddings of its own model (constants), H the teacher's
    states, argmax its most likely token. N(x) = x / std of all entries of the sample's rows, population value, x
    itself where that is 0. A row whose sample has no row on the other side (partnered) gets zeros.
    Products in the dtype of the maps, whatever autocast says; softmax in fp32 or wider.
    Gradients: the t2s rows reach query and t2s, the s2t rows reach query, s2t and the student's states h. All three
    maps get a gradient from either, 0 where they took no part. Embeddings and the teacher get none.
    Memory: n x m per sample, never N x M of the batch.
    Source: arXiv 2406.17328, section 3.3; the value of the t2s rows as in arXiv 2504.11426, which takes the
    teacher's prediction where v1 takes the gold next token and so shows it the label.
    """

    def __init__(self, query: nn.Linear, t2s: nn.Linear, s2t: nn.Linear) -> None:
        super().__init__()
        self.query = query
        self.t2s = t2s
        self.s2t = s2t

    def attention(
        self,
        student_pair_embeddings_N2d: Tensor,
        teacher_pair_embeddings_M2D: Tensor,
        sample_N: Tensor,
        sample_M: Tensor,
    ) -> Attention:
        """Scores of all samples, to be shared by t2s_rows and s2t_rows.

        *_pair_embeddings: [e(x); e(y)] of each row. sample_N, sample_M: number of its sample, negative for none.
        """
        dtype = self.query.weight.dtype
        student_order, student_sizes = _by_sample(sample_N, partnered(sample_N, sample_M))
        teacher_order, teacher_sizes = _by_sample(sample_M, partnered(sample_M, sample_N))
        with no_autocast(sample_N.device):
            queries = self.query(student_pair_embeddings_N2d.detach()[student_order].to(dtype))
            keys = teacher_pair_embeddings_M2D.detach()[teacher_order]
            scale = math.sqrt(self.query.weight.shape[0])
            scores = tuple(
                _wide(query_nE @ _normalised(key_mE).to(dtype).T) / scale
                for query_nE, key_mE in zip(
                    torch.split(queries, student_sizes), torch.split(keys, teacher_sizes), strict=True
                )
            )
        return Attention(scores, student_order, teacher_order, len(sample_N), len(sample_M))

    def t2s_rows(self, attention: Attention, teacher_MD: Tensor, teacher_argmax_embeddings_MD: Tensor) -> Tensor:
        """The teacher's rows in the student's space, mixed by attention. Returns [N, d] in the dtype of the maps."""
        sizes = [scores_nm.shape[1] for scores_nm in attention.scores]
        states = torch.split(teacher_MD.detach()[attention.teacher_order], sizes)
        embeddings = torch.split(teacher_argmax_embeddings_MD.detach()[attention.teacher_order], sizes)
        with no_autocast(teacher_MD.device):
            mixed = [
                torch.softmax(scores_nm, dim=1).to(self.t2s.weight.dtype)
                @ self.t2s((_normalised(state_mD) + _normalised(embedding_mD)).to(self.t2s.weight.dtype))
                for scores_nm, state_mD, embedding_mD in zip(attention.scores, states, embeddings, strict=True)
            ]
        return self._placed(mixed, attention.student_order, attention.student_rows, self.t2s)

    def s2t_rows(self, attention: Attention, student_Nd: Tensor) -> Tensor:
        """The student's rows in the teacher's space, mixed by attention. Returns [M, D] in the dtype of the maps.

        student_Nd: the student's last hidden states at its N rows; detach them to train the projectors alone.
        """
        sizes = [scores_nm.shape[0] for scores_nm in attention.scores]
        states = torch.split(student_Nd[attention.student_order], sizes)
        with no_autocast(student_Nd.device):
            mixed = [
                torch.softmax(scores_nm, dim=0).T.to(self.s2t.weight.dtype)
                @ self.s2t(state_nd.to(self.s2t.weight.dtype))
                for scores_nm, state_nd in zip(attention.scores, states, strict=True)
            ]
        return self._placed(mixed, attention.teacher_order, attention.teacher_rows, self.s2t)

    def _placed(self, mixed: Sequence[Tensor], order: Tensor, rows: int, linear: nn.Linear) -> Tensor:
        """The rows at their places, zeros elsewhere; attached to all three maps whatever took part."""
        placed = linear.weight.new_zeros(rows, linear.weight.shape[0])
        if mixed:
            placed = placed.index_copy(0, order, torch.cat(list(mixed)))
        return placed + sum(part.weight[:0].sum() for part in (self.query, self.t2s, self.s2t))


def cross_model_attention(
    student_width: int,
    teacher_width: int,
    *,
    t2s_weight_Dd: Tensor | None = None,
    s2t_weight_dD: Tensor | None = None,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float32,
) -> CrossModelAttention:
    """The maps query [2d, 2D], t2s [D, d] and s2t [d, D].

    Weights in the orientation h W; None draws uniform noise in +-1 / sqrt(input width) from the generator, in the
    order query, t2s, s2t. ValueError for a weight of another shape.
    """
    query = linear_map(2 * student_width, 2 * teacher_width, generator=generator, dtype=dtype)
    t2s = linear_map(teacher_width, student_width, t2s_weight_Dd, generator=generator, dtype=dtype)
    s2t = linear_map(student_width, teacher_width, s2t_weight_dD, generator=generator, dtype=dtype)
    return CrossModelAttention(query, t2s, s2t)


def _by_sample(sample_N: Tensor, kept_N: Tensor) -> tuple[Tensor, list[int]]:
    """The kept rows in rising order of their sample, and how many each sample has."""
    order = sample_N.argsort(stable=True)
    order = order[kept_N[order]]
    sizes_S = torch.bincount(sample_N[order])
    return order, sizes_S[sizes_S > 0].tolist()


def _wide(x: Tensor) -> Tensor:
    return x.to(wide(x))


def _normalised(rows_mD: Tensor) -> Tensor:
    """x / std(x) over all entries, in fp32 or wider; x where all entries are equal."""
    wide_mD = _wide(rows_mD)
    std = wide_mD.std(correction=0)
    return wide_mD / torch.where(std > 0, std, 1)
