"""A `Page` from runs: scores, comparisons, counts and settings under the labels of the models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from dskd_eval import comparison, number_text
from dskd_eval.entries import NO_TEMPLATE, Entry, Roles, entries_of, given_roles, run_labels, template_notes
from dskd_eval.report.browser import BUDGET, browser_of
from dskd_eval.report.page import Browser, MeasuredTask, Page, ShownCounts, ShownMetric, ShownModel, ShownRun, ShownTask
from dskd_eval.run_folder import SavedRun
from dskd_eval.schema import Comparison, ScoreRow, TaskRecord
from dskd_eval.scorers import registry


def payload(runs: Sequence[SavedRun], roles: Roles | None = None) -> Page:
    """Everything both reports show."""
    roles = roles or Roles()
    entries = entries_of(runs)
    scores = []
    for entry in entries:
        of_model = [score for score in entry.run.results.scores if score.model == entry.model]
        scores += [score.model_copy(update={"model": entry.label}) for score in of_model]
    comparisons = _comparisons(runs, entries, roles)
    # Two runs may have models of one name; only run and name together tell a label.
    labels = {(id(entry.run), entry.model): entry.label for entry in entries}
    suites = []
    for run in runs:
        for suite in run.results.suites:
            if label := labels.get((id(run), suite.model)):
                suites.append(suite.model_copy(update={"model": label}))
    given = given_roles(entries, roles)
    notes = _notes(runs, entries)
    notes += [note for note in comparisons.notes if note not in notes]
    models = []
    for run in runs:
        for model in run.models:
            shown_as = labels[id(run), model.name]
            role = given.get(shown_as) or model.role
            models.append(ShownModel.model_validate({**model.given(), "label": shown_as, "role": role}))
    names = set[str]().union(*(score.metrics for score in scores))
    return Page(
        title="dskd-eval: " + ", ".join(entry.label for entry in entries),
        complete=all(score.finished for score in scores),
        models=models,
        tasks=_tables(scores),
        measured=_measured(scores),
        metrics={name: ShownMetric(**asdict(registry.metric_info(name))) for name in sorted(names)},
        scores=scores,
        suites=suites,
        comparisons=comparisons,
        notes=notes,
        answers=_answer_facts(entries),
        runs=_runs(entries),
        samples=_samples(entries, list(dict.fromkeys(score.task.task for score in scores))),
    )


def _comparisons(runs: Sequence[SavedRun], entries: Sequence[Entry], roles: Roles) -> Comparison:
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


def _tables(scores: Sequence[ScoreRow]) -> list[ShownTask]:
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


def _measured(scores: Sequence[ScoreRow]) -> list[MeasuredTask]:
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
ANSWERS = {
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
            details = [detail for sample in entry.samples(task) for detail in sample.details]
            if any("dropped" in detail for detail in details):
                facts["code_left_out"] = sum(bool(detail.get("dropped")) for detail in details)
            told = {}
            for key, name in ANSWERS.items():
                if key in facts:
                    rate = key == "mean_new_tokens"
                    value = facts[key]
                    told[name] = (
                        number_text.fixed(float(str(value))) if rate else f"{value} of {facts.get('count', '?')}"
                    )
            if told:
                found.append(ShownCounts(task=task, model=entry.label, facts=told))
    return found


def _runs(entries: Sequence[Entry]) -> list[ShownRun]:
    """Settings, sandbox and versions of every run, once per folder."""
    found: dict[Path, ShownRun] = {}
    for entry, label in zip(entries, run_labels([entry.run for entry in entries]), strict=True):
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


_REMADE = ("not compared: ", "no closed gap: ", NO_TEMPLATE)


def _notes(runs: Sequence[SavedRun], entries: Sequence[Entry]) -> list[str]:
    """Notes of the runs about the models that are shown, under their labels here."""
    if len(runs) == 1 and runs[0].only is None:
        return list(runs[0].results.notes)
    about_models, about_runs = [], []
    for entry in entries:
        prefix = f"{entry.model}: "
        texts = [note.removeprefix(prefix) for note in entry.run.results.notes if note.startswith(prefix)]
        about_models += [f"{entry.label}: {text}" for text in texts]
    labels = run_labels(runs)
    for run, label in zip(runs, labels, strict=True):
        names = tuple(f"{model.name}: " for model in run.results.models)
        for note in run.results.notes:
            if not note.startswith((*names, *_REMADE)):
                everywhere = all(note in other.results.notes for other in runs)
                about_runs.append(note if everywhere else f"{label}: {note}")
    templates = {entry.label: entry.facts.chat_template for entry in entries}
    return list(dict.fromkeys([*about_runs, *template_notes(templates), *about_models]))


def _samples(entries: Sequence[Entry], tasks: Sequence[str]) -> dict[str, Browser]:
    """Samples by task and document; long texts are clipped, documents beyond the page's budget left out."""
    share = BUDGET // max(1, len(tasks))
    return {task: browser_of(entries, task, share) for task in tasks}
