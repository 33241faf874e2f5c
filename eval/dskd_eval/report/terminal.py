"""Scores and comparisons on a terminal."""

from __future__ import annotations

from rich.console import Console, JustifyMethod, OverflowMethod
from rich.markup import escape
from rich.table import Table

from dskd_eval import number_text
from dskd_eval.report import tables
from dskd_eval.schema import Comparison, Results

_COLOURS = {"good": "green", "bad": "red"}


def show_results(results: Results, out: Console) -> None:
    labels = [model.name for model in results.models]
    scores = tables.score_table(labels, results.scores, results.suites)
    out.print(_set(scores, "Scores with 95 % intervals", overflow="fold"))
    show_comparison(results.comparisons, out)
    show_notes(results.notes, out)


def show_comparison(found: Comparison, out: Console) -> None:
    for gap in found.gaps:
        if gap.rows:
            out.print(_set(tables.gap_table(gap), f"Gap closed by {gap.model}"))
    for pair in found.pairs:
        if pair.rows:
            against = found.baseline if pair.against is None else pair.against
            out.print(_set(tables.pair_table(pair), f"{pair.model} against {against}", no_wrap=True))


def _set(table: tables.Table, title: str, *, no_wrap: bool = False, overflow: OverflowMethod = "ellipsis") -> Table:
    found = Table(title=escape(title), title_justify="left", header_style="bold")
    for column in table.columns:
        justify: JustifyMethod = "left" if column.text else "right"
        found.add_column(escape(column.narrow), justify=justify, no_wrap=no_wrap, overflow=overflow)
    for row in table.rows:
        found.add_row(*(_cell(item) for item in row.cells), style="bold" if row.total else "", end_section=row.total)
    return found


def _cell(item: tables.Cell | tables.Estimate) -> str:
    if isinstance(item, tables.Estimate):
        return f"{item.value} [dim]{number_text.UNKNOWN if item.ends is None else '–'.join(item.ends)}[/]"
    text = escape(f"{item.text} {item.aside}" if item.aside else item.text)
    return f"[{_COLOURS[item.tone]}]{text}[/]" if item.tone else text


def show_notes(notes: list[str], out: Console) -> None:
    for note in notes:
        out.print(f"[yellow]note[/] {escape(note)}", soft_wrap=True)
