"""Runs work in children of one process that has imported what training needs, so that the imports cost once.

Python's own fork server does the rest: it runs one thread and has seen no GPU, so that it may be forked whatever the
process that asks for a child has done. The quickstart, the studies and the end-to-end tests run their commands so.
"""

import contextlib
import ctypes
import multiprocessing
import os
import resource
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from pathlib import Path

# Imported before the first child; a name that cannot be imported is left to the work that needs it.
MODULES = (
    "axolotl.cli.main",
    "axolotl.cli.train",
    "axolotl.core.builders.causal",
    "axolotl.loaders.model",
    "axolotl.train",
    "axolotl.utils.data.sft",
    "deepspeed",
    "transformers.models.llama.modeling_llama",
    "dskd_plugin.cli",
    "dskd_plugin.cli.generate",
    "dskd_plugin.host.plugin",
    "dskd_plugin.host.trainer",
)
_PR_SET_PDEATHSIG = 1
_DEVICES = "CUDA_VISIBLE_DEVICES"


def script(name: str) -> EntryPoint | None:
    """What the installed script `name` calls, where its process may be forked; else None.

    On Linux only, and not beside a GPU, where commands of the quickstart have never been forked.
    """
    import torch

    if sys.platform != "linux" or torch.cuda.is_available():
        return None
    return next(iter(entry_points(group="console_scripts", name=name)), None)


def prepare(environment: dict[str, str], modules: tuple[str, ...] = (), *, quiet: bool = False) -> None:
    """Start the process that imports; modules: more than MODULES. Libraries read the environment when imported.

    quiet: what libraries say while they are imported goes nowhere, and neither does what a child says before its work.
    """
    multiprocessing.set_forkserver_preload([*MODULES, *modules])
    kept = dict(os.environ)
    # A process that has used several threads cannot be forked, nor can one that has touched CUDA use it in a child.
    os.environ |= environment | {"OMP_NUM_THREADS": "1", _DEVICES: ""}
    try:
        with _silence() if quiet else contextlib.nullcontext():
            forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ |= kept


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Nothing on the terminal from what is started meanwhile."""
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


@dataclass(frozen=True)
class Called:
    """Work of a child: an installed script with these arguments."""

    script: EntryPoint
    arguments: list[str]

    def __call__(self) -> object:
        sys.argv = [self.script.name, *self.arguments]
        return self.script.load()()


class Child:
    """A running child that does some work; what it says is added to a log file.

    work: sent to the child with pickle; as of a script, what it returns is the exit code or an error's text, None is 0.
    """

    def __init__(self, work: Callable[[], object], *, folder: Path, log: Path, environment: dict[str, str]) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        context = multiprocessing.get_context("forkserver")
        self._cost, cost = context.Pipe(duplex=False)
        # The server itself sees no GPU, see `prepare`.
        variables = {key: os.environ[key] for key in (_DEVICES,) if key in os.environ} | environment
        self._process = context.Process(target=_child, args=(work, folder.resolve(), log.resolve(), variables, cost))
        self._process.start()
        cost.close()
        self.cpu_seconds = 0.0

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def poll(self) -> int | None:
        """The exit code, minus the signal that ended it; None while it runs."""
        code = self._process.exitcode
        if code is not None and not self._cost.closed:
            # A child that was killed has told nothing: its end of the pipe is closed and empty.
            with contextlib.suppress(EOFError):
                self.cpu_seconds = self._cost.recv()
            self._cost.close()
        return code

    def terminate(self) -> None:
        """End the child."""
        self._process.terminate()
        self._process.join()


def _child(work: Callable[[], object], folder: Path, log: Path, environment: dict[str, str], cost: Connection) -> None:
    if sys.platform == "linux":
        # The server ends with the process that started it; its children end with the server.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    sink = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for number in (1, 2):
        os.dup2(sink, number)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
    os.chdir(folder)
    os.environ.pop(_DEVICES, None)
    os.environ |= environment
    _settle(environment)
    code: object = 0
    try:
        code = work()
    except SystemExit as stop:
        code = stop.code
    except BaseException:
        traceback.print_exc()
        code = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        cost.send(sum(usage.ru_utime + usage.ru_stime for usage in used))
    if isinstance(code, str):
        print(code, file=sys.stderr)
    sys.exit(code if isinstance(code, int) else 1 if code else 0)


def _settle(environment: dict[str, str]) -> None:
    """Change what imported libraries have settled for the server and not for this child."""
    torch, datasets, questions = map(sys.modules.get, ("torch", "datasets", "transformers.utils.import_utils"))
    # Else the workers of a DataLoader, from a fork server of their own, and the spawned ones of datasets would import
    # everything again.
    multiprocessing.set_start_method("fork", force=True)
    if datasets is not None:
        forked = datasets.arrow_dataset.mp.get_context("fork")
        datasets.arrow_dataset.mp.get_context = lambda method=None: forked
    if torch is not None:
        torch.set_num_threads(int(environment.get("OMP_NUM_THREADS", "1").split(",")[0]))
    # These remember that there was no GPU.
    for question in vars(questions).values() if questions is not None else ():
        if hasattr(question, "cache_clear"):
            question.cache_clear()
