"""report.md and report.html: scores with intervals, comparisons and every sample; no network needed."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from dskd_eval import comparison, records, shown
from dskd_eval.comparison import Entry, Roles
from dskd_eval.data import content_hash
from dskd_eval.records import Run
from dskd_eval.schema import (
    Comparison,
    DataRecord,
    Environment,
    Free,
    MetricScore,
    ModelRecord,
    PairedModels,
    Record,
    Sample,
    SandboxRecord,
    Score,
    Settings,
    SuiteScore,
    TaskRecord,
    Text,
)
from dskd_eval.scorers import registry

_PAGE = Path(__file__).parent / "report.html"
_CLIP = 6_000
_BUDGET = 24_000_000


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
    scores: list[Score]
    suites: list[SuiteScore]
    comparisons: Comparison
    notes: list[Text]
    answers: list[ShownCounts]
    runs: list[ShownRun]
    samples: dict[str, Browser]


def write(runs: Sequence[Run], folder: Path, roles: Roles | None = None) -> tuple[Path, Path]:
    """Write report.md and report.html of one or several runs into a folder; returns their paths.

    roles: as for `comparison.compare`; None: those of the recipe.
    """
    found = payload(runs, roles or Roles())
    markdown, page = folder / "report.md", folder / "report.html"
    records.replace_text(markdown, as_markdown(found))
    records.replace_text(page, as_html(found))
    return markdown, page


def write_comparison(found: Comparison, output: Path) -> list[Path]:
    """A comparison as a .json or a .md file; another name is a folder for comparison.json and comparison.md."""
    files = [output] if output.suffix in (".json", ".md") else [output / f"comparison{end}" for end in (".json", ".md")]
    for file in files:
        if file.suffix == ".json":
            records.write_json(file, found)
        else:
            notes = [f"- {_cell(note)}" for note in found.notes]
            records.replace_text(file, "\n".join(["# Comparison", "", *_comparison_lines(found), *notes, ""]))
    return files


def payload(runs: Sequence[Run], roles: Roles | None = None) -> Page:
    """Everything both reports show."""
    roles = roles or Roles()
    entries = comparison.entries(runs)
    scores = [
        score.model_copy(update={"model": entry.label})
        for entry in entries
        for score in entry.run.results.scores
        if score.model == entry.model
    ]
    comparisons = _comparisons(runs, entries, roles)
    labels = {(id(entry.run), entry.model): entry.label for entry in entries}
    suites = [
        suite.model_copy(update={"model": labels[id(run), suite.model]})
        for run in runs
        for suite in run.results.suites
        if (id(run), suite.model) in labels
    ]
    given = comparison.given_roles(entries, roles)
    notes = _notes(runs, entries)
    notes += [note for note in comparisons.notes if note not in notes]
    models = []
    for run in runs:
        for model in run.models:
            label = labels[id(run), model.name]
            role = given.get(label) or model.role
            models.append(ShownModel.model_validate({**model.given(), "label": label, "role": role}))
    return Page(
        title="dskd-eval: " + ", ".join(entry.label for entry in entries),
        complete=all(score.finished for score in scores),
        models=models,
        tasks=_tables(scores),
        measured=_measured(scores),
        metrics={
            name: ShownMetric(**asdict(registry.metric_info(name)))
            for name in sorted({name for score in scores for name in score.metrics})
        },
        scores=scores,
        suites=suites,
        comparisons=comparisons,
        notes=notes,
        answers=_answer_facts(entries),
        runs=_runs(entries),
        samples=_samples(entries, list(dict.fromkeys(score.task.task for score in scores))),
    )


def _comparisons(runs: Sequence[Run], entries: Sequence[Entry], roles: Roles) -> Comparison:
    """The comparison that one whole run holds already, else a new one of the models that are shown."""
    if len(runs) == 1 and runs[0].only is None and roles == Roles():
        return runs[0].results.comparisons
    if len(entries) < 2 and roles == Roles():
        return Comparison()
    return comparison.compare(
        entries,
        baseline=roles.baseline,
        teacher=roles.teacher,
        base=roles.base,
        students=roles.students,
        strict=False,
    )


def _tables(scores: Sequence[Score]) -> list[ShownTask]:
    """One entry per task and primary metric: the lines of the score tables."""
    groups: dict[tuple[str, str], list[TaskRecord]] = {}
    for score in scores:
        groups.setdefault((score.task.task, score.task.primary_metric), []).append(score.task)
    tables = []
    for tasks in groups.values():
        styles = list(dict.fromkeys(task.style for task in tasks))
        shots = list(dict.fromkeys(task.shots for task in tasks))
        tables.append(ShownTask.model_validate({**tasks[0].given(), "styles": styles, "all_shots": shots}))
    return tables


def _measured(scores: Sequence[Score]) -> list[MeasuredTask]:
    """Every way in which a task was measured; those of one task stand together."""
    found: list[MeasuredTask] = []
    for score in scores:
        same = next((entry for entry in found if entry.task == score.task), None)
        if same is None:
            found.append(MeasuredTask(task=score.task, models=[score.model]))
        else:
            same.models.append(score.model)
    order = [entry.task.task for entry in found]
    return sorted(found, key=lambda entry: order.index(entry.task.task))


# What both pages tell of the answers of a task, by its key in the record.
_ANSWERS = {
    "empty": "empty answers",
    "unfinished": "answers at their token limit",
    "clamped": "answers with a lowered limit",
    "prompts_cut": "prompts cut",
    "with_reasoning": "answers with a reasoning trace",
    "unfinished_reasoning": "unfinished reasoning traces",
    "unread_reasoning": "reasoning scored with the answer",
    "code_left_out": "answers of which code or text was left out",
    "mean_new_tokens": "mean new tokens",
}


def _answer_facts(entries: Sequence[Entry]) -> list[ShownCounts]:
    found = []
    for entry in entries:
        for task in entry.tasks():
            score = entry.run.score(entry.model, task)
            facts = score.answers.given() if score else {}
            details = [detail for sample in entry.run.samples(entry.model, task) for detail in sample.details]
            if any("dropped" in detail for detail in details):
                facts["code_left_out"] = sum(bool(detail.get("dropped")) for detail in details)
            told = {}
            for key, name in _ANSWERS.items():
                if key in facts:
                    rate = key == "mean_new_tokens"
                    value = facts[key]
                    told[name] = shown.fixed(float(str(value))) if rate else f"{value} of {facts.get('count', '?')}"
            if told:
                found.append(ShownCounts(task=task, model=entry.label, facts=told))
    return found


def _answer_lines(found: Sequence[ShownCounts]) -> list[str]:
    names = [name for name in _ANSWERS.values() if any(name in entry.facts for entry in found)]
    if not names:
        return []
    lines = ["## Answers", "", _line(["task", "model", *names]), _line(["---", "---", *["--:"] * len(names)])]
    lines += [_line([entry.task, entry.model, *(entry.facts.get(name, "") for name in names)]) for entry in found]
    return [*lines, ""]


def _runs(entries: Sequence[Entry]) -> list[ShownRun]:
    """Settings, sandbox and versions of every run, once per folder."""
    found: dict[Path, ShownRun] = {}
    for entry, label in zip(entries, comparison.run_labels([entry.run for entry in entries]), strict=True):
        results = entry.run.results
        place = entry.run.folder.resolve()
        if place not in found:
            found[place] = ShownRun(
                label=label,
                models=[],
                settings=results.settings,
                environment=results.environment,
                sandbox=results.sandbox,
            )
        found[place].models.append(entry.label)
    return list(found.values())


_REMADE = ("not compared: ", "no closed gap: ", comparison.NO_TEMPLATE)


def _notes(runs: Sequence[Run], entries: Sequence[Entry]) -> list[str]:
    """Notes of the runs about the models that are shown, under their labels here."""
    if len(runs) == 1 and runs[0].only is None:
        return list(runs[0].results.notes)
    about_models, about_runs = [], []
    for entry in entries:
        prefix = f"{entry.model}: "
        texts = [note.removeprefix(prefix) for note in entry.run.results.notes if note.startswith(prefix)]
        about_models += [f"{entry.label}: {text}" for text in texts]
    labels = comparison.run_labels(runs)
    for run, label in zip(runs, labels, strict=True):
        names = tuple(f"{model.name}: " for model in run.results.models)
        for note in run.results.notes:
            if not note.startswith((*names, *_REMADE)):
                everywhere = all(note in other.results.notes for other in runs)
                about_runs.append(note if everywhere else f"{label}: {note}")
    templates = {entry.label: entry.facts.chat_template for entry in entries}
    return list(dict.fromkeys([*about_runs, *comparison.template_notes(templates), *about_models]))


def _samples(entries: Sequence[Entry], tasks: Sequence[str]) -> dict[str, Browser]:
    """Samples by task and document; long texts are clipped, documents beyond the page's budget left out."""
    share = _BUDGET // max(1, len(tasks))
    return {task: _browser(entries, task, share) for task in tasks}


