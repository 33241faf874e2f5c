"""Records of a comparison of models."""

from __future__ import annotations

from dskd_eval.schema.base import Record, Text


class PairRow(Record):
    """One task, second model against first. better: first, second or None (not certain)."""

    task: Text
    metric: Text
    first: float
    second: float
    difference: float
    low: float | None
    high: float | None
    interval: str = ""
    better: str | None
    wins: int
    ties: int
    losses: int
    p: float
    test: str
    n: int
    of: int
    p_holm: float = 1.0


class PairedModels(Record):
    """`model` against `against`, task by task."""

    model: Text
    against: Text | None = None
    rows: list[PairRow]


class GapRow(Record):
    """One task: how much of the way from base to teacher the student went, in percent."""

    task: Text
    base: float
    student: float
    teacher: float
    closed: float | None
    low: float | None
    high: float | None
    interval: str = ""
    n: int


class GapOfModel(Record):
    model: Text
    rows: list[GapRow]


class Comparison(Record):
    """Every model against the baseline, and closed gaps; within results.json the notes stand with those of the run."""

    baseline: Text = ""
    pairs: list[PairedModels] = []
    gaps: list[GapOfModel] = []
    notes: list[Text] = []

    def without_notes(self) -> Comparison:
        return Comparison.model_validate({name: value for name, value in self.given().items() if name != "notes"})
