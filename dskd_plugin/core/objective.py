"""The dual-space objective on the rows of one micro-batch: named terms, each a (sum, count) pair.

    L = (1 - r) ce + r (t2s_kd + t2s_ce + s2t_kd)

Shape letters: R response rows, N rows of them with a teacher partner, V ids of a head, D and E width of
student and teacher; in the maps between the spaces d is the student's width and D the teacher's.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from dskd_plugin.core.divergences import Divergence, log_probs
from dskd_plugin.core.heads import Head, head_logits
from dskd_plugin.core.reduce import keep_rows, masked_sum

TERMS = ("ce", "t2s_kd", "t2s_ce", "s2t_kd")
RATES = ("t2s_agreement", "s2t_agreement")

Sums = dict[str, tuple[Tensor, Tensor]]


@dataclass(frozen=True, kw_only=True)
class Objective:
    """What to compute.

    divergence: see divergences.divergence. temperature: > 0, of the KD distributions only.
    kd_ratio: r in [0, 1]. spaces: which of the two comparisons to make.
    agreement_mask: t2s_kd only where the projected teacher predicts the label.
    Terms of weight 0 are left out: no ce at r = 1, nothing else at r = 0; they count 0 rows.
    """

    divergence: Divergence
    temperature: float = 2.0
    kd_ratio: float = 0.5
    spaces: Literal["both", "student", "teacher"] = "both"
    agreement_mask: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.kd_ratio <= 1:
            raise ValueError(f"dskd.kd_ratio: expected a number from 0 to 1, got {self.kd_ratio}. Try 0.5.")
        if self.spaces not in ("both", "student", "teacher"):
            raise ValueError(
                f"dskd.spaces: expected 'both', 'student' or 'teacher', got {self.spaces!r}. Choose one of these."
            )

    @property
    def with_ce(self) -> bool:
        return self.kd_ratio < 1

    @property
    def in_student_space(self) -> bool:
        return self.kd_ratio > 0 and self.spaces != "teacher"

    @property
    def in_teacher_space(self) -> bool:
        return self.kd_ratio > 0 and self.spaces != "student"


@dataclass(frozen=True, kw_only=True)
class Rows:
    """The rows of one micro-batch; the first N response rows are those with a teacher partner.

    student_RD: last hidden states of the student (after the final norm) at all response rows.
    labels_R: gold next token of each, an id of the student.
    teacher_NE: last hidden states of the teacher at the partners.
    teacher_argmax_N: the teacher's most likely id. label_N: that id in the student's vocabulary, or -1.
    agree_N: bool, the projected teacher predicts the label (chunked.agreement); None only where the
        objective has no agreement mask.
    s2t_N: bool, rows of s2t_kd; None for all N.
    A teacher row may hold NaN where label_N is -1 and s2t_N is False.
    """

    student_RD: Tensor
    labels_R: Tensor
    teacher_NE: Tensor
    label_N: Tensor
    teacher_argmax_N: Tensor
    agree_N: Tensor | None = None
    s2t_N: Tensor | None = None

    def __len__(self) -> int:
        return self.student_RD.shape[0]

    @property
    def pairs(self) -> int:
        """N, the number of rows with a teacher partner."""
        return self.teacher_NE.shape[0]

    def block(self, start: int, stop: int) -> Rows:
        """Response rows start..stop with whatever partners they have."""
        return replace(
            self,
            student_RD=self.student_RD[start:stop],
            labels_R=self.labels_R[start:stop],
            teacher_NE=self.teacher_NE[start:stop],
            label_N=self.label_N[start:stop],
            teacher_argmax_N=self.teacher_argmax_N[start:stop],
            agree_N=None if self.agree_N is None else self.agree_N[start:stop],
            s2t_N=None if self.s2t_N is None else self.s2t_N[start:stop],
        )


def row_masks(rows: Rows, objective: Objective) -> dict[str, Tensor]:
    """Which rows each term of the objective takes: name in TERMS -> bool, [R] for ce and [N] for the others.

    A term that the objective leaves out has no entry. ValueError when the agreement mask lacks agree_N.
    """
    masks: dict[str, Tensor] = {}
    if objective.with_ce:
        masks["ce"] = torch.ones_like(rows.labels_R, dtype=torch.bool)
    if objective.in_student_space:
        labelled_N = rows.label_N >= 0
        masks["t2s_ce"] = masks["t2s_kd"] = labelled_N
        if objective.agreement_mask:
            if rows.agree_N is None:
                raise ValueError(
                    "rows.agree_N: expected a bool tensor with agreement_mask on, got None. "
                    "Compute it with agreement()."
                )
            masks["t2s_kd"] = labelled_N & rows.agree_N
    if objective.in_teacher_space:
        all_N = torch.ones_like(rows.label_N, dtype=torch.bool)
        masks["s2t_kd"] = all_N if rows.s2t_N is None else rows.s2t_N
    return masks


def counts(rows: Rows, objective: Objective) -> Tensor:
    """Rows per term in the order of TERMS, known before any student forward.

    Only labels_R, label_N, agree_N and s2t_N are read. Returns [4] int64; sum them over micro-batches and
    ranks to get divisors for the loss. A term that the objective leaves out counts 0.
    """
    masks = row_masks(rows, objective)
    none = torch.zeros((), dtype=torch.long, device=rows.labels_R.device)
    return torch.stack([masks[term].sum() if term in masks else none for term in TERMS])


def project(hidden_ND: Tensor, map_DE: Tensor) -> Tensor:
    """Hidden states in the other space: h W, in the dtype of the map. Returns [N, E]."""
    return hidden_ND.to(map_DE.dtype) @ map_DE


def term_sums(
    rows: Rows,
    *,
    student_head: Head,
    teacher_head: Head,
    t2s_Dd: Tensor | None,
    s2t_dD: Tensor | None,
    objective: Objective,
) -> Sums:
    """All terms of the given rows, without division; holds [rows, V] tensors, so give it a block at a time.

        ce      = CE(z, gold)                    all V rows of the head, temperature 1
        t2s_ce  = CE(z_t2s, label)               the same;  z_t2s = head_s(H W_t2s)
        t2s_kd  = dist(z, sg(z_t2s))             the student's vocab_size real ids, objective.temperature
        s2t_kd  = dist(z_s2t, sg(z_t))           the teacher's real ids;  z_s2t = head_t(h W_s2t)

    Gradients: ce and t2s_kd reach student_RD and the student's head, t2s_ce reaches t2s_Dd alone, s2t_kd
    reaches student_RD alone. Teacher rows, teacher head and s2t_dD never get one.
    t2s_Dd, s2t_dD: [D, d] and [d, D]; None where the objective does not use that space.
    Returns name -> (sum in nats, count) for TERMS; for RATES (rows where the argmaxes agree, rows), without
    gradient. A term that the objective leaves out is absent.
    Source: arXiv 2504.11426, section 3 (v2), with the terms divided outside.
    """
    sums = student_space_sums(rows, student_head=student_head, t2s_Dd=t2s_Dd, objective=objective)
    return sums | teacher_space_sums(rows, teacher_head=teacher_head, s2t_dD=s2t_dD, objective=objective)


def student_space_sums(rows: Rows, *, student_head: Head, t2s_Dd: Tensor | None, objective: Objective) -> Sums:
    """ce, t2s_kd, t2s_ce and t2s_agreement: the part of term_sums over the student's vocabulary."""
    masks = row_masks(rows, objective)
    pairs = rows.pairs
    with_pairs = objective.in_student_space and pairs > 0
    sums: Sums = {}
    if objective.with_ce or with_pairs:
        needed_RD = rows.student_RD if objective.with_ce else rows.student_RD[:pairs]
        student_RV = head_logits(needed_RD, student_head)
    if objective.with_ce:
        ce_R = torch.nn.functional.cross_entropy(student_RV, rows.labels_R, reduction="none")
        sums["ce"] = masked_sum(ce_R, masks["ce"])
    if with_pairs:
        assert t2s_Dd is not None
        labelled_N = masks["t2s_ce"]
        real = student_head.vocab_size
        label_N = rows.label_N.clamp(min=0)
        teacher_NE = keep_rows(rows.teacher_NE.detach(), labelled_N)
        t2s_NV = head_logits(project(teacher_NE, t2s_Dd), student_head.detach())
        t2s_ce_N = torch.nn.functional.cross_entropy(t2s_NV, label_N, reduction="none")
        sums["t2s_ce"] = masked_sum(t2s_ce_N, labelled_N)
        t2s_kd_N = objective.divergence(
            student_NV=log_probs(student_RV[:pairs, :real], temperature=objective.temperature),
            teacher_NV=log_probs(t2s_NV.detach()[:, :real], temperature=objective.temperature),
        )
        sums["t2s_kd"] = masked_sum(t2s_kd_N, masks["t2s_kd"])
        agree_N = rows.agree_N
        if agree_N is None:
            agree_N = t2s_NV.detach()[:, :real].argmax(-1) == label_N
        sums["t2s_agreement"] = masked_sum(agree_N.to(t2s_ce_N.dtype), labelled_N)
    return sums