def _browser(entries: Sequence[Entry], task: str, share: int) -> Browser:
    """Documents of a task, as many as `share` characters hold."""
    documents: dict[tuple[int, str], tuple[Sample, list[ShownAnswer]]] = {}
    metric, unit = "", "percent"
    for entry in entries:
        score = entry.run.score(entry.model, task)
        if score is None:
            continue
        metric, unit = score.task.primary_metric, score.primary.unit
        for sample in entry.run.samples(entry.model, task):
            _, answers = documents.setdefault((sample.doc_id, sample.doc_hash), (sample, []))
            answers.append(_shown_answer(entry.label, sample, metric))
    kept, used = [], 0
    for key in sorted(documents):
        document = _shown_document(*documents[key])
        used += len(json.dumps(document.plain()))
        if used > share:
            break
        kept.append(document)
    return Browser(metric=metric, unit=unit, total=len(documents), documents=kept)


def _shown_answer(label: str, sample: Sample, metric: str) -> ShownAnswer:
    value = sample.metrics.get(metric)
    if isinstance(value, list):
        value = value[0] / value[1] if value[1] else 0.0
    generation = [info for info in sample.generation if info]
    return ShownAnswer(
        model=label,
        value=value,
        prompt=_clip(sample.prompt),
        texts=[_clip(text) for text in sample.answers[:10]],
        details=[_shown_details(detail) for detail in sample.details[:10]],
        finish=[info.finish for info in sample.generation[:10] if info],
        cut=sum(info.cut_tokens for info in generation),
    )


