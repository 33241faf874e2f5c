"""Training from a teacher cache: the curves of the live teacher, under every engine, and without the teacher."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

# On one worker: the tests share what one of them has made.
pytestmark = [pytest.mark.e2e, pytest.mark.xdist_group("cache")]

LOSSES = ("loss", "dskd/ce", "dskd/kd", "dskd/t2s_kd", "dskd/s2t_kd")
TERMS = (*LOSSES, "grad_norm")
# Of a state that was computed beside other samples than in the run: sums are taken in another order. 7e-7 was seen.
FLOAT32 = 1e-6
# Of states in bfloat16 under a teacher in float32; 1.5e-3 was seen.
BFLOAT16 = 5e-3
EVALUATED = {"val_set_size": 0.25, "eval_steps": 2}
PACKED = {"sample_packing": True, "eval_sample_packing": True, "sequence_len": 128, "micro_batch_size": 1, **EVALUATED}
# One sample at a time, as the states are computed here: the run reads what the live teacher would say, bit for bit.
ALONE = {"micro_batch_size": 1, "gradient_accumulation_steps": 4}
STEPS = {**ALONE, "max_steps": 12, "save_steps": 4}


@pytest.fixture(scope="module")
def kept():
    """What one test has made and others read."""
    return {}


@pytest.fixture
def states(recipe, kept, tmp_path_factory):
    """A folder of float32 states that two processes have made: all tests of this file have one teacher and its rows."""
    if "folder" not in kept:
        place = tmp_path_factory.mktemp("cache")
        file, folder = place / "recipe.yaml", place / "states"
        file.write_text(yaml.safe_dump({**recipe, **EVALUATED}))
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        build = ["-m", "dskd_plugin.cli", "cache", "build", str(file), "--out", str(folder), "--dtype", "float32"]
        build += ["--batch-tokens", "1"]
        done = subprocess.run([*torchrun, *build], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-4000:]
        assert done.stdout.count("to compute: 48 samples") == 1 and "shared by 2 processes" in done.stdout
        assert f"cache: {folder}" in done.stdout
        listed = json.loads((folder / "manifest.json").read_text())["shards"]
        assert len(listed) == 2 and sum(shard["samples"] for shard in listed) == 48
        kept["folder"] = str(folder)
    return kept["folder"]


@pytest.fixture
def cached(recipe):
    """The ``dskd:`` block with a cache."""

    def block(folder, **more):
        return {"teacher": {**recipe["dskd"]["teacher"], **more, "cache": folder}}

    return block


def evaluations(run):
    return [(e["eval_loss"], e["eval_dskd/kd"]) for e in run.log if "eval_loss" in e]


def close(steps, rel):
    return [pytest.approx(step, rel=rel) for step in steps]


def worst(curve, other):
    """The largest relative difference of two curves; for whoever runs the tests with -s."""
    pairs = [pair for x, y in zip(curve, other, strict=True) for pair in zip(x, y, strict=True)]
    return max(abs(a - b) / abs(b) for a, b in pairs if b)


@pytest.fixture
def curves(train, states, cached, kept):
    """The curves of one process with the live teacher and with the cache, 12 steps."""
    if "curves" not in kept:
        live, run = train("live", **STEPS), train("cached", dskd=cached(states), **STEPS)
        assert f"the teacher's states come from {states}: 48 samples" in run.output
        kept["curves"] = live.curve(*TERMS), run.curve(*TERMS)
    return kept["curves"]


def test_the_curve_is_that_of_the_live_teacher(curves):
    live, run = curves
    assert len(run) == 12 and run == live  # bit for bit


def test_packed_rows_and_evaluations_are_those_of_the_live_teacher(train, states, cached):
    live, run = train("live", **PACKED), train("cached", dskd=cached(states), **PACKED)
    print("float32, packed:", worst(run.curve(*TERMS), live.curve(*TERMS)))
    assert run.curve(*LOSSES) == close(live.curve(*LOSSES), FLOAT32)
    assert len(evaluations(run)) >= 2 and evaluations(run) == close(evaluations(live), FLOAT32)


def test_workers_of_the_dataloader_read_ahead_what_the_step_asks_for(train, states, cached):
    """So does an evaluation, which has a collator of its own where rows are packed."""
    plugins = ["dskd", "tests.e2e.told_ahead.ToldAhead"]
    run = train("ahead", dskd=cached(states), plugins=plugins, dataloader_num_workers=1, **PACKED)
    lines = [line.split(" ", 2) for line in run.out.with_suffix(".told.txt").read_text().splitlines()]
    told, asked = ([line for line in lines if line[0] == kind] for kind in ("read_ahead", "rows"))
    assert len({process for _, process, _ in asked}) == 1 and asked[0][1] not in {process for _, process, _ in told}
    assert asked and {what for _, _, what in asked} <= {what for _, _, what in told}


MORE_ENGINES = [pytest.param(engine, marks=pytest.mark.more) for engine in ("zero2", "fsdp2")]


@pytest.mark.parametrize("engine", ["ddp", "zero3", *MORE_ENGINES])
def test_two_ranks_give_the_same_curve(train, states, cached, tmp_path, options, curves, engine):
    run = train(ranks=2, dskd=cached(states), gradient_accumulation_steps=1, **options(engine, tmp_path))
    assert run.curve(*TERMS) == close(curves[0][:4], 2e-5)  # as of the live teacher, see test_engines.py


@pytest.mark.more
@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_packed_rows_on_two_ranks_are_those_of_the_live_teacher(train, states, cached, tmp_path, options, engine):
    split = {"ranks": 2, **PACKED, **options(engine, tmp_path)}
    live, run = train("live", **split), train("cached", dskd=cached(states), **split)
    assert len(run.curve()) == len(live.curve()) > 1
    assert run.curve(*LOSSES) == close(live.curve(*LOSSES), FLOAT32)
    assert evaluations(run) == close(evaluations(live), FLOAT32)


def test_a_killed_run_goes_on_as_if_nothing_had_been(run_axolotl, recipe, states, cached, curves):
    cut = {**recipe, **STEPS, "dskd": {**recipe["dskd"], **cached(states)}}
    killed = run_axolotl(cut, kill_after=f"{cut['output_dir']}/checkpoint-4/trainer_state.json")
    assert killed.code != 0 and not (killed.out / "dskd_state.json").exists()
    again = run_axolotl({**cut, "auto_resume_from_checkpoints": True})
    assert again.code == 0, again.output[-3000:]
    assert again.curve(*TERMS) == curves[1]  # bit for bit


def test_the_teacher_is_not_loaded(train, run_axolotl, recipe, states, cached, tmp_path):
    teacher = tmp_path / "teacher"
    shutil.copytree(recipe["dskd"]["teacher"]["model"], teacher)
    (teacher / "model.safetensors").unlink()
    run = train("without", dskd=cached(states, model=str(teacher)))
    assert "the teacher's weights are not here" in run.output and "its decoder is not loaded" in run.output
    # Other rows than those that the cache was made of, and no cache at all.
    file = tmp_path / "other.jsonl"
    rows = [json.loads(line) for line in Path(recipe["datasets"][0]["path"]).read_text().splitlines()]
    rows[3]["messages"][0]["content"] += " river"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    other = {**recipe, "datasets": [{**recipe["datasets"][0], "path": str(file)}]}
    other["dskd"] = {**recipe["dskd"], **cached(states)}
    refused = run_axolotl(other)
    assert refused.code != 0
    assert "expected the teacher's states of all 48 samples of the run, got those of 47; 1 lack some or all places" in (
        refused.output
    )
    assert f"Run `dskd cache build {other['output_dir']}.yaml`." in refused.output
    refused = run_axolotl({**recipe, "dskd": {**recipe["dskd"], **cached(str(tmp_path / "none"))}})
    assert refused.code != 0 and "dskd.teacher.cache: expected the folder of a teacher cache, or auto" in refused.output
    assert "which does not exist" in refused.output and "`dskd cache build " in refused.output


def test_made_before_the_first_step_by_all_ranks_and_used_again(train, cached, tmp_path, options, curves):
    made = train("made", ranks=2, dskd=cached("auto"), gradient_accumulation_steps=1, **options("fsdp2", tmp_path))
    assert "to compute: 48 samples" in made.output and "shared by 2 processes" in made.output
    print("bfloat16:", worst(made.curve(*TERMS), curves[0][:4]))
    assert made.curve(*TERMS) == close(curves[0][:4], BFLOAT16)
    (folder,) = (made.out.parent / "prepared").glob("dskd-cache-*")
    again = train("again", dskd=cached("auto"))
    assert "to compute: 0 samples" in again.output and str(folder) in again.output
    assert again.curve() == close(made.curve(), 2e-5)


def test_answers_of_the_student_are_read_by_the_teacher(train, states, cached):
    on_policy = {"on_policy": {"fraction": 0.5, "max_new_tokens": 8}, "projector": {"init": "fitted"}}
    live = train("live", dskd=on_policy)
    run = train("cached", dskd={**on_policy, **cached(states)})
    assert "the teacher itself reads the student's answers alone" in run.output
    assert any(entry.get("dskd/rollout_tokens", 0) > 0 for entry in run.log)
    print("on-policy and fitted, float32:", worst(run.curve(*TERMS), live.curve(*TERMS)))
    assert run.curve(*LOSSES) == close(live.curve(*LOSSES), FLOAT32)
