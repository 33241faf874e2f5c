"""Which runs there are: the search of the rate, the seeds at the chosen rate, the ablations of DSKD."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import yaml

from benchmarks.study import evaluate, records, runs
from benchmarks.study.launch import Job
from benchmarks.study.runs import Run
from benchmarks.study.table import ABLATIONS, METHODS, Size

SPLITS = ("validation", "heldout")
LEADING = 4  # the first so many ablations get all their seeds before the others start
PROBED = ("dskd",)
PROBES = 6
BASES = ("sft", "dskd")  # what the ablations are compared with, so they get the validation split too


@dataclass(frozen=True)
class Wanted:
    """Tasks, and pairs and methods if not all."""

    tasks: tuple[str, ...]
    pairs: list[str] | None = None
    methods: list[str] | None = None

    def methods_of(self, size: Size) -> list[tuple[str, str, str]]:
        """(task, pair, method) in the order of the tables."""
        return [
            (task, pair, name)
            for task in self.tasks
            for pair in size.students
            for name, method in METHODS.items()
            if pair in method.pairs
            and (self.pairs is None or pair in self.pairs)
            and (self.methods is None or name in self.methods)
        ]


def job(out: Path, run: Run, work: Callable[[], None]) -> Job:
    return Job(run.name, out / "logs" / f"{run.name}.log", work)


def teacher_jobs(size: Size, out: Path, wanted: Wanted) -> list[Job]:
    """The teacher's greedy answers of both splits, and its answers to the training questions."""
    jobs = []
    for task in wanted.tasks:
        for split in SPLITS:
            evaluate.write_tasks(out / "tasks", task, split)
            if not (out / f"teacher-{task}-{split}.json").is_file():
                work = partial(evaluate.teacher_answers, out, task, split)
                jobs.append(Job(f"{task}-{split}", out / "logs" / f"teacher-{task}-{split}.log", work))
        if not (out / "data" / f"{task}-generated.jsonl").is_file():
            work = partial(generate, size, out, task)
            jobs.append(Job(f"{task}-generate", out / "logs" / f"generate-{task}.log", work))
    return jobs


def generate(size: Size, out: Path, task: str) -> None:
    """`dskd generate`: the teacher's answers to the students' training questions."""
    from dskd_plugin.cli import main

    made = runs.recipe(Run(task, next(iter(size.students)), "sft", size.rates[0], size.seeds[0]), size)
    file = out / f"generate-{task}.yaml"
    file.write_text(yaml.safe_dump(made, sort_keys=False), encoding="utf-8")
    os.chdir(out)
    limit, size_of_batch = str(evaluate.LIMITS[task]), str(evaluate.batch(evaluate.ANSWERED))
    arguments = [file.name, "--out", f"data/{task}-generated.jsonl", "--max-new-tokens", limit, "--keep-unfinished"]
    arguments += ["--batch-size", size_of_batch]
    main.main(args=["generate", *arguments], prog_name="dskd", standalone_mode=False)


def slowest_first(found: list[Run]) -> list[Run]:
    """The runs that generate before the others, so that none is still busy when everything else is done."""
    return sorted(found, key=lambda run: "on_policy" not in METHODS[run.method].block)


def search_runs(size: Size, wanted: Wanted) -> list[Run]:
    return [
        Run(task, pair, method, rate, size.seeds[0])
        for rate in size.rates
        for task, pair, method in wanted.methods_of(size)
    ]


def search(run: Run, size: Size, out: Path) -> None:
    runs.train(run, size, out)
    runs.measure(run, "validation", out, answers=False)


def search_jobs(size: Size, out: Path, wanted: Wanted) -> list[Job]:
    """Every rate with the first seed, scored by the bits per byte of the validation rows."""
    return [
        job(out, run, partial(search, run, size, out))
        for run in slowest_first(runs.drop_stale(search_runs(size, wanted), size, out))
        if not (run.folder(out) / "validation-likelihood.json").is_file()
    ]


def validation_bits(run: Run, out: Path) -> float | None:
    file = run.folder(out) / "validation-likelihood.json"
    return sum(pair[0] for pair in runs.read_json(file)["gold"]) if file.is_file() else None


def chosen_rate(task: str, pair: str, method: str, size: Size, out: Path) -> float | None:
    """The rate with the fewest bits on the validation rows, the lower one on a tie; None when every run failed."""
    found = {}
    for rate in size.rates:
        bits = validation_bits(Run(task, pair, method, rate, size.seeds[0]), out)
        if bits is not None and bits == bits:
            found[rate] = bits
    return min(found, key=lambda rate: (found[rate], rate)) if found else None


