"""Events: what two vocabularies can both say next, however finely each of them cuts it.

A student's token of a newline with indentation and a teacher's bare newline open the same text: to compare their
probabilities id by id teaches the student a bare newline, which in its own tokenization means "no indentation".
Every token of either side belongs to one event, and only the masses of events are compared.

Shape letters: N rows, V ids of the student, U ids of the teacher, K events.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Self

import torch
from torch import Tensor

from dskd_plugin.core.divergences import Divergence, log_probs


@dataclass(frozen=True)
class Events:
    """The event of each id of both vocabularies, a number from 0 to count - 1.

    student_V, teacher_U: int64. Every event has ids of both sides, except perhaps the last: the *rest*, which holds
    all ids of events that the other side lacks.
    """

    student_V: Tensor
    teacher_U: Tensor
    count: int

    def to(self, device: torch.device) -> Self:
        return type(self)(self.student_V.to(device), self.teacher_U.to(device), self.count)

    @cached_property
    def sizes_K(self) -> Tensor:
        """Number of student ids of each event, int64."""
        return torch.bincount(self.student_V, minlength=self.count)

    @cached_property
    def student_lacks_last(self) -> bool:
        """Whether the last event is a rest that no id of the student belongs to."""
        return bool(self.sizes_K[-1] == 0)

    @cached_property
    def teacher_lacks_last(self) -> bool:
        return not bool((self.teacher_U == self.count - 1).any())


def events_of(student_keys: Sequence[Hashable | None], teacher_keys: Sequence[Hashable | None]) -> Events:
    """Ids with one key are one event; ids whose key is None or is not found on the other side are the rest.

    student_keys, teacher_keys: one per id. ValueError where no key occurs on both sides.
    """
    common = {key for key in student_keys if key is not None} & set(teacher_keys)
    if not common:
        raise ValueError(
            "keys of two vocabularies: expected at least one that both have, got none. Give keys of one kind."
        )
    # Numbered by the student's ids, so that the numbers do not depend on the order of a set.
    number = {key: k for k, key in enumerate(dict.fromkeys(key for key in student_keys if key in common))}
    rest = len(number)
    student = [number.get(key, rest) for key in student_keys]
    teacher = [number.get(key, rest) for key in teacher_keys]
    has_rest = rest in student or rest in teacher
    return Events(torch.tensor(student), torch.tensor(teacher), rest + has_rest)


def events_of_pairs(pairs: Iterable[tuple[int, int]], student_ids: int, teacher_ids: int) -> Events:
    """One event for each (student id, teacher id), the rest for all other ids. Pairs are one-to-one."""
    student_keys: list[int | None] = [None] * student_ids
    teacher_keys: list[int | None] = [None] * teacher_ids
    for student_id, teacher_id in pairs:
        student_keys[student_id] = teacher_keys[teacher_id] = student_id
    return events_of(student_keys, teacher_keys)


def masses(log_probs_NV: Tensor, event_V: Tensor, count: int) -> Tensor:
    """Log-probability of each event: the log of the sum over its ids. Returns [N, count], -inf for an empty event."""
    with torch.no_grad():
        index_NV = event_V.expand_as(log_probs_NV)
        peak_NK = log_probs_NV.new_full((len(log_probs_NV), count), -torch.inf)
        peak_NK = peak_NK.scatter_reduce(1, index_NV, log_probs_NV, "amax")
        # An event without mass has nothing to shift by.
        peak_NK = torch.where(peak_NK.isneginf(), 0, peak_NK)
    # Shifted by each event's likeliest id: probabilities below 1e-38 would all be 0 in fp32.
    shifted_NV = (log_probs_NV - peak_NK.index_select(1, event_V)).exp()
    sums_NK = shifted_NV.new_zeros(peak_NK.shape).index_add(1, event_V, shifted_NV)
    # log(0) has an infinite slope, which would meet a zero gradient.
    present_NK = sums_NK > 0
    return torch.where(present_NK, torch.where(present_NK, sums_NK, 1).log() + peak_NK, -torch.inf)


def teacher_masses(student_NK: Tensor, teacher_NU: Tensor, events: Events) -> Tensor:
    """The teacher's log-mass of each event; of what one side alone can say, the student's own opinion stands.

    student_NK: the student's masses. teacher_NU: log-probabilities of the teacher. No gradient.
    Where the teacher has no id of the rest, the student's mass of it stays and the teacher's masses share the
    remainder. Where the student has none, the teacher's mass of it is shared out as the student shares its own.
    Both sums stay 1, and a student that agrees on all other events is not pulled.
    """
    student_NK, teacher_NK = student_NK.detach(), masses(teacher_NU.detach(), events.teacher_U, events.count)
    if events.teacher_lacks_last:
        own_N1 = student_NK[:, -1:]
        return torch.cat([teacher_NK[:, :-1] + torch.log1p(-own_N1.exp()), own_N1], dim=-1)
    if events.student_lacks_last:
        shared_out_NK = torch.logaddexp(teacher_NK[:, :-1], teacher_NK[:, -1:] + student_NK[:, :-1])
        return torch.cat([shared_out_NK, torch.full_like(teacher_NK[:, -1:], -torch.inf)], dim=-1)
    return teacher_NK


@dataclass(frozen=True)
class EventCompare:
    """dist(masses of the student, masses of the teacher) over events, at the temperature; nothing is renormalised.

    The gradient reaches the student's logits alone. Returns [N] nats.
    """

    divergence: Divergence
    temperature: float
    events: Events

    def __call__(self, *, student_NV: Tensor, teacher_NV: Tensor) -> Tensor:
        events = self.events
        student_NK = masses(log_probs(student_NV, temperature=self.temperature), events.student_V, events.count)
        teacher_NU = log_probs(teacher_NV, temperature=self.temperature)
        return self.divergence(student_NV=student_NK, teacher_NV=teacher_masses(student_NK, teacher_NU, events))


@dataclass(frozen=True)
class Exact:
    """How method dskd makes an exact target in the student's space.

    events: of the two vocabularies. shares_inside: the projected teacher shares out inside an event, else the
    student's own distribution does, which pulls between events alone.
    """

    events: Events
    shares_inside: bool


def exact_target(*, student_NV: Tensor, share_NV: Tensor, teacher_NU: Tensor, events: Events) -> Tensor:
    """Log-probabilities over the student's ids: the teacher decides between events, another distribution inside them.

        target(v) = M_t(e) share(v) / M_share(e),   e the event of v, M the mass of an event

    student_NV, share_NV, teacher_NU: log-probabilities. share_NV: the projected teacher's, or the student's own, which
    pulls between events alone. Returns [N, V], each row summing to 1 after exp, without gradient.
    """
    is_own = share_NV is student_NV
    share_NV = share_NV.detach()
    student_NK = masses(student_NV.detach(), events.student_V, events.count)
    wanted_NK = teacher_masses(student_NK, teacher_NU, events)
    shared_NK = student_NK if is_own else masses(share_NV, events.student_V, events.count)
    # The rest may be empty on the student's side: -inf - -inf is never read there.
    change_NK = torch.where(shared_NK.isneginf(), 0, wanted_NK - shared_NK)
    return share_NV + change_NK.index_select(1, events.student_V)


def inside(log_probs_NV: Tensor, id_N: Tensor, events: Events) -> Tensor:
    """Log-probability of an id given its event. Returns [N] nats, <= 0."""
    id_N1 = id_N[:, None]
    mass_NK = masses(log_probs_NV, events.student_V, events.count)
    return (log_probs_NV.gather(1, id_N1) - mass_NK.gather(1, events.student_V[id_N1]))[:, 0]
