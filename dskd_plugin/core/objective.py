"""The objective on the rows of one micro-batch: named terms, each a (sum, count) pair.

    L = (1 - r) ce + r (t2s_kd + t2s_ce + s2t_kd + c span_kl)      method dskd
    L = (1 - r) ce + r (kd + c span_kl)                            kd, overlap_kd, bpm, uld, mined
    L = (1 - r) ce + r kd                                          methods that compare segments
    L = ce                                                             sft

With unpaired_ce each of the first three gains r ce_unpaired. With a kd_scale the terms that move the student, all of
the KD terms but t2s_ce, are multiplied with it.

Shape letters: R response rows, N rows of them with a teacher partner, M teacher rows (cross-model attention), V ids
of a head, D and E width of student and teacher, P response rows within spans, C spans; in the maps between the
spaces d is the student's width and D the teacher's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor

from dskd_plugin.core.divergences import Divergence

TERMS = ("ce", "t2s_kd", "t2s_ce", "s2t_kd", "kd", "span_kl", "ce_unpaired")


CE_TERMS = ("ce", "ce_unpaired")


RATES = ("t2s_agreement", "s2t_agreement", "t2s_inside", "teacher_lead")


Compares = Literal["nothing", "distributions", "spaces"]


Sums = dict[str, tuple[Tensor, Tensor]]


class Compare(Protocol):
    """A distance of two sides that need not share a vocabulary: logits of the real ids -> [N]."""

    def __call__(self, *, student_NV: Tensor, teacher_NV: Tensor) -> Tensor: ...


@dataclass(frozen=True, kw_only=True)
class Objective:
    """What to compute.

    divergence: see divergences.divergence. temperature: > 0, of the KD distributions only.
    kd_ratio: r in [0, 1]. spaces: which of the two comparisons to make where spaces are compared.
    agreement_mask: t2s_kd only where the projected teacher predicts the label.
    compares: what the KD terms compare. nothing: there are none; distributions: the two of a pair, term kd; spaces:
        both sides in a space of one of them, terms t2s_kd, t2s_ce, s2t_kd.
    span_weight: c >= 0, the weight of the span term beside the other KD terms.
    span_temperature: > 0, divides the log-likelihood of a span (divergences.binary_kl).
    unpaired_ce: rows that no KD term of pairs takes, and those of `Rows.open_N`, keep their whole cross-entropy: term
        ce_unpaired, the sum of ce over these rows, of weight r and with the divisor of ce.
    kd_scale: >= 0, multiplies the KD terms that move the student, `scaled`; see balance.Balance.
    teacher_weight, adds_ce: of one of several teachers, whose losses are added up:

            loss = (1 - r) ce + r sum_i w_i (KD_i + ce_unpaired_i),   sum of w = 1

        w_i in (0, 1] multiplies all terms of teacher i but ce; the loss of one teacher alone adds ce. A row that some
        teacher does not pair has the share w_i of it in its whole cross-entropy.
    projectors_alone: projector warm-up. The terms whose gradient reaches the student (t2s_kd, s2t_kd,
        span_kl) are computed but weigh nothing, ce and t2s_ce stay as they are. Where the map of s2t_kd is
        learned (cma_loss), that term stays too and the caller detaches the student's states from it.
    gold_alone: the KD terms whose gradient reaches the student are computed but weigh nothing, and every row keeps its
        whole cross-entropy; t2s_ce stays. Only with unpaired_ce.
    Terms of weight 0 are left out: no ce at r = 1 (unless unpaired_ce, which measures it), nothing else at r = 0; they
    count 0 rows.
    """

    divergence: Divergence
    temperature: float
    kd_ratio: float
    spaces: Literal["both", "student", "teacher"]
    agreement_mask: bool
    compares: Compares
    span_weight: float = 0.0
    span_temperature: float = 100.0
    projectors_alone: bool = False
    gold_alone: bool = False
    unpaired_ce: bool = False
    kd_scale: float = 1.0
    teacher_weight: float = 1.0
    adds_ce: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.kd_ratio <= 1:
            raise ValueError(f"kd_ratio: expected a number from 0 to 1, got {self.kd_ratio}. Try 0.5.")
        if self.spaces not in ("both", "student", "teacher"):
            raise ValueError(
                f"spaces: expected 'both', 'student' or 'teacher', got {self.spaces!r}. Choose one of these."
            )
        if self.compares not in get_args(Compares):
            raise ValueError(
                f"compares: expected one of {', '.join(get_args(Compares))}, got {self.compares!r}. "
                "Choose one of these."
            )
        if not 0 <= self.span_weight < float("inf") or (self.span_weight and self.compares == "nothing"):
            raise ValueError(
                "span_weight: expected a finite number from 0, and 0 where nothing is compared, got "
                f"{self.span_weight}. Use 0 for no span term."
            )
        if not 0 < self.span_temperature < float("inf"):
            raise ValueError(
                f"span_temperature: expected a finite number above 0, got {self.span_temperature}. Try 100."
            )
        if not 0 <= self.kd_scale < float("inf"):
            raise ValueError(f"kd_scale: expected a finite number from 0, got {self.kd_scale}. Use 1 for none.")
        if not 0 < self.teacher_weight <= 1:
            raise ValueError(
                f"teacher_weight: expected a number above 0, at most 1, got {self.teacher_weight}. "
                "Use 1 for one teacher."
            )
        if not self.adds_ce and self.compares == "nothing":
            raise ValueError(
                "adds_ce: expected True where nothing is compared, got compares 'nothing', which has no other term. "
                "Leave it out."
            )
        if self.unpaired_ce and self.compares == "nothing":
            raise ValueError(
                "unpaired_ce: expected it only where something is compared, got compares 'nothing', under which each "
                "row has its whole cross-entropy. Leave it out."
            )
        if self.gold_alone and not self.unpaired_ce:
            raise ValueError("gold_alone: expected it only with unpaired_ce, got it without. Set unpaired_ce.")
        if self.projectors_alone and self.compares != "spaces":
            raise ValueError(
                f"projectors_alone: expected it only where spaces are compared, got {self.compares!r}, which has no "
                "projector. Leave it out."
            )

    @property
    def with_ce(self) -> bool:
        """Whether it is computed: also for ce_unpaired, a part of it."""
        return self.compares == "nothing" or (self.adds_ce and self.kd_ratio < 1) or self.unpaired_ce

    @property
    def with_kd(self) -> bool:
        return self.compares != "nothing" and self.kd_ratio > 0

    @property
    def in_student_space(self) -> bool:
        return self.compares == "spaces" and self.with_kd and self.spaces != "teacher"

    @property
    def in_teacher_space(self) -> bool:
        return self.compares == "spaces" and self.with_kd and self.spaces != "student"

    @property
    def terms(self) -> tuple[str, ...]:
        """Names of the terms that it computes, in the order of TERMS."""
        computed = {
            "ce": self.with_ce,
            "t2s_kd": self.in_student_space,
            "t2s_ce": self.in_student_space,
            "s2t_kd": self.in_teacher_space,
            "kd": self.with_kd and self.compares == "distributions",
            "span_kl": self.with_kd and self.span_weight > 0,
            "ce_unpaired": self.with_kd and self.unpaired_ce,
        }
        return tuple(term for term in TERMS if computed[term])

    @property
    def scaled(self) -> tuple[str, ...]:
        """The KD terms that move the student; t2s_ce moves the projector alone."""
        return tuple(term for term in self.terms if term not in (*CE_TERMS, "t2s_ce"))

    def shares(self, *, s2t_is_learned: bool = False) -> dict[str, float]:
        """Weight of the mean of each term in the loss; a term without an entry adds nothing, nor any gradient.

        s2t_is_learned: s2t_kd also trains a projector, so that projectors_alone keeps it.
        """
        silent: set[str] = set()
        if self.projectors_alone:
            silent = {"t2s_kd", "span_kl"} if s2t_is_learned else {"t2s_kd", "span_kl", "s2t_kd"}
        if self.gold_alone:
            silent = set(self.scaled)
        special = {
            "ce": 1.0 if self.compares == "nothing" else 1 - self.kd_ratio,
            "span_kl": self.kd_ratio * self.span_weight,
        }
        shares = {term: special.get(term, self.kd_ratio) for term in self.terms if term not in silent}
        if not self.adds_ce:
            shares.pop("ce", None)
        scaled = {term: share * (self.kd_scale if term in self.scaled else 1) for term, share in shares.items()}
        weighted = {term: share * (1 if term == "ce" else self.teacher_weight) for term, share in scaled.items()}
        return {term: share for term, share in weighted.items() if share > 0}


def numbers_beside(like: Tensor, values: Sequence[float]) -> Tensor:
    """Numbers as fp64 on the device of ``like``; `Tensor.new_tensor` would wait for all that a GPU still has to do."""
    return torch.tensor(values, dtype=torch.double).to(like.device, non_blocking=True)


def term_weights(divisors_T: Tensor, shares: dict[str, float]) -> Tensor:
    """Factor of each sum in the loss, in the order of TERMS: its share (Objective.shares) / its divisor.

    divisors_T: rows per term over the whole optimizer step, >= 0; a divisor of 0 gives weight 0.
    Returns [T] fp64.
    """
    divisors_T = divisors_T.double()
    shares_T = numbers_beside(divisors_T, [shares.get(term, 0.0) for term in TERMS])
    return torch.where(divisors_T > 0, shares_T / divisors_T.clamp(min=1e-30), 0)


def means_of_step(sums_T2: Tensor, objective: Objective) -> tuple[float, float] | None:
    """Mean cross-entropy and mean KD of an optimizer step: what `balance.Balance` weighs.

        KD = the sum of the means of the terms that move the student (Objective.scaled), span_kl times c

    sums_T2: sum and number of rows of each term in the order of TERMS, over micro-batches and ranks.
    None for a step without rows of either.
    """
    found = {term: (total, rows) for term, (total, rows) in zip(TERMS, sums_T2.tolist(), strict=True) if rows > 0}
    shares = {term: objective.span_weight if term == "span_kl" else 1.0 for term in objective.scaled if term in found}
    if "ce" not in found or not shares:
        return None
    total, rows = found["ce"]
    return total / rows, sum(share * found[term][0] / found[term][1] for term, share in shares.items())
