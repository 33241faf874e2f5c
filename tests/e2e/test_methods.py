"""Every method and alignment through the real ``axolotl train``: one tokenizer and two, kill -9, two ranks."""

import math

import pytest

pytestmark = pytest.mark.e2e

# name -> (block, terms that it logs); all across two tokenizers
TWO = {
    "sft": ({"method": "sft"}, {"ce"}),
    "overlap_kd": ({"method": "overlap_kd"}, {"ce", "kd"}),
    "uld": ({"method": "uld"}, {"ce", "kd"}),
    "mined": ({"method": "mined"}, {"ce", "kd"}),
    "cma": ({"alignment": "cma"}, {"ce", "t2s_kd", "t2s_ce", "s2t_kd"}),
    "chunk_ratio": ({"chunk_ratio": 1.0}, {"ce", "t2s_kd", "t2s_ce", "s2t_kd", "chunk_ratio"}),
    "warm-up": ({"projector": {"warmup_steps": 2}}, {"ce", "t2s_kd", "t2s_ce", "s2t_kd"}),
    "on-policy": (
        {"on_policy": {"fraction": 0.5, "max_new_tokens": 12, "log_samples": 1}},
        {"ce", "t2s_kd", "t2s_ce", "s2t_kd"},
    ),
    "on-policy overlap_kd": (
        {"method": "overlap_kd", "on_policy": {"fraction": 1, "max_new_tokens": 12}},
        {"ce", "kd"},
    ),
}
ONE = {
    "kd": ({"method": "kd"}, {"ce", "kd"}),
    "overlap_kd": ({"method": "overlap_kd"}, {"ce", "kd"}),
    "cma": ({"alignment": "cma"}, {"ce", "t2s_kd", "t2s_ce", "s2t_kd"}),
    "on-policy": (
        {"on_policy": {"fraction": 1, "max_new_tokens": 12}},
        {"ce", "t2s_kd", "t2s_ce", "s2t_kd"},
    ),
}
TERMS = {"ce", "kd", "t2s_kd", "t2s_ce", "s2t_kd", "chunk_ratio"}


def block(recipe, changes, teacher=None):
    """The recipe's block with changes; settings that the method would ignore are left out."""
    base = {"teacher": {"model": teacher, "dtype": "float32"} if teacher else recipe["dskd"]["teacher"]}
    if changes.get("method", "dskd") == "dskd":
        base["projector"] = {**recipe["dskd"]["projector"], **changes.get("projector", {})}
    return {**base, **{key: value for key, value in changes.items() if key != "projector"}}


def check(run, terms, warm_up=0):
    """warm_up: steps whose loss leaves out the terms that would move the student."""
    steps = [entry for entry in run.log if "loss" in entry]
    assert len(steps) == 4
    for step, entry in enumerate(steps):
        logged = {name for name in TERMS if f"dskd/{name}" in entry}
        assert logged - {"kd"} == terms - {"kd"}
        assert all(math.isfinite(entry[f"dskd/{name}"]) for name in logged)
        kd = entry["dskd/t2s_ce"] if step < warm_up else entry.get("dskd/kd", 0.0)
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
    if "on_policy" in changes:
        assert sum(entry["dskd/rollout_answers"] for entry in steps) > 0
        assert "dskd: step" in run.output or "log_samples" not in changes["on_policy"]


@pytest.mark.parametrize("name", ONE)
def test_one_tokenizer(run_axolotl, recipe, tiny, name):
    changes, terms = ONE[name]
    run = run_axolotl({**recipe, "dskd": block(recipe, changes, tiny["sibling"])})
    assert run.code == 0, run.output[-3000:]
    check(run, terms)


def test_sft_is_plain_axolotl_and_never_loads_the_teacher(run_axolotl, recipe, tiny):
    """The same rows in the same order; only the first token of a sample is trained by neither."""
    plain = run_axolotl({key: value for key, value in recipe.items() if key not in ("dskd", "plugins")})
    run = run_axolotl({**recipe, "dskd": block(recipe, {"method": "sft"}), "output_dir": recipe["output_dir"] + "-sft"})
    assert run.curve("loss", "grad_norm") == [
        pytest.approx(step, rel=2e-5) for step in plain.curve("loss", "grad_norm")
    ]
