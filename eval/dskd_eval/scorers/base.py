"""What a scorer is: its name, metrics and requirements, how it judges answers, and how rows are checked for it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from dskd_eval import stats
from dskd_eval.data import Row
from dskd_eval.errors import UserError
from dskd_eval.scorers.metrics import Judgement, Metric


@dataclass(frozen=True)
class Answer:
    """One answer to score. `style` tells completions (base) from chat replies; parts: the row's `code:` block."""

    row: Row
    text: str
    references: list[str]
    style: str = "base"
    parts: Mapping[str, str] = field(default_factory=dict)


class Scorer(ABC):
    """One way to judge answers. A new one is one class and its row in `registry.SCORERS`."""

    name: ClassVar[str]
    # In the order of a task without `metrics:`, the primary one first.
    metrics: ClassVar[Mapping[str, Metric]]
    # Modules and files that scoring needs, checked before anything is generated.
    modules: ClassVar[tuple[str, ...]] = ()
    needs: ClassVar[tuple[str, ...]] = ()
    # Parts of `code:` that a task must give.
    required_code: ClassVar[tuple[str, ...]] = ()
    executes_code: ClassVar[bool] = False
    # Whether a task must name the reference of a row, and whether a reference that it names must score 100.
    needs_reference: ClassVar[bool] = True
    references_are_right: ClassVar[bool] = True
    # Whether references are scored before a model is loaded, and how many different ones where that is slow.
    checked_before_run: ClassVar[bool] = True
    most_checked: ClassVar[int | None] = None
    # An answer to score for every row, where rows hold no right one.
    probe: ClassVar[str | None] = None

    @classmethod
    def primary(cls) -> str:
        return next(iter(cls.metrics))

    @abstractmethod
    def score(self, answers: Sequence[Answer]) -> list[Judgement]:
        """One `Judgement` per answer, with a value for each of `metrics`; takes all answers of a task at once."""

    def check_row(self, row: Row, parts: Mapping[str, str]) -> None:
        """Raises UserError when a row lacks what the scorer reads of it."""
        return None

    def check_reference(self, answer: Answer) -> None:
        """Raises UserError when an answer that must be right does not score 100."""
        value = self.score([answer])[0].metrics[self.primary()]
        if value != 1.0:
            raise UserError(
                "",
                expected=f"a reference that its own `scorer: {self.name}` scores 100",
                got=f"{answer.text[:120]!r}, which scores {100 * stats.mean([value]):.0f}",
                fix="Correct `reference` or the row, choose another scorer, or give `reference_answer`, a template "
                "of an answer that is right.",
            )

    def extracted(self, answer: Answer) -> str:
        """What is scored of an answer: a number, a formula, a program; '' for the whole text."""
        return str(self.score([answer])[0].details.get("extracted") or "")


class AnswerScorer(Scorer):
    """A scorer that judges each answer by itself."""

    @abstractmethod
    def score_one(self, answer: Answer) -> Judgement: ...

    def score(self, answers: Sequence[Answer]) -> list[Judgement]:
        return [self.score_one(answer) for answer in answers]
