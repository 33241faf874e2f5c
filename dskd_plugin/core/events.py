"""Events: what two vocabularies can both say next, however finely each of them cuts it.

A student's token of a newline with indentation and a teacher's bare newline open the same text: to compare their
probabilities id by id teaches the student a bare newline, which in its own tokenization means "no indentation".
Every token of either side belongs to one event, and only the masses of events are compared.

Shape letters: N rows, V ids of the student, U ids of the teacher, K events.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

import torch
from torch import Tensor

from dskd_plugin.core.divergences import NEARLY_CERTAIN, Divergence, log1mexp, log_probs


@dataclass(frozen=True)
class IdsByEvent:
    """Ids of one vocabulary in the order of their events, and the event of each, int32: an event's ids stand together.

    Ids without an event may be left out.
    """

    ids_P: Tensor
    event_P: Tensor

    @classmethod
    def of(cls, ids_P: Tensor, event_P: Tensor) -> Self:
        event_P, order_P = event_P.sort(stable=True)
        return cls(ids_P[order_P].int(), event_P.int())


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
    def open_V(self) -> Tensor:
        """Student ids whose event has others beside them, bool: the teacher does not decide between these."""
        return (self.sizes_K > 1)[self.student_V]

    @cached_property
    def student_ids(self) -> IdsByEvent:
        return IdsByEvent.of(torch.arange(len(self.student_V), device=self.student_V.device), self.student_V)

    @cached_property
    def teacher_ids(self) -> IdsByEvent:
        return IdsByEvent.of(torch.arange(len(self.teacher_U), device=self.teacher_U.device), self.teacher_U)

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


def masses(log_weights_NV: Tensor, event_V: Tensor, count: int) -> Tensor:
    """Log-weight of each event: the log of the sum over its ids. Returns [N, count], -inf for an empty event.

    log_weights_NV: log-probabilities, or logits for masses that are not normalised; a transposed [V, N] is read as it
    is. Holds one copy of it at most.
    """
    apply: Callable[..., Tensor] = _Masses.apply
    return apply(log_weights_NV, event_V, count)


class _Masses(torch.autograd.Function):
    """M(e) = peak + log sum exp(x - peak), with the peak of each event: by a common one, small events would be 0.

    d / d x(v) = exp(x(v) - M(e)). Its own rule because the ids of an event are added up as whole rows of [V, N], a few
    ids at a time: several times faster than one element after the other, and nothing but the input is held.
    """

    @staticmethod
    def forward(ctx: Any, log_weights_NV: Tensor, event_V: Tensor, count: int) -> Tensor:
        mass_NK, _ = _masses_and_peaks(log_weights_NV, event_V, count)
        ctx.save_for_backward(log_weights_NV, event_V, mass_NK)
        return mass_NK

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient_NK: Tensor) -> tuple[Tensor, None, None]:
        log_weights_NV, event_V, mass_NK = ctx.saved_tensors
        # Ids of an event without mass have the weight 0: whatever is finite may stand in for it.
        shift_NK = mass_NK.masked_fill(mass_NK.isneginf(), 0)
        found_NV = (log_weights_NV - shift_NK.index_select(1, event_V)).exp_()
        return found_NV.mul_(gradient_NK.index_select(1, event_V)), None, None


def _masses_and_peaks(log_weights_NV: Tensor, event_V: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Log-weight of each event, [N, count], and that of its likeliest id, [count, N], 0 for an event without any."""
    rows_VN = log_weights_NV.T.contiguous()
    peak_KN = rows_VN.new_full((count, rows_VN.shape[1]), -torch.inf)
    peak_KN.scatter_reduce_(0, event_V[:, None].expand_as(rows_VN), rows_VN, "amax")
    # An event without mass has nothing to shift by.
    peak_KN.masked_fill_(peak_KN.isneginf(), 0)
    sums_KN = torch.zeros_like(peak_KN)
    for ids in _id_blocks(rows_VN):
        event_B = event_V[ids]
        sums_KN.index_add_(0, event_B, (rows_VN[ids] - peak_KN.index_select(0, event_B)).exp_())
    return sums_KN.log_().add_(peak_KN).T.contiguous(), peak_KN


