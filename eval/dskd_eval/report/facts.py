"""How a run measured what it shows: tables of its tasks, models and answers, and every fact of each of them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pydantic import JsonValue

from dskd_eval.report.collect import ANSWERS
from dskd_eval.report.page import MeasuredTask, Page, ShownCounts, ShownModel
from dskd_eval.report.tables import Cell, Column, Row, Table, text_columns
from dskd_eval.schema import DataRecord, TaskRecord


def task_table(measured: Sequence[MeasuredTask]) -> Table:
    """How every task was measured; the models are named where they were not measured alike."""
    names = [entry.task.task for entry in measured]
    several = len(names) > len(set(names))
    columns = text_columns("task", "version", "style", "protocol", "shots", "answers end at", "data", "sha256")
    rows = []
    for entry in measured:
        task = entry.task
        stop = ", ".join(repr(text) for text in task.stops) or "end token"
        data = task.data.get("test") or DataRecord()
        cells = [task.task, f"{task.version:g}", task.style, task.protocol, str(task.shots)]
        cells += [f"{stop}; {task.limit} tokens", data.source, (data.sha256 or "")[:12]]
        rows.append(_row([*cells, ", ".join(entry.models)] if several else cells))
    return Table((*columns, *text_columns("models")) if several else columns, rows)


def model_table(models: Sequence[ShownModel]) -> Table:
    columns = text_columns("model", "role", "source", "dtype", "device", "context", "chat template", "fingerprint")
    rows = []
    for model in models:
        facts = [model.label, model.role or "", model.source, model.dtype, model.device]
        facts += [str(model.context_length or ""), "yes" if model.chat_template else "no", model.fingerprint[:12]]
        rows.append(_row(facts))
    return Table(columns, rows)


def answer_table(found: Sequence[ShownCounts]) -> Table:
    """Counts of the answers of each task and model; without columns where nothing was counted."""
    names = [name for name in ANSWERS.values() if any(name in entry.facts for entry in found)]
    if not names:
        return Table([], [])
    rows = [_row([entry.task, entry.model, *(entry.facts.get(name, "") for name in names)]) for entry in found]
    return Table([*text_columns("task", "model"), *(Column(name) for name in names)], rows)


def _row(texts: Iterable[str]) -> Row:
    return Row([Cell(text) for text in texts])


@dataclass(frozen=True)
class Facts:
    """Everything about one task, model or run."""

    title: str
    pairs: Sequence[tuple[str, str]]


def all_facts(page: Page) -> list[Facts]:
    """Those of each task, of each model and of each run."""
    names = [entry.task.task for entry in page.measured]
    found = []
    for entry in page.measured:
        of = "" if names.count(entry.task.task) == 1 else f" of {', '.join(entry.models)}"
        found.append(Facts(f"Task {entry.task.task}{of}", _task_facts(entry.task, page)))
    for model in page.models:
        told = {key: value for key, value in model.plain().items() if key not in ("label", "name")}
        found.append(_plain_facts(f"Model {model.label}", told))
    for run in page.runs:
        of = f" of {run.label}" if len(page.runs) > 1 else ""
        none: dict[str, JsonValue] = {"sandbox": "no task ran code"}
        where = {"python": run.environment.python, "platform": run.environment.platform}
        found += [
            _plain_facts(f"Settings{of}", run.settings.plain()),
            _plain_facts(f"Sandbox{of}", run.sandbox.plain() if run.sandbox else none),
            _plain_facts(f"Environment{of}", {**where, **run.environment.packages}),
        ]
    return found


def _task_facts(task: TaskRecord, page: Page) -> list[tuple[str, str]]:
    metric = page.metrics.get(task.primary_metric)
    drawn = task.generation
    sampling = f"T = {drawn.get('temperature')}, top-p {drawn.get('top_p')}, seeds {', '.join(map(str, task.seeds))}"
    ends = [*(_plain(text, quoted=True) for text in task.stops), "end token", f"{task.limit} tokens"]
    data = task.data.get("test")
    return [
        ("summary", task.summary),
        ("version", f"{task.version:g}"),
        ("primary metric", f"{metric.label}: {metric.description}" if metric else task.primary_metric),
        ("scorer", task.scorer),
        ("prompt", _plain(task.prompt)),
        ("style, protocol", f"{task.style}, {task.protocol}"),
        ("shots", str(task.shots)),
        ("answers end at", ", ".join(ends)),
        ("sampling", sampling if task.sampled else "greedy"),
        ("data", f"{data.source}, {data.rows} rows" if data else "loaded by lm-eval"),
        ("sha256", _plain(data.sha256 if data else None)),
        ("content digest", _plain(data.digest if data else None)),
    ]


def _plain_facts(title: str, told: dict[str, JsonValue]) -> Facts:
    return Facts(title, [(key, _plain(value)) for key, value in told.items()])


def _plain(value: JsonValue, *, quoted: bool = False) -> str:
    """A value as a line: a text as it is, all else as JSON has it."""
    if value is None:
        return "–"
    return value if isinstance(value, str) and not quoted else json.dumps(value, ensure_ascii=False)
