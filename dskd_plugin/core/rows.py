"""The rows of one micro-batch, and which of them each term of the objective takes.

Shape letters as in objective.py.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dskd_plugin.core.objective import TERMS, Objective
from dskd_plugin.core.prefixes import Places
from dskd_plugin.core.segments import Segments


@dataclass(frozen=True, kw_only=True)
class Spans:
    """Spans of text that both sides split into several tokens, or into other tokens than a pair.

    rows_P: the response rows (0 to R - 1) whose gold tokens make up the student's side of the spans.
    of_P: number of the span (0 to C - 1) that each belongs to.
    teacher_C: log-likelihood of each span under the teacher, nats, <= 0: span_sums of token_log_probs.
    """

    rows_P: Tensor
    of_P: Tensor
    teacher_C: Tensor


@dataclass(frozen=True, kw_only=True)
class Rows:
    """The rows of one micro-batch; the first N response rows are those with a teacher partner.

    student_RD: last hidden states of the student (after the final norm) at all response rows.
    labels_R: gold next token of each, an id of the student.
    ce_R: bool, rows of ce; None for all R.
    spans: None for no span.
    teacher_NE: last hidden states of the teacher at the partners; not read by cross-model attention.
    label_N: the teacher's most likely id in the student's vocabulary, or -1; with cross-model attention the gold id, or
        -1 for a row that attended to nothing. None with an exact target, which has a use for every row.
    agree_N: bool, the projected teacher predicts the label (readings.agreement_of); None only where the
        objective has no agreement mask.
    s2t_N: bool, rows of s2t_kd; None for all N.
    s2t_M: bool, the teacher rows of s2t_kd with cross-model attention, where it takes the place of s2t_N.
    kd_N: bool, rows of kd; None for all N.
    places: where the pairs stand in the teacher's text, for a comparison by bytes; None for all others.
    segments: where segments are compared: the first N rows are their open tokens, see segments.Segments.
    open_N: bool, gold tokens of an event that has others of the student's, see events.Events.open_V; None for none.
    taken_R: bool, rows beside the first N that kd takes; None for none.
    The baselines read teacher_NE alone of the tensors over N, and cross-entropy alone none of them.
    A teacher row may hold NaN where label_N is -1 and s2t_N is False, and where kd_N is False; a student row where no
    term takes it.
    """

    student_RD: Tensor
    labels_R: Tensor
    ce_R: Tensor | None = None
    spans: Spans | None = None
    teacher_NE: Tensor | None = None
    label_N: Tensor | None = None
    agree_N: Tensor | None = None
    s2t_N: Tensor | None = None
    s2t_M: Tensor | None = None
    kd_N: Tensor | None = None
    places: Places | None = None
    segments: Segments | None = None
    open_N: Tensor | None = None
    taken_R: Tensor | None = None

    def __len__(self) -> int:
        return self.student_RD.shape[0]

    @property
    def pairs(self) -> int:
        """N, the number of rows with a teacher partner."""
        given = self.teacher_NE if self.label_N is None else self.label_N
        return 0 if given is None else given.shape[0]

    def opened(self, open_V: Tensor) -> Rows:
        """The same with open_N. open_V: student ids that the comparison does not tell from others, bool."""
        return replace(self, open_N=open_V[self.labels_R[: self.pairs]])

    def block(self, rows: slice) -> Rows:
        """These response rows with whatever partners they have; without spans and segments, which cross the bounds."""
        over_N = ("teacher_NE", "label_N", "agree_N", "s2t_N", "kd_N", "open_N")
        parts = ("student_RD", "labels_R", "ce_R", *over_N, "taken_R")
        places = self.places and self.places.block(rows)
        changes: dict[str, Any] = {"spans": None, "segments": None, "places": places}
        for name in parts:
            given = getattr(self, name)
            changes[name] = None if given is None else given[rows]
        return replace(self, **changes)


def row_masks(rows: Rows, objective: Objective) -> dict[str, Tensor]:
    """Which rows each term of the objective takes: name in TERMS -> bool.

    Shapes: [R] for ce and ce_unpaired, [C] for span_kl, [M] for s2t_kd of cross-model attention and [N] for the others.
    A term that the objective leaves out has no entry. ValueError when the agreement mask lacks agree_N.
    """

    def all_of(number: int) -> Tensor:
        return torch.ones(number, dtype=torch.bool, device=rows.labels_R.device)

    masks: dict[str, Tensor] = {}
    if objective.with_ce:
        masks["ce"] = all_of(len(rows.labels_R)) if rows.ce_R is None else rows.ce_R
    if objective.in_student_space:
        labelled_N = all_of(rows.pairs) if rows.label_N is None else rows.label_N >= 0
        masks["t2s_ce"] = masks["t2s_kd"] = labelled_N
        if objective.agreement_mask:
            if rows.agree_N is None:
                raise ValueError(
                    "rows.agree_N: expected a bool tensor with agreement_mask on, got None. "
                    "Compute it with agreement() or agreement_of()."
                )
            masks["t2s_kd"] = labelled_N & rows.agree_N
    if objective.in_teacher_space:
        given = rows.s2t_N if rows.s2t_M is None else rows.s2t_M
        masks["s2t_kd"] = all_of(rows.pairs) if given is None else given
    if "kd" in objective.terms:
        masks["kd"] = all_of(rows.pairs) if rows.kd_N is None else rows.kd_N
    if "span_kl" in objective.terms:
        masks["span_kl"] = all_of(0 if rows.spans is None else len(rows.spans.teacher_C))
    if "ce_unpaired" in objective.terms:
        masks["ce_unpaired"] = masks["ce"].clone()
        if objective.gold_alone:
            return masks
        taken_N = _taken(rows, masks)
        masks["ce_unpaired"][: rows.pairs] &= ~taken_N if rows.open_N is None else ~taken_N | rows.open_N
        if rows.taken_R is not None:
            masks["ce_unpaired"] &= ~rows.taken_R
    return masks


def _taken(rows: Rows, masks: dict[str, Tensor]) -> Tensor:
    """The pairs that some KD term takes, [N] bool; with cross-model attention the rows that attended."""
    if rows.s2t_M is not None:
        assert rows.label_N is not None
        return rows.label_N >= 0
    found = [masks[term] for term in ("t2s_ce", "s2t_kd", "kd") if term in masks]
    return torch.stack(found).any(0)


def counts(rows: Rows, objective: Objective) -> Tensor:
    """Rows (for span_kl: spans) per term in the order of TERMS, known before any student forward.

    Only labels_R, the masks and labels over R, N and M, the lengths of teacher_NE (without label_N) and of
    spans.teacher_C are read. Returns [T] int64, T terms; sum them over micro-batches and ranks to get divisors
    for the loss. A term that the objective leaves out counts 0; ce_unpaired, a part of ce, counts the rows of ce.
    """
    masks = row_masks(rows, objective)
    if "ce_unpaired" in masks:
        masks["ce_unpaired"] = masks["ce"]
    none = torch.zeros((), dtype=torch.long, device=rows.labels_R.device)
    return torch.stack([masks[term].sum() if term in masks else none for term in TERMS])
