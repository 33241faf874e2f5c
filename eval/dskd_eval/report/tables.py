"""Tables of a comparison, made once: `markdown` and `terminal` only set them."""

from __future__ import annotations

from dataclasses import dataclass

from dskd_eval import comparison, shown
from dskd_eval.schema import GapOfModel, GapRow, MetricScore, PairedModels, PairRow, ScoreRow, SuiteScore


@dataclass(frozen=True)
class Column:
    """short: the name on a terminal, whose columns are narrow."""

    name: str
    short: str = ""

    @property
    def narrow(self) -> str:
        return self.short or self.name


@dataclass(frozen=True)
class Cell:
    """aside: what a terminal adds, where its head is too narrow to say it. tone: good, bad or none."""

    text: str
    aside: str = ""
    tone: str = ""


@dataclass(frozen=True)
class Table:
    """The first column is text, the others are numbers."""

    columns: tuple[Column, ...]
    rows: list[list[Cell]]


@dataclass(frozen=True)
class Estimate:
    """A score with the ends of its interval, or None where they are unknown."""

    value: str
    ends: tuple[str, str] | None


def estimate(item: MetricScore | SuiteScore) -> Estimate:
    if item.low is None or item.high is None:
        return Estimate(shown.fixed(item.value), None)
    return Estimate(shown.fixed(item.value), (shown.fixed(item.low), shown.fixed(item.high)))


def score_or_status(score: ScoreRow) -> Estimate | str:
    """The primary score of a finished task, else why there is none."""
    return estimate(score.primary) if score.finished else score.status


GAP_COLUMNS = (
    Column("task"),
    Column("base"),
    Column("student"),
    Column("teacher"),
    Column("closed %", "closed"),
    Column("95 % interval", "95 %"),
    Column("n"),
)
PAIR_COLUMNS = (
    Column("task"),
    Column("difference", "diff."),
    Column("95 % interval", "95 %"),
    Column("p"),
    Column("p (Holm)", "p Holm"),
    Column("wins/ties/losses", "win/tie/loss"),
    Column("n"),
)
_TONES = {"second": "good", "first": "bad", None: ""}


def gap_table(gap: GapOfModel) -> Table:
    return Table(GAP_COLUMNS, [_gap_cells(row) for row in gap.rows])


def _gap_cells(row: GapRow) -> list[Cell]:
    closed = Cell(shown.UNKNOWN) if row.closed is None else Cell(shown.fixed(row.closed, 0), aside="%")
    ends = [Cell(shown.fixed(score)) for score in (row.base, row.student, row.teacher)]
    return [Cell(row.task), *ends, closed, Cell(comparison.gap_span(row)), Cell(str(row.n))]


def pair_table(pair: PairedModels) -> Table:
    return Table(PAIR_COLUMNS, [_pair_cells(row) for row in pair.rows])


def _pair_cells(row: PairRow) -> list[Cell]:
    return [
        Cell(row.task),
        Cell(shown.signed(row.difference), tone=_TONES[row.better]),
        Cell(shown.signed_span(row.low, row.high)),
        Cell(shown.p_value(row.p)),
        Cell(shown.p_value(row.p_holm)),
        Cell(f"{row.wins}/{row.ties}/{row.losses}"),
        Cell(str(row.n), aside="" if row.n == row.of else f"of {row.of}"),
    ]
