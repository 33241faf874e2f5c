"""Byte-prefix marginalization: the teacher's next-token distribution said in the student's tokens, by their bytes.

A teacher token says how the text goes on. Its mass goes to the longest student token that its bytes begin with; where
the student begins inside a teacher token, only teacher tokens that begin with the bytes already said count; where the
student's token is longer than the teacher's, the teacher's next distribution along the text says how it goes on.
Source: byte-prefix marginalization, arXiv 2607.22334.

Shape letters: N rows, Q further teacher rows along the text, P rows of either kind, U ids of the teacher, V ids of the
student, C classes of the student's ids with the residual as the last, K ids of a map and M classes of it, E width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dskd_plugin.core.divergences import Divergence, log_probs
from dskd_plugin.core.events import event_log_probs, masses

NONE = -1  # in place of a teacher id: the text goes on with no further teacher token that matters


@dataclass(frozen=True)
class PrefixMap:
    """Where the mass of each teacher token goes, given what the row's token has of the text so far.

    ids_K: teacher ids; None for all of them. place_K: the place of the class of each in classes_M.
    classes_M: the classes that get mass; None for all, in their order.
    others: the place of the class that gets the mass of all other ids; None: the distribution is that given ids_K.
    """

    ids_K: Tensor | None
    place_K: Tensor
    classes_M: Tensor | None = None
    others: int | None = None

    def to(self, device: torch.device) -> PrefixMap:
        ids_K, classes_M = (None if x is None else x.to(device) for x in (self.ids_K, self.classes_M))
        return replace(self, ids_K=ids_K, place_K=self.place_K.to(device), classes_M=classes_M)

    def masses(self, log_PU: Tensor, next_P: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Log-mass of each class without the token that the text goes on with, and that token's own log-probability.

        log_PU: log-probabilities; the entries of next_P are overwritten. next_P: teacher ids of the map, or NONE.
        count: C. Returns [P, M], -inf for a class without mass, and [P], 0 for NONE.
        """
        goes_on_P, at_P1 = next_P != NONE, next_P.clamp(min=0)[:, None]
        own_P1 = log_PU.gather(1, at_P1)
        step_P = torch.where(goes_on_P, own_P1[:, 0], 0)
        # Its mass goes to no class here: the teacher rows that follow share it out.
        log_PU.scatter_(1, at_P1, own_P1.masked_fill(goes_on_P[:, None], -torch.inf))
        size = count if self.classes_M is None else len(self.classes_M)
        if self.ids_K is None:
            return masses(log_PU, self.place_K, size), step_P
        mass_PM = masses(log_PU.index_select(1, self.ids_K), self.place_K, size)
        if self.others is not None:
            left_P = log_PU.index_fill(1, self.ids_K, -torch.inf).logsumexp(1)
            mass_PM[:, self.others] = torch.logaddexp(mass_PM[:, self.others], left_P)
            return mass_PM, step_P
        whole_P = torch.logaddexp(mass_PM.logsumexp(1), torch.where(goes_on_P, step_P, -torch.inf))
        return mass_PM - whole_P[:, None], torch.where(goes_on_P, step_P - whole_P, 0)


@dataclass(frozen=True, kw_only=True)
class Places:
    """Where the student's rows stand in the teacher's text.

    maps: those that map_N and map_Q number. map_N: of the teacher's row of each pair; next_N: the teacher token that
    the text goes on with there, where the student's token goes on beyond it, else NONE.
    row_Q: the pair, 0 to N - 1, that each further teacher row belongs to, not falling; depth_Q: its number among those
    of its pair, from 1; map_Q, next_Q: as above, NONE at the last of a pair. teacher_QE: the teacher's states there.
    """

    maps: tuple[PrefixMap, ...]
    map_N: Tensor
    next_N: Tensor
    row_Q: Tensor
    depth_Q: Tensor
    map_Q: Tensor
    next_Q: Tensor
    teacher_QE: Tensor

    def of_states(self, teacher_QE: Tensor) -> Places:
        """The same with the teacher's states, on their device."""
        names = ("map_N", "next_N", "row_Q", "depth_Q", "map_Q", "next_Q")
        moved = {name: getattr(self, name).to(teacher_QE.device) for name in names}
        return replace(self, teacher_QE=teacher_QE.detach(), **moved)

    def block(self, rows: slice) -> Places:
        """Those of some pairs."""
        first, stop, _ = rows.indices(len(self.map_N))
        within_Q = (self.row_Q >= first) & (self.row_Q < stop)
        parts = {name: getattr(self, name)[within_Q] for name in ("depth_Q", "map_Q", "next_Q", "teacher_QE")}
        return replace(
            self,
            map_N=self.map_N[first:stop],
            next_N=self.next_N[first:stop],
            row_Q=self.row_Q[within_Q] - first,
            **parts,
        )


