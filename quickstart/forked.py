"""Starts commands as children of one process that has imported what they need, so that the imports cost once.

A child calls the entry point of the installed script. Python's own fork server does the rest.
"""

import contextlib
import multiprocessing
import os
import resource
import sys
import traceback
from importlib.metadata import EntryPoint, entry_points
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from pathlib import Path

# Imported before the first command; a name that cannot be imported is left to the command that needs it.
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
    "dskd_plugin.host.trainer",
)


def script(name: str) -> EntryPoint | None:
    """What the installed script `name` calls, where its process may be forked; else None.

    It may on Linux only, and not beside a GPU: the child of a process that has touched CUDA cannot use it.
    """
    import torch

    if sys.platform != "linux" or torch.cuda.is_available():
        return None
    return next(iter(entry_points(group="console_scripts", name=name)), None)


def prepare(environment: dict[str, str]) -> None:
    """Start the process that imports. Libraries read the environment when they are imported."""
    if script("axolotl") is None:
        return
    multiprocessing.set_forkserver_preload(list(MODULES))
    kept = dict(os.environ)
    # A process that has used several threads cannot be forked.
    os.environ |= environment | {"OMP_NUM_THREADS": "1"}
    try:
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ |= kept


class Forked:
    """A running command; its output is added to a log file."""

    def __init__(
        self, called: EntryPoint, arguments: list[str], *, folder: Path, log: Path, environment: dict[str, str]
    ) -> None:
        context = multiprocessing.get_context("forkserver")
        self._cost, cost = context.Pipe(duplex=False)
        parts = (called, arguments, folder.resolve(), log.resolve(), environment, cost)
        self._process = context.Process(target=_work, args=parts)
        self._process.start()
        cost.close()
        self.cpu_seconds = 0.0

    def poll(self) -> int | None:
        """The exit code; None while the command runs."""
        code = self._process.exitcode
        if code is not None and not self._cost.closed:
            # A command that was killed has told nothing: its end of the pipe is closed and empty.
            with contextlib.suppress(EOFError):
                self.cpu_seconds = self._cost.recv()
            self._cost.close()
        return code

    def terminate(self) -> None:
        """End the command."""
        self._process.terminate()
        self._process.join()


def _work(
    called: EntryPoint, arguments: list[str], folder: Path, log: Path, environment: dict[str, str], cost: Connection
) -> None:
    """In the child: call the command as its script does."""
    import torch

    sink = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(sink, 1)
    os.dup2(sink, 2)
    os.chdir(folder)
    os.environ |= environment
    # Else the workers of a DataLoader would come from a fork server of their own, which imports everything again.
    multiprocessing.set_start_method("fork", force=True)
    torch.set_num_threads(int(environment["OMP_NUM_THREADS"].split(",")[0]))
    sys.argv = [called.name, *arguments]
    code: object = 0
    try:
        code = called.load()()
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
