"""Two machines, here two launchers on the loopback address, started with the commands of docs/scale.md."""

import re
import shlex
from pathlib import Path

import pytest

pytestmark = pytest.mark.e2e

PAGE = (Path(__file__).parents[2] / "docs" / "scale.md").read_text(encoding="utf-8")
STEPS = {"max_steps": 2, "save_steps": 2}


def block(section, kind):
    """The first block of a section of the page."""
    body = PAGE.split(f"\n## {section}\n")[1].split("\n## ")[0]
    return re.search(rf"```{kind}\n(.*?)```", body, re.S).group(1)


def on_loopback(text, port, machine):
    """What a section tells the first machine, for machine 0 or 1 of two with one process each, both here."""
    replaced = {
        "10.0.0.1": "127.0.0.1",
        "29500": str(port),
        "--nproc-per-node 8": "--nproc-per-node 1",
        "--node-rank 0": f"--node-rank {machine}",
        "num_processes: 16": "num_processes: 2",
        "machine_rank: 0": f"machine_rank: {machine}",
    }
    for old, new in replaced.items():
        text = text.replace(old, new)
    return text


def words(command):
    return shlex.split(command.replace("\\\n", " "))


def torchrun(folder, port, machine):
    return words(on_loopback(block("torchrun", "bash"), port, machine))


def accelerate(folder, port, machine):
    (folder / f"machines-{machine}.yaml").write_text(on_loopback(block("accelerate", "yaml"), port, machine))
    return words(block("accelerate", "bash").replace("machines.yaml", f"machines-{machine}.yaml"))


@pytest.fixture(scope="module")
def one_machine():
    """The curve of two processes on one machine, made once."""
    return {}


@pytest.mark.parametrize(
    ("launcher", "engine"),
    [
        (torchrun, "ddp"),
        pytest.param(torchrun, "zero3", marks=pytest.mark.more),
        pytest.param(accelerate, "ddp", marks=pytest.mark.more),
    ],
    ids=lambda one: getattr(one, "__name__", one),
)
def test_two_machines_train_as_one(
    train, recipe, run_on_machines, a_free_port, options, one_machine, tmp_path, launcher, engine
):
    changes = {"gradient_accumulation_steps": 1, **STEPS}
    if not one_machine:
        one_machine["curve"] = train("one", ranks=2, **changes).curve()
    wanted = {**recipe, **changes, **options(engine, tmp_path)}
    port = a_free_port()
    commands = [launcher(tmp_path, port, machine) for machine in range(2)]
    run = run_on_machines(wanted, commands)
    assert run.code == 0, run.output[-4000:]
    assert run.curve() == [pytest.approx(step, rel=2e-5) for step in one_machine["curve"]]
    assert (run.out / "model.safetensors").is_file() and (run.out / "dskd/projectors.safetensors").is_file()
