"""What the terms of paired rows read of the teacher, from one product with its head.

Shape letters as in objective.py; U ids of the teacher, K events or a few ids of a row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dskd_plugin.core.divergences import log_probs
from dskd_plugin.core.events import EventCompare, Events, Exact, likeliest_event
from dskd_plugin.core.heads import Head, head_logits, logits_at
from dskd_plugin.core.objective import Compare, Objective
from dskd_plugin.core.prefixes import PrefixCompare
from dskd_plugin.core.reduce import keep_rows
from dskd_plugin.core.rows import Rows, row_masks
from dskd_plugin.core.top_shared import TopSharedCompare


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


def states_read(rows: Rows, objective: Objective, *, labels: bool) -> Tensor | None:
    """The teacher's states that some term reads, [N, E], zeros where none does; None where nothing is read.

    Rows that no term takes may hold NaN: they are zeros before the product. labels: whether t2s_ce reads them too.
    """
    masks = row_masks(rows, objective)
    reading = [name for name in ("s2t_kd", "kd", "t2s_ce") if name in masks and (labels or name != "t2s_ce")]
    if not reading or rows.pairs == 0:
        return None
    assert rows.teacher_NE is not None
    mask_N = torch.stack([masks[name] for name in reading]).any(0)
    return keep_rows(rows.teacher_NE.detach(), mask_N)


def teacher_rows(
    rows: Rows,
    teacher_head: Head,
    objective: Objective,
    *,
    soft_labels: Compare | None = None,
    exact: Exact | None = None,
    compare: Compare | None = None,
) -> TeacherRows | None:
    """What the terms of paired rows read of the teacher; None where they read nothing."""
    kept_NE = states_read(rows, objective, labels=exact is not None or soft_labels is not None)
    if kept_NE is None:
        return None
    if isinstance(compare, TopSharedCompare):
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
