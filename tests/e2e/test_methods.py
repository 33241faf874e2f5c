"""Every method and alignment through the real ``axolotl train``: one tokenizer and two, kill -9, two ranks."""

import json
import math
import re

import pytest

from dskd_plugin.methods.base import METHODS, SegmentMethod

pytestmark = pytest.mark.e2e

# name -> (block, terms that it logs); all across two tokenizers
TWO = {
    "two keys": ({}, {"ce", "t2s_kd", "t2s_ce"}),
    "published": (
        {"target": "projected", "temperature": 2.0, "projector": {"labels": "hard"}},
        {"ce", "t2s_kd", "t2s_ce", "s2t_kd"},
    ),
    "sft": ({"method": "sft"}, {"ce"}),
    "fitted": ({"spaces": "student", "projector": {"init": "fitted"}}, {"ce", "t2s_kd", "t2s_ce"}),
    "overlap_kd": ({"method": "overlap_kd", "shared": "ids"}, {"ce", "kd"}),
    "support": ({"method": "overlap_kd", "shared": "ids", "support": 16}, {"ce", "kd"}),
    "bpm": ({"method": "bpm", "shared": "ids", "divergence": {"kind": "js"}}, {"ce", "kd"}),
    "uld": ({"method": "uld"}, {"ce", "kd"}),
    "mined": ({"method": "mined"}, {"ce", "kd"}),
    "cma": ({"alignment": "cma"}, {"ce", "t2s_kd", "t2s_ce", "s2t_kd"}),
    "span_weight": ({"span_weight": 1.0}, {"ce", "t2s_kd", "t2s_ce", "s2t_kd", "span_kl"}),
    "balanced": ({"kd_weight": "balanced"}, {"ce", "t2s_kd", "t2s_ce", "s2t_kd"}),
    "unpaired": ({"method": "overlap_kd", "shared": "ids", "unpaired": "ce"}, {"ce", "kd", "ce_unpaired"}),
    "warm-up": ({"projector": {"warmup_steps": 2}}, {"ce", "t2s_kd", "t2s_ce", "s2t_kd"}),
    "on-policy": (
        {"on_policy": {"fraction": 0.5, "max_new_tokens": 12, "log_samples": 1}},
        {"ce", "t2s_kd", "t2s_ce", "s2t_kd"},
    ),
    "on-policy support": (
        {
            "method": "overlap_kd",
            "shared": "ids",
            "support": 16,
            "divergence": {"kind": "reverse_kl"},
            "kd_weight": "balanced",
            "on_policy": {"fraction": 1, "max_new_tokens": 12},
        },
        {"ce", "kd"},
    ),
    "on-policy overlap_kd": (
        {"method": "overlap_kd", "on_policy": {"fraction": 1, "max_new_tokens": 12}},
        {"ce", "kd"},
    ),
    "on-policy bpm": (
        {"method": "bpm", "on_policy": {"fraction": 1, "max_new_tokens": 12}},
        {"ce", "kd"},
    ),
}
ON_POLICY = {"on_policy": {"fraction": 0.5, "max_new_tokens": 12}}
ALWAYS_ON_POLICY = {"on_policy": {"fraction": 1, "max_new_tokens": 12}}
for (name, _), method in METHODS.items():
    if isinstance(method, SegmentMethod):
        TWO[name] = {"method": name}, {"ce", "kd"}
        TWO[f"on-policy {name}"] = {"method": name, "kd_weight": "balanced", **ALWAYS_ON_POLICY}, {"ce", "kd"}
for loss in ("projected", "hybrid"):
    TWO[f"xtoken {loss}"] = {"method": "xtoken", "xtoken": {"loss": loss}}, {"ce", "kd"}
    TWO[f"on-policy xtoken {loss}"] = {**TWO[f"xtoken {loss}"][0], **ALWAYS_ON_POLICY}, {"ce", "kd"}
ONE = {
    "kd": ({"method": "kd"}, {"ce", "kd"}),
    "overlap_kd": ({"method": "overlap_kd"}, {"ce", "kd"}),
    "cma": ({"alignment": "cma"}, {"ce", "t2s_kd", "t2s_ce", "s2t_kd"}),
    "on-policy": (
        {"on_policy": {"fraction": 1, "max_new_tokens": 12}},
        {"ce", "t2s_kd", "t2s_ce", "s2t_kd"},
    ),
}
TERMS = {"ce", "kd", "t2s_kd", "t2s_ce", "s2t_kd", "span_kl", "ce_unpaired"}


