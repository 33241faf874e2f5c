"""Warns once, after the first steps, where the cross-entropy rises or a bad target pulls; tells when the guard acts."""

from collections.abc import Mapping

_STEPS = 10  # steps that are looked at, or the first two logged lines where these are more
_MANY_TIMES, _BAD_TIMES, _BAD_AGREEMENT = 4.0, 1.5, 0.5
_RISE, _RISE_NATS = 1.2, 0.1
_DUAL_SPACE = ("t2s_kd", "s2t_kd")  # without t2s_ce, which moves the projector alone


class Watch:
    """Collects the means of the first logged lines. Nothing here changes the run."""

    def __init__(self, *, target: str | None) -> None:
        """target: exact or projected for method dskd in the student's space, else None."""
        self._target = target
        self._seen: list[Mapping[str, float]] = []
        self._is_over = self._told_guard = False

    def see(self, means: Mapping[str, float], step: int) -> list[str]:
        """Take the means of a logged line, by name of the term, and its step. Returns the messages that now are due."""
        guard = self._guard(means, step)
        due = [] if guard is None else [guard]
        if self._is_over or "ce" not in means:
            return due
        self._seen.append(dict(means))
        self._is_over = step >= _STEPS and len(self._seen) > 1
        return due + [found for found in (self._rise(step), self._pull(step)) if found] if self._is_over else due

    def _mean(self, term: str, part: slice = slice(None)) -> float:
        lines = self._seen[part]
        return sum(line.get(term, 0.0) for line in lines) / len(lines)

    def _guard(self, means: Mapping[str, float], step: int) -> str | None:
        if self._told_guard or not means.get("guarded"):
            return None
        self._told_guard = True
        return (
            f"dskd: by step {step:.0f} the student finds the gold tokens likelier than the teacher does "
            f"(dskd/teacher_lead {means['teacher_lead']:.2f}), so it learns from the gold answers alone while that "
            "lasts. A teacher helps more on answers that it knows: its own (`dskd generate`), or these once it was "
            "fine-tuned on them. dskd.guard: false lets it teach on."
        )

    def _pull(self, step: int) -> str | None:
        """A distillation term that outweighs the cross-entropy, although the student is not that far from the data."""
        ce = self._mean("ce")
        terms = [term for term in _DUAL_SPACE if term in self._seen[0]]
        terms = terms or [term for term in self._seen[0] if term == "kd"]
        if not terms:
            return None
        name = max(terms, key=self._mean)
        value = self._mean(name)
        is_bad = self._target == "projected" and name == "t2s_kd" and self._mean("t2s_agreement") < _BAD_AGREEMENT
        if value <= (_BAD_TIMES if is_bad else _MANY_TIMES) * ce:
            return None
        return f"dskd: over the first {step:.0f} steps dskd/{name} is {value:.2f}, {value / ce:.1f} times the " + (
            f"cross-entropy ({ce:.2f}): the projected teacher is far from the student and may spoil it"
            + (f" (it agrees with the teacher on {self._mean('t2s_agreement'):.0%}). " if is_bad else ". ")
            + "Set dskd.target: exact, or lower dskd.kd_ratio."
            if self._target == "projected"
            else f"cross-entropy ({ce:.2f}): the teacher is far from a student that knows this data, and may spoil it. "
            "Check that the teacher is good at it (its template, its language), or lower dskd.kd_ratio."
        )

    def _rise(self, step: int) -> str | None:
        half = len(self._seen) // 2
        start, end = self._mean("ce", slice(half)), self._mean("ce", slice(half, None))
        if end <= max(_RISE * start, start + _RISE_NATS):
            return None
        return (
            f"dskd: the student's cross-entropy rises over the first {step:.0f} steps, from {start:.2f} to {end:.2f}. "
            "Lower learning_rate or dskd.kd_ratio"
            + (", or set dskd.target: exact." if self._target == "projected" else ".")
        )
