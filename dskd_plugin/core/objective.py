"""The objective on the rows of one micro-batch: named terms, each a (sum, count) pair.

    L = (1 - r) ce + r (t2s_kd + t2s_ce + s2t_kd + c span_kl)      method dskd
    L = (1 - r) ce + r (kd + c span_kl)                            kd, overlap_kd, bpm, uld, mined
    L = (1 - r) ce + r kd                                          methods that compare segments
    L = ce                                                             sft

With unpaired_ce each of the first two gains r ce_unpaired. With a kd_scale the terms that move the student, all of the
KD terms but t2s_ce, are multiplied with it.

Shape letters: R response rows, N rows of them with a teacher partner, M teacher rows (cross-model attention), V ids
of a head, D and E width of student and teacher, P response rows within spans, C spans; in the maps between the
spaces d is the student's width and D the teacher's.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor

from dskd_plugin.core.divergences import Divergence, binary_kl, log_probs
from dskd_plugin.core.events import EventCompare, Events, Exact, exact_target, inside, likeliest_event, masses
from dskd_plugin.core.heads import Head, head_logits, logits_at
from dskd_plugin.core.prefixes import Places, PrefixCompare
from dskd_plugin.core.reduce import keep_rows, masked_sum
from dskd_plugin.core.segments import Others, Segments
from dskd_plugin.core.support import SupportCompare

TERMS = ("ce", "t2s_kd", "t2s_ce", "s2t_kd", "kd", "span_kl", "ce_unpaired")
CE_TERMS = ("ce", "ce_unpaired")
RATES = ("t2s_agreement", "s2t_agreement", "t2s_inside")

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
    unpaired_ce: rows that no KD term of pairs takes keep their whole cross-entropy: term ce_unpaired, the sum of ce
        over these rows, of weight r and with the divisor of ce.
    kd_scale: >= 0, multiplies the KD terms that move the student, `scaled`; see balance.Balance.
    projectors_alone: projector warm-up. The terms whose gradient reaches the student (t2s_kd, s2t_kd,
        span_kl) are computed but weigh nothing, ce and t2s_ce stay as they are. Where the map of s2t_kd is
        learned (cma_loss), that term stays too and the caller detaches the student's states from it.
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
    unpaired_ce: bool = False
    kd_scale: float = 1.0

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
        if self.unpaired_ce and self.compares == "nothing":
            raise ValueError(
                "unpaired_ce: expected it only where something is compared, got compares 'nothing', under which each "
                "row has its whole cross-entropy. Leave it out."
            )
        if self.projectors_alone and self.compares != "spaces":
            raise ValueError(
                f"projectors_alone: expected it only where spaces are compared, got {self.compares!r}, which has no "
                "projector. Leave it out."
            )

    @property
    def with_ce(self) -> bool:
        return self.compares == "nothing" or self.kd_ratio < 1 or self.unpaired_ce

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
        special = {
            "ce": 1.0 if self.compares == "nothing" else 1 - self.kd_ratio,
            "span_kl": self.kd_ratio * self.span_weight,
        }
        shares = {term: special.get(term, self.kd_ratio) for term in self.terms if term not in silent}
        scaled = {term: share * (self.kd_scale if term in self.scaled else 1) for term, share in shares.items()}
        return {term: share for term, share in scaled.items() if share > 0}


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
    agree_N: bool, the projected teacher predicts the label (blockwise.agreement_of); None only where the
        objective has no agreement mask.
    s2t_N: bool, rows of s2t_kd; None for all N.
    s2t_M: bool, the teacher rows of s2t_kd with cross-model attention, where it takes the place of s2t_N.
    kd_N: bool, rows of kd; None for all N.
    places: where the pairs stand in the teacher's text, for a comparison by bytes; None for all others.
    segments: where segments are compared: the first N rows are their open tokens, see segments.Segments.
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
    taken_R: Tensor | None = None

    def __len__(self) -> int:
        return self.student_RD.shape[0]

    @property
    def pairs(self) -> int:
        """N, the number of rows with a teacher partner."""
        given = self.teacher_NE if self.label_N is None else self.label_N
        return 0 if given is None else given.shape[0]

    def block(self, rows: slice) -> Rows:
        """These response rows with whatever partners they have; without spans and segments, which cross the bounds."""
        parts = ("student_RD", "labels_R", "ce_R", "teacher_NE", "label_N", "agree_N", "s2t_N", "kd_N", "taken_R")
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
        masks["ce_unpaired"][: rows.pairs] &= ~_taken(rows, masks)
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


def term_weights(divisors_T: Tensor, shares: dict[str, float]) -> Tensor:
    """Factor of each sum in the loss, in the order of TERMS: its share (Objective.shares) / its divisor.

    divisors_T: rows per term over the whole optimizer step, >= 0; a divisor of 0 gives weight 0.
    Returns [T] fp64.
    """
    divisors_T = divisors_T.double()
    shares_T = divisors_T.new_tensor([shares.get(term, 0.0) for term in TERMS])
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


def project(hidden_ND: Tensor, map_DE: Tensor) -> Tensor:
    """Hidden states in the other space: h W, in the dtype of the map. Returns [N, E]."""
    return hidden_ND.to(map_DE.dtype) @ map_DE


def projected_teacher(rows: Rows, t2s_Dd: Tensor) -> Tensor:
    """Teacher rows in the student's space, H W_t2s; rows without a label are zeros. Returns [N, d]."""
    assert rows.teacher_NE is not None
    teacher_NE = rows.teacher_NE.detach()
    return project(teacher_NE if rows.label_N is None else keep_rows(teacher_NE, rows.label_N >= 0), t2s_Dd)


