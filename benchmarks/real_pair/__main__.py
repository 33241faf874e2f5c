"""`python -m benchmarks.real_pair`: prepare, generate, runs, records and report; repeat it to go on after a stop."""

import argparse
import signal
import sys
import time
from functools import partial
from pathlib import Path

from benchmarks.options import add_stages, stages_of
from benchmarks.real_pair import data, easy, records, report, runs
from benchmarks.real_pair.measures import HUMANEVAL, MBPP, MEASURES
from benchmarks.real_pair.table import BASE, DATA_SETS, PAIRS, SETTINGS, Run, planned
from benchmarks.study import launch
from benchmarks.study.records import merged

STAGES = ("prepare", "generate", "runs", "records", "report")
RECORDS = Path(__file__).parent / "records" / "real_pair.jsonl"


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.real_pair",
        description="Methods on a pair of real models. Repeat the command to go on after a stop.",
    )
    add = parser.add_argument
    add_stages(parser, STAGES)
    add("--teacher", type=Path, required=True, metavar="DIR", help="folder of the teacher")
    add("--student", type=Path, required=True, metavar="DIR", help="folder of the student")
    add("--data", type=Path, required=True, metavar="DIR", help="folder with mbpp/, gsm8k/ and humaneval/")
    add("--out", type=Path, default=Path("out") / "real-pair", help="default: out/real-pair")
    add("--records", type=Path, default=RECORDS, metavar="FILE", help="default: the committed file")
    add("--page", type=Path, default=report.PAGE, metavar="FILE", help="default: docs/real_pair.md")
    add("--pairs", nargs="+", choices=list(PAIRS), help="only these (default: all)")
    add("--data-sets", nargs="+", choices=DATA_SETS, help="only these (default: all)")
    add("--settings", nargs="+", choices=[BASE, *SETTINGS], help="only these (default: all)")
    add("--seeds", nargs="+", type=int, help="only these (default: all)")
    add("--rates", nargs="+", type=float, help="only these (default: all)")
    add("--steps", nargs="+", type=int, help="only these (default: all)")
    add("--measures", nargs="+", choices=MEASURES, default=list(MEASURES), help="only these (default: all)")
    add("--humaneval", type=int, default=0, metavar="N", help="so many documents of HumanEval (default: all)")
    add("--mbpp", type=int, default=160, metavar="N", help="so many documents of MBPP's test split (default: 160)")
    add("--keep-models", action="store_true", help="do not delete a model when it is measured")
    add("--jobs", type=int, default=1, help="runs at a time, one thread each (default: 1)")
    add("--minutes", type=float, help="start no further run after so many minutes")
    options = parser.parse_args(arguments)
    options.stages = stages_of(parser, options, STAGES)
    options.out = options.out.resolve()
    return options


def chosen(options: argparse.Namespace) -> list[Run]:
    """The planned runs that the options name; the untrained student has no rate, length and seed."""
    wanted = {"pair": options.pairs, "data": options.data_sets, "setting": options.settings}
    amounts = {"rate": options.rates, "steps": options.steps, "seed": options.seeds}
    found = []
    for run in planned():
        limits = wanted if run.setting == BASE else wanted | amounts
        if all(names is None or getattr(run, key) in names for key, names in limits.items()):
            found.append(run)
    return found


def jobs(options: argparse.Namespace, place: runs.Place) -> list[launch.Job]:
    """One job for every run that lacks something; says which of them cannot run now, and why."""
    made = []
    for run in chosen(options):
        if runs.finished(run, place):
            continue
        why = runs.obstacle(run, place)
        if why is not None:
            print(f"left out: {run.name}: {why}")
            continue
        made.append(launch.Job(run.name, place.out / "logs" / f"{run.name}.log", partial(runs.work, run, place)))
    return made


def in_turn(made: list[launch.Job], options: argparse.Namespace, title: str) -> bool:
    """Run the jobs, one line each; none starts after --minutes. Returns whether all of them succeeded."""
    started = time.monotonic()
    limit = float("inf") if options.minutes is None else 60 * options.minutes
    waiting = (job for job in made if time.monotonic() - started < limit)
    shown = launch.shown(waiting, len(made), at_once=options.jobs, title=title)
    return sum(outcome.ok for outcome in shown) == len(made)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    limits = {HUMANEVAL: options.humaneval, MBPP: options.mbpp}
    place = runs.Place(options.out, options.data.resolve(), limits, tuple(options.measures), options.keep_models)
    ok = True
    if "prepare" in options.stages:
        runs.link_models(place.out, options.teacher, options.student)
        data.prepare(place.data, place.out / "data")
        easy.write_task(place.out / "tasks")
    if {"generate", "runs"} & set(options.stages):
        launch.preload()
    if "generate" in options.stages:
        asked = [
            launch.Job(
                f"generate-{source}-{pair}",
                place.out / "logs" / f"generate-{source}-{pair}.log",
                partial(runs.generate, pair, source, place.out),
            )
            for source in ("few", "mbpp", "gsm8k")
            for pair in options.pairs or PAIRS
            if options.data_sets is None or source in options.data_sets
        ]
        ok &= in_turn(asked, options, "generate")
    if "runs" in options.stages:
        ok &= in_turn(jobs(options, place), options, "runs")
    if "records" in options.stages:
        earlier = records.read(options.records) if options.records.is_file() else []
        made = merged(earlier, records.collect(planned(), place))
        records.write(options.records, made)
        print(f"{options.records}: {len(made)} lines")
    if "report" in options.stages:
        report.write(options.records, options.page)
        print(options.page)
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
