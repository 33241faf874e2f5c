"""The terms of the objective as sums over rows: what needs logits over the student's or the teacher's vocabulary.

Shape letters as in objective.py; U ids of the teacher, K events, or rows in the teacher's space.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dskd_plugin.core.divergences import binary_kl, log_probs, token_nll
from dskd_plugin.core.events import (
    EventCompare,
    Events,
    Exact,
    event_log_probs,
    exact_target,
    inside,
    lead,
    masses,
    teacher_masses,
)
from dskd_plugin.core.heads import Head, head_logits
from dskd_plugin.core.objective import Compare, Objective, Sums
from dskd_plugin.core.prefixes import PrefixCompare
from dskd_plugin.core.reduce import keep_rows, masked_sum
from dskd_plugin.core.rows import Rows, Spans, row_masks
from dskd_plugin.core.segments import Others
from dskd_plugin.core.teacher_rows import TeacherRows
from dskd_plugin.core.top_shared import TopSharedCompare


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
    needed_R = needed_rows(rows, masks, pull_R)
    if others is not None:
        needed_R |= others.pull_R != 0
    # Rows are dropped before the product with the head and not only masked in its result.
    size = len(rows) if with_gold or others else pairs
    student_RV = head_logits(keep_rows(rows.student_RD[:size], needed_R[:size]), student_head)
    # What ce and t2s_kd both read is made once, where padding and temperature do not tell them apart.
    one_softmax = with_t2s and objective.temperature == 1.0 and student_head.vocab_size == student_RV.shape[1]
    student_log_RV = log_probs(student_RV, temperature=1.0) if one_softmax else None
    if with_gold:
        if student_log_RV is None:
            nll_R = token_nll(student_RV, rows.labels_R)
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


def needed_rows(rows: Rows, masks: dict[str, Tensor], pull_R: Tensor | None) -> Tensor:
    """Rows whose logits over the student's vocabulary some term reads, [R] bool. pull_R: see student_space_sums."""
    needed_R = torch.zeros_like(rows.labels_R, dtype=torch.bool)
    if "ce" in masks:
        needed_R |= masks["ce"]
    if pull_R is not None:
        needed_R |= pull_R != 0
    for term in ("t2s_kd", "kd"):
        if term in masks:
            needed_R[: rows.pairs] |= masks[term]
    return needed_R


def _compared(compare: Compare, student_NV: Tensor, teacher: TeacherRows) -> Tensor:
    """The distance of a pair's two distributions, [N], from no more of the teacher than it reads."""
    if isinstance(compare, PrefixCompare):
        return compare.of_target(student_NV=student_NV, target_NC=teacher.target_NC)
    if not isinstance(compare, TopSharedCompare):
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
        target_NK = teacher_masses(own_NK, teacher.of_events(temperature), events)
        plain_NK, plain_target_NK = own_NK, target_NK
        if temperature != 1.0:  # softened, a larger vocabulary would lose
            plain_NK = event_log_probs(own_NV * temperature, events.student_V, events.count, temperature=1.0)
            plain_target_NK = teacher_masses(plain_NK, teacher.of_events(1.0), events)
        lead_N = lead(target_NK=plain_target_NK, student_NK=plain_NK, id_N=gold_N, events=events)
        sums["teacher_lead"] = masked_sum(lead_N, labelled_N)
        several_N = labelled_N & events.open_V[gold_N]
        inside_N = inside(t2s_NV, share_NK, gold_N, events) - inside(own_NV, own_NK, gold_N, events)
        # Of rows whose event has one id there is nothing to say.
        sums["t2s_inside"] = masked_sum(inside_N, several_N)
        target_NV = exact_target(
            share_NV=t2s_NV if exact.shares_inside else own_NV,
            share_NK=share_NK if exact.shares_inside else own_NK,
            target_NK=target_NK,
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
        distance_N = token_nll(t2s_NV, label_N)
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
