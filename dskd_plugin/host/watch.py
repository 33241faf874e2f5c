"""Warns once, after the first logged steps, where the cross-entropy rises or a KD term is many times as large."""

from collections.abc import Mapping

_STEPS = 10  # logged steps that are looked at
_MANY_TIMES = 4.0
_RISE, _RISE_NATS = 1.2, 0.1
_DUAL_SPACE = ("t2s_kd", "s2t_kd")  # without t2s_ce, which moves the projector alone


class Watch:
    """Collects the means of the first logged steps. Nothing here changes the run."""

    def __init__(self, *, target: str | None) -> None:
        """target: exact or projected for method dskd in the student's space, else None."""
        self._target = target
        self._seen: list[Mapping[str, float]] = []

    def see(self, means: Mapping[str, float]) -> list[str]:
        """Take the means of a logged step, by name of the term. Returns the warnings that now are due."""
        if len(self._seen) >= _STEPS or "ce" not in means:
            return []
        self._seen.append(dict(means))
        return [found for found in (self._rise(), self._pull()) if found] if len(self._seen) == _STEPS else []

    def _mean(self, term: str, first: int, last: int) -> float:
        return sum(step.get(term, 0.0) for step in self._seen[first:last]) / (last - first)

    def _pull(self) -> str | None:
        """A distillation term that outweighs the cross-entropy, although the student is not that far from the data."""
        ce = self._mean("ce", 0, _STEPS)
        terms = [term for term in _DUAL_SPACE if term in self._seen[0]]
        terms = terms or [term for term in self._seen[0] if term == "kd"]
        if not terms:
            return None
        name = max(terms, key=lambda term: self._mean(term, 0, _STEPS))
        value = self._mean(name, 0, _STEPS)
        if value <= _MANY_TIMES * ce:
            return None
        return (
            f"dskd: over the first {_STEPS} logged steps dskd/{name} is {value:.2f}, {value / ce:.0f} times the "
            f"cross-entropy ({ce:.2f}): "
            + (
                "the projected teacher is far from the student and may spoil it. Set dskd.target: exact, or lower "
                "dskd.kd_ratio."
                if self._target == "projected"
                else "the teacher is far from a student that knows this data, and may spoil it. Check that the teacher "
                "is good at it (its template, its language), or lower dskd.kd_ratio."
            )
        )

    def _rise(self) -> str | None:
        half = _STEPS // 2
        start, end = self._mean("ce", 0, half), self._mean("ce", half, _STEPS)
        if end <= max(_RISE * start, start + _RISE_NATS):
            return None
        return (
            f"dskd: the student's cross-entropy rises over the first {_STEPS} logged steps, from {start:.2f} to "
            f"{end:.2f}. Lower learning_rate or dskd.kd_ratio"
            + (", or set dskd.target: exact." if self._target == "projected" else ".")
        )