def projected_student(rows: Rows, s2t_dD: Tensor, mask_N: Tensor) -> Tensor:
    """Student rows in the teacher's space, h sg(W_s2t); rows off the mask are zeros. Returns [N, D]."""
    return project(keep_rows(rows.student_RD[: rows.pairs], mask_N), s2t_dD.detach())


class TeacherRows:
    """The teacher's distributions at some rows, all from one product with its head; no gradient.

    logits_NU: of its real ids. events: of the two vocabularies, where events are read.
    states: in place of the logits, the hidden states and the head, where a few ids of each row are read.
    target_NC: in place of the logits, what they say in the student's classes.
    """

    def __init__(
        self,
        logits_NU: Tensor | None,
        events: Events | None = None,
        states: tuple[Tensor, Head] | None = None,
        target_NC: Tensor | None = None,
    ) -> None:
        self._logits_NU = None if logits_NU is None else logits_NU.detach()
        self._states = states
        self._target_NC = target_NC
        self._events = events
        self._of_events: dict[float, Tensor] = {}
        self._likeliest_N: Tensor | None = None

    @property
    def logits_NU(self) -> Tensor:
        assert self._logits_NU is not None
        return self._logits_NU

    @property
    def target_NC(self) -> Tensor:
        assert self._target_NC is not None
        return self._target_NC

    def logits_at(self, ids_NK: Tensor, *, elements: int) -> Tensor:
        """Logits of some ids of each row, see `heads.logits_at`."""
        assert self._states is not None
        return logits_at(*self._states, ids_NK, elements=elements)

    def read_events(self, *temperatures: float) -> None:
        """Read all that `of_events` and `likeliest_event_N` say."""
        assert self._events is not None
        for temperature in sorted({*temperatures}):
            scaled_NU = self.logits_NU if temperature == 1.0 else self.logits_NU / temperature
            mass_NK, self._likeliest_N = likeliest_event(scaled_NU, self._events.teacher_U, self._events.count)
            self._of_events[temperature] = log_probs(mass_NK, temperature=1.0)

    def let_logits_go(self) -> None:
        """Free the memory: only events are read from here on."""
        self._logits_NU = None

    def of_events(self, temperature: float) -> Tensor:
        """Log-probabilities of events at a temperature, [N, K]."""
        return self._of_events[temperature]

    @property
    def likeliest_event_N(self) -> Tensor:
        """The event of the most likely id; of several such ids the first of their events."""
        assert self._likeliest_N is not None
        return self._likeliest_N