def teacher_space_sums(rows: Rows, *, teacher_head: Head, s2t_dD: Tensor | None, objective: Objective) -> Sums:
    """s2t_kd and s2t_agreement: the part of term_sums over the teacher's vocabulary."""
    if not objective.in_teacher_space or not rows.pairs:
        return {}
    assert s2t_dD is not None
    s2t_N = row_masks(rows, objective)["s2t_kd"]
    head = teacher_head.detach().real()
    student_ND = keep_rows(rows.student_RD[: rows.pairs], s2t_N)
    teacher_NE = keep_rows(rows.teacher_NE.detach(), s2t_N)
    s2t_NV = head_logits(project(student_ND, s2t_dD.detach()), head)
    s2t_kd_N = objective.divergence(
        student_NV=log_probs(s2t_NV, temperature=objective.temperature),
        teacher_NV=log_probs(head_logits(teacher_NE, head), temperature=objective.temperature),
    )
    agree_N = s2t_NV.detach().argmax(-1) == rows.teacher_argmax_N
    return {
        "s2t_kd": masked_sum(s2t_kd_N, s2t_N),
        "s2t_agreement": masked_sum(agree_N.to(s2t_kd_N.dtype), s2t_N),
    }


def term_weights(divisors_4: Tensor, kd_ratio: float) -> Tensor:
    """Factor of each sum in the loss, in the order of TERMS: (1 - r) / div for ce, r / div for the others.

    divisors_4: rows per term over the whole optimizer step, >= 0; a divisor of 0 gives weight 0.
    Returns [4] fp64.
    """
    divisors_4 = divisors_4.double()
    shares_4 = divisors_4.new_tensor([1 - kd_ratio, kd_ratio, kd_ratio, kd_ratio])
    return torch.where(divisors_4 > 0, shares_4 / divisors_4.clamp(min=1e-30), 0)
