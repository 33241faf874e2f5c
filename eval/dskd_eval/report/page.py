"""What both report files show, as records: report.html holds a `Page` as JSON, report.md is written from it."""

from __future__ import annotations

from dskd_eval.schema import (
    Comparison,
    Environment,
    ModelRecord,
    Record,
    SandboxRecord,
    ScoreRow,
    Settings,
    SuiteScore,
    TaskRecord,
    Text,
)


class ShownModel(ModelRecord):
    label: Text


class ShownTask(TaskRecord):
    """A line of the score tables, with every style and number of shots in which the task was measured."""

    styles: list[str]
    all_shots: list[int]


class MeasuredTask(Record):
    """One way in which a task was measured, with the models that were measured so."""

    task: TaskRecord
    models: list[Text]


class ShownMetric(Record):
    label: Text
    description: Text
    unit: str
    higher_is_better: bool
    graded: bool


class ShownCounts(Record):
    """Counts of the answers of a task and model, as texts under the names of `_ANSWERS`."""

    task: Text
    model: Text
    facts: dict[str, str]


class ShownRun(Record):
    label: Text
    models: list[Text]
    settings: Settings
    environment: Environment
    sandbox: SandboxRecord | None


class ShownAnswer(Record):
    """Answers of one model to a document; the prompt stands with the document where all models had the same."""

    model: Text
    value: float | None
    prompt: Text = ""
    texts: list[Text]
    details: list[dict[str, Text]]
    finish: list[str]
    cut: int


class ShownDocument(Record):
    id: int
    references: list[Text]
    answers: list[ShownAnswer]
    prompt: Text = ""


class Browser(Record):
    """Documents of a task; total: how many there are, also beyond those that are shown."""

    metric: Text
    unit: str
    total: int
    documents: list[ShownDocument]


class Page(Record):
    """Everything both reports show."""

    title: Text
    complete: bool
    models: list[ShownModel]
    tasks: list[ShownTask]
    measured: list[MeasuredTask]
    metrics: dict[str, ShownMetric]
    scores: list[ScoreRow]
    suites: list[SuiteScore]
    comparisons: Comparison
    notes: list[Text]
    answers: list[ShownCounts]
    runs: list[ShownRun]
    samples: dict[str, Browser]