@dataclass(frozen=True)
class PrefixCompare:
    """dist of the student and of the teacher said in the student's classes, at the temperature.

        m(u) = the teacher's mass of texts whose longest student token is u,   dist(q, m) over the classes

    together: the map of rows that begin with their teacher token. count: C. student_V: class of each student id, 0 to
    C - 2; None: each is a class of its own and C = V + 1.
    The residual, the last class, has on the teacher's side what no student token takes, on the student's side all
    classes that no teacher token of the row can open. Nothing is renormalised. The gradient reaches the student alone.
    Called with whole logits it gives [N] nats for rows that all begin with their teacher token and end no later;
    `target` and `of_target` give it for any.
    """

    divergence: Divergence
    temperature: float
    together: PrefixMap
    count: int
    student_V: Tensor | None = None

    def __call__(self, *, student_NV: Tensor, teacher_NV: Tensor) -> Tensor:
        log_NU = log_probs(teacher_NV.detach(), temperature=self.temperature)
        none_N = torch.full((len(log_NU),), NONE, device=log_NU.device)
        target_NC, _ = self.together.masses(log_NU, none_N, self.count)
        return self.of_target(student_NV=student_NV, target_NC=target_NC)

    def target(self, teacher_NE: Tensor, places: Places, logits_of: Callable[[Tensor], Tensor], *, rows: int) -> Tensor:
        """Log-mass of each class under the teacher, [N, C], each row summing to 1 after exp; no gradient.

        logits_of: the teacher's logits [P, U] of states [P, E]. rows: further teacher rows that are read at a time.
        """
        every_N = torch.arange(len(teacher_NE), device=teacher_NE.device)
        log_NU = log_probs(logits_of(teacher_NE), temperature=self.temperature)
        target_NC = log_NU.new_full((len(every_N), self.count), -torch.inf)
        weight_N = log_NU.new_zeros(len(every_N))
        self._add(target_NC, weight_N, every_N, log_NU, places.maps, places.map_N, places.next_N)
        del log_NU
        for part_P in _by_depth(places.depth_Q, rows):
            log_PU = log_probs(logits_of(places.teacher_QE[part_P]), temperature=self.temperature)
            row_P, map_P, next_P = (values_Q[part_P] for values_Q in (places.row_Q, places.map_Q, places.next_Q))
            self._add(target_NC, weight_N, row_P, log_PU, places.maps, map_P, next_P)
        return target_NC

    def _add(
        self,
        target_NC: Tensor,
        weight_N: Tensor,
        row_P: Tensor,
        log_PU: Tensor,
        maps: tuple[PrefixMap, ...],
        map_P: Tensor,
        next_P: Tensor,
    ) -> None:
        """Add what teacher rows of different pairs say; weight_N: log-probability of the text up to there."""
        # One map at a time, because its rows give mass to the same few classes.
        for number in sorted({*map_P.tolist()}):
            here_B = (map_P == number).nonzero()[:, 0]
            one, row_B = maps[number], row_P[here_B]
            log_BU = log_PU if len(here_B) == len(log_PU) else log_PU[here_B]
            mass_BM, step_B = one.masses(log_BU, next_P[here_B], self.count)
            at: Any = row_B if one.classes_M is None else (row_B[:, None], one.classes_M)
            weight_B = weight_N[row_B]
            target_NC[at] = torch.logaddexp(target_NC[at], weight_B[:, None] + mass_BM)
            weight_N[row_B] = weight_B + step_B

    def of_target(self, *, student_NV: Tensor, target_NC: Tensor) -> Tensor:
        """The distance of the student's logits of the real ids from a target, [N] nats."""
        if self.student_V is None:
            student_NC = log_probs(student_NV, temperature=self.temperature)
        else:
            student_NC = event_log_probs(student_NV, self.student_V, self.count, temperature=self.temperature)
        apply: Callable[..., Tensor] = _Pooled.apply
        pooled_NC = apply(student_NC, target_NC)
        return self.divergence(student_NV=pooled_NC, teacher_NV=_sayable(target_NC, pooled_NC.detach()))


def _by_depth(depth_Q: Tensor, rows: int) -> Iterator[Tensor]:
    """Numbers of further teacher rows, so many at a time, none of one pair together and each after those before it."""
    for depth in sorted({*depth_Q.tolist()}):
        yield from torch.split((depth_Q == depth).nonzero()[:, 0], max(1, rows))


def _sayable(target_NC: Tensor, student_NC: Tensor) -> Tensor:
    """A residual that the student has no class for, shared out as the student shares its own mass."""
    empty_N1 = student_NC[:, -1:].isneginf()
    if not bool((empty_N1[:, 0] & ~target_NC[:, -1].isneginf()).any()):
        return target_NC
    left_N1 = target_NC[:, -1:].masked_fill(~empty_N1, -torch.inf)
    kept_NC = target_NC.clone()
    kept_NC[:, -1:].masked_fill_(empty_N1, -torch.inf)
    return torch.logaddexp(kept_NC, left_N1 + student_NC)


class _Pooled(torch.autograd.Function):
    """The student's log-masses with all classes that the teacher gives no mass in one, the last.

    student_NC: C classes, or C - 1 without a residual of their own. Its own rule because it holds two tensors of that
    size where plain autograd holds five, and makes no NaN of an empty residual.
    """

    @staticmethod
    def forward(ctx: Any, student_NC: Tensor, target_NC: Tensor) -> Tensor:
        last = target_NC.shape[1] - 1
        open_NC = target_NC[:, :last].isneginf()
        left_NC = student_NC.clone()
        left_NC[:, :last].masked_fill_(~open_NC, -torch.inf)
        rest_N1 = left_NC.logsumexp(1, keepdim=True)
        pooled_NC = torch.cat([student_NC[:, :last].masked_fill(open_NC, -torch.inf), rest_N1], dim=1)
        ctx.save_for_backward(student_NC, open_NC, rest_N1)
        return pooled_NC

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient_NC: Tensor) -> tuple[Tensor, None]:
        student_NC, open_NC, rest_N1 = ctx.saved_tensors
        last = open_NC.shape[1]
        # An empty residual has no member: whatever is finite may stand in for it. Other classes are not read below.
        share_NC = (student_NC - rest_N1.masked_fill(rest_N1.isneginf(), 0)).exp_()
        found_NC = share_NC.mul_(gradient_NC[:, last:])
        found_NC[:, :last] = torch.where(open_NC, found_NC[:, :last], gradient_NC[:, :last])
        return found_NC, None
