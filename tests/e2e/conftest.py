"""The real ``axolotl`` command, on one process or on two with real training engines."""

import contextlib
import functools
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from quickstart import forked

LAUNCH = Path(__file__).parent / "cpu_engines.py"
ON_START = Path(__file__).parent / "on_start"


def environment() -> dict[str, str]:
    # What the plugin's tests set for their own process is not what a user has.
    inherited = {key: value for key, value in os.environ.items() if key != "AXOLOTL_TEE_STDOUT"}
    return {
        **inherited,
        "AXOLOTL_DO_NOT_TRACK": "1",
        "AXOLOTL_METRIC_NDIGITS": "9",
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "CUDA_VISIBLE_DEVICES": "",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }


class Run:
    """A finished command: exit code, output and, where it trained, the logged history."""

    def __init__(self, code: int, output: str, recipe: dict[str, Any]) -> None:
        self.code, self.output, self.out = code, output, Path(recipe["output_dir"])

    @property
    def log(self) -> list[dict[str, float]]:
        steps = sorted(self.out.glob("checkpoint-*/trainer_state.json"), key=lambda p: int(p.parent.name.split("-")[1]))
        return json.loads(steps[-1].read_text())["log_history"]

    @staticmethod
    def kd_of(entry: dict[str, float], prefix: str = "dskd/") -> float:
        """What the loss of a logged step holds beside its cross-entropy, of one teacher; see docs/metrics.md."""
        guarded = entry.get(f"{prefix}guarded", 0.0)
        return entry[f"{prefix}t2s_ce" if guarded else f"{prefix}kd"] + entry[f"{prefix}ce_unpaired"]

    def curve(self, *names: str) -> list[tuple[float, ...]]:
        names = names or ("loss", "grad_norm", "dskd/ce", "dskd/kd")
        return [tuple(entry[name] for name in names) for entry in self.log if "loss" in entry]


def kill_tree(pid: int) -> None:
    """kill -9 a process and all its descendants; torchrun starts its ranks in sessions of their own."""
    with contextlib.suppress(psutil.NoSuchProcess):
        parent = psutil.Process(pid)
        for process in [*parent.children(recursive=True), parent]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


class Process:
    """A command in an interpreter of its own."""

    def __init__(self, arguments: list[str], folder: Path, log: Path, environment: dict[str, str]) -> None:
        with log.open("w") as stream:
            self._process = subprocess.Popen(
                arguments, cwd=folder, env=environment, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True
            )
        self.pids = [self._process.pid]

    def poll(self) -> int | None:
        return self._process.poll()

    def wait(self) -> int:
        return self._process.wait()


class Fork:
    """A command in children that have imported everything; as under torchrun, a rank that fails ends the others.

    `poll` and `wait` give the first exit code that is not 0.
    """

    def __init__(self, arguments: list[str], ranks: int, folder: Path, log: Path, environment: dict[str, str]) -> None:
        from tests.e2e.forked_rank import Rank

        imports_once()
        log.write_text("")
        port = free_port()
        place = {"folder": folder, "log": log, "environment": environment}
        self._children = [forked.Child(Rank(arguments, rank, ranks, port), **place) for rank in range(ranks)]
        self.pids = [child.pid for child in self._children]
        self._code = 0

    def poll(self) -> int | None:
        codes = [child.poll() for child in self._children]
        failed = [code for code in codes if code]
        if failed and self._code == 0:
            self._code = failed[0]
            for child, code in zip(self._children, codes, strict=True):
                if code is None:
                    kill_tree(child.pid)
        return None if None in codes else self._code

    def wait(self) -> int:
        while (code := self.poll()) is None:
            time.sleep(0.01)
        return code


@functools.cache
def imports_once() -> None:
    """Start the process that imports, once in each process of the tests; it ends with that one."""
    forked.prepare(environment() | {"DS_ACCELERATOR": "cpu"}, quiet=True)


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


def written(file: Path) -> bool:
    """Whether a file, JSON or not, is there to its end."""
    if not file.exists() or file.suffix != ".json":
        return file.exists()
    try:
        return bool(json.loads(file.read_text()))
    except ValueError:
        return False


def command_line(file: Path, command: str, launcher: str, ranks: int, more: Sequence[str]) -> list[str]:
    if ranks > 1:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        return [*torchrun, str(LAUNCH), str(file)]
    chosen = [] if command == "preprocess" else ["--launcher", launcher]
    return ["axolotl", command, str(file), *chosen, *more]


SAID = "said: "


def reached(mark: str, log: Path, there: Callable[[Path], bool]) -> bool:
    """Whether a run has come so far: a path is there, or, after `SAID`, a text in its log."""
    return mark.removeprefix(SAID) in log.read_text() if mark.startswith(SAID) else there(Path(mark))