def _shown_details(detail: dict[str, Free]) -> dict[str, str]:
    return {key: _clip(str(item)) for key, item in detail.items() if item not in (None, "", [])}


def _shown_document(first: Sample, answers: list[ShownAnswer]) -> ShownDocument:
    references = [_clip(text) for text in first.references[:8]]
    prompts = {answer.prompt for answer in answers}
    if len(prompts) > 1:
        return ShownDocument(id=first.doc_id, references=references, answers=answers)
    without = [ShownAnswer.model_validate({k: v for k, v in a.given().items() if k != "prompt"}) for a in answers]
    return ShownDocument(id=first.doc_id, references=references, answers=without, prompt=prompts.pop())


def _clip(text: str) -> str:
    return text if len(text) <= _CLIP else text[: _CLIP // 2] + "\n[…]\n" + text[-_CLIP // 2 :]


def as_html(found: Page) -> str:
    """One page with its data, style and script inside; model output is data, never markup."""
    data = json.dumps(found.plain(), ensure_ascii=False, separators=(",", ":"))
    data = data.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
    page = _PAGE.read_text(encoding="utf-8")
    return page.replace("{{title}}", html.escape(found.title), 1).replace("{{data}}", data, 1)


def as_markdown(found: Page) -> str:
    """Tables for a repository or an issue."""
    lines = [f"# {_cell(found.title)}", ""]
    if not found.complete:
        lines += ["**Not complete: some tasks failed or are waiting.**", ""]
    labels = [model.label for model in found.models]
    lines += ["Scores with 95 % intervals. Higher is better.", ""]
    lines += [_line(["task", "metric", "n", *labels]), _line(["---", "---", "--:", *["--:"] * len(labels)])]
    by_place = {(score.task.task, score.task.primary_metric, score.model): score for score in found.scores}
    for task in found.tasks:
        rows = [by_place.get((task.task, task.primary_metric, label)) for label in labels]
        counts = sorted({row.n for row in rows if row and row.finished})
        cells = [_score_cell(row) for row in rows]
        lines.append(_line([task.task, task.primary_metric, "/".join(map(str, counts)), *cells]))
    for suite in dict.fromkeys(item.suite for item in found.suites):
        values = {item.model: item for item in found.suites if item.suite == suite}
        cells = [_interval_cell(values[label]) if label in values else "" for label in labels]
        lines.append(_line([f"**{suite}** (mean)", "", "", *cells]))
    lines.append("")
    lines += _comparison_lines(found.comparisons)
    if found.notes:
        lines += ["## Notes", "", *[f"- {_cell(note)}" for note in found.notes], ""]
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
            lines += [f"- {_cell(run.label)}: {text}" for run, text in zip(runs, texts, strict=True)] + [""]
    return lines


def _settings_text(run: ShownRun) -> str:
    told = {key: value for key, value in run.settings.plain().items() if value not in (None, False)}
    if (template := run.settings.given_template) is not None:
        told["chat_template"] = "a file, sha256 " + content_hash(template)
    return "Settings: " + (", ".join(f"{key} {_cell(str(value))}" for key, value in told.items()) or "none") + "."


def _sandbox_text(run: ShownRun) -> str:
    box = run.sandbox
    return f"Sandbox: {box.backend} ({box.version})." if box else "Sandbox: not needed."


def _versions_text(run: ShownRun) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in run.environment.packages.items())
    return f"Python {run.environment.python}; {versions}."


