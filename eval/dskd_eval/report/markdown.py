"""report.md and comparison.md: tables for a repository or an issue."""

from __future__ import annotations

from collections.abc import Sequence

from dskd_eval import number_text
from dskd_eval.data import content_hash
from dskd_eval.report import facts, tables
from dskd_eval.report.page import Page, ShownRun
from dskd_eval.schema import Comparison, PairedModels


def as_markdown(found: Page) -> str:
    """Tables for a repository or an issue."""
    lines = [f"# {escaped(found.title)}", ""]
    if not found.complete:
        lines += ["**Not complete: some tasks failed or are waiting.**", ""]
    labels = [model.label for model in found.models]
    lines += ["Scores with 95 % intervals. Higher is better.", ""]
    lines += [*_table_lines(tables.score_table(labels, found.scores, found.suites)), ""]
    lines += comparison_lines(found.comparisons)
    if found.notes:
        lines += ["## Notes", "", *[f"- {escaped(note)}" for note in found.notes], ""]
    answers = facts.answer_table(found.answers)
    if answers.columns:
        lines += ["## Answers", "", *_table_lines(answers), ""]
    lines += ["## Tasks", "", *_table_lines(facts.task_table(found.measured)), ""]
    lines += ["## Models", "", *_table_lines(facts.model_table(found.models))]
    lines += ["", *_run_lines(found.runs)]
    return "\n".join(lines)


def _run_lines(runs: Sequence[ShownRun]) -> list[str]:
    """Settings, sandbox and versions: one line where all runs agree, else one for each run."""
    lines = []
    for describe in (_settings_text, _sandbox_text, _versions_text):
        texts = [describe(run) for run in runs]
        if len(set(texts)) == 1:
            lines += [texts[0], ""]
        else:
            lines += [f"- {escaped(run.label)}: {text}" for run, text in zip(runs, texts, strict=True)] + [""]
    return lines


def _settings_text(run: ShownRun) -> str:
    told = {key: value for key, value in run.settings.plain().items() if value not in (None, False)}
    if (template := run.settings.given_template) is not None:
        told["chat_template"] = "a file, sha256 " + content_hash(template)
    return "Settings: " + (", ".join(f"{key} {escaped(str(value))}" for key, value in told.items()) or "none") + "."


def _sandbox_text(run: ShownRun) -> str:
    box = run.sandbox
    return f"Sandbox: {box.backend} ({box.version})." if box else "Sandbox: not needed."


def _versions_text(run: ShownRun) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in run.environment.packages.items())
    return f"Python {run.environment.python}; {versions}."


def comparison_lines(found: Comparison) -> list[str]:
    """Tables of pairs and of closed gaps."""
    lines: list[str] = []
    if found.pairs and not any(pair.rows for pair in found.pairs):
        lines += ["## Comparison", "", "Nothing could be compared; the notes say why.", ""]
    elif found.pairs:
        lines += [f"## Against {escaped(found.baseline)}", ""]
        for pair in found.pairs:
            lines += _pair_lines(pair, found.baseline)
    for gap in found.gaps:
        if gap.rows:
            lines += [f"## Gap closed by {escaped(gap.model)}", "", *_table_lines(tables.gap_table(gap)), ""]
    return lines


def _pair_lines(pair: PairedModels, baseline: str) -> list[str]:
    if not pair.rows:
        return []
    against = baseline if pair.against is None else pair.against
    title = escaped(pair.model) + (f" against {escaped(against)}" if against != baseline else "")
    return [f"### {title}", "", *_table_lines(tables.pair_table(pair)), ""]


def _table_lines(table: tables.Table) -> list[str]:
    lines = [_line([column.name for column in table.columns])]
    lines.append(_line(["---" if column.text else "--:" for column in table.columns]))
    for row in table.rows:
        first, *others = (_cell(item) for item in row.cells)
        lines.append(_line([f"**{first}**" if row.total else first, *others]))
    return lines


def _cell(item: tables.Cell | tables.Estimate) -> str:
    if isinstance(item, tables.Cell):
        return item.text
    return f"{item.value} ({number_text.UNKNOWN if item.ends is None else ' to '.join(item.ends)})"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(escaped(cell) for cell in cells) + " |"


def escaped(text: str) -> str:
    return " ".join(str(text).split()).replace("|", "\\|").replace("<", "&lt;")
