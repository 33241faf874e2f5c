"""Segments: stretches of one text that both sides begin and end together, in one token each or in several.

What methods that compare more than token with token are made of: a method says which token of a segment is *open*,
the one whose whole distribution it compares, and what it reads of the others; the engine brings both to it.
Shape letters: R response rows, N pairs, C spans, G = N + C segments, the pairs first; B of them in a block, P and Q
the tokens of all spans on the student's and the teacher's side, V ids of a side.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

Reading = Literal["log_probs", "logits"]


@dataclass(frozen=True, kw_only=True)
class Side:
    """One model at the segments of a block.

    logits_BV: of its real ids at the open token; no column of a teacher of which likelihoods alone are read.
    ids_B: the open token. others_B: what is read of the other tokens, added up; 0 where there are none. sizes_B: tokens
    of the segment, the open one included.
    """

    logits_BV: Tensor
    ids_B: Tensor
    others_B: Tensor
    sizes_B: Tensor

    def at(self, segments: Tensor) -> Side:
        """Some of the segments. segments: their numbers in the block."""
        return Side(
            logits_BV=self.logits_BV[segments],
            ids_B=self.ids_B[segments],
            others_B=self.others_B[segments],
            sizes_B=self.sizes_B[segments],
        )


class SegmentCompare:
    """A distance of two models at the segments of a text; a method is a subclass with its formula.

    opens: which token of a segment is the open one. reads: what is read of each other token, see `token_values`.
    whole_teacher: whether the teacher's distribution at the open token is compared; else its likelihood alone, and
    `Side.others_B` of the teacher has all tokens in it.
    ends_U, least_end: bool over the teacher's ids. A segment counts only where the teacher gives these ids together at
    least this probability right after it; also where it is not known what it says there. None: every segment counts.
    temperature: of the token values; > 0.
    """

    opens: ClassVar[Literal["first", "last"]] = "first"
    reads: ClassVar[Reading] = "log_probs"
    whole_teacher: ClassVar[bool] = True
    temperature: float
    ends_U: Tensor | None = None
    least_end: float = 0.0

    def __call__(self, *, student: Side, teacher: Side, paired_B: Tensor) -> Tensor:
        """The distance of each segment, [B]. paired_B: bool, one token of each side with one meaning.

        The gradient reaches student.logits_BV and student.others_B.
        """
        raise NotImplementedError


def token_values(logits_NV: Tensor, ids_N: Tensor, *, reads: Reading, temperature: float) -> Tensor:
    """What is read of one token at each row: its logit, or its log-probability, at the temperature. Returns [N]."""
    scaled_NV = logits_NV if temperature == 1.0 else logits_NV / temperature
    chosen_N = scaled_NV.gather(1, ids_N[:, None])[:, 0]
    return chosen_N if reads == "logits" else chosen_N - scaled_NV.logsumexp(1)


@dataclass(frozen=True, kw_only=True)
class Segments:
    """What segments have beside the rows of their open tokens, which are the first G response rows.

    order_R: where each response row stood before the open ones were put first. paired_G: bool, of `SegmentCompare`.
    others_P, of_P: response rows of the student's other tokens, and the segment of each. sizes_G: its tokens.
    teacher_ids_G: the teacher's open token. teacher_others_G, teacher_sizes_G: see `Side`.
    """

    order_R: Tensor
    paired_G: Tensor
    others_P: Tensor
    of_P: Tensor
    sizes_G: Tensor
    teacher_ids_G: Tensor
    teacher_others_G: Tensor
    teacher_sizes_G: Tensor

    def bound(self, compare: SegmentCompare, block: slice, ids_B: Tensor, others_B: Tensor) -> Callable[..., Tensor]:
        """The distance at the segments of a block as a function of logits alone, see `objective.Compare`.

        ids_B, others_B: of the student.
        """

        def at_block(*, student_NV: Tensor, teacher_NV: Tensor) -> Tensor:
            own = Side(logits_BV=student_NV, ids_B=ids_B, others_B=others_B, sizes_B=self.sizes_G[block])
            theirs = Side(
                logits_BV=teacher_NV.detach(),
                ids_B=self.teacher_ids_G[block],
                others_B=self.teacher_others_G[block].to(student_NV.dtype),
                sizes_B=self.teacher_sizes_G[block],
            )
            return compare(student=own, teacher=theirs, paired_B=self.paired_G[block])

        return at_block


@dataclass(frozen=True, kw_only=True)
class Cut:
    """Segments of one side. open_G: rows of their open tokens; others_P, of_P: rows of all others, and the segment of
    each; sizes_G: tokens of each segment.
    """

    open_G: Tensor
    others_P: Tensor
    of_P: Tensor
    sizes_G: Tensor


def cut(rows_P: Tensor, of_P: Tensor, segments: int, opens: Literal["first", "last"]) -> Cut:
    """Segments from their tokens in order.

    rows_P: the row of each token. of_P: its segment, rising from 0 to segments - 1, each at least once.
    """
    sizes_G = torch.bincount(of_P, minlength=segments)
    stops_G = sizes_G.cumsum(0)
    open_G = stops_G - 1 if opens == "last" else stops_G - sizes_G
    is_other_P = torch.ones_like(of_P, dtype=torch.bool)
    is_other_P[open_G] = False
    return Cut(open_G=rows_P[open_G], others_P=rows_P[is_other_P], of_P=of_P[is_other_P], sizes_G=sizes_G)


def followed_by(positions_Q: Tensor, of_Q: Tensor, segments: int) -> Tensor:
    """The number of the token that stands right after each segment, -1 where it is none of those given. Returns [G].

    positions_Q: where each token of the segments stands in one text, all different; of_Q: its segment, rising.
    """
    last_G = positions_Q[torch.bincount(of_Q, minlength=segments).cumsum(0) - 1]
    number_at = positions_Q.new_full((int(positions_Q.max()) + 2 if len(positions_Q) else 1,), -1)
    number_at[positions_Q] = torch.arange(len(positions_Q), device=positions_Q.device)
    return number_at[last_G + 1]


def put_first(rows_G: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """An order of rows 0 to rows - 1 in which some come first. rows_G: these, each once.

    Returns order_R, the old number of each place, and place_R, the new place of each old number.
    """
    rest_R = torch.ones(rows, dtype=torch.bool, device=rows_G.device)
    rest_R[rows_G] = False
    order_R = torch.cat([rows_G, rest_R.nonzero()[:, 0]])
    place_R = torch.empty_like(order_R)
    place_R[order_R] = torch.arange(rows, device=rows_G.device)
    return order_R, place_R


@dataclass(frozen=True)
class Others:
    """The gradient of segments by what was read of their other tokens, on its way to these tokens' rows.

    pull_R: derivative by the value of each row, 0 for a row that is no other token. compare: says what was read.
    """

    pull_R: Tensor
    compare: SegmentCompare

    def pulled(self, logits_RV: Tensor, ids_R: Tensor) -> tuple[Tensor, Tensor]:
        """A sum of value 0 over no segment, whose gradient by the logits is that of the segments."""
        compare = self.compare
        values_R = token_values(logits_RV, ids_R, reads=compare.reads, temperature=compare.temperature)
        pulled_R = self.pull_R.to(values_R.dtype) * (values_R - values_R.detach())
        return pulled_R.sum(), torch.zeros_like(values_R[:0].sum())