def teacher_rows(
    rows: Rows,
    teacher_head: Head,
    objective: Objective,
    *,
    soft_labels: Compare | None = None,
    exact: Exact | None = None,
    compare: Compare | None = None,
) -> TeacherRows | None:
    """What the terms of paired rows read of the teacher; None where they read nothing.

    Rows that no term takes may hold NaN: they are zeros before the product.
    """
    masks = row_masks(rows, objective)
    reads: dict[str, bool] = {"s2t_kd": True, "kd": True, "t2s_ce": exact is not None or soft_labels is not None}
    reading = [name for name in masks if reads.get(name)]
    if not reading or rows.pairs == 0:
        return None
    assert rows.teacher_NE is not None
    mask_N = torch.stack([masks[name] for name in reading]).any(0)
    kept_NE = keep_rows(rows.teacher_NE.detach(), mask_N)
    if isinstance(compare, SupportCompare):
        return TeacherRows(None, states=(kept_NE, teacher_head.detach()))
    if isinstance(compare, PrefixCompare):
        assert rows.places is not None
        real = teacher_head.detach().real()
        target_NC = compare.target(kept_NE, rows.places, lambda states: head_logits(states, real), rows=len(rows))
        return TeacherRows(None, target_NC=target_NC)
    events_alone = isinstance(compare, EventCompare) or (exact is not None and not objective.in_teacher_space)
    logits_NU = head_logits(kept_NE, teacher_head.detach().real(), by_id=events_alone)
    teacher = TeacherRows(logits_NU, None if exact is None else exact.events)
    if exact is not None:
        teacher.read_events(1.0, objective.temperature)
        if events_alone:
            teacher.let_logits_go()
    return teacher


def student_space_sums(
    rows: Rows,
    *,
    student_head: Head,
    objective: Objective,
    t2s_Nd: Tensor | None = None,
    teacher: TeacherRows | None = None,
    compare: Compare | None = None,
    soft_labels: Compare | None = None,
    exact: Exact | None = None,
    pull_R: Tensor | None = None,
    others: Others | None = None,
) -> Sums:
    """Everything that needs the student's logits: ce, t2s_kd, t2s_ce with t2s_agreement, kd, and the pull of spans.

    t2s_Nd: projected teacher rows, [N, d]; where spaces are compared, in the student's space. compare: for kd.
    soft_labels: what t2s_ce is in place of the cross-entropy with label_N. exact: what t2s_kd compares with in place of
    the projected teacher, see blockwise.dskd_loss. teacher: for these three, of the same rows.
    pull_R: derivative of the span term by each row's log p(gold), 0 outside of spans.
    others: the gradient of kd by rows that have no part in its value here; none of these rows has a partner.
    Gradients: ce, t2s_kd, kd and the pull reach student_RD and the student's head; t2s_ce reaches t2s_Nd alone.
    Returns name -> (sum in nats, count), the terms of this space that the objective does not leave out, and its rates,
    which have no gradient; "span_kl" has the gradient of the span term but value and count 0.
    """
    masks = row_masks(rows, objective)
    pairs = rows.pairs
    with_t2s, with_kd = objective.in_student_space and pairs > 0, "kd" in masks and pairs > 0
    with_gold = objective.with_ce or pull_R is not None
    sums: Sums = {}
    if not (with_gold or with_t2s or with_kd or others):
        return sums
    needed_R = torch.zeros_like(rows.labels_R, dtype=torch.bool)
    if objective.with_ce:
        needed_R |= masks["ce"]
    if pull_R is not None:
        needed_R |= pull_R != 0
    if others is not None:
        needed_R |= others.pull_R != 0
    if with_t2s or with_kd:
        needed_R[:pairs] |= masks["t2s_kd" if with_t2s else "kd"]
    # Rows are dropped before the product with the head and not only masked in its result.
    size = len(rows) if with_gold or others else pairs
    student_RV = head_logits(keep_rows(rows.student_RD[:size], needed_R[:size]), student_head)
    # What ce and t2s_kd both read is made once, where padding and temperature do not tell them apart.
    one_softmax = with_t2s and objective.temperature == 1.0 and student_head.vocab_size == student_RV.shape[1]
    student_log_RV = log_probs(student_RV, temperature=1.0) if one_softmax else None
    if with_gold:
        if student_log_RV is None:
            nll_R = torch.nn.functional.cross_entropy(student_RV, rows.labels_R, reduction="none")
        else:
            nll_R = torch.nn.functional.nll_loss(student_log_RV, rows.labels_R, reduction="none")
        if objective.with_ce:
            sums["ce"] = masked_sum(nll_R, masks["ce"])
        if "ce_unpaired" in masks:
            sums["ce_unpaired"] = masked_sum(nll_R, masks["ce_unpaired"])[0], sums["ce"][1]
        if pull_R is not None:
            pulled_R = pull_R.to(nll_R.dtype) * (nll_R.detach() - nll_R)
            sums["span_kl"] = (pulled_R.sum(), torch.zeros_like(nll_R[:0].sum()))
    real = student_head.vocab_size
    if others is not None:
        assert not pairs
        sums["kd"] = others.pulled(student_RV[:, :real], rows.labels_R)
    if with_t2s:
        assert t2s_Nd is not None
        if student_log_RV is None:
            student_log_NV = log_probs(_corner(student_RV, pairs, real), temperature=objective.temperature)
        else:
            student_log_NV = _corner(student_log_RV, pairs, real)
        del student_RV, student_log_RV
        sums |= _t2s_sums(rows, student_log_NV, t2s_Nd, teacher, masks, student_head, objective, soft_labels, exact)
    if with_kd:
        assert compare is not None and teacher is not None
        sums["kd"] = masked_sum(_compared(compare, _corner(student_RV, pairs, real), teacher), masks["kd"])
    return sums


