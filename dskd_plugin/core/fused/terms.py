"""The terms that need the student's logits at paired rows, by kernels: one value a row, gradients over the logits.

Which rows count, labels, targets and what the events of one side mean on the other are those of core/terms.py and
core/events.py. Nothing here has an autograd graph.

Shape letters as in objective.py; K events.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dskd_plugin.core.baselines import MappedIds, SameIds, SharedIds
from dskd_plugin.core.divergences import forward_kl
from dskd_plugin.core.events import EventCompare, Events, Exact, change_inside, lead, teacher_masses
from dskd_plugin.core.fused import launch
from dskd_plugin.core.fused.launch import Gold, Handed, Logits, Masses, Other
from dskd_plugin.core.heads import Head
from dskd_plugin.core.objective import Compare, Objective, Sums
from dskd_plugin.core.reduce import keep_rows, masked_sum
from dskd_plugin.core.rows import Rows
from dskd_plugin.core.teacher_rows import TeacherRows


class TeacherLogits(TeacherRows):
    """The teacher's logits at some rows, None where only masses are read, and those by temperature."""

    def __init__(self, logits: Logits | None, masses: dict[float, Masses] | None = None) -> None:
        super().__init__(None)
        self._logits, self._masses = logits, masses or {}

    def at(self, temperature: float) -> Logits:
        assert self._logits is not None
        return self._logits.at(temperature)

    def of_events(self, temperature: float) -> Tensor:
        return self._masses[temperature].log_NK

    @property
    def likeliest_event_N(self) -> Tensor:
        return next(iter(self._masses.values())).likeliest_N.long()


@dataclass(frozen=True)
class Block:
    """Rows of a block and what is read of them.

    masks: see rows.row_masks. weights: of the sum of each term in the gradients. moves: whether the gradient of the
    student's logits is wanted.
    """

    rows: Rows
    masks: dict[str, Tensor]
    objective: Objective
    student_head: Head
    weights: dict[str, Tensor]
    teacher: TeacherRows | None
    moves: bool

    def weight(self, term: str) -> Tensor:
        """What each row's value of a term weighs in the gradient, [N]."""
        return self.weights[term] * self.masks[term]

    def weight_of_gold(self, pull_R: Tensor | None) -> Tensor:
        """What each row's -log p(gold) weighs, [R]: in ce, in ce_unpaired, and by the derivative of the span term."""
        parts = [self.weight(term) for term in ("ce", "ce_unpaired") if term in self.masks]
        if pull_R is not None:
            parts.append(-self.weights["span_kl"] * pull_R)
        return torch.stack(parts).sum(0)

    @property
    def of_teacher(self) -> TeacherLogits:
        assert isinstance(self.teacher, TeacherLogits)
        return self.teacher


def kd(part: Block, own: Logits, gold: Gold | None, compare: Compare) -> tuple[Tensor, Tensor]:
    """The distance of the two distributions and the cross-entropy of the pairs, [N] each."""
    assert isinstance(compare, SameIds | SharedIds | MappedIds | EventCompare)
    teacher, own, weight_N = part.of_teacher, own.at(compare.temperature), part.weight("kd")
    if isinstance(compare, EventCompare):
        events = compare.events
        masses = launch.event_masses(own, events.student_ids, events.count)
        target_NK = teacher_masses(masses.log_NK, teacher.of_events(compare.temperature), events)
        kd_N, handed = _between_events(compare, masses, target_NK, weight_N, part.moves)
        return kd_N, launch.cross_entropy_of(own, gold, handed=handed, write=part.moves)
    if isinstance(compare, MappedIds):
        return launch.compare(own, _moved(compare, teacher), forward_kl, weight_N, gold=gold, write=part.moves)
    partner_V = compare.partner_V if isinstance(compare, SharedIds) else None
    other = Other(teacher.at(compare.temperature), partner_V)
    return launch.compare(own, other, compare.divergence, weight_N, gold=gold, write=part.moves)


def t2s(
    part: Block,
    own: Logits,
    gold: Gold | None,
    t2s_Nd: Tensor,
    learns: bool,
    *,
    soft_labels: Compare | None = None,
    exact: Exact | None = None,
) -> tuple[Sums, Tensor, Logits]:
    """t2s_kd, t2s_ce and their rates, see terms.student_space_sums, and the cross-entropy of the pairs, [N].

    t2s_Nd: states of the projected teacher. Also returned are its logits; learns: with the gradient of t2s_ce in place.
    """
    rows, temperature, labelled_N = part.rows, part.objective.temperature, part.masks["t2s_ce"]
    theirs = Logits.of(keep_rows(t2s_Nd, labelled_N), part.student_head)
    predicted_N = theirs.argmax()
    own, other = own.at(temperature), Other(theirs.at(temperature))
    sums: Sums = {}
    masses: Masses | None = None
    if exact is None:
        assert rows.label_N is not None
        agree_N = predicted_N == rows.label_N
    else:
        events = exact.events
        masses = launch.event_masses(theirs, events.student_ids, events.count)
        agree_N = events.student_V[predicted_N] == part.of_teacher.likeliest_event_N
        other, rates = _exact_target(part, exact, own, theirs.at(temperature), masses)
        sums |= rates
    t2s_kd_N, nll_N = launch.compare(
        own, other, part.objective.divergence, part.weight("t2s_kd"), gold=gold, write=part.moves
    )
    # All that reads the projected teacher's logits has done so: their gradient may take their place.
    if masses is None or exact is None:
        t2s_ce_N = _label_distance(part, theirs, soft_labels, learns)
    else:
        t2s_ce_N = _event_distance(part, theirs, masses, exact.events, soft_labels, learns)
    agree_N = agree_N if rows.agree_N is None else rows.agree_N
    sums |= {
        "t2s_ce": masked_sum(t2s_ce_N, labelled_N),
        "t2s_kd": masked_sum(t2s_kd_N, part.masks["t2s_kd"]),
        "t2s_agreement": masked_sum(agree_N.to(t2s_kd_N.dtype), labelled_N),
    }
    return sums, nll_N, theirs


