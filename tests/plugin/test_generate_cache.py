"""`dskd generate --cache`: answers and the teacher cache of the written recipe by one command, stopped anywhere."""

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import CliRunner
from safetensors.torch import load_file

pytestmark = pytest.mark.axolotl
OPTIONS = ["--max-new-tokens", "10", "--batch-size", "4", "--keep-unfinished", "--ask", "unanswered"]
BOTH = [*OPTIONS, "--write-recipe", "next.yaml", "--cache", "states"]


@pytest.fixture(autouse=True)
def surroundings(monkeypatch, tmp_path, fresh_plugin_manager):
    monkeypatch.setattr(os, "environ", os.environ)  # `datasets` may put a copy in its place
    monkeypatch.setenv("AXOLOTL_LOG_LEVEL", "WARNING")
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def recipe_file(recipe, tiny):
    """recipe_file(**dskd): a recipe of four conversations with answers and, but for a wish, eight prompts without."""

    def write(prompts=True, **block):
        rows = [json.loads(line) for line in Path(tiny["data"]).read_text(encoding="utf-8").splitlines()[:12]]
        parts = {"gold": [row["messages"] for row in rows[:4]], "prompts": [row["messages"][:1] for row in rows[4:]]}
        entries = []
        for name, messages in parts.items():
            lines = [json.dumps({"messages": part}) + "\n" for part in messages]
            Path(f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
            if name == "prompts" and not prompts:
                continue
            entries.append({"path": f"{name}.jsonl", "ds_type": "json", "type": "chat_template"})
        changed = {**recipe, "output_dir": "out", "datasets": entries, "dataset_prepared_path": "prepared"}
        changed["dskd"] = {"teacher": recipe["dskd"]["teacher"], **block}
        Path("recipe.yaml").write_text(yaml.safe_dump(changed))
        return "recipe.yaml"

    return write


def run(*arguments, code=0):
    """Output of a command of `dskd` in this process; fails unless it ends with the exit code."""
    from axolotl.integrations.base import PluginManager
    from axolotl.utils import tee

    from dskd_plugin.cli import main

    PluginManager._instance = None
    streams = sys.stdout, sys.stderr
    tee.close_debug_log()
    sys.stdout, sys.stderr = streams
    result = CliRunner().invoke(main, [*map(str, arguments)])
    unexpected = result.exception if not isinstance(result.exception, SystemExit) else None
    assert result.exit_code == code, (result.output, unexpected)
    assert unexpected is None and "Traceback" not in result.output
    return result.output


def states_in(folder):
    """key -> (positions, states) of all samples of a cache."""
    found = {}
    for file in Path(folder, "shards").glob("*.safetensors"):
        shard = load_file(file)
        bounds = shard["starts"].tolist()
        for number, key in enumerate(shard["keys"].tolist()):
            inside = slice(bounds[number], bounds[number + 1])
            found[tuple(key)] = shard["positions"][inside].tolist(), shard["states"][inside]
    return found


def assert_same(folder, other):
    ours, theirs = states_in(folder), states_in(other)
    assert ours.keys() == theirs.keys() and len(ours) > 8
    for key, (positions, states) in ours.items():
        assert positions == theirs[key][0] and torch.equal(states, theirs[key][1])


@pytest.fixture
def watched(monkeypatch):
    """How often a teacher was loaded, and how many batches of answers were written."""
    from dskd_plugin.generation.answers import Writer
    from dskd_plugin.teachers.live import Teacher

    counts = {"loaded": 0, "answered": 0}

    def counting(name, original):
        def counted(*arguments, **named):
            counts[name] += 1
            return original(*arguments, **named)

        return counted

    monkeypatch.setattr(Teacher, "__init__", counting("loaded", Teacher.__init__))
    monkeypatch.setattr(Writer, "answer", counting("answered", Writer.answer))
    return counts


@pytest.fixture
def stop_in_build(monkeypatch):
    """stop_in_build(error): the teacher fails so when the cache asks it a second time; its result undoes that."""
    from dskd_plugin.teachers.live import Teacher

    original = Teacher.rows

    def stop(error):
        calls = []

        def rows(self, *question):
            calls.append(1)
            if len(calls) == 2:
                raise error
            return original(self, *question)

        monkeypatch.setattr(Teacher, "rows", rows)
        monkeypatch.setattr("dskd_plugin.cache.build.BATCH_TOKENS", {"cpu": 64})
        return lambda: monkeypatch.setattr(Teacher, "rows", original)

    return stop


def test_one_command_makes_what_two_commands_make_with_one_load(recipe_file, watched):
    output = run("generate", recipe_file(), *BOTH)
    assert watched == {"loaded": 1, "answered": 2}
    assert "states: 96 bytes for each token of an answer, at most 0.0 GiB" in output
    new = yaml.safe_load(Path("next.yaml").read_text())
    assert new["dskd"]["teacher"]["cache"] == "states" and len(new["datasets"]) == 2
    assert output.rstrip().endswith("Next: axolotl train next.yaml")
    assert not Path("out-generated.jsonl.partial").exists()
    run("cache", "build", "next.yaml", "--out", "apart", "--device", "cpu")
    assert_same("states", "apart")
    assert "to compute: 0 samples" in run("cache", "build", "next.yaml", "--device", "cpu")


def test_ctrl_c_in_the_build_and_the_same_command_again(recipe_file, watched, stop_in_build):
    undo = stop_in_build(KeyboardInterrupt())
    file = recipe_file()
    assert "Stopped; the same command goes on with the cache." in run("generate", file, *BOTH, code=130)
    undo()
    dataset, kept = Path("out-generated.jsonl").read_bytes(), states_in("states")
    assert Path("out-generated.jsonl.partial").exists() and kept
    answered = watched["answered"]
    run("generate", file, *BOTH)
    assert watched["answered"] == answered and Path("out-generated.jsonl").read_bytes() == dataset
    assert not Path("out-generated.jsonl.partial").exists()
    run("cache", "build", "next.yaml", "--out", "apart", "--device", "cpu")
    assert_same("states", "apart")
    assert "got an earlier result" in run("generate", file, *BOTH, code=1)


def test_what_was_changed_in_between_is_not_replaced(recipe_file, stop_in_build):
    undo = stop_in_build(KeyboardInterrupt())
    file = recipe_file()
    run("generate", file, *BOTH, code=130)
    undo()
    recipe = Path("next.yaml")
    recipe.write_text(recipe.read_text() + "weight_decay: 0.1\n")
    output = run("generate", file, *BOTH, code=1)
    assert "next.yaml: expected no file of this name, got an earlier result." in output
    assert "weight_decay" in recipe.read_text()
    without = [option for option in BOTH if option != "--keep-unfinished"]
    assert "out-generated.jsonl: expected no file" in run("generate", file, *without, code=1)
    assert "out-generated.jsonl: expected no file" in run("generate", file, *BOTH[:-2], code=1)
    run("generate", file, *BOTH, "--overwrite")
    assert "weight_decay" not in recipe.read_text() and states_in("states")


def test_a_batch_that_does_not_fit_leaves_the_answers_and_the_way_on(recipe_file, stop_in_build):
    stop_in_build(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"))
    output = run("generate", recipe_file(), *BOTH, code=1)
    assert (
        "--batch-tokens: expected batches that fit on the teacher's device, got one that does not (CUDA out" in output
    )
    assert "Go on with `dskd cache build RECIPE --batch-tokens N`" in output
    run("cache", "build", "next.yaml", "--device", "cpu")


def test_a_small_disk_is_told_first_and_refused_when_the_answers_are_there(recipe_file, watched, monkeypatch):
    real = shutil.disk_usage
    monkeypatch.setattr(shutil, "disk_usage", lambda path: real(path)._replace(free=5000))
    output = run("generate", recipe_file(), *BOTH, code=1)
    told = output.index("0.0 GiB are free, and what does not fit is refused once the answers are written")
    assert told < output.index("8 of 8 answers written") < output.index("of free space for the teacher's states")
    monkeypatch.setattr(shutil, "disk_usage", real)
    answered = watched["answered"]
    run("generate", "recipe.yaml", *BOTH)
    assert watched["answered"] == answered and states_in("states")


def test_states_of_a_folder_keep_its_dtype(recipe_file):
    build = ["--out", "states", "--dtype", "float32", "--device", "cpu"]
    run("cache", "build", recipe_file(prompts=False), *build)
    gold = states_in("states")
    run("generate", recipe_file(), *BOTH)
    every = states_in("states")
    assert gold.keys() < every.keys() and {states.dtype for _, states in every.values()} == {torch.float32}


@pytest.mark.parametrize(
    ("block", "folder", "told"),
    [
        (
            {"method": "sft"},
            "states",
            "--cache: expected a dskd.method that compares states of the teacher, got 'sft'.",
        ),
        ({}, "gold.jsonl", "--cache: expected a folder, got 'gold.jsonl', a file. Name"),
        ({}, "gold.jsonl/states", "expected a folder to write to, got a file at "),
    ],
)
def test_what_cannot_be_is_told_before_an_answer_is_written(recipe_file, watched, block, folder, told):
    assert told in run("generate", recipe_file(**block), *BOTH, "--cache", folder, code=1)
    assert watched == {"loaded": 0, "answered": 0}


def test_the_cache_of_another_teacher_is_refused_before_an_answer_is_written(recipe_file, recipe, tiny, watched):
    from transformers import AutoModelForCausalLM

    other = shutil.copytree(tiny["teacher"], "other")
    model = AutoModelForCausalLM.from_pretrained(other, dtype=torch.float32)
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    model.save_pretrained(other)
    file = recipe_file(prompts=False, teacher={**recipe["dskd"]["teacher"], "model": str(other)})
    run("cache", "build", file, "--out", "states", "--device", "cpu")
    before = watched["loaded"]
    output = run("generate", recipe_file(), *BOTH, code=1)
    assert "got one of another teacher, 'other'" in output and "Name another folder with --cache." in output
    assert watched == {"loaded": before, "answered": 0}


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--cache", "states"], "--cache: expected --write-recipe FILE beside it, got none."),
        ([*BOTH, "--plain-recipe"], "--cache: expected a recipe that distils, got --plain-recipe."),
    ],
)
def test_wrong_usage(recipe_file, options, told):
    assert told in run("generate", recipe_file(), *options, code=2)


def test_the_benchmark_compares_the_two_passes_over_one_row(tmp_path):
    """A teacher that writes a row token by token is where one is that reads it at once, up to rounding."""
    from benchmarks.answers import SIZES, Bench, distances

    bench = Bench(SIZES["tiny"], tmp_path)
    bench.write()
    bench.read()
    found = {row.metric: float(row.value) for row in distances(bench)}
    assert len(found) == 4 and found["states of steps from the row's, float32"] < 1e-5