def axolotl(
    recipe: dict[str, Any],
    command: str = "train",
    *,
    launcher: str = "python",
    ranks: int = 1,
    fresh: bool = False,
    kill_after: str | None = None,
    interrupt: tuple[signal.Signals, str] | None = None,
    help_only: bool = False,
    command_options: Sequence[str] = (),
    timeout: int = 600,
    extra_env: dict[str, str] | None = None,
) -> Run:
    """Run the real command on the recipe. ranks 2: two processes with the CPU engines of cpu_engines.py.

    fresh: in interpreters of its own, as a user starts it, with two ranks under torchrun; otherwise the same command
    runs in a fork that has imported everything (quickstart/forked.py), except where a launcher starts interpreters.
    kill_after: kill -9 the whole process group as soon as this file is written, or `SAID` and this text is in the log.
    interrupt: a signal, sent as soon as the path exists or the text is said: SIGINT to all processes, as a terminal
    does, others to the command alone.
    """
    out = Path(recipe["output_dir"])
    out.parent.mkdir(parents=True, exist_ok=True)
    file, log = out.parent / f"{out.name}.yaml", out.parent / f"{out.name}.log"
    file.write_text(yaml.safe_dump(recipe, sort_keys=False))
    arguments = ["axolotl", "--help"] if help_only else command_line(file, command, launcher, ranks, command_options)
    variables = {**environment(), **(extra_env or {})}
    run: Process | Fork
    if fresh or help_only or launcher != "python":
        run = Process(arguments, out.parent, log, variables)
    else:
        run = Fork(arguments, ranks, out.parent, log, variables)
    deadline = time.monotonic() + timeout
    try:
        while run.poll() is None:
            if time.monotonic() > deadline:
                raise TimeoutError(f"{arguments}: no end after {timeout} s\n{log.read_text()[-3000:]}")
            if kill_after is not None and reached(kill_after, log, written):
                break
            if interrupt is not None and reached(interrupt[1], log, Path.exists):
                number = interrupt[0]
                (os.killpg if number == signal.SIGINT else os.kill)(run.pids[0], number)
                interrupt = None
            time.sleep(0.05)
    finally:
        if run.poll() is None:
            for pid in run.pids:
                kill_tree(pid)
        code = run.wait()
    return Run(code, log.read_text(), recipe)


def on_machines(recipe: dict[str, Any], commands: Sequence[Sequence[str]], timeout: int = 900) -> Run:
    """Run one command for each machine at once, all on this one; ranks that a launcher starts train on the CPU.

    recipe.yaml in a command stands for the recipe, which lies in the folder where the commands run.
    """
    out = Path(recipe["output_dir"])
    out.parent.mkdir(parents=True, exist_ok=True)
    (out.parent / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    variables = environment()
    variables["PYTHONPATH"] = os.pathsep.join([str(ON_START), variables.get("PYTHONPATH", "")])
    logs = [out.parent / f"machine-{number}.log" for number in range(len(commands))]
    running = [Process(list(command), out.parent, log, variables) for command, log in zip(commands, logs, strict=True)]
    deadline = time.monotonic() + timeout
    try:
        while None in (codes := [one.poll() for one in running]) and not any(codes):
            if time.monotonic() > deadline:
                raise TimeoutError(f"{commands}: no end after {timeout} s")
            time.sleep(0.05)
    finally:
        for one in running:
            if one.poll() is None:
                kill_tree(one.pids[0])
    code = next((code for code in (one.wait() for one in running) if code), 0)
    return Run(code, "\n".join(log.read_text() for log in logs), recipe)


@pytest.fixture(scope="session")
def run_axolotl() -> Callable[..., Run]:
    return axolotl


@pytest.fixture(scope="session")
def run_on_machines() -> Callable[..., Run]:
    return on_machines


@pytest.fixture(scope="session")
def a_free_port() -> Callable[[], int]:
    return free_port


@pytest.fixture
def train(recipe: dict[str, Any]):
    """``train(**changes)``: run the recipe with changes and expect success."""

    def run(name: str = "out", *, ranks: int = 1, command: str = "train", fresh: bool = False, **changes: Any) -> Run:
        block = {**recipe["dskd"], **changes.pop("dskd", {})}
        changed = {
            **recipe,
            **changes,
            "dskd": block,
            "output_dir": str(Path(recipe["output_dir"]).parent / name),
        }
        kept = {key: value for key, value in changed.items() if value is not None}
        result = axolotl(kept, command, ranks=ranks, fresh=fresh)
        assert result.code == 0, result.output[-4000:]
        return result

    return run


@pytest.fixture(scope="session")
def lora() -> dict[str, Any]:
    """A small adapter; nothing about kernels, which the plugin settles on a machine without a GPU."""
    return {
        "adapter": "lora",
        "lora_r": 4,
        "lora_alpha": 8,
        "lora_target_modules": ["q_proj", "v_proj", "up_proj"],
    }


FSDP2 = {
    "fsdp_version": 2,
    "fsdp_config": {
        "offload_params": False,
        "state_dict_type": "FULL_STATE_DICT",
        "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "transformer_layer_cls_to_wrap": "LlamaDecoderLayer",
        "reshard_after_forward": True,
    },
}


def _zero(stage: int, folder: Path) -> dict[str, Any]:
    file = folder / f"zero{stage}.json"
    file.write_text(
        json.dumps(
            {
                "zero_optimization": {"stage": stage, "stage3_gather_16bit_weights_on_model_save": True},
                "zero_force_ds_cpu_optimizer": False,
                "zero_allow_untested_optimizer": True,
                "train_micro_batch_size_per_gpu": "auto",
                "gradient_accumulation_steps": "auto",
                "train_batch_size": "auto",
                "gradient_clipping": "auto",
            }
        )
    )
    return {"deepspeed": str(file)}


@pytest.fixture(scope="session")
def options() -> Callable[[str, Path], dict[str, Any]]:
    """``options(engine, folder)``: what a recipe needs for a training engine; a file for it may go into the folder."""

    def of(engine: str, folder: Path) -> dict[str, Any]:
        return {"ddp": {}, "zero2": _zero(2, folder), "zero3": _zero(3, folder), "fsdp2": FSDP2}[engine]

    return of