def seed_runs(size: Size, out: Path, wanted: Wanted) -> list[Run]:
    lines = [(*line, chosen_rate(*line, size, out)) for line in wanted.methods_of(size)]
    return [
        Run(task, pair, method, rate, seed)
        for seed in size.seeds
        for task, pair, method, rate in lines
        if rate is not None
    ]


def compare(run: Run, size: Size, out: Path) -> None:
    runs.train(run, size, out)
    for split in splits_of(run):
        runs.measure(run, split, out, answers=True)


def seed_jobs(size: Size, out: Path, wanted: Wanted) -> list[Job]:
    """Every seed at the chosen rate, scored on the held-out rows; models that lost the search are deleted."""
    keep = {run.name for run in seed_runs(size, out, wanted)}
    for run in search_runs(size, wanted):
        if run.name not in keep:
            runs.forget_model(run, out)
    return [
        job(out, run, partial(compare, run, size, out))
        for run in slowest_first(runs.drop_stale(seed_runs(size, out, wanted), size, out))
        if not all((run.folder(out) / f"{split}.json").is_file() for split in splits_of(run))
    ]


def splits_of(run: Run) -> tuple[str, ...]:
    return SPLITS if run.method in BASES else ("heldout",)


def ablation_runs(size: Size, out: Path, wanted: Wanted) -> list[Run]:
    lines = [line for line in wanted.methods_of(size) if line[2] == "dskd"]
    rates = {line: chosen_rate(*line, size, out) for line in lines}
    names = list(ABLATIONS)
    order = [(seed, name) for group in (names[:LEADING], names[LEADING:]) for seed in size.seeds for name in group]
    return [
        Run(task, pair, "dskd", rate, seed, name)
        for seed, name in order
        for (task, pair, _), rate in rates.items()
        if rate is not None and pair in ABLATIONS[name].pairs
    ]


def ablate(run: Run, size: Size, out: Path) -> None:
    runs.train(run, size, out)
    runs.measure(run, "validation", out, answers=True)
    runs.forget_model(run, out)


def ablation_jobs(size: Size, out: Path, wanted: Wanted) -> list[Job]:
    """One change to DSKD at a time, at its chosen rate, scored on the validation rows."""
    found = runs.drop_stale(ablation_runs(size, out, wanted), size, out)
    left = [run for run in found if not (run.folder(out) / "validation.json").is_file()]
    return [job(out, run, partial(ablate, run, size, out)) for run in left]


def gradient_runs(size: Size, out: Path, wanted: Wanted) -> list[Run]:
    """Runs of a seed of their own, so that the probes touch nothing that is compared."""
    lines = [line for line in wanted.methods_of(size) if line[2] in PROBED]
    rates = {line: chosen_rate(*line, size, out) for line in lines}
    return [Run(*line, rate, size.seeds[-1] + 1) for line, rate in rates.items() if rate is not None]


def probe(run: Run, size: Size, out: Path) -> None:
    runs.train(run, size, out, probes=PROBES)
    runs.forget_model(run, out)


def gradient_jobs(size: Size, out: Path, wanted: Wanted) -> list[Job]:
    """The gradient of every term while DSKD trains."""
    found = runs.drop_stale(gradient_runs(size, out, wanted), size, out)
    left = [run for run in found if not (run.folder(out) / "train.json").is_file()]
    return [job(out, run, partial(probe, run, size, out)) for run in left]


def failure(out: Path, name: str) -> Path:
    """Where a failed run is marked."""
    return out / "logs" / f"{name}.failed"


def all_records(size: Size, out: Path) -> list[records.Record]:
    """Records of whatever has run, failures included."""
    tasks = tuple(task for task in ("qa", "text") if (out / f"teacher-{task}").is_dir())
    wanted = Wanted(tasks)
    made = [records.documents(out, task, split) for task in tasks for split in SPLITS]
    seen: set[str] = set()
    phases = {
        "seeds": seed_runs(size, out, wanted),
        "search": search_runs(size, wanted),
        "ablations": ablation_runs(size, out, wanted),
    }
    for phase, found in phases.items():
        for run in found:
            ended = (run.folder(out) / "train.json").is_file() or failure(out, run.name).is_file()
            if ended and run.name not in seen:
                seen.add(run.name)
                made.append(records.record(run, out, phase))
    for run in gradient_runs(size, out, wanted):
        file = run.folder(out) / "gradients.jsonl"
        if (run.folder(out) / "train.json").is_file() and file.is_file():
            made.append(records.gradients(run, file))
    return made