def _comparison_lines(found: Comparison) -> list[str]:
    lines: list[str] = []
    if found.pairs and not any(pair.rows for pair in found.pairs):
        lines += ["## Comparison", "", "Nothing could be compared; the notes say why.", ""]
    elif found.pairs:
        lines += [f"## Against {_cell(found.baseline)}", ""]
        for pair in found.pairs:
            lines += _pair_lines(pair, found.baseline)
    for gap in found.gaps:
        if not gap.rows:
            continue
        lines += [f"## Gap closed by {_cell(gap.model)}", ""]
        lines += [_line(["task", "base", "student", "teacher", "closed %", "95 % interval", "n"])]
        lines += [_line(["---", *["--:"] * 6])]
        for row in gap.rows:
            closed = shown.UNKNOWN if row.closed is None else shown.fixed(row.closed, 0)
            numbers = [shown.fixed(score) for score in (row.base, row.student, row.teacher)]
            lines.append(_line([row.task, *numbers, closed, comparison.gap_span(row), str(row.n)]))
        lines.append("")
    return lines


def _pair_lines(pair: PairedModels, baseline: str) -> list[str]:
    if not pair.rows:
        return []
    against = baseline if pair.against is None else pair.against
    title = _cell(pair.model) + (f" against {_cell(against)}" if against != baseline else "")
    lines = [f"### {title}", ""]
    lines += [_line(["task", "difference", "95 % interval", "p", "p (Holm)", "wins/ties/losses", "n"])]
    lines += [_line(["---", *["--:"] * 6])]
    for row in pair.rows:
        cells = [row.task, shown.signed(row.difference), shown.signed_span(row.low, row.high)]
        cells += [shown.p_value(row.p), shown.p_value(row.p_holm)]
        lines.append(_line([*cells, f"{row.wins}/{row.ties}/{row.losses}", str(row.n)]))
    return [*lines, ""]


def _score_cell(score: Score | None) -> str:
    if score is None:
        return ""
    if not score.finished:
        return score.status
    return _interval_cell(score.primary)


def _interval_cell(item: MetricScore | SuiteScore) -> str:
    return f"{shown.fixed(item.value)} ({shown.span(item.low, item.high)})"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(_cell(cell) for cell in cells) + " |"


def _cell(text: str) -> str:
    return " ".join(str(text).split()).replace("|", "\\|").replace("<", "&lt;")