def _id_blocks(rows_VN: Tensor) -> Iterator[slice]:
    """Ids of some 1 MiB at a time on a CPU, which its caches hold; all of them elsewhere."""
    ids, rows = rows_VN.shape
    step = max(1, 2**18 // max(1, rows)) if rows_VN.device.type == "cpu" else max(1, ids)
    return (slice(start, start + step) for start in range(0, ids, step))


def likeliest_event(log_weights_NV: Tensor, event_V: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The masses, and the event of each row's likeliest id, [N]; of several such ids the first of their events.

    Without gradient. No further pass over the ids: the likeliest id of each event is known from the masses.
    """
    mass_NK, peak_KN = _masses_and_peaks(log_weights_NV.detach(), event_V, count)
    # Also an event without mass has a peak, 0, which is none.
    peak_NK = peak_KN.T.masked_fill(mass_NK.isneginf(), -torch.inf)
    return mass_NK, peak_NK.contiguous().argmax(-1)


def event_log_probs(logits_NV: Tensor, event_V: Tensor, count: int, *, temperature: float) -> Tensor:
    """Log-probability of each event under softmax(z / temperature). Returns [N, count].

    The masses of the logits normalised: the ids' own log-probabilities are not made.
    """
    scaled_NV = logits_NV if temperature == 1.0 else logits_NV / temperature
    return log_probs(masses(scaled_NV, event_V, count), temperature=1.0)


def teacher_masses(student_NK: Tensor, teacher_NK: Tensor, events: Events) -> Tensor:
    """The teacher's log-mass of each event; of what one side alone can say, the student's own opinion stands.

    student_NK, teacher_NK: log-masses. No gradient.
    Where the teacher has no id of the rest, the student's mass of it stays and the teacher's masses share the
    remainder. Where the student has none, the teacher's mass of it is shared out as the student shares its own.
    Both sums stay 1, and a student that agrees on all other events is not pulled.
    """
    student_NK, teacher_NK = student_NK.detach(), teacher_NK.detach()
    if events.teacher_lacks_last:
        own_N1 = student_NK[:, -1:].clamp(max=NEARLY_CERTAIN)
        return torch.cat([teacher_NK[:, :-1] + log1mexp(own_N1), own_N1], dim=-1)
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
        sides = (student_NV, events.student_V), (teacher_NV.detach(), events.teacher_U)
        student_NK, teacher_NK = (
            event_log_probs(logits_NV, event_V, events.count, temperature=self.temperature)
            for logits_NV, event_V in sides
        )
        return self.of_masses(student_NK=student_NK, teacher_NK=teacher_NK)

    def of_masses(self, *, student_NK: Tensor, teacher_NK: Tensor) -> Tensor:
        """The same from the log-probabilities of events at the temperature."""
        return self.divergence(student_NV=student_NK, teacher_NV=teacher_masses(student_NK, teacher_NK, self.events))


@dataclass(frozen=True)
class Exact:
    """How method dskd makes an exact target in the student's space.

    events: of the two vocabularies. shares_inside: the projected teacher shares out inside an event, else the
    student's own distribution does, which pulls between events alone.
    """

    events: Events
    shares_inside: bool


def exact_target(*, share_NV: Tensor, share_NK: Tensor, target_NK: Tensor, events: Events) -> Tensor:
    """Log-probabilities over the student's ids: the teacher decides between events, another distribution inside them.

        target(v) = M_t(e) share(v) / M_share(e),   e the event of v, M the mass of an event

    share_NV: log-probabilities or logits of the projected teacher, or of the student itself, which pulls between events
    alone; share_NK: their masses. target_NK: M_t, see teacher_masses. None of them with a gradient.
    Returns [N, V], each row summing to 1 after exp.
    """
    change_NK = change_inside(share_NK=share_NK, target_NK=target_NK)
    return change_NK.index_select(1, events.student_V).add_(share_NV)


def change_inside(*, share_NK: Tensor, target_NK: Tensor) -> Tensor:
    """log M_t(e) - log M_share(e): what is added to the log-share of each id of an event, see exact_target. [N, K]."""
    # The rest may be empty on the student's side: -inf - -inf is never read there.
    return torch.where(share_NK.isneginf(), 0, target_NK - share_NK)


def lead(*, target_NK: Tensor, student_NK: Tensor, id_N: Tensor, events: Events) -> Tensor:
    """How much likelier than the student the exact target finds the event of an id. Returns [N] nats, no gradient."""
    event_N1 = events.student_V[id_N][:, None]
    return (target_NK.gather(1, event_N1) - student_NK.gather(1, event_N1))[:, 0]


def inside(log_weights_NV: Tensor, mass_NK: Tensor, id_N: Tensor, events: Events) -> Tensor:
    """Log-probability of an id given its event. Returns [N] nats, <= 0.

    log_weights_NV: log-probabilities or logits of the student's ids. mass_NK: their masses.
    """
    id_N1 = id_N[:, None]
    return (log_weights_NV.gather(1, id_N1) - mass_NK.gather(1, events.student_V[id_N1]))[:, 0]
