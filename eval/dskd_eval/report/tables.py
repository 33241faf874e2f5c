"""The tables of scores and comparisons, made once: terminal, Markdown and HTML only set them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dskd_eval import comparison, number_text
from dskd_eval.schema import GapOfModel, GapRow, MetricScore, PairedModels, PairRow, ScoreRow, SuiteScore


@dataclass(frozen=True)
class Column:
    """short: the name on a terminal, whose columns are narrow. text: set to the left; numbers are set to the right."""

    name: str
    short: str = ""
    text: bool = False

    @property
    def narrow(self) -> str:
        return self.short or self.name


@dataclass(frozen=True)
class Cell:
    """aside: what a terminal adds, where its head is too narrow to say it. tone: good, bad or none. hint: for a page,
    what the cell does not say.
    """

    text: str
    aside: str = ""
    tone: str = ""
    hint: str = ""


@dataclass(frozen=True)
class Estimate:
    """A score with the ends of its interval, or None where they are unknown."""

    value: str
    ends: tuple[str, str] | None


@dataclass(frozen=True)
class Row:
    """total: a mean over the rows above."""

    cells: Sequence[Cell | Estimate]
    total: bool = False


@dataclass(frozen=True)
class Table:
    columns: Sequence[Column]
    rows: Sequence[Row]


def text_columns(*names: str) -> tuple[Column, ...]:
    return tuple(Column(name, text=True) for name in names)


def estimate(item: MetricScore | SuiteScore) -> Estimate:
    if item.low is None or item.high is None:
        return Estimate(number_text.fixed(item.value), None)
    return Estimate(number_text.fixed(item.value), (number_text.fixed(item.low), number_text.fixed(item.high)))


def score_table(labels: Sequence[str], scores: Sequence[ScoreRow], suites: Sequence[SuiteScore]) -> Table:
    """A line for each task and primary metric, suite by suite, each suite with its mean where it has one."""
    columns = [*text_columns("task", "metric"), *(Column(name) for name in ("n", *labels))]
    by_place = {(score.task.task, score.task.primary_metric, score.model): score for score in scores}
    lines = dict.fromkeys((score.task.suite, score.task.task, score.task.primary_metric) for score in scores)
    rows = []
    for suite in dict.fromkeys(line[0] for line in lines):
        for _, task, metric in (line for line in lines if line[0] == suite):
            found = [by_place.get((task, metric, label)) for label in labels]
            counts = sorted({score.n for score in found if score and score.finished})
            head = [Cell(task), Cell(metric), Cell("/".join(map(str, counts)))]
            rows.append(Row([*head, *(_score_or_status(score) for score in found)]))
        means = {item.model: item for item in suites if item.suite == suite}
        if means:
            cells = [estimate(means[label]) if label in means else Cell("") for label in labels]
            rows.append(Row([Cell(suite), Cell("mean of the suite"), Cell(""), *cells], total=True))
    return Table(columns, rows)


def _score_or_status(score: ScoreRow | None) -> Cell | Estimate:
    """The primary score of a finished task, else why there is none."""
    if score is None:
        return Cell("")
    return estimate(score.primary) if score.finished else Cell(score.status, tone="bad")


GAP_COLUMNS = (
    Column("task", text=True),
    Column("base"),
    Column("student"),
    Column("teacher"),
    Column("closed %", "closed"),
    Column("95 % interval", "95 %"),
    Column("n"),
)
PAIR_COLUMNS = (
    Column("task", text=True),
    Column("difference", "diff."),
    Column("95 % interval", "95 %"),
    Column("p"),
    Column("p (Holm)", "p Holm"),
    Column("wins/ties/losses", "win/tie/loss"),
    Column("n"),
)
_TONES = {"second": "good", "first": "bad", None: ""}


def gap_table(gap: GapOfModel) -> Table:
    return Table(GAP_COLUMNS, [Row(_gap_cells(row)) for row in gap.rows])


def _gap_cells(row: GapRow) -> list[Cell]:
    closed = Cell(number_text.UNKNOWN) if row.closed is None else Cell(number_text.fixed(row.closed, 0), aside="%")
    ends = [Cell(number_text.fixed(score)) for score in (row.base, row.student, row.teacher)]
    return [Cell(row.task), *ends, closed, Cell(comparison.gap_span(row)), Cell(str(row.n))]


def pair_table(pair: PairedModels) -> Table:
    return Table(PAIR_COLUMNS, [Row(_pair_cells(row)) for row in pair.rows])


def _pair_cells(row: PairRow) -> list[Cell]:
    return [
        Cell(row.task),
        Cell(number_text.signed(row.difference), tone=_TONES[row.better]),
        Cell(number_text.signed_span(row.low, row.high)),
        Cell(number_text.p_value(row.p), hint=row.test),
        Cell(number_text.p_value(row.p_holm)),
        Cell(f"{row.wins}/{row.ties}/{row.losses}"),
        Cell(str(row.n) if row.n == row.of else f"{row.n} of {row.of}"),
    ]