def _exact_target(part: Block, exact: Exact, own: Logits, theirs: Logits, masses: Masses) -> tuple[Other, Sums]:
    """events.exact_target as the other side of a comparison, and the rates t2s_inside and teacher_lead.

    own, theirs: at the temperature of the comparison. masses: of theirs at temperature 1.
    """
    events, gold_N = exact.events, part.rows.labels_R[: part.rows.pairs]
    own_masses = launch.event_masses(own, events.student_ids, events.count)
    if theirs.temperature != 1.0:
        masses = launch.event_masses(theirs, events.student_ids, events.count)
    target_NK = teacher_masses(own_masses.log_NK, part.of_teacher.of_events(own.temperature), events)
    plain_NK, plain_target_NK = own_masses.log_NK, target_NK
    if own.temperature != 1.0:
        plain_NK = launch.event_masses(own.at(1.0), events.student_ids, events.count).log_NK
        plain_target_NK = teacher_masses(plain_NK, part.of_teacher.of_events(1.0), events)
    labelled_N = part.masks["t2s_ce"]
    lead_N = lead(target_NK=plain_target_NK, student_NK=plain_NK, id_N=gold_N, events=events)
    inside_N = _inside(theirs, masses, gold_N, events) - _inside(own, own_masses, gold_N, events)
    share, share_masses = (theirs, masses) if exact.shares_inside else (own, own_masses)
    change_NK = change_inside(share_NK=share_masses.log_NK, target_NK=target_NK)
    return Other(share, change_NK=change_NK, event_V=events.student_V), {
        "teacher_lead": masked_sum(lead_N, labelled_N),
        "t2s_inside": masked_sum(inside_N, labelled_N & events.open_V[gold_N]),
    }


def _label_distance(part: Block, theirs: Logits, soft_labels: Compare | None, moves: bool) -> Tensor:
    """t2s_ce with ids as labels, [N]: one id, or the teacher's mass at the student's ids."""
    assert part.rows.label_N is not None
    weight_N = part.weight("t2s_ce")
    if soft_labels is None:
        return launch.cross_entropy_of(theirs, Gold(part.rows.label_N.clamp(min=0), weight_N), write=moves)
    assert isinstance(soft_labels, MappedIds)
    other = _moved(soft_labels, part.of_teacher)
    return launch.compare(theirs.at(soft_labels.temperature), other, forward_kl, weight_N, write=moves)[0]


def _event_distance(
    part: Block, theirs: Logits, masses: Masses, events: Events, soft_labels: Compare | None, moves: bool
) -> Tensor:
    """t2s_ce with events as labels, [N]: their distribution, or the likeliest one, 0 for one that the student lacks."""
    teacher, weight_N = part.of_teacher, part.weight("t2s_ce")
    if soft_labels is not None:
        assert isinstance(soft_labels, EventCompare) and soft_labels.temperature == 1.0
        target_NK = teacher_masses(masses.log_NK, teacher.of_events(1.0), events)
        distance_N, handed = _between_events(soft_labels, masses, target_NK, weight_N, moves)
    else:
        label_N, slope_NK = teacher.likeliest_event_N, torch.empty_like(masses.log_NK)
        known_N = events.sizes_K[label_N] > 0
        gold = Gold(label_N, weight_N * known_N)
        nll_N = launch.cross_entropy_of(Logits(masses.log_NK, events.count), gold, write=moves, out_NV=slope_NK)
        distance_N, handed = torch.where(known_N, nll_N, 0), Handed(masses, slope_NK, events.student_V)
    if moves:
        launch.cross_entropy_of(theirs, None, handed=handed, write=True)
    return distance_N


def _between_events(
    compare: EventCompare, masses: Masses, target_NK: Tensor, weight_N: Tensor, moves: bool
) -> tuple[Tensor, Handed | None]:
    """The distance of masses from a target, [N], and what it hands back to the logits of the ids."""
    events, slope_NK = compare.events, torch.empty_like(masses.log_NK) if moves else None
    own, other = Logits(masses.log_NK, events.count), Other(Logits(target_NK, events.count))
    distance_N, _ = launch.compare(own, other, compare.divergence, weight_N, write=moves, out_NV=slope_NK)
    return distance_N, None if slope_NK is None else Handed(masses, slope_NK, events.student_V)


def _moved(compare: MappedIds, teacher: TeacherLogits) -> Other:
    """The teacher's mass at the student's ids."""
    moved = launch.event_masses(teacher.at(compare.temperature), compare.by_image, compare.student_vocab)
    return Other(Logits(moved.log_NK, compare.student_vocab))


def _inside(logits: Logits, masses: Masses, id_N: Tensor, events: Events) -> Tensor:
    """events.inside: log-probability of an id given its event, [N]."""
    of_event_N1 = masses.log_NK.gather(1, events.student_V[id_N][:, None])
    return logits.of_ids(id_N) - masses.normaliser_N - of_event_N1[:, 0]
