"""Recipes of several steps, each started from what the step before it left, on tiny models."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

pytestmark = pytest.mark.e2e

RECIPES = Path(__file__).parents[2] / "recipes"
PIPELINES = {"few-gold": 2, "two-stage": 3, "on-policy": 3}  # folder: its steps
# What a tiny run on a CPU needs otherwise; all else is as in the recipe.
SMALL = {
    "sequence_len": 256,
    "micro_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "max_steps": 2,
    "optimizer": "adamw_torch",
    "bf16": False,
    "fp16": False,
    "tf32": False,
    "dataset_num_proc": 1,
    "dataloader_num_workers": 0,
    "dataloader_pin_memory": False,
    "logging_steps": 1,
    "save_steps": 2,
}
OF_LLAMA = ("eot_tokens", "special_tokens", "saves_per_epoch", "num_epochs")


def small(file: Path, tiny: dict[str, str], folder: Path) -> dict:
    """The recipe of a step over tiny models, a few rows and the folder."""
    text = file.read_text(encoding="utf-8").replace("./outputs/", f"{folder}/")
    recipe = {key: value for key, value in yaml.safe_load(text).items() if key not in OF_LLAMA} | SMALL
    if not Path(recipe["base_model"]).is_dir():
        assert recipe["base_model"] == "meta-llama/Llama-3.2-1B-Instruct"
        recipe["base_model"] = tiny["student"]
    if "dskd" in recipe:
        recipe["dskd"]["teacher"] |= {"model": tiny["teacher"], "dtype": "float32"}
    for entry in recipe["datasets"]:
        if entry["path"] == "HuggingFaceH4/ultrachat_200k":
            del entry["split"]
            entry |= {"path": tiny["data"], "ds_type": "json"}
    if "on_policy" in recipe.get("dskd", {}):
        recipe["dskd"]["on_policy"]["max_new_tokens"] = 12
    return recipe


@pytest.mark.parametrize("name", PIPELINES)
def test_every_step_starts_from_the_one_before(name, tiny, tmp_path, run_axolotl):
    files = sorted((RECIPES / name).glob("*.yaml"))
    assert [int(file.name[0]) for file in files] == list(range(1, PIPELINES[name] + 1))
    first, *others = files
    # The command that the file itself names, but for the length of answers and their folder.
    told = re.search(r"^# dskd (generate .*)$", first.read_text(encoding="utf-8"), re.M)[1].split()
    assert told[1] == f"recipes/{name}/{first.name}"
    recipe = tmp_path / first.name
    recipe.write_text(yaml.safe_dump(small(first, tiny, tmp_path)), encoding="utf-8")
    told[1] = str(recipe)
    told[told.index("--max-new-tokens") + 1] = "24"
    rows = tmp_path / Path(told[told.index("--out") + 1]).relative_to("outputs")
    told[told.index("--out") + 1] = str(rows)
    command = [str(Path(sys.executable).parent / "dskd"), *told, "--keep-unfinished"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert rows.read_text(encoding="utf-8").count("\n") > 5
    trained = []
    for file in others:
        step = small(file, tiny, tmp_path)
        assert step["base_model"] == (trained[-1] if trained else tiny["student"])
        run = run_axolotl(step)
        assert run.code == 0, run.output[-4000:]
        losses = [entry["loss"] for entry in run.log if "loss" in entry]
        assert len(losses) == 2 and all(math.isfinite(loss) for loss in losses)
        distilled = [entry["dskd/kd"] for entry in run.log if "dskd/kd" in entry]
        assert len(distilled) == (2 if "dskd" in step else 0)
        if "on_policy" in step.get("dskd", {}):
            assert "the student answers" in run.output
            assert all(entry["dskd/rollout_answers"] == 4 for entry in run.log if "loss" in entry)
        trained.append(step["output_dir"])
    config = json.loads((Path(trained[-1]) / "config.json").read_text(encoding="utf-8"))
    assert config["model_type"] == json.loads((Path(tiny["student"]) / "config.json").read_text())["model_type"]
