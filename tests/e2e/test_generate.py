"""Sequence-level distillation from one recipe: ``dskd generate``, then ``axolotl train`` on what it wrote."""

import json
import math
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

# On one worker: the tests share what one of them has made.
pytestmark = [pytest.mark.e2e, pytest.mark.xdist_group("generate")]


@pytest.fixture(scope="module")
def generated():
    """generated(recipe, name, *options, **changes) -> the recipe that the command wrote, as the user would run it."""

    def generate(recipe, name, *more, **changes):
        folder = Path(recipe["output_dir"]).parent
        file, new = folder / f"{name}.yaml", folder / f"{name}-next.yaml"
        file.write_text(yaml.safe_dump({**recipe, "output_dir": str(folder / name), **changes}))
        options = ["--max-new-tokens", "24", "--keep-unfinished", "--write-recipe", str(new), *more]
        command = [str(Path(sys.executable).parent / "dskd"), "generate", str(file), *options]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=folder)
        assert done.returncode == 0, done.stderr[-3000:]
        assert f"Next: axolotl train {new}" in done.stdout
        return yaml.safe_load(new.read_text())

    return generate


def test_the_written_recipe_trains(generated, recipe, tiny, run_axolotl):
    """Instructions become conversations; the recipe is plain Axolotl."""
    datasets = [{"path": tiny["data"], "ds_type": "json", "type": "alpaca"}]
    options = ["--plain-recipe", "--recipe-rows", "generated"]
    new = generated(recipe, "plain", *options, datasets=datasets, max_steps=2)
    run = run_axolotl(new)
    assert run.code == 0, run.output[-4000:]
    losses = [entry["loss"] for entry in run.log if "loss" in entry]
    assert len(losses) == 2 and all(math.isfinite(loss) and loss > 0 for loss in losses)
    assert "dskd" not in new and not (run.out / "dskd/projectors.safetensors").exists()


def test_distillation_on_the_teachers_answers(generated, recipe, train):
    """The generated rows in the recipe that has the `dskd:` block: only the answers are trained on."""
    new = generated(recipe, "both", "--recipe-rows", "generated")
    run = train("trained", datasets=new["datasets"], max_steps=2, save_steps=2)
    assert all(math.isfinite(entry["dskd/kd"]) for entry in run.log if "loss" in entry)
    rows = [json.loads(line) for line in Path(new["datasets"][0]["path"]).read_text(encoding="utf-8").splitlines()]
    assert any(len(row["messages"]) > 2 for row in rows)
    assert f"{len(rows)} rows" in run.output


def test_few_gold_answers_and_many_prompts(generated, recipe, tiny, run_axolotl, tmp_path):
    """Gold rows and prompts without answers in one recipe: what the command writes trains with its `dskd:` block."""
    rows = [json.loads(line) for line in Path(tiny["data"]).read_text(encoding="utf-8").splitlines()]
    gold = [{"messages": row["messages"][:2]} for row in rows[:8]]
    prompts = [{"messages": row["messages"][:1]} for row in rows[8:32]]
    entries = []
    for name, part in {"gold": gold, "prompts": prompts}.items():
        file = tmp_path / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in part), encoding="utf-8")
        entries.append({"path": str(file), "ds_type": "json", "type": "chat_template"})
    new = generated(recipe, "few", "--ask", "unanswered", datasets=entries, max_steps=2, save_steps=2)
    made = Path(new["datasets"][1]["path"])
    assert [entry["path"] for entry in new["datasets"]] == [entries[0]["path"], str(made)]
    written = made.read_text(encoding="utf-8").count("\n")
    assert 20 < written <= 24
    run = run_axolotl(new)
    assert run.code == 0, run.output[-4000:]
    assert all(math.isfinite(entry["dskd/kd"]) for entry in run.log if "loss" in entry)
    for rows_of_entry in (len(gold), written):
        assert f": {rows_of_entry} rows, " in run.output


def test_answers_and_their_cache_in_one_command_that_is_killed(recipe, tiny, run_axolotl, tmp_path):
    """kill -9 while the cache is built, the same command again, then a training that has no weights of the teacher."""
    teacher = Path(shutil.copytree(recipe["dskd"]["teacher"]["model"], tmp_path / "teacher"))
    rows = [json.loads(line) for line in Path(tiny["data"]).read_text(encoding="utf-8").splitlines()[:32]]
    data = tmp_path / "rows.jsonl"
    short = [{"messages": row["messages"][: 2 if number < 8 else 1]} for number, row in enumerate(rows)]
    data.write_text("".join(json.dumps(row) + "\n" for row in short), encoding="utf-8")
    block = {**recipe["dskd"], "teacher": {**recipe["dskd"]["teacher"], "model": str(teacher)}}
    entry = {"path": str(data), "ds_type": "json", "type": "chat_template"}
    file, new, states = tmp_path / "recipe.yaml", tmp_path / "new.yaml", tmp_path / "states"
    file.write_text(yaml.safe_dump({**recipe, "datasets": [entry], "dskd": block}))
    options = ["--max-new-tokens", "24", "--keep-unfinished", "--write-recipe", str(new), "--cache", str(states)]
    command = [str(Path(sys.executable).parent / "dskd"), "generate", str(file), *options]
    with (tmp_path / "log.txt").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=tmp_path)
        deadline = time.monotonic() + 300
        while not (states / "shards").exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)
        process.kill()
        process.wait()
    assert new.exists() and not list(states.glob("shards/*.json")), (tmp_path / "log.txt").read_text()[-3000:]
    dataset = Path(yaml.safe_load(new.read_text())["datasets"][-1]["path"])
    written = dataset.read_bytes()
    again = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert again.returncode == 0, again.stderr[-3000:]
    assert "Generating:" not in again.stderr and dataset.read_bytes() == written
    assert f"Next: axolotl train {new}" in again.stdout
    distilled = {**yaml.safe_load(new.read_text()), "output_dir": str(tmp_path / "cached")}
    assert distilled["dskd"]["teacher"]["cache"] == str(states)
    alone = {key: value for key, value in distilled["dskd"]["teacher"].items() if key != "cache"}
    live = run_axolotl(
        {**distilled, "output_dir": str(tmp_path / "live"), "dskd": {**distilled["dskd"], "teacher": alone}}
    )
    assert live.code == 0, live.output[-3000:]
    (teacher / "model.safetensors").unlink()
    run = run_axolotl(distilled)
    assert run.code == 0, run.output[-3000:]
    assert "its decoder is not loaded" in run.output and len(run.curve()) == 4
    # States in bfloat16 of a teacher in float32, see test_cache.py.
    names = ("loss", "dskd/ce", "dskd/kd")
    assert run.curve(*names) == [pytest.approx(step, rel=5e-3) for step in live.curve(*names)]
