"""`python -m benchmarks.study`: prepare, search, runs over seeds, ablations, records and report."""

import argparse
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.options import add_stages, stages_of
from benchmarks.study import launch, plan, prepare, records, report
from benchmarks.study.table import METHODS, SIZES, Size

STAGES = ("prepare", "search", "seeds", "gradients", "ablations", "records", "report")
RECORDS = Path(__file__).parent / "records"


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.study",
        description="Distillation methods over seeds on pairs of models. Repeat the command to go on after a stop.",
    )
    add_stages(parser, STAGES)
    parser.add_argument("--size", choices=sorted(SIZES), default="small")
    parser.add_argument("--out", type=Path, help="default: out/study-SIZE")
    parser.add_argument("--tasks", nargs="+", choices=("qa", "text"), help="default: what the size names")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), help="only these (default: all)")
    parser.add_argument("--pairs", nargs="+", choices=("one", "two"), help="only these (default: all)")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each (default: 2)")
    parser.add_argument("--minutes", type=float, help="start no further run after so many minutes")
    options = parser.parse_args(arguments)
    options.stages = stages_of(parser, options, STAGES)
    options.out = (options.out or Path("out") / f"study-{options.size}").resolve()
    return options


def in_parallel(jobs: list[launch.Job], options: argparse.Namespace, deadline: float, title: str) -> bool:
    """Run the jobs, one line each; a job past the deadline is not started. Returns whether all of them succeeded."""
    succeeded = 0
    waiting = (job for job in jobs if time.monotonic() < deadline)
    for outcome in launch.shown(waiting, len(jobs), at_once=options.jobs, title=title):
        mark = plan.failure(options.out, outcome.job.name)
        mark.unlink(missing_ok=True) if outcome.ok else mark.touch()
        succeeded += outcome.ok
    return succeeded == len(jobs)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    size: Size = SIZES[options.size]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    deadline = float("inf") if options.minutes is None else time.monotonic() + 60 * options.minutes
    out, wanted = options.out, plan.Wanted(tuple(options.tasks or size.tasks), options.pairs, options.methods)
    if set(STAGES[:5]) & set(options.stages):
        launch.preload()
    if "prepare" in options.stages:
        parts: tuple[Callable[[], list[launch.Job]], ...] = (
            lambda: [prepare.first_job(size, out)],
            lambda: prepare.jobs(size, out, wanted.tasks),
            lambda: plan.teacher_jobs(size, out, wanted),
        )
        for part in parts:
            if not in_parallel(part(), options, deadline, "prepare"):
                return 1
    if "search" in options.stages:
        in_parallel(plan.search_jobs(size, out, wanted), options, deadline, "search")
    rest: dict[str, Callable[[Size, Path, plan.Wanted], list[launch.Job]]] = {
        "seeds": plan.seed_jobs,
        "gradients": plan.gradient_jobs,
        "ablations": plan.ablation_jobs,
    }
    # All of these wait for the chosen rates only.
    jobs = [job for stage, make in rest.items() if stage in options.stages for job in make(size, out, wanted)]
    in_parallel(jobs, options, deadline, "runs")
    file = RECORDS / f"{options.size}.jsonl"
    if "records" in options.stages:
        made = plan.all_records(size, out)
        records.write(file, records.merged(records.read(file) if file.is_file() else [], made))
        failed = sum("error" in record for record in made)
        print(f"{file}: {len(made)} lines, {failed} of failed runs")
    if "report" in options.stages:
        report.write(file, options.size)
    return 0


if __name__ == "__main__":
    sys.exit(main())
