"""Models that answered the same prompts, compared in pairs, and how much of the way to a teacher a student went.

Samples are joined on document hash and prompt hash. Runs whose prompts differ are refused: their difference
would mix model and prompt.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from dskd_eval import number_text, stats
from dskd_eval.entries import (
    Entry,
    check_roles,
    choose_baseline,
    entries_of,
    find,
    of_role,
    reasoning_notes,
    trained,
)
from dskd_eval.errors import UserError
from dskd_eval.run_folder import SavedRun
from dskd_eval.schema import (
    Comparison,
    GapOfModel,
    GapRow,
    MetricValue,
    PairedModels,
    PairRow,
    Sample,
    ScoreRow,
)
from dskd_eval.scorers import registry

_SAME = ("version", "scorer", "primary_metric", "protocol", "style", "shots", "generation", "seeds", "prompt")


Place = tuple[str, str, int]  # hashes of document and prompt, and which of several equal ones


class Mismatch(Exception):
    """Two models were not asked the same; the text says where."""


def joined(first: Entry, second: Entry, task: str) -> dict[Place, tuple[MetricValue, MetricValue]]:
    """Values of the primary metric on the documents that both answered. Raises Mismatch."""
    return {key: (values[0], values[1]) for key, values in _join([first, second], task).items()}


def _join(group: Sequence[Entry], task: str) -> dict[Place, list[MetricValue]]:
    plans = []
    for entry in group:
        score = entry.run.score(entry.model, task)
        if score is None:
            raise Mismatch(f"{task}: {entry.label} has no finished result")
        plans.append(score.task)
    for entry, plan in zip(group[1:], plans[1:], strict=True):
        for key in _SAME:
            if key == "seeds" and not plan.sampled:
                continue  # A greedy answer does not depend on them.
            there, here = getattr(plans[0], key), getattr(plan, key)
            if here != there:
                raise Mismatch(f"{task}: {_words(key)} differs: {_place(group[0], there, entry, here)}")
    tables = [_table(entry, task) for entry in group]
    for entry, table in zip(group[1:], tables[1:], strict=True):
        _check_prompts(group[0], tables[0], entry, table, task)
    metric = plans[0].primary_metric
    shared: dict[Place, list[MetricValue]] = {}
    for place in tables[0]:
        if all(place in table for table in tables[1:]):
            shared[place] = [table[place].metrics[metric] for table in tables]
    if not shared:
        raise Mismatch(f"{task}: no document in common (other --seed, --limit or data)")
    return shared


def _words(key: str) -> str:
    return {"style": "prompt style (chat template)", "generation": "generation settings"}.get(key, key)


def _place(first: Entry, there: object, second: Entry, here: object) -> str:
    if isinstance(there, dict) and isinstance(here, dict):
        keys = [key for key in sorted(there.keys() | here.keys()) if there.get(key) != here.get(key)]
        there, here = {key: there.get(key) for key in keys}, {key: here.get(key) for key in keys}
    return f"{first.label} {str(there)[:80]!r}, {second.label} {str(here)[:80]!r}"


def _table(entry: Entry, task: str) -> dict[Place, Sample]:
    seen: Counter[tuple[str, str]] = Counter()
    table = {}
    for sample in entry.run.samples(entry.model, task):
        # Some data sets hold a document twice; its n-th answers belong together.
        key = (sample.doc_hash, sample.prompt_hash)
        table[(*key, seen[key])] = sample
        seen[key] += 1
    return table


def _check_prompts(
    first: Entry,
    first_table: dict[Place, Sample],
    second: Entry,
    second_table: dict[Place, Sample],
    task: str,
) -> None:
    prompts: dict[str, set[str]] = {}
    for document, prompt, _ in second_table:
        prompts.setdefault(document, set()).add(prompt)
    for (document, prompt, _), sample in first_table.items():
        if document in prompts and prompt not in prompts[document]:
            other = next(row for key, row in second_table.items() if key[0] == document)
            raise Mismatch(
                f"{task}: the prompt of document {sample.doc_id} differs: "
                + _first_difference(first.label, sample.prompt, second.label, other.prompt)
            )


def _first_difference(first: str, there: str, second: str, here: str) -> str:
    place = next((i for i, (a, b) in enumerate(zip(there, here, strict=False)) if a != b), min(len(there), len(here)))
    start = max(0, place - 20)
    return (
        f"from character {place}, {first} has {there[start : place + 40]!r}, {second} has {here[start : place + 40]!r}"
    )


def pair(first: Entry, second: Entry, *, strict: bool = True) -> tuple[list[PairRow], list[str]]:
    """Rows of `second` against `first`, Holm-adjusted over tasks, and what could not be compared.

    strict: raise UserError on the first kind of mismatch instead of leaving tasks out.
    """
    common = [task for task in first.tasks() if task in second.tasks()]
    rows, problems = [], []
    for task in common:
        try:
            values = joined(first, second, task)
        except Mismatch as mismatch:
            problems.append(str(mismatch))
            continue
        rows.append(_row(first, second, task, list(values.values())))
    if not common:
        problems.append(f"{first.label} and {second.label} have no finished task in common")
    if strict and problems:
        raise UserError(
            f"compare {first.label} with {second.label}",
            expected="the same prompts, settings and documents",
            got="; ".join(problems),
            fix="Repeat one run with the settings of the other (--chat-template, --num-fewshot, --seed, "
            "--data-dir), or compare only what is equal with --skip-different.",
        )
    adjusted = stats.holm([row.p for row in rows])
    rows = [row.model_copy(update={"p_holm": p}) for row, p in zip(rows, adjusted, strict=True)]
    return rows, problems


def _alone(first: Entry, second: Entry) -> list[str]:
    """Which tasks one of two models has finished and the other has not."""
    lines = []
    for has, other in ((first, second), (second, first)):
        tasks = [task for task in has.tasks() if task not in other.tasks()]
        if tasks:
            lines.append(f"{', '.join(tasks)}, of which {other.label} has no finished result and {has.label} has one")
    return lines


def _row(first: Entry, second: Entry, task: str, values: list[tuple[MetricValue, MetricValue]]) -> PairRow:
    metric, scale, sign, proportion = _reading([first, second], task)
    before, after = [value[0] for value in values], [value[1] for value in values]
    worse, better = (before, after) if sign > 0 else (after, before)
    found = stats.compare(worse, better, proportion=proportion)
    low = high = None
    leader = None
    if found.low is not None and found.high is not None:
        low, high = sorted((scale * sign * found.low, scale * sign * found.high))
        leader = "second" if found.low > 0 else "first" if found.high < 0 else None
    return PairRow(
        task=task,
        metric=metric,
        first=scale * stats.mean(before),
        second=scale * stats.mean(after),
        difference=scale * sign * found.difference,
        low=low,
        high=high,
        interval=found.method,
        better=leader,
        wins=found.wins,
        ties=found.ties,
        losses=found.losses,
        p=found.p,
        test=found.test,
        n=found.n,
        of=max(score.n for score in _scores([first, second], task)),
    )


def _scores(group: Sequence[Entry], task: str) -> list[ScoreRow]:
    return [score for entry in group if (score := entry.run.score(entry.model, task)) is not None]


def _reading(group: Sequence[Entry], task: str) -> tuple[str, float, int, bool]:
    """Primary metric, its scale (100 for a percentage), its sign (-1 when lower is better), and whether it is the
    share of documents that are right.
    """
    scores = _scores(group, task)
    metric = scores[0].task.primary_metric
    percent = all(score.metrics[metric].unit == "percent" for score in scores)
    proportion = registry.is_proportion(metric, "percent" if percent else "number")
    sign = 1 if scores[0].metrics[metric].higher_is_better else -1
    return metric, 100.0 if percent else 1.0, sign, proportion


def _gap(columns: list[list[MetricValue]], sign: int, proportion: bool) -> stats.GapClosed:
    """The closed gap of base, student and teacher; of an error rate it is that of the shares without error."""
    if sign > 0:
        return stats.gap_closed(*columns, proportion=proportion)
    top = 1.0 if proportion else 0.0

    def turned(value: MetricValue) -> MetricValue:
        return [top * value[1] - value[0], value[1]] if isinstance(value, list) else top - value

    base, student, teacher = ([turned(value) for value in column] for column in columns)
    return stats.gap_closed(base, student, teacher, proportion=proportion)


def gap_span(row: GapRow) -> str:
    """The interval of a closed gap as text, or why there is none."""
    if row.closed is None:
        return "teacher not above base"
    if row.low is None:
        return number_text.UNKNOWN if row.interval == "none" else "open"
    return number_text.span(row.low, row.high, 0)


def gap(base: Entry, student: Entry, teacher: Entry) -> tuple[list[GapRow], list[str]]:
    """Share of the distance from base to teacher that the student covers, per task, and what was left out."""
    rows, problems = [], []
    for task in base.tasks():
        if task not in student.tasks() or task not in teacher.tasks():
            continue
        try:
            values = list(_join([base, student, teacher], task).values())
        except Mismatch as mismatch:
            problems.append(str(mismatch))
            continue
        columns = [[value[place] for value in values] for place in range(3)]
        _, scale, sign, proportion = _reading([base, student, teacher], task)
        found = _gap(columns, sign, proportion)
        rows.append(
            GapRow(
                task=task,
                base=scale * stats.mean(columns[0]),
                student=scale * stats.mean(columns[1]),
                teacher=scale * stats.mean(columns[2]),
                closed=found.value,
                low=found.low,
                high=found.high,
                interval=found.method,
                n=found.n,
            )
        )
    return rows, problems


def compare(
    group: Sequence[Entry],
    *,
    baseline: str | None = None,
    teacher: str | None = None,
    base: str | None = None,
    students: Sequence[str] = (),
    strict: bool = True,
) -> Comparison:
    """Every model against the baseline, and the closed gap of students where teacher and base are known."""
    if len(group) < 2:
        raise UserError("compare", expected="at least two models", got=str(len(group)), fix="Name another run.")
    notes = reasoning_notes(group)
    named_base = find(group, base, "--base") if base else of_role(group, "base", notes, strict)
    named_teacher = find(group, teacher, "--teacher") if teacher else of_role(group, "teacher", notes, strict)
    chosen = [find(group, label, "--student") for label in students]
    check_roles(named_base, named_teacher, chosen)
    against = choose_baseline(group, baseline or base)
    pairs: list[PairedModels] = []
    gaps: list[GapOfModel] = []
    for entry in group:
        if entry is not against:
            # The base is what the baseline started from, so that difference reads the other way round.
            first, second = (entry, against) if base and entry is named_base else (against, entry)
            rows, problems = pair(first, second, strict=strict)
            pairs.append(PairedModels(model=second.label, against=first.label, rows=rows))
            notes += [f"not compared: {problem}" for problem in (*problems, *_alone(first, second))]
    if named_base and named_teacher:
        for entry in trained(group, chosen, named_base, named_teacher, named=bool(teacher or base)):
            shares, problems = gap(named_base, entry, named_teacher)
            gaps.append(GapOfModel(model=entry.label, rows=shares))
            notes += [f"no closed gap: {problem}" for problem in problems]
    elif teacher or students:
        raise UserError(
            "compare",
            expected="--teacher and --base, the two ends of the gap",
            got="no base" if named_teacher else "no teacher",
            fix="Name it with --base." if named_teacher else "Name it with --teacher.",
        )
    return Comparison(baseline=against.label, pairs=pairs, gaps=gaps, notes=list(dict.fromkeys(notes)))


def within(run: SavedRun) -> Comparison:
    """The comparison of the models of one run; tasks that cannot be compared become notes."""
    group = entries_of([run])
    if len(group) < 2:
        return Comparison(notes=[])
    return compare(group, strict=False)
