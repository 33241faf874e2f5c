"""Sequence-level distillation from one recipe: ``dskd generate``, then ``axolotl train`` on what it wrote."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def generated():
    """generated(recipe, name, **changes) -> the recipe that the command wrote, as the user would run it."""

    def generate(recipe, name, **changes):
        folder = Path(recipe["output_dir"]).parent
        file, new = folder / f"{name}.yaml", folder / f"{name}-next.yaml"
        file.write_text(yaml.safe_dump({**recipe, "output_dir": str(folder / name), **changes}))
        options = ["--max-new-tokens", "24", "--keep-unfinished", "--write-recipe", str(new)]
        command = [str(Path(sys.executable).parent / "dskd"), "generate", str(file), *options]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=folder)
        assert done.returncode == 0, done.stderr[-3000:]
        assert f"Next: axolotl train {new}" in done.stdout
        return yaml.safe_load(new.read_text())

    return generate


def test_the_written_recipe_trains(generated, recipe, tiny, run_axolotl):
    """Instructions become conversations; the recipe is plain Axolotl."""
    new = generated(
        recipe, "plain", datasets=[{"path": tiny["data"], "ds_type": "json", "type": "alpaca"}], max_steps=2
    )
    run = run_axolotl(new)
    assert run.code == 0, run.output[-4000:]
    losses = [entry["loss"] for entry in run.log if "loss" in entry]
    assert len(losses) == 2 and all(math.isfinite(loss) and loss > 0 for loss in losses)
    assert "dskd" not in new and not (run.out / "dskd_projectors.safetensors").exists()


def test_distillation_on_the_teachers_answers(generated, recipe, train):
    """The generated rows in the recipe that has the `dskd:` block: only the answers are trained on."""
    new = generated(recipe, "both")
    run = train("trained", datasets=new["datasets"], max_steps=2, save_steps=2)
    assert all(math.isfinite(entry["dskd/kd"]) for entry in run.log if "loss" in entry)
    rows = [json.loads(line) for line in Path(new["datasets"][0]["path"]).read_text(encoding="utf-8").splitlines()]
    assert any(len(row["messages"]) > 2 for row in rows)
    assert f"{len(rows)} rows" in run.output
