"""report.md and comparison.md: tables for a repository or an issue."""

from __future__ import annotations

from collections.abc import Sequence

from dskd_eval import shown
from dskd_eval.data import content_hash
from dskd_eval.report import tables
from dskd_eval.report.collect import ANSWERS
from dskd_eval.report.page import MeasuredTask, Page, ShownCounts, ShownRun
from dskd_eval.schema import Comparison, DataRecord, PairedModels


def as_markdown(found: Page) -> str:
    """Tables for a repository or an issue."""
    lines = [f"# {escaped(found.title)}", ""]
    if not found.complete:
        lines += ["**Not complete: some tasks failed or are waiting.**", ""]
    labels = [model.label for model in found.models]
    lines += ["Scores with 95 % intervals. Higher is better.", ""]
    lines += [_line(["task", "metric", "n", *labels]), _line(["---", "---", "--:", *["--:"] * len(labels)])]
    by_place = {(score.task.task, score.task.primary_metric, score.model): score for score in found.scores}
    for task in found.tasks:
        rows = [by_place.get((task.task, task.primary_metric, label)) for label in labels]
        counts = sorted({row.n for row in rows if row and row.finished})
        cells = [_estimate(tables.score_or_status(row)) if row else "" for row in rows]
        lines.append(_line([task.task, task.primary_metric, "/".join(map(str, counts)), *cells]))
    for suite in dict.fromkeys(item.suite for item in found.suites):
        values = {item.model: item for item in found.suites if item.suite == suite}
        cells = [_estimate(tables.estimate(values[label])) if label in values else "" for label in labels]
        lines.append(_line([f"**{suite}** (mean)", "", "", *cells]))
    lines.append("")
    lines += comparison_lines(found.comparisons)
    if found.notes:
        lines += ["## Notes", "", *[f"- {escaped(note)}" for note in found.notes], ""]
    lines += _answer_lines(found.answers)
    lines += _task_lines(found.measured)
    lines += ["", "## Models", ""]
    lines += [_line(["model", "role", "source", "dtype", "device", "context", "chat template", "fingerprint"])]
    lines += [_line(["---"] * 8)]
    for model in found.models:
        facts = [model.label, model.role or "", model.source, model.dtype, model.device]
        facts += [str(model.context_length or ""), "yes" if model.chat_template else "no", model.fingerprint[:12]]
        lines.append(_line(facts))
    lines += ["", *_run_lines(found.runs)]
    return "\n".join(lines)


def _task_lines(measured: Sequence[MeasuredTask]) -> list[str]:
    """How every task was measured; the models are named where they were not measured alike."""
    names = [entry.task.task for entry in measured]
    several = len(names) > len(set(names))
    head = ["task", "version", "style", "protocol", "shots", "answers end at", "data", "sha256"]
    head += ["models"] if several else []
    lines = ["## Tasks", "", _line(head), _line(["---"] * len(head))]
    for entry in measured:
        task = entry.task
        stop = ", ".join(repr(text) for text in task.stops) or "end token"
        data = task.data.get("test") or DataRecord()
        cells = [task.task, f"{task.version:g}", task.style, task.protocol, str(task.shots)]
        cells += [f"{stop}; {task.limit} tokens", data.source, (data.sha256 or "")[:12]]
        lines.append(_line(cells + ([", ".join(entry.models)] if several else [])))
    return lines


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


def _answer_lines(found: Sequence[ShownCounts]) -> list[str]:
    names = [name for name in ANSWERS.values() if any(name in entry.facts for entry in found)]
    if not names:
        return []
    lines = ["## Answers", "", _line(["task", "model", *names]), _line(["---", "---", *["--:"] * len(names)])]
    lines += [_line([entry.task, entry.model, *(entry.facts.get(name, "") for name in names)]) for entry in found]
    return [*lines, ""]


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
    head = [_line([column.name for column in table.columns]), _line(["---", *["--:"] * (len(table.columns) - 1)])]
    return head + [_line([item.text for item in row]) for row in table.rows]


def _estimate(item: tables.Estimate | str) -> str:
    if isinstance(item, str):
        return item
    span = shown.UNKNOWN if item.ends is None else " to ".join(item.ends)
    return f"{item.value} ({span})"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(escaped(cell) for cell in cells) + " |"


def escaped(text: str) -> str:
    return " ".join(str(text).split()).replace("|", "\\|").replace("<", "&lt;")