def _compared(compare: Compare, student_NV: Tensor, teacher: TeacherRows) -> Tensor:
    """The distance of a pair's two distributions, [N], from no more of the teacher than it reads."""
    if isinstance(compare, PrefixCompare):
        return compare.of_target(student_NV=student_NV, target_NC=teacher.target_NC)
    if not isinstance(compare, SupportCompare):
        return compare(student_NV=student_NV, teacher_NV=teacher.logits_NU)
    student_ids_NK, teacher_ids_NK = compare.ids(student_NV)
    return compare.of_logits(
        student_NK=student_NV.gather(1, student_ids_NK),
        teacher_NK=teacher.logits_at(teacher_ids_NK, elements=student_NV.numel()),
    )


def _corner(x_RV: Tensor, rows: int, ids: int) -> Tensor:
    """The first rows and ids; the tensor itself where these are all: the derivative of a slice is a copy."""
    x_RV = x_RV if rows == x_RV.shape[0] else x_RV[:rows]
    return x_RV if ids == x_RV.shape[1] else x_RV[:, :ids]


def _t2s_sums(
    rows: Rows,
    student_log_NV: Tensor,
    t2s_Nd: Tensor,
    teacher: TeacherRows | None,
    masks: dict[str, Tensor],
    student_head: Head,
    objective: Objective,
    soft_labels: Compare | None,
    exact: Exact | None,
) -> Sums:
    """t2s_ce, t2s_kd and their rates. student_log_NV: log-probabilities of the real ids at the temperature."""
    labelled_N, temperature = masks["t2s_ce"], objective.temperature
    t2s_NV = head_logits(keep_rows(t2s_Nd, labelled_N), student_head.detach())
    t2s_ce_N, agree_N, t2s_NK = label_distance(
        t2s_NV, teacher, rows.label_N, real=student_head.vocab_size, soft_labels=soft_labels, exact=exact
    )
    t2s_NV = _corner(t2s_NV.detach(), rows.pairs, student_head.vocab_size)
    sums: Sums = {}
    if exact is None:
        target_NV = log_probs(t2s_NV, temperature=temperature)
    else:
        assert teacher is not None and t2s_NK is not None
        events, own_NV, share_NK = exact.events, student_log_NV.detach(), t2s_NK.detach()
        own_NK = masses(own_NV, events.student_V, events.count)
        if temperature != 1.0:
            t2s_NV = t2s_NV / temperature
            share_NK = masses(t2s_NV, events.student_V, events.count)
        gold_N = rows.labels_R[: rows.pairs]
        several_N = labelled_N & (events.sizes_K[events.student_V[gold_N]] > 1)
        lead_N = inside(t2s_NV, share_NK, gold_N, events) - inside(own_NV, own_NK, gold_N, events)
        # Of rows whose event has one id there is nothing to say.
        sums["t2s_inside"] = masked_sum(lead_N, several_N)
        target_NV = exact_target(
            share_NV=t2s_NV if exact.shares_inside else own_NV,
            share_NK=share_NK if exact.shares_inside else own_NK,
            student_NK=own_NK,
            teacher_NK=teacher.of_events(temperature),
            events=events,
        )
    t2s_kd_N = objective.divergence(student_NV=student_log_NV, teacher_NV=target_NV)
    agree_N = agree_N if rows.agree_N is None else rows.agree_N
    return sums | {
        "t2s_ce": masked_sum(t2s_ce_N, labelled_N),
        "t2s_kd": masked_sum(t2s_kd_N, masks["t2s_kd"]),
        "t2s_agreement": masked_sum(agree_N.to(t2s_kd_N.dtype), labelled_N),
    }