def block(recipe, changes, teacher=None):
    """The recipe's block with changes, without settings that the method would ignore; the teacher alone for none."""
    if not changes and not teacher:
        return {"teacher": {"model": recipe["dskd"]["teacher"]["model"]}}
    base = {"teacher": {"model": teacher, "dtype": "float32"} if teacher else recipe["dskd"]["teacher"]}
    if changes.get("method", "dskd") == "dskd":
        base |= {key: recipe["dskd"][key] for key in ("spaces", "agreement_mask")}
        base["projector"] = {**recipe["dskd"]["projector"], **changes.get("projector", {})}
    return {**base, **{key: value for key, value in changes.items() if key != "projector"}}


def check(run, terms, warm_up=0):
    """terms: beside those of every run; warm_up: steps whose loss leaves out the terms that would move the student."""
    steps = [entry for entry in run.log if "loss" in entry]
    assert len(steps) == 4
    for step, entry in enumerate(steps):
        logged = {name for name in TERMS if f"dskd/{name}" in entry}
        alone = terms == {"ce"} or "dskd/rollout_answers" in entry
        assert logged - {"kd"} == (terms if alone else terms | {"ce_unpaired"}) - {"kd"}
        assert all(math.isfinite(entry[f"dskd/{name}"]) for name in logged)
        kd = entry["dskd/t2s_ce"] if step < warm_up else entry.get("dskd/kd", 0.0)
        if "dskd/kd_scale" in entry:
            of_projector = entry.get("dskd/t2s_ce", 0.0)
            kd = entry["dskd/kd_scale"] * (kd - of_projector) + of_projector
            assert (entry["dskd/kd_scale"] == 1) == (step == 0)
        if entry.get("dskd/guarded"):
            kd = entry["dskd/t2s_ce"]
            assert entry["dskd/ce_unpaired"] == entry["dskd/ce"]
        kd += entry.get("dskd/ce_unpaired", 0.0)
        expected = entry["dskd/ce"] if terms == {"ce"} else 0.5 * entry["dskd/ce"] + 0.5 * kd
        assert entry["loss"] == pytest.approx(expected, rel=1e-5)
    from transformers import AutoModelForCausalLM

    _, info = AutoModelForCausalLM.from_pretrained(run.out, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    return steps


@pytest.mark.parametrize("name", TWO)
def test_across_tokenizers(run_axolotl, recipe, name):
    changes, terms = TWO[name]
    run = run_axolotl({**recipe, "dskd": block(recipe, changes)})
    assert run.code == 0, run.output[-3000:]
    steps = check(run, terms, changes.get("projector", {}).get("warmup_steps", 0))
    if name == "fitted":
        assert "Reading teacher states" in run.output and "Fitting the projector" in run.output  # its bars
        said = r"dskd: projector fitted on \d+ .* agrees with the teacher on \d+ % -> \d+ %, t2s_ce [\d.]+ -> [\d.]+"
        assert re.search(said, run.output)
    if "on_policy" in changes:
        assert sum(entry["dskd/rollout_answers"] for entry in steps) > 0
        assert "dskd: step" in run.output or "log_samples" not in changes["on_policy"]


@pytest.mark.parametrize("name", ONE)
def test_one_tokenizer(run_axolotl, recipe, tiny, name):
    changes, terms = ONE[name]
    run = run_axolotl({**recipe, "dskd": block(recipe, changes, tiny["sibling"])})
    assert run.code == 0, run.output[-3000:]
    check(run, terms)


def test_sft_is_plain_axolotl(run_axolotl, recipe):
    """On the same rows in the same order; one micro-batch a step, because Axolotl averages the means of several."""
    recipe = {**recipe, "gradient_accumulation_steps": 1}
    plain = run_axolotl({key: value for key, value in recipe.items() if key not in ("dskd", "plugins")})
    run = run_axolotl({**recipe, "dskd": block(recipe, {"method": "sft"}), "output_dir": recipe["output_dir"] + "-sft"})
    expected = [pytest.approx(step, rel=2e-5) for step in plain.curve("loss", "grad_norm")]
    assert run.curve("loss", "grad_norm") == expected


ROLLOUT = ("dskd/rollout_answers", "dskd/rollout_tokens", "dskd/rollout_empty", "dskd/rollout_cut")


FITTED = {"projector": {"init": "fitted"}}
BALANCED = {"method": "overlap_kd", "kd_weight": "balanced"}


@pytest.mark.parametrize(
    "changes", [{"alignment": "cma"}, ON_POLICY, FITTED, BALANCED], ids=["cma", "on-policy", "fitted", "balanced"]
)
def test_killed_run_resumes_the_same_curve(run_axolotl, recipe, changes):
    """Bit for bit: draws and samples of an on-policy step follow from the seed and the step, a projector that was
    fitted once is not fitted again, and what a balanced loss has seen is kept.
    """
    recipe = {
        **recipe,
        "dskd": block(recipe, changes),
        "max_steps": 20,
        "save_steps": 5,
        "gradient_accumulation_steps": 1,
    }
    whole = run_axolotl(recipe)
    cut = {**recipe, "output_dir": recipe["output_dir"] + "-cut"}
    killed = run_axolotl(cut, kill_after=f"{cut['output_dir']}/checkpoint-10/trainer_state.json")
    assert killed.code != 0 and not (killed.out / "dskd_state.json").exists(), "the run was not cut"
    again = run_axolotl({**cut, "auto_resume_from_checkpoints": True})
    assert again.code == 0, again.output[-3000:]
    names = ("loss", "grad_norm", "dskd/ce", "dskd/kd", *(ROLLOUT if "on_policy" in changes else ()))
    names += ("dskd/kd_scale",) if changes is BALANCED else ()
    assert len(again.curve(*names)) == 20
    assert again.curve(*names) == whole.curve(*names)
    fits = ["dskd: projector fitted on" in run.output for run in (whole, killed, again)]
    assert fits == ([True, True, False] if changes is FITTED else [False, False, False])
    from safetensors.torch import load_file

    for file in ("model.safetensors", "dskd/projectors.safetensors"):
        ours, theirs = load_file(again.out / file), load_file(whole.out / file)
        assert ours.keys() == theirs.keys()
        assert all((ours[key] == theirs[key]).all() for key in ours)


@pytest.mark.parametrize("engine", ["zero3", pytest.param("fsdp2", marks=pytest.mark.more)])
def test_cross_model_attention_on_two_ranks(train, tmp_path, engine, options, single_cma):
    if not single_cma:
        run = train("single", dskd={"alignment": "cma"}, micro_batch_size=2, gradient_accumulation_steps=2)
        single_cma["curve"] = run.curve()
    run = train(engine, ranks=2, dskd={"alignment": "cma"}, gradient_accumulation_steps=1, **options(engine, tmp_path))
    assert run.curve() == [pytest.approx(step, rel=2e-5) for step in single_cma["curve"]]
    from safetensors.torch import load_file

    found = load_file(run.out / "dskd/projectors.safetensors")
    shapes = {name: tuple(value.shape) for name, value in found.items()}
    assert shapes == {
        "attention.query.weight": (96, 64),
        "attention.t2s.weight": (32, 48),
        "attention.s2t.weight": (48, 32),
    }


def test_tokens_that_begin_inside_the_teachers_in_every_kind_of_run(run_axolotl, recipe, tmp_path):
    """Two ranks and the teacher's states from a folder give the curve of one process; packed rows and evaluations."""
    answers = ["returned lamps", "lamps\n- items 🙂🙂 naïvecafé\n- code"]
    rows = [
        {"messages": [{"role": "user", "content": f"red {k}"}, {"role": "assistant", "content": text}]}
        for k in range(16)
        for text in answers
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = {
        **recipe,
        "datasets": [{**recipe["datasets"][0], "path": str(file)}],
        "val_set_size": 0.25,
        "eval_steps": 2,
    }

    def run(name, teacher=None, ranks=1, **changes):
        bpm = block(recipe, {"method": "bpm"})
        bpm["teacher"] = {**bpm["teacher"], **(teacher or {})}
        found = run_axolotl({**recipe, **changes, "dskd": bpm, "output_dir": str(tmp_path / name)}, ranks=ranks)
        assert found.code == 0, found.output[-3000:]
        assert all(entry["dskd/align_ratio"] == 1 for entry in found.log if "loss" in entry)
        evaluations = [entry["eval_dskd/kd"] for entry in found.log if "eval_loss" in entry]
        assert len(evaluations) >= 2 and all(value > 0 for value in evaluations)
        return found.curve("loss", "grad_norm", "dskd/kd") + [(value,) for value in evaluations]

    def close(curve, tolerance):
        return [pytest.approx(step, rel=tolerance) for step in curve]

    one = run("one")
    assert run("two", ranks=2, gradient_accumulation_steps=1) == close(one, 2e-5)
    assert run("cached", teacher={"cache": "auto"}) == close(one, 5e-3)  # states in bfloat16
    run("packed", sample_packing=True, eval_sample_packing=True, sequence_len=128, micro_batch_size=1)


@pytest.mark.parametrize("engine", ["fsdp2"])
def test_segments_on_two_ranks_from_a_cache(run_axolotl, recipe, tmp_path, engine, options):
    """The curve of one process with padded rows and the live teacher; evaluated as well."""
    changes = {"val_set_size": 0.25, "eval_steps": 2, "sequence_len": 128, "gradient_accumulation_steps": 1}
    whole = {**recipe, **changes, "micro_batch_size": 4, "dskd": block(recipe, {"method": "span_kd"})}
    alone = run_axolotl(whole)
    cached = {**whole["dskd"], "teacher": {**whole["dskd"]["teacher"], "cache": "auto"}}
    split = {**whole, "micro_batch_size": 2, "dskd": cached, "output_dir": recipe["output_dir"] + "-split"}
    run = run_axolotl({**split, **options(engine, tmp_path)}, ranks=2)
    for one in (alone, run):
        assert one.code == 0, one.output[-3000:]
    names = ("loss", "grad_norm", "dskd/ce", "dskd/kd")
    # The cache of a tiny model has bfloat16 states.
    assert run.curve(*names) == [pytest.approx(step, rel=5e-3) for step in alone.curve(*names)]
    assert any("eval_dskd/kd" in entry for entry in run.log)


@pytest.fixture(scope="module")
def single_cma():
    """The curve of one process, computed once."""
    return {}


@pytest.fixture(scope="module")
def whole_student():
    """Steps with sampled answers under an engine that leaves the student whole, run once."""
    return {}


@pytest.mark.parametrize("engine", [pytest.param("zero2", marks=pytest.mark.more), "zero3", "fsdp2"])
def test_ranks_answer_alike_whatever_is_split(train, tmp_path, engine, options, whole_student):
    """A step is on-policy on both ranks or on neither: it has answers to all prompts of both batches or none."""

    def steps_of(name, engine):
        changes = {"gradient_accumulation_steps": 1, "max_steps": 8, **options(engine, tmp_path)}
        run = train(name, ranks=2, dskd=ON_POLICY, **changes)
        return [entry for entry in run.log if "loss" in entry]

    if not whole_student:
        whole_student["steps"] = steps_of("ddp", "ddp")
    steps = steps_of(engine, engine)
    assert {entry["dskd/rollout_answers"] for entry in steps} == {0.0, 4.0}  # two ranks with two prompts each
    for ours, theirs in zip(steps, whole_student["steps"], strict=True):
        for name in ("loss", "dskd/ce", "dskd/kd", "dskd/rollout_tokens"):
            assert ours[name] == pytest.approx(theirs[name], rel=2e-5), name


@pytest.mark.parametrize("changes", [{}, {"sample_packing": True, "sequence_len": 128}], ids=["padded", "packed"])
def test_on_policy_lora_with_gradient_checkpointing(train, lora, changes):
    run = train(
        dskd={"on_policy": {"fraction": 1, "max_new_tokens": 12}}, **lora, **changes, gradient_checkpointing=True
    )
    steps = [entry for entry in run.log if "loss" in entry]
    for entry in steps:
        assert entry["dskd/rollout_answers"] > 0
        assert entry["loss"] == pytest.approx(0.5 * entry["dskd/ce"] + 0.5 * entry["dskd/kd"], rel=1e-5)
