"""Scores as bars of report.html: one card for each suite, with its tasks below its mean."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dskd_eval.report import tables
from dskd_eval.report.page import Page, ShownTask
from dskd_eval.report.tables import Cell, Column, Estimate, Row, Table
from dskd_eval.schema import MetricScore, ScoreRow, SuiteScore


@dataclass(frozen=True)
class Bar:
    """A score of a model. place: number of the model, for its colour. value, low, width: in percent of the bar's
    length, low and width None where the interval is unknown.
    """

    label: str
    place: int
    estimate: Estimate
    unit: str
    value: float
    low: float | None = None
    width: float | None = None

    @property
    def said(self) -> str:
        """The bar for who cannot see it."""
        ends = "interval unknown" if self.estimate.ends is None else f"95 % interval {' to '.join(self.estimate.ends)}"
        return f"{self.label}: {self.estimate.value}, {ends}"


@dataclass(frozen=True)
class NoBar:
    """A task that a model has not finished."""

    label: str
    status: str
    error: str


@dataclass(frozen=True)
class TaskCard:
    """what: metric, number of documents and prompts; floor: the score of a constant answer, or nothing."""

    name: str
    what: str
    floor: str
    bars: Sequence[Bar | NoBar]
    metrics: Table


@dataclass(frozen=True)
class SuiteCard:
    name: str
    means: Sequence[Bar]
    tasks: Sequence[TaskCard]


def suite_cards(page: Page) -> list[SuiteCard]:
    labels = [model.label for model in page.models]
    cards = []
    for suite in dict.fromkeys(task.suite for task in page.tasks):
        means = [_bar(mean.model, labels, mean, 100.0) for mean in page.suites if mean.suite == suite]
        tasks = [_task_card(task, page, labels) for task in page.tasks if task.suite == suite]
        cards.append(SuiteCard(suite, means, tasks))
    return cards


def _task_card(task: ShownTask, page: Page, labels: Sequence[str]) -> TaskCard:
    metric = task.primary_metric
    found = [
        score
        for label in labels
        for score in page.scores
        if score.model == label and score.task.task == task.task and score.task.primary_metric == metric
    ]
    finished = [score for score in found if score.finished]
    ends = [score.primary.value if score.primary.high is None else score.primary.high for score in finished]
    longest = max([*ends, 1.0])
    bars: list[Bar | NoBar] = []
    for score in found:
        if score.finished:
            top = 100.0 if score.primary.unit == "percent" else longest
            bars.append(_bar(score.model, labels, score.primary, top))
        else:
            bars.append(NoBar(score.model, score.status, score.error))
    floor = ""
    if metric in task.floor:
        floor = f"floor {task.floor[metric]}: the constant answer “{task.floor.get('answer')}”"
    return TaskCard(task.task, _what(task, page, finished), floor, bars, metrics_table(task, page, finished))


def _what(task: ShownTask, page: Page, finished: Sequence[ScoreRow]) -> str:
    sizes = dict.fromkeys(f"{s.n}" if s.n == s.documents else f"{s.n} of {s.documents}" for s in finished)
    parts = [_name(page, task.primary_metric), f"n = {', '.join(sizes) or 0}"]
    parts.append(f"{'/'.join(map(str, task.all_shots))}-shot")
    if len(task.styles) > 1:
        parts.append(f"styles {' and '.join(task.styles)}")
    if task.protocol != "default":
        parts.append(f"protocol {task.protocol}")
    return " · ".join(parts)


def metrics_table(task: ShownTask, page: Page, finished: Sequence[ScoreRow]) -> Table:
    """The other metrics of a task and the counts of its answers, a column for each model; without rows if none."""
    names = dict.fromkeys(name for score in finished for name in score.metrics if name != task.primary_metric)
    rows = []
    for name in names:
        hint = page.metrics[name].description if name in page.metrics else ""
        found = [score.metrics.get(name) for score in finished]
        cells = [tables.estimate(item) if item else Cell("") for item in found]
        rows.append(Row([Cell(_name(page, name), hint=hint), *cells]))
    counted = {entry.model: entry.facts for entry in page.answers if entry.task == task.task}
    facts = [counted.get(score.model, {}) for score in finished]
    for text in dict.fromkeys(text for told in facts for text in told):
        rows.append(Row([Cell(text), *(Cell(told.get(text, "")) for told in facts)]))
    return Table([Column("", text=True), *(Column(score.model) for score in finished)], rows)


def _name(page: Page, metric: str) -> str:
    return page.metrics[metric].label if metric in page.metrics else metric


def _bar(label: str, labels: Sequence[str], item: MetricScore | SuiteScore, top: float) -> Bar:
    def place(value: float) -> float:
        return round(max(0.0, min(100.0, 100 * value / top)), 2)

    low, width = None, None
    if item.low is not None and item.high is not None:
        low = place(item.low)
        width = round(max(0.4, place(item.high) - low), 2)  # an interval of one point is still seen
    unit = item.unit if isinstance(item, MetricScore) and item.unit != "percent" else ""
    return Bar(label, labels.index(label), tables.estimate(item), unit, place(item.value), low, width)
