"""The commands of Axolotl and of this project as processes of their own, each with a bar and two at a time."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from threading import Event
from typing import Any

from tqdm import tqdm

from quickstart import forked
from quickstart.forked import Called, Child

# The trainer's bar has no words, that of `dskd generate` has these; the others are short.
_STEP = re.compile(r"(?:Generating: *)?\d+%\|[^|]*\| *(\d+)/(\d+)(?: answers)? \[")
_TAIL = 4000


class Stopped(RuntimeError):
    """A command was ended because the one beside it failed or the user asked for the end."""


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def program(name: str) -> str:
    """The program beside this Python, else on PATH; ValueError when there is none."""
    found = shutil.which(name, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    if found is None:
        raise ValueError(
            f"{name}: expected the command beside {sys.executable} or on PATH, found none. "
            "Run `pip install -e '.[train,eval,dev]'`, or start the quickstart with `make quickstart`."
        )
    return found


class _Started:
    """A running command; its output is added to a log file."""

    def __init__(self, command: list[str], *, folder: Path, log: Path, environment: dict[str, str]) -> None:
        with log.open("a", encoding="utf-8") as sink:
            options: dict[str, Any] = {"cwd": folder, "env": environment, "stdout": sink, "stderr": subprocess.STDOUT}
            self._process = subprocess.Popen(command, **options)
        self.cpu_seconds = 0.0

    def poll(self) -> int | None:
        """The exit code; None while the command runs."""
        if self._process.returncode is None:
            # Unlike Popen.wait it tells what this one process cost.
            done, status, usage = os.wait4(self._process.pid, os.WNOHANG)
            if done:
                self._process.returncode = os.waitstatus_to_exitcode(status)
                self.cpu_seconds = usage.ru_utime + usage.ru_stime
        return self._process.returncode

    def terminate(self) -> None:
        """End the command."""
        self._process.terminate()
        self._process.wait()


class Commands:
    """Runs commands in the folder `out`, their output in `out`/logs; `stop` ends those that run."""

    def __init__(self, out: Path, *, seed: int, offline: bool) -> None:
        self.out, self.seed = out, seed
        self.environment = {"AXOLOTL_DO_NOT_TRACK": "1", "TOKENIZERS_PARALLELISM": "false"} | os.environ
        if offline:
            self.environment |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
        self.stop = Event()

    def train(self, recipe: str, output: Path, *options: str, title: str, threads: int, place: int = 0) -> float:
        """`axolotl train RECIPE.yaml` into the folder `output`; returns its CPU seconds."""
        fixed = ["--launcher", "python", "--seed", str(self.seed), "--output-dir", str(output.resolve())]
        command = [program("axolotl"), "train", f"{recipe}.yaml", *fixed, *options]
        log = self.out / "logs" / f"{output.name}.log"
        return self.run(command, log, title=title, threads=threads, place=place)

    def run(self, command: list[str], log: Path, *, title: str, threads: int, place: int = 0) -> float:
        """Run one command to its end; returns its CPU seconds; RuntimeError when it fails.

        place: line of the bar, for two commands at a time.
        """
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text("", encoding="utf-8")
        environment = {"OMP_NUM_THREADS": str(max(1, threads))} | self.environment
        name = Path(command[0]).name
        called = forked.script(name)
        with _bar(title, place) as bar:
            run: Child | _Started = (
                _Started(command, folder=self.out, log=log, environment=environment)
                if called is None
                else Child(Called(called, command[1:]), folder=self.out, log=log, environment=environment)
            )
            code = self._follow(run, log, bar)
        if code != 0:
            shown = " ".join([name, *command[1:3]])
            last = "\n".join(_lines(log)[-15:])
            raise RuntimeError(f"{shown}: expected exit code 0, got {code}. Read {log}; it ends with:\n{last}")
        return run.cpu_seconds

    def _follow(self, run: "Child | _Started", log: Path, bar: "tqdm[Any]") -> int:
        """The exit code of a command, once it has ended; a command that is left before is ended."""
        code = None
        try:
            while (code := run.poll()) is None:
                _show(bar, log)
                if self.stop.wait(0.5):
                    raise Stopped(f"{bar.desc}: stopped.")
            return code
        finally:
            if code is None:
                run.terminate()

    def side_by_side(self, *jobs: Callable[[], Any]) -> list[Any]:
        """Results of the jobs, two at a time where there are two cores; the first failure ends the others."""
        with ThreadPoolExecutor(max_workers=min(2, cores())) as pool:
            futures = [pool.submit(job) for job in jobs]
            try:
                done, _ = wait(futures, return_when=FIRST_EXCEPTION)
                for future in done:
                    future.result()  # raises what the job raised
                return [future.result() for future in futures]
            except BaseException:
                self.stop.set()
                raise


@contextmanager
def _bar(title: str, place: int) -> Iterator["tqdm[Any]"]:
    every = 0.5 if sys.stderr.isatty() else 60
    layout = "{desc}: {percentage:3.0f}% |{bar:20}| {n_fmt}/{total_fmt}, {elapsed} gone, {remaining} left"
    options = {"bar_format": layout, "position": place, "leave": False, "mininterval": every}
    with tqdm(total=1, desc=f"{title}: starting", **options) as bar:
        yield bar


def _show(bar: "tqdm[Any]", log: Path) -> None:
    """Take the step that the log shows last over into the bar."""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - _TAIL))
        parts = re.split(r"[\r\n]+", file.read().decode("utf-8", errors="replace"))
    steps = [(int(found[1]), int(found[2])) for part in parts if (found := _STEP.match(part.strip()))]
    if not steps:
        return
    if bar.desc.endswith(": starting"):
        # The clock of the bar starts with the first step, or loading would count as a step.
        bar.set_description_str(bar.desc.removesuffix(": starting"), refresh=False)
        bar.reset(total=steps[-1][1])
    # An evaluation inside a training has a bar of its own, of another length.
    of_this = [done for done, total in steps if total == bar.total]
    bar.update(max(0, of_this[-1] - bar.n) if of_this else 0)


def _lines(log: Path) -> list[str]:
    text = log.read_text(encoding="utf-8", errors="replace")
    return [line.strip() for line in re.split(r"[\r\n]+", text) if line.strip()]
