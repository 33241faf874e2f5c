"""Jobs of a study, each in a child that has imported everything (`quickstart/forked.py`), several at a time.

`axolotl train RECIPE --launcher python` itself is called there, through its click command.
"""

import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from quickstart import forked

ENVIRONMENT = {
    "AXOLOTL_DO_NOT_TRACK": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


@dataclass(frozen=True)
class Job:
    """name: what the progress line shows; log: where the output goes; work: called in a child, pickled for it."""

    name: str
    log: Path
    work: Callable[[], None]


@dataclass(frozen=True)
class Outcome:
    job: Job
    ok: bool
    seconds: float


def preload() -> None:
    """Import what a run needs; call it before the first job."""
    forked.prepare(ENVIRONMENT, ("dskd_eval.cli", "dskd_eval.evaluate"), quiet=True)


def axolotl(arguments: list[str], folder: Path) -> None:
    """`axolotl ARGUMENTS` in `folder`, in this process."""
    from axolotl.cli.main import cli

    os.chdir(folder)
    cli.main(args=arguments, prog_name="axolotl", standalone_mode=False)


def shown(jobs: Iterable[Job], count: int, *, at_once: int, title: str) -> Iterator[Outcome]:
    """`run`, with a line for each job that has ended. count: of all jobs."""
    started = time.monotonic()
    for done, outcome in enumerate(run(jobs, at_once=at_once), start=1):
        said = "" if outcome.ok else f"  FAILED, see {outcome.job.log}"
        elapsed = (time.monotonic() - started) / 60
        print(
            f"{title} {done}/{count} {elapsed:5.1f} min  {outcome.seconds:4.0f} s  {outcome.job.name}{said}", flush=True
        )
        yield outcome


def run(jobs: Iterable[Job], *, at_once: int) -> Iterator[Outcome]:
    """Every job in a child process, at most `at_once` of them; outcomes as they come. A failure stops no other."""
    waiting = iter(jobs)
    running: list[tuple[Job, forked.Child, float]] = []
    try:
        while True:
            while len(running) < at_once and (job := next(waiting, None)) is not None:
                job.log.unlink(missing_ok=True)
                child = forked.Child(job.work, folder=Path.cwd(), log=job.log, environment=ENVIRONMENT)
                running.append((job, child, time.monotonic()))
            if not running:
                return
            time.sleep(0.05)
            for entry in list(running):
                job, child, started = entry
                if child.poll() is not None:
                    running.remove(entry)
                    yield Outcome(job, child.poll() == 0, time.monotonic() - started)
    finally:
        for _, child, _ in running:
            child.terminate()
