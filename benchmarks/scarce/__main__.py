"""`python -m benchmarks.scarce`: quickstart, runs, records and report; repeat it to go on after a stop."""

import argparse
import signal
import sys
from functools import partial
from itertools import product
from pathlib import Path

from benchmarks.options import add_stages, stages_of
from benchmarks.scarce import records, report, runs
from benchmarks.scarce.students import STUDENTS
from benchmarks.scarce.table import RECIPES, SEEDS
from benchmarks.scarce.table import runs as planned
from benchmarks.study import launch
from benchmarks.study.data import read
from benchmarks.study.records import write as write_lines

STAGES = ("quickstart", "runs", "records", "report")
RECORDS = Path(__file__).parent / "records" / "scarce.jsonl"


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scarce",
        description="Every method where gold answers are few. Repeat the command to go on after a stop.",
    )
    add = parser.add_argument
    add_stages(parser, STAGES)
    add("--out", type=Path, default=Path("out") / "scarce", help="default: out/scarce")
    add("--records", type=Path, default=RECORDS, metavar="FILE", help="default: the committed file")
    add("--page", type=Path, default=report.PAGE, metavar="FILE", help="default: docs/scarce.md")
    add("--students", nargs="+", choices=list(STUDENTS), default=list(STUDENTS), help="only these (default: all)")
    add("--recipes", nargs="+", choices=list(RECIPES), default=list(RECIPES), help="only these (default: all)")
    add("--seeds", nargs="+", type=int, default=list(SEEDS), help="default: 1 2 3")
    add("--jobs", type=int, default=1, help="runs at a time, one thread each (default: 1)")
    options = parser.parse_args(arguments)
    options.stages = stages_of(parser, options, STAGES)
    options.out = options.out.resolve()
    return options


def train(options: argparse.Namespace) -> bool:
    """Every run that is not finished, one line each. Returns whether all of them succeeded."""
    chosen = planned(options.students, options.recipes, options.seeds)
    left = [run for run in chosen if not runs.finished(options.out, run)]
    jobs = [
        launch.Job(run.name, options.out / "logs" / f"{run.name}.log", partial(runs.work, options.out, run))
        for run in left
    ]
    launch.preload()
    shown = launch.shown(jobs, len(jobs), at_once=options.jobs, title="runs")
    return sum(outcome.ok for outcome in shown) == len(jobs)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    ok = True
    if "quickstart" in options.stages:
        for student, seed in product(options.students, options.seeds):
            runs.make_questions(options.out, student, seed)
    if "runs" in options.stages:
        ok = train(options)
    if "records" in options.stages:
        made = [records.of_quickstart(options.out, *pair) for pair in product(options.students, options.seeds)]
        chosen = planned(options.students, options.recipes, options.seeds)
        made += [records.of_run(options.out, run) for run in chosen]
        earlier = read(options.records) if options.records.is_file() else []
        kept = records.merged(earlier, [one for one in made if one is not None])
        options.records.parent.mkdir(parents=True, exist_ok=True)
        write_lines(options.records, kept)
        print(f"{options.records}: {len(kept)} lines")
    if "report" in options.stages:
        report.write(read(options.records), options.page)
        print(options.page)
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
