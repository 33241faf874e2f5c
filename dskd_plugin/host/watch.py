"""Warns once, after the first steps, where the cross-entropy rises or a bad target pulls; tells when the guard acts."""

from collections.abc import Mapping

_STEPS = 10  # steps that are looked at, or those of the first two logged lines where these are more
_MANY_TIMES, _BAD_TIMES, _BAD_AGREEMENT = 4.0, 1.5, 0.5
_RISE, _RISE_NATS = 1.2, 0.1
_DUAL_SPACE = ("t2s_kd", "s2t_kd")  # without t2s_ce, which moves the projector alone


class Watch:
    """Collects the means of the first logged lines. Nothing here changes the run."""

    def __init__(self, *, target: str | None, warmup: int = 0) -> None:
        """target: exact or projected for method dskd in the student's space, else None.

        warmup: steps that do not pull the student yet.
        """
        self._target, self._warmup = target, warmup
        self._seen: list[Mapping[str, float]] = []
        self._first: int | None = None
        self._is_over = False
        self._guarded: set[str] = set()

    def see(self, means: Mapping[str, float], step: int) -> list[str]:
        """Take the means of a logged line, by name of the term, and its step. Returns the warnings that now are due."""
        if self._is_over or "ce" not in means or step <= self._warmup:
            return []
        # A resumed run begins later.
        self._first = step if self._first is None else self._first
        self._seen.append(dict(means))
        looked_at = step if self._first <= _STEPS else step - self._first
        self._is_over = looked_at >= _STEPS and len(self._seen) > 1
        return [found for found in (self._rise(step), self._pull(step)) if found] if self._is_over else []

    def _mean(self, term: str, part: slice = slice(None)) -> float:
        lines = self._seen[part]
        return sum(line.get(term, 0.0) for line in lines) / len(lines)

    def _pulls(self, term: str) -> float:
        """A term as it pulled the student: scaled, and not in steps that were guarded."""
        pulls = [
            line.get(term, 0.0) * line.get("kd_scale", 1.0) * (1 - line.get("guarded", 0.0)) for line in self._seen
        ]
        return sum(pulls) / len(pulls)

    def see_guard(self, means: Mapping[str, float], step: int) -> list[str]:
        """What is told of each teacher that the guard stops for the first time."""
        several = [name for name in means if name.endswith("/guarded")]
        stopped = {name for name in several or ["guarded"] if means.get(name)} - self._guarded
        self._guarded |= stopped
        told = []
        for name in sorted(stopped):
            teacher = name.removesuffix("/guarded") if several else "the teacher"
            told.append(
                f"dskd: since step {step} or a little before, the student finds the gold tokens of its rows likelier "
                f"than {teacher} does (dskd/teacher_lead, in the mean of the last steps), so the gold answers teach "
                "alone while that lasts. A teacher helps more on answers that it knows: its own (`dskd generate`), or "
                "these once it was fine-tuned on them. After several epochs it may also be that the student knows the "
                "rows by heart. dskd.guard: false lets the teacher teach on. eval_loss is not guarded: choose "
                "checkpoints by eval_dskd/ce (metric_for_best_model)."
            )
        return told

    def _pull(self, step: int) -> str | None:
        """A distillation term that outweighs the cross-entropy, although the student is not that far from the data."""
        ce = self._mean("ce")
        terms = [term for term in _DUAL_SPACE if term in self._seen[0]]
        terms = terms or [term for term in self._seen[0] if term == "kd"]
        if not terms:
            return None
        name = max(terms, key=self._pulls)
        value, agreement = self._pulls(name), self._mean("t2s_agreement")
        is_bad = self._target == "projected" and name == "t2s_kd" and agreement < _BAD_AGREEMENT
        if value <= (_BAD_TIMES if is_bad else _MANY_TIMES) * ce:
            return None
        seen = f"dskd: in the first steps, up to step {step}, dskd/{name} is {value:.2f}, {value / ce:.1f} times the "
        if self._target != "projected":
            return (
                f"{seen}cross-entropy ({ce:.2f}): the teacher is far from a student that knows this data, and may "
                "spoil it. Check that the teacher is good at it (its template, its language), or lower dskd.kd_ratio."
            )
        agrees = f" (it agrees with the teacher on {agreement:.0%})" if is_bad else ""
        return (
            f"{seen}cross-entropy ({ce:.2f}): the projected teacher is far from the student and may spoil it{agrees}. "
            "Set dskd.target: exact, or lower dskd.kd_ratio."
        )

    def _rise(self, step: int) -> str | None:
        half = len(self._seen) // 2
        start, end = self._mean("ce", slice(half)), self._mean("ce", slice(half, None))
        if end <= max(_RISE * start, start + _RISE_NATS):
            return None
        return (
            f"dskd: the student's cross-entropy rises in the first steps, up to step {step}, from {start:.2f} to "
            f"{end:.2f}. Lower learning_rate or dskd.kd_ratio"
            + (", or set dskd.target: exact." if self._target == "projected" else ".")
        )
