"""Scores and comparisons on a terminal."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dskd_eval import shown
from dskd_eval.report import tables
from dskd_eval.schema import Comparison, Results

_COLOURS = {"good": "green", "bad": "red"}


def show_results(results: Results, out: Console) -> None:
    labels = [model.name for model in results.models]
    table = Table(title="Scores with 95 % intervals", title_justify="left", header_style="bold")
    table.add_column("task")
    table.add_column("metric", overflow="fold")
    table.add_column("n", justify="right")
    for label in labels:
        table.add_column(escape(label), justify="right", overflow="fold")
    tasks = list(dict.fromkeys(score.task.task for score in results.scores))
    by_place = {(score.task.task, score.model): score for score in results.scores}
    previous = None
    for task in tasks:
        rows = [by_place[task, label] for label in labels]
        suite = rows[0].task.suite
        if previous not in (None, suite):
            _suite_row(table, results, str(previous), labels)
        previous = suite
        sizes = sorted({row.n for row in rows if row.finished})
        cells = [_estimate(tables.score_or_status(row)) for row in rows]
        table.add_row(task, rows[0].task.primary_metric, "/".join(map(str, sizes)), *cells)
    if previous is not None:
        _suite_row(table, results, str(previous), labels)
    out.print(table)
    show_comparison(results.comparisons, out)
    show_notes(results.notes, out)


def _suite_row(table: Table, results: Results, suite: str, labels: list[str]) -> None:
    values = {item.model: item for item in results.suites if item.suite == suite}
    if values:
        cells = [_estimate(tables.estimate(values[label])) if label in values else "" for label in labels]
        table.add_row(f"[bold]{suite}[/]", "[dim]mean of the suite[/]", "", *[f"[bold]{cell}[/]" for cell in cells])
        table.add_section()


def _estimate(item: tables.Estimate | str) -> str:
    if isinstance(item, str):
        return f"[red]{item}[/]"
    return f"{item.value} [dim]{shown.UNKNOWN if item.ends is None else '–'.join(item.ends)}[/]"


def show_comparison(found: Comparison, out: Console) -> None:
    for gap in found.gaps:
        if gap.rows:
            out.print(_set(tables.gap_table(gap), f"Gap closed by {gap.model}"))
    for pair in found.pairs:
        if pair.rows:
            against = found.baseline if pair.against is None else pair.against
            out.print(_set(tables.pair_table(pair), f"{pair.model} against {against}", no_wrap=True))


def _set(table: tables.Table, title: str, *, no_wrap: bool = False) -> Table:
    found = Table(title=escape(title), title_justify="left", header_style="bold")
    for place, column in enumerate(table.columns):
        found.add_column(column.narrow, justify="right" if place else "left", no_wrap=no_wrap)
    for row in table.rows:
        found.add_row(*(_cell(item) for item in row))
    return found


def _cell(item: tables.Cell) -> str:
    text = escape(f"{item.text} {item.aside}" if item.aside else item.text)
    return f"[{_COLOURS[item.tone]}]{text}[/]" if item.tone else text


def show_notes(notes: list[str], out: Console) -> None:
    for note in notes:
        out.print(f"[yellow]note[/] {escape(note)}", soft_wrap=True)
