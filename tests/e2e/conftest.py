"""The real ``axolotl`` command, on one process or on two with real training engines."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

LAUNCH = Path(__file__).parent / "cpu_engines.py"


def environment() -> dict[str, str]:
    return {
        **os.environ,
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

    def curve(self, *names: str) -> list[tuple[float, ...]]:
        names = names or ("loss", "grad_norm", "dskd/ce", "dskd/kd")
        return [tuple(entry[name] for name in names) for entry in self.log if "loss" in entry]


def kill_tree(pid: int) -> None:
    """kill -9 a process and all its descendants; torchrun starts its ranks in sessions of their own."""
    parent = psutil.Process(pid)
    for process in [*parent.children(recursive=True), parent]:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def axolotl(
    recipe: dict[str, Any],
    command: str = "train",
    *,
    launcher: str = "python",
    ranks: int = 1,
    kill_after: str | None = None,
    interrupt: tuple[signal.Signals, str] | None = None,
    help_only: bool = False,
    command_options: Sequence[str] = (),
    timeout: int = 600,
    extra_env: dict[str, str] | None = None,
) -> Run:
    """Run the real command on the recipe. ranks 2: under torchrun with the CPU engines of cpu_engines.py.

    kill_after: kill -9 the whole process group as soon as this path exists.
    interrupt: a signal, sent as soon as the path exists: SIGINT to all processes, as a terminal does, others to the
    command alone.
    """
    out = Path(recipe["output_dir"])
    out.parent.mkdir(parents=True, exist_ok=True)
    file = out.parent / f"{out.name}.yaml"
    file.write_text(yaml.safe_dump(recipe, sort_keys=False))
    if ranks > 1:
        arguments = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc-per-node={ranks}",
            str(LAUNCH),
            str(file),
        ]
    else:
        arguments = [
            "axolotl",
            command,
            str(file),
            *(["--launcher", launcher] if command != "preprocess" else []),
            *command_options,
        ]
    arguments = ["axolotl", "--help"] if help_only else arguments
    log = out.parent / f"{out.name}.log"
    with log.open("w") as stream:
        process = subprocess.Popen(
            arguments,
            cwd=out.parent,
            env={**environment(), **(extra_env or {})},
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        deadline = time.monotonic() + timeout
        try:
            while process.poll() is None:
                if time.monotonic() > deadline:
                    raise TimeoutError(f"{arguments}: no end after {timeout} s\n{log.read_text()[-3000:]}")
                if kill_after is not None and Path(kill_after).exists():
                    break
                if interrupt is not None and Path(interrupt[1]).exists():
                    number = interrupt[0]
                    (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)
                    interrupt = None
                time.sleep(0.05)
        finally:
            if process.poll() is None:
                kill_tree(process.pid)
            process.wait()
    return Run(process.returncode, log.read_text(), recipe)


@pytest.fixture(scope="session")
def run_axolotl() -> Callable[..., Run]:
    return axolotl


@pytest.fixture
def train(recipe: dict[str, Any]):
    """``train(**changes)``: run the recipe with changes and expect success."""

    def run(name: str = "out", *, ranks: int = 1, command: str = "train", **changes: Any) -> Run:
        block = {**recipe["dskd"], **changes.pop("dskd", {})}
        changed = {
            **recipe,
            **changes,
            "dskd": block,
            "output_dir": str(Path(recipe["output_dir"]).parent / name),
        }
        result = axolotl({key: value for key, value in changed.items() if value is not None}, command, ranks=ranks)
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
