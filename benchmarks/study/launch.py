"""Runs jobs in children of one process that has imported everything: a child calls the same `axolotl` command.

Forking saves some twenty seconds of imports for each run; `axolotl train RECIPE --launcher python` itself is called
through its click command, with a working folder, log file and environment of its own.
"""

import contextlib
import ctypes
import importlib
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

ENVIRONMENT = {
    "AXOLOTL_DO_NOT_TRACK": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
MODULES = (
    "axolotl.cli.train",
    "axolotl.core.builders.causal",
    "axolotl.loaders.model",
    "axolotl.train",
    "axolotl.utils.data.sft",
    "transformers.models.llama.modeling_llama",
    "dskd_plugin.host.plugin",
    "dskd_plugin.host.trainer",
    "dskd_eval.cli",
    "dskd_eval.evaluate",
)
_PR_SET_PDEATHSIG = 1
_DEVICES = "CUDA_VISIBLE_DEVICES"
_hidden: dict[str, str] | None = None  # that variable as it was before `preload`


@dataclass(frozen=True)
class Job:
    """name: what the progress line shows; log: where the output goes; work: called in a child process."""

    name: str
    log: Path
    work: Callable[[], None]


@dataclass(frozen=True)
class Outcome:
    job: Job
    ok: bool
    seconds: float


def preload() -> None:
    """Import what a run needs, with one thread; call it before the first job.

    A process that has touched CUDA cannot fork children that use it, and some imports touch it: none is seen here.
    """
    global _hidden
    if _hidden is None:
        _hidden = {key: os.environ[key] for key in (_DEVICES,) if key in os.environ}
    os.environ |= ENVIRONMENT | {_DEVICES: ""}
    with _silence():
        for name in MODULES:
            importlib.import_module(name)
        if find_spec("deepspeed"):  # accelerate imports it where it is installed
            importlib.import_module("deepspeed")
        import datasets
        import torch

        # A spawned worker would import everything again just to write some rows.
        multiprocess = datasets.arrow_dataset.mp
        forked = multiprocess.get_context("fork")
        multiprocess.get_context = lambda method=None: forked
    torch.set_num_threads(1)


def _show_gpu(hidden: dict[str, str]) -> None:
    """Let a child use the GPU that the parent never saw."""
    from transformers.utils import import_utils

    del os.environ[_DEVICES]
    os.environ |= hidden
    # These remember that there was none.
    for question in vars(import_utils).values():
        if hasattr(question, "cache_clear"):
            question.cache_clear()


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Nothing on the terminal while libraries greet."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept, nowhere = [os.dup(1), os.dup(2)], os.open(os.devnull, os.O_WRONLY)
    try:
        for number in (1, 2):
            os.dup2(nowhere, number)
        yield
    finally:
        for number, copy in zip((1, 2), kept, strict=True):
            os.dup2(copy, number)
            os.close(copy)
        os.close(nowhere)


def axolotl(arguments: list[str], folder: Path) -> None:
    """`axolotl ARGUMENTS` in `folder`, in this process."""
    from axolotl.cli.main import cli

    os.chdir(folder)
    cli.main(args=arguments, prog_name="axolotl", standalone_mode=False)


def run(jobs: Iterable[Job], *, at_once: int) -> Iterator[Outcome]:
    """Every job in a child process, at most `at_once` of them; outcomes as they come. A failure stops no other."""
    waiting = iter(jobs)
    running: dict[int, tuple[Job, float]] = {}
    try:
        while True:
            while len(running) < at_once and (job := next(waiting, None)) is not None:
                job.log.unlink(missing_ok=True)
                running[start(job)] = (job, time.monotonic())
            if not running:
                return
            time.sleep(0.05)
            for pid in list(running):
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    job, started = running.pop(pid)
                    yield Outcome(job, status == 0, time.monotonic() - started)
    finally:
        for pid in running:
            os.kill(pid, signal.SIGTERM)


def start(job: Job) -> int:
    """The process id of a child that does the job; its output is added to the log."""
    job.log.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        sink = os.open(job.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(sink, 1)
        os.dup2(sink, 2)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if _hidden is not None:
            _show_gpu(_hidden)
        job.work()
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