def label_distance(
    t2s_NV: Tensor,
    teacher: TeacherRows | None,
    label_N: Tensor | None,
    *,
    real: int,
    soft_labels: Compare | None,
    exact: Exact | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """How far the projected teacher is from its labels, t2s_ce, and where it predicts them.

    t2s_NV: its logits over all rows of the student's head, of which the first `real` are ids. teacher: the teacher's
    own opinion, for soft_labels and exact. label_N: ids of the student, -1 for none; not read with exact.
    Returns [N] nats, whose gradient reaches t2s_NV, [N] bool, and with exact the masses [N, K] of the logits, not
    normalised. Rows without a label mean nothing.
    """
    real_NV = _corner(t2s_NV, len(t2s_NV), real)
    predicted_N = real_NV.detach().argmax(-1)
    if exact is not None:
        assert teacher is not None
        events = exact.events
        t2s_NK = masses(real_NV, events.student_V, events.count)
        agree_N = events.student_V[predicted_N] == teacher.likeliest_event_N
        return _event_distance(log_probs(t2s_NK, temperature=1.0), teacher, soft_labels, events), agree_N, t2s_NK
    assert label_N is not None
    label_N = label_N.clamp(min=0)
    if soft_labels is not None:
        assert teacher is not None
        distance_N = soft_labels(student_NV=real_NV, teacher_NV=teacher.logits_NU)
    else:
        distance_N = torch.nn.functional.cross_entropy(t2s_NV, label_N, reduction="none")
    return distance_N, predicted_N == label_N, None


def _event_distance(t2s_log_NK: Tensor, teacher: TeacherRows, soft_labels: Compare | None, events: Events) -> Tensor:
    """t2s_ce with events as labels: their distribution, or the likeliest one, 0 for one that the student lacks."""
    if soft_labels is not None:
        assert isinstance(soft_labels, EventCompare) and soft_labels.temperature == 1.0
        return soft_labels.of_masses(student_NK=t2s_log_NK, teacher_NK=teacher.of_events(1.0))
    label_N = teacher.likeliest_event_N
    known_N = events.sizes_K[label_N] > 0
    return -torch.where(known_N, t2s_log_NK.gather(1, label_N[:, None])[:, 0], 0)


def teacher_space_sums(
    s2t_KD: Tensor, *, teacher: TeacherRows, mask_K: Tensor, head: Head, objective: Objective
) -> Sums:
    """s2t_kd and s2t_agreement: what needs logits over the teacher's vocabulary, at K rows.

    s2t_KD: the student's states in the teacher's space. Its gradient is the only one. teacher: the teacher's own
    opinion. mask_K: bool, rows that count. head: the teacher's.
    """
    s2t_KU = head_logits(keep_rows(s2t_KD, mask_K), head.detach().real())
    s2t_kd_K = objective.divergence(
        student_NV=log_probs(s2t_KU, temperature=objective.temperature),
        teacher_NV=log_probs(teacher.logits_NU, temperature=objective.temperature),
    )
    agree_K = s2t_KU.detach().argmax(-1) == teacher.logits_NU.argmax(-1)
    return {
        "s2t_kd": masked_sum(s2t_kd_K, mask_K),
        "s2t_agreement": masked_sum(agree_K.to(s2t_kd_K.dtype), mask_K),
    }


def span_sums(log_probs_P: Tensor, of_P: Tensor, spans: int) -> Tensor:
    """Log-likelihood of each span or segment: the sum over its tokens, in fp64 because many small numbers add up.

    log_probs_P: nats per token. of_P: number of the span of each, 0 to spans - 1. Returns [spans] fp64.
    """
    return log_probs_P.new_zeros(spans, dtype=torch.float64).index_add(0, of_P, log_probs_P.double())


def span_term(spans: Spans, log_probs_P: Tensor, *, temperature: float) -> tuple[Tensor, Tensor]:
    """How far the likelihoods of the spans are apart.

        sum over spans of binary_kl(student_C, teacher_C),   student_C = sum of log p(gold) of the span's rows

    log_probs_P: the student's log p(gold) at rows_P; the gradient reaches it alone. temperature: span_temperature.
    Returns (sum in nats, number of spans), fp64.
    Source: approximate likelihood matching, arXiv 2503.20083, on the spans that exact token alignment leaves over.
    """
    student_C = span_sums(log_probs_P, spans.of_P, len(spans.teacher_C))
    teacher_C = spans.teacher_C.detach().double()
    all_C = torch.ones_like(teacher_C, dtype=torch.bool)
    return masked_sum(binary_kl(student_C=student_C, teacher_C=teacher_C, temperature=temperature), all_C)
