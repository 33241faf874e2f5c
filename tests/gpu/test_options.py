"""Axolotl's options that need a GPU, each trained by `axolotl train` beside the same recipe without it."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from benchmarks.tiny import make_pair, small_recipe
from tests.options import BASES, CUDA, with_verdict, written

# Half precision on both sides, as FlashAttention and fused kernels want it; then losses are near and not the same.
HALF = {"bf16": True, "max_steps": 2, "save_steps": 2}
NEAR = 0.05
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    # The kernels of FlexAttention on a GPU take heads of 16 numbers or more.
    return make_pair(tmp_path_factory.mktemp("pair"), head_dim=16)


@pytest.fixture(scope="module")
def losses():
    """First losses of the runs that options are compared with."""
    return {}


def first_losses(pair, folder, changes):
    recipe = written(small_recipe(pair, folder), {**HALF, **changes})
    recipe["dskd"]["teacher"]["dtype"] = "bfloat16"
    recipe.setdefault("plugins", ["dskd"])
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe))
    command = [sys.executable, "-m", "axolotl.cli.main", "train", str(file), "--launcher", "python"]
    variables = {**os.environ, "AXOLOTL_DO_NOT_TRACK": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    log = json.loads((folder / "out" / "checkpoint-2" / "trainer_state.json").read_text())["log_history"]
    step = next(entry for entry in log if "loss" in entry)
    return [step[name] for name in ("loss", "dskd/ce", "dskd/kd")]


@pytest.mark.parametrize("option", with_verdict(CUDA), ids=lambda option: f"{option.base}: {option.name}")
def test_first_losses_are_near_those_without_it(pair, losses, device, tmp_path, option):
    if device.type == "cpu":
        pytest.skip("these options are for a GPU")
    for package in ("axolotl", option.package):
        if package and importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    changes = {**option.changes, "bf16": None, "fp16": True} if "fp16" in option.recipe else option.changes
    if option.base not in losses:
        (tmp_path / "without").mkdir()
        losses[option.base] = first_losses(pair, tmp_path / "without", BASES[option.base])
    (tmp_path / "with").mkdir()
    found = first_losses(pair, tmp_path / "with", changes)
    assert found == pytest.approx(losses[option.base], rel=NEAR)
