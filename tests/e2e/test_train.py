"""Real ``axolotl train`` on one process: what a user runs, what it logs and what it leaves behind."""

import json
import math
from pathlib import Path

import pytest

pytestmark = pytest.mark.e2e

METRICS = ("ce", "kd", "t2s_kd", "t2s_ce", "s2t_kd", "t2s_agreement", "s2t_agreement", "align_ratio")


def loads_cleanly(folder):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert len(AutoTokenizer.from_pretrained(folder)) <= model.config.vocab_size
    return model


def test_distillation_across_tokenizers(train):
    run = train(max_steps=12, save_steps=12)
    steps = [entry for entry in run.log if "loss" in entry]
    assert len(steps) == 12
    for entry in steps:
        assert all(math.isfinite(entry[f"dskd/{name}"]) for name in METRICS)
        assert entry["dskd/kd"] == pytest.approx(
            sum(entry[f"dskd/{name}"] for name in ("t2s_kd", "t2s_ce", "s2t_kd")), abs=1e-5
        )
        assert entry["loss"] == pytest.approx(0.5 * entry["dskd/ce"] + 0.5 * entry["dskd/kd"], rel=1e-5)
        assert 0.7 < entry["dskd/align_ratio"] <= 1  # the first words do not pair
        assert "ppl" not in entry
    # The projector learns (t2s_ce), and so does the student (ce).
    for name in ("dskd/t2s_ce", "dskd/ce"):
        assert sum(e[name] for e in steps[-4:]) < sum(e[name] for e in steps[:4]) - 0.8, name
    loads_cleanly(run.out)
    state = json.loads((run.out / "dskd_state.json").read_text())
    assert state["widths"] == [32, 48]
    from safetensors.torch import load_file

    assert load_file(run.out / "dskd_projectors.safetensors")["t2s.linear.weight"].shape == (32, 48)
    assert "% aligned with the teacher" in run.output


def test_one_tokenizer(train, tiny):
    run = train(dskd={"teacher": {"model": tiny["sibling"], "dtype": "float32"}})
    assert all(entry["dskd/align_ratio"] == 1 for entry in run.log if "loss" in entry)
    assert "`method: kd` scored better" in run.output


def test_any_split_of_the_batch_gives_the_same_curve(train):
    expected = train("a", micro_batch_size=4, gradient_accumulation_steps=1).curve()
    for found in (train("b", micro_batch_size=1, gradient_accumulation_steps=4, gradient_checkpointing=True).curve(),):
        assert found == [pytest.approx(step, rel=2e-5) for step in expected]


def test_packed_with_evaluation(train):
    run = train(
        sample_packing=True,
        eval_sample_packing=True,
        sequence_len=128,
        micro_batch_size=2,
        val_set_size=0.25,
        eval_steps=2,
    )
    evaluations = [entry for entry in run.log if "eval_loss" in entry]
    assert len(evaluations) >= 2
    for entry in evaluations:
        assert entry["eval_loss"] == pytest.approx(0.5 * entry["eval_dskd/ce"] + 0.5 * entry["eval_dskd/kd"], abs=1e-5)
    assert evaluations[-1]["eval_dskd/ce"] < evaluations[0]["eval_dskd/ce"]


def test_packed_equals_padded(train):
    """All rows in one step: however they are laid out, the loss is the same."""
    padded = train("padded", micro_batch_size=48, gradient_accumulation_steps=1, max_steps=1, save_steps=1).curve()
    packed = train(
        "packed",
        sample_packing=True,
        sequence_len=4096,
        max_steps=1,
        save_steps=1,
        micro_batch_size=1,
        gradient_accumulation_steps=1,
        sdp_attention=None,  # Axolotl keeps the attention mask of packed rows unless an implementation is named
    ).curve()
    assert packed == [pytest.approx(step, rel=1e-4) for step in padded]


def test_lora(train, tiny, lora):
    run = train(**lora)
    from peft import PeftModel
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    names = list(load_file(run.out / "adapter_model.safetensors"))
    assert names and all("lora_" in name for name in names)
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny["student"]), run.out)
    assert (run.out / "dskd_projectors.safetensors").is_file()


@pytest.mark.parametrize("kind", ["alpaca", "completion"])
def test_other_datasets(train, tiny, kind):
    run = train(
        datasets=[{"path": tiny["data"], "ds_type": "json", "type": kind}],
        sequence_len=64 if kind == "completion" else 256,
    )
    assert run.curve()


def test_preprocess_then_train_then_evaluate(train, recipe, run_axolotl):
    prepared = train("prepare", command="preprocess", val_set_size=0.25)
    assert "% aligned with the teacher" in prepared.output
    trained = train("out", val_set_size=0.25)
    assert "% aligned with the teacher" not in trained.output  # the prepared rows were reused
    evaluated = train("out", command="evaluate", val_set_size=0.25)
    assert (Path(evaluated.out) / "eval_summary.csv").is_file()


@pytest.mark.parametrize("launcher", ["accelerate", "torchrun"])
def test_launchers(recipe, run_axolotl, launcher):
    # Neither launcher starts more than one process without GPUs; both start a new interpreter.
    options = {"plugins": ["dskd_plugin.DSKDPlugin"]} if launcher == "torchrun" else {}
    run = run_axolotl({**recipe, **options, "max_steps": 2}, launcher=launcher)
    assert run.code == 0, run.output[-3000:]
    assert run.curve()


def test_plugin_without_a_block_is_plain_axolotl(recipe, run_axolotl):
    plain = run_axolotl({key: value for key, value in recipe.items() if key not in ("dskd", "plugins")})
    expected = plain.curve("loss", "grad_norm")
    listed = run_axolotl({key: value for key, value in recipe.items() if key != "dskd"})
    assert listed.curve("loss", "grad_norm") == expected
    assert "no `dskd:` block" in listed.output and "no `dskd:` block" not in plain.output
    assert not (listed.out / "dskd_state.json").exists()


def test_bad_recipe_stops_the_command(recipe, run_axolotl):
    run = run_axolotl({**recipe, "dskd": {**recipe["dskd"], "kd_ratio": 1.5}})
    assert run.code != 0
    assert "dskd.kd_ratio: expected less than or equal to 1, got 1.5" in run.output
    assert not run.out.exists()
