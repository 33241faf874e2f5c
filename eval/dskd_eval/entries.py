"""The models that are compared or shown together: their labels, their roles, and notes on how they differ."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dskd_eval.errors import UserError
from dskd_eval.run_folder import SavedRun
from dskd_eval.schema import ModelRecord, Sample

_TRAINED = ("student", "sft")


@dataclass(frozen=True)
class Entry:
    """One model of one run; `label` is unique among the compared ones."""

    run: SavedRun
    model: str
    label: str
    role: str | None = None

    @property
    def facts(self) -> ModelRecord:
        """The record of the model."""
        return next(model for model in self.run.models if model.name == self.model)

    def samples(self, task: str) -> list[Sample]:
        return self.run.samples(self.model, task)

    def tasks(self) -> list[str]:
        return [score.task.task for score in self.run.results.scores if score.model == self.model and score.finished]


@dataclass(frozen=True)
class Roles:
    """Models that are named for a part of the comparison, by label or name; None: as `compare` chooses."""

    baseline: str | None = None
    teacher: str | None = None
    base: str | None = None
    students: tuple[str, ...] = ()


def entries_of(runs: Sequence[SavedRun]) -> list[Entry]:
    """All models of the runs, labelled by name, or by folder and name where names repeat.

    Raises UserError: one model of one run is named twice.
    """
    found = []
    for run, where in zip(runs, run_labels(runs), strict=True):
        found += [(run, model, where) for model in run.models]
    names = Counter(model.name for _, model, _ in found)
    listed: list[Entry] = []
    seen: set[tuple[Path, str]] = set()
    for run, model, where in found:
        place = (run.folder.resolve(), model.name)
        if place in seen:
            raise UserError(
                f"run {run.folder}",
                expected="each model of a run once",
                got=f"{model.name!r} twice",
                fix="Name the run once; RUN:MODEL picks one of its models.",
            )
        seen.add(place)
        label = model.name if names[model.name] == 1 else f"{where}/{model.name}"
        listed.append(Entry(run, model.name, label, model.role))
    _check_labels(listed)
    return listed


def _check_labels(group: Sequence[Entry]) -> None:
    """Raise UserError where two models have one label, as a model `a/m` beside the model `m` of a run `a`."""
    labels = Counter(entry.label for entry in group)
    for entry in group:
        if labels[entry.label] > 1:
            same = [str(other.run.folder) for other in group if other.label == entry.label]
            raise UserError(
                "runs",
                expected="a label of its own for every model",
                got=f"{entry.label!r} for models of " + " and ".join(same),
                fix="Rename one of the folders.",
            )


def run_labels(runs: Sequence[SavedRun]) -> list[str]:
    """Names of the runs' folders; where they repeat, with as many folders above them as tell them apart."""
    folders = [run.folder.resolve() for run in runs]
    depth = 1
    while True:
        names = {folder: "/".join(folder.parts[-depth:]).removeprefix("//") for folder in folders}
        if len(set(names.values())) == len(names):
            break
        depth += 1
    counts = Counter(folder.name for folder in names)
    return [names[folder] if counts[folder.name] > 1 else folder.name for folder in folders]


NO_TEMPLATE = "no chat template: "


def template_notes(templates: Mapping[str, bool]) -> list[str]:
    """What to know of models some of which have no chat template; templates: whether each model has one."""
    without = [name for name, has in templates.items() if not has]
    if not without or len(without) == len(templates):
        return []
    return [
        f"{NO_TEMPLATE}{', '.join(without)}; the other models use theirs, so their prompts differ and are not "
        "compared (--chat-template FILE or off makes them equal)"
    ]


def given_roles(group: Sequence[Entry], roles: Roles) -> dict[str, str]:
    """Roles by label, of the models that are named for one."""
    named = [("teacher", "--teacher", roles.teacher), ("base", "--base", roles.base)]
    named += [("student", "--student", name) for name in roles.students]
    return {find(group, name, option).label: role for role, option, name in named if name}


def choose_baseline(group: Sequence[Entry], label: str | None = None) -> Entry:
    """The named model, else the one a recipe calls base, else the first."""
    if label is not None:
        return find(group, label, "--baseline")
    return next((entry for entry in group if entry.role == "base"), group[0])


def find(group: Sequence[Entry], label: str, option: str) -> Entry:
    """The model of that label, or of that name where one run has it. Raises UserError: none, or several."""
    found = [entry for entry in group if entry.label == label] or [entry for entry in group if entry.model == label]
    if len(found) == 1:
        return found[0]
    labels = ", ".join(entry.label for entry in found or group)
    raise UserError(
        option,
        expected="one of " + labels,
        got=f"{label!r}, which is in several runs" if found else repr(label),
        fix=f"Write for example {option} {found[0].label}." if found else "Choose one.",
    )


def of_role(group: Sequence[Entry], role: str, notes: list[str], strict: bool) -> Entry | None:
    """The model that a recipe gives a role; the first of several that are one model.

    Where they differ: raises UserError if strict, else none has it, and a note says so.
    """
    found = [entry for entry in group if entry.role == role]
    if len({entry.facts.fingerprint for entry in found}) < 2:
        return found[0] if found else None
    several = ", ".join(entry.label for entry in found)
    fix = f"Name one, as in --{role} {found[0].label}."
    if strict:
        raise UserError(f"the role {role}", expected="one model", got=f"several: {several}", fix=fix)
    notes.append(f"no closed gap: several models have the role {role}: {several}. {fix}")
    return None


def check_roles(base: Entry | None, teacher: Entry | None, students: Sequence[Entry]) -> None:
    """Raise UserError where one model has two parts in the closed gap, or is named twice as a student."""
    parts = [("--base", base), ("--teacher", teacher), *(("--student", entry) for entry in students)]
    seen: dict[str, str] = {}
    for option, entry in parts:
        if entry is not None and entry.label in seen:
            raise UserError(
                f"{option} {entry.label}",
                expected="a model of its own for each role",
                got=f"the model of {seen[entry.label]}",
                fix="Name another, or leave the option out.",
            )
        if entry is not None:
            seen[entry.label] = option


def trained(
    group: Sequence[Entry], students: Sequence[Entry], base: Entry, teacher: Entry, *, named: bool
) -> list[Entry]:
    """The students: those named, else those of a recipe, else (roles given by hand) all but base and teacher."""
    if students:
        return list(students)
    by_role = [entry for entry in group if entry.role in _TRAINED and entry not in (base, teacher)]
    return by_role or [entry for entry in group if named and entry is not base and entry is not teacher]


def reasoning_notes(group: Sequence[Entry]) -> list[str]:
    """What to know where runs differ in `--reasoning`: a trace is scored in one and not in the other."""
    models: dict[str, list[str]] = {}
    for entry in group:
        settings = entry.run.results.settings
        option = settings.reasoning if settings.has("reasoning") else "not recorded"
        models.setdefault(option, []).append(entry.label)
    if len(models) < 2:
        return []
    told = "; ".join(f"{', '.join(labels)}: {option}" for option, labels in models.items())
    return [f"--reasoning differs, so what counts as the answer differs: {told}"]
