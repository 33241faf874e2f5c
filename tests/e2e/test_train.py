"""Real ``axolotl train`` on one process: what a user runs, what it logs and what it leaves behind."""

import json
import math
import re
from pathlib import Path

import pytest
import yaml

pytestmark = pytest.mark.e2e

METRICS = ("ce", "kd", "t2s_kd", "t2s_ce", "s2t_kd", "t2s_agreement", "s2t_agreement", "align_ratio")


def loads_cleanly(folder):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert len(AutoTokenizer.from_pretrained(folder)) <= model.config.vocab_size
    return model


def test_distillation_across_tokenizers(train, recipe):
    run = train(max_steps=12, save_steps=12, fresh=True)
    steps = [entry for entry in run.log if "loss" in entry]
    assert len(steps) == 12
    for entry in steps:
        assert all(math.isfinite(entry[f"dskd/{name}"]) for name in METRICS)
        assert entry["dskd/kd"] == pytest.approx(
            sum(entry[f"dskd/{name}"] for name in ("t2s_kd", "t2s_ce", "s2t_kd")), abs=1e-5
        )
        assert entry["loss"] == pytest.approx(0.5 * entry["dskd/ce"] + 0.5 * run.kd_of(entry), rel=1e-5)
        assert 0.7 < entry["dskd/align_ratio"] <= 1  # the first words do not pair
        assert "ppl" not in entry
    # The projector learns (t2s_ce), and so does the student (ce).
    for name in ("dskd/t2s_ce", "dskd/ce"):
        assert sum(e[name] for e in steps[-4:]) < sum(e[name] for e in steps[:4]) - 0.8, name
    loads_cleanly(run.out)
    state = json.loads((run.out / "dskd_state.json").read_text())
    assert state["widths"] == [32, 48]
    from safetensors.torch import load_file

    assert load_file(run.out / "dskd/projectors.safetensors")["t2s.linear.weight"].shape == (32, 48)
    assert "% aligned with the teacher" in run.output
    assert_ended_well(run, recipe)


def rows(recipe):
    return [json.loads(line) for line in Path(recipe["datasets"][0]["path"]).read_text().splitlines()]


def assert_ended_well(run, recipe):
    """The summary stands last, in few lines; nothing is marked as partial; the card says what was done, not where."""
    summary = run.output[run.output.rindex("\ndskd: finished ") :].strip().splitlines()
    assert len(summary) <= 15
    assert re.match(r"dskd: finished 12 steps in 0:\d\d:\d\d, [\d,]+ tokens/s of the student, peak memory", summary[0])
    steps = [entry for entry in run.log if "loss" in entry]
    for name in METRICS:
        assert f"{name} {steps[0][f'dskd/{name}']:.3f} -> {steps[-1][f'dskd/{name}']:.3f}" in "\n".join(summary)
    assert any(line.startswith("  a training prompt: ") for line in summary)
    gold = next(line.removeprefix("  gold: ") for line in summary if line.startswith("  gold: "))
    answers = [message["content"] for row in rows(recipe) for message in row["messages"]]
    assert gold in [" ".join(answer.split()) for answer in answers]
    assert any(line.startswith("  answer: ") for line in summary)
    assert summary[-2:] == [
        f"  student: {run.out}",
        f"  evaluate: dskd-eval --model {run.out} --suite instruct,math,code",
    ]
    assert not (run.out / "PARTIAL.txt").exists()
    card = (run.out / "README.md").read_text()
    assert "`student`, distilled from `teacher` with dskd" in card and "| data | `train.jsonl` |" in card
    assert "spaces: both" in card and "learning_rate: 0.001" in card
    assert (
        "scratch" not in card and str(run.out.parent) not in card and str(Path(recipe["base_model"]).parent) not in card
    )


def test_the_card_names_what_the_command_line_replaced(recipe, run_axolotl):
    """Of a recipe that says other rates, seeds and folders, or nothing of them."""
    del recipe["seed"]
    words = ["--learning-rate", "0.0007", "--seed", "7", "--max-steps", "2"]
    run = run_axolotl(recipe, command_options=words)
    assert run.code == 0, run.output[-3000:]
    card = (run.out / "README.md").read_text()
    written = yaml.safe_load(card.split("```yaml\n")[1].split("```")[0])
    assert "2 steps" in card and "learning rate 0.0007" in card and "seed 7" in card
    assert written["learning_rate"] == 0.0007 and written["seed"] == 7 and written["max_steps"] == 2
    replaced = {"learning_rate": 0.0007, "seed": 7, "max_steps": 2}
    places = ("base_model", "output_dir", "dataset_prepared_path", "datasets", "dskd")  # without their folders
    assert {**written, **{key: recipe[key] for key in places if key in recipe}} == {**recipe, **replaced}


def test_one_tokenizer(train, tiny):
    run = train(dskd={"teacher": {"model": tiny["sibling"], "dtype": "float32"}})
    assert all(entry["dskd/align_ratio"] == 1 for entry in run.log if "loss" in entry)
    assert "recommended: method: kd (this recipe: method: dskd with target: exact)" in run.output


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
        load_best_model_at_end=True,
    )
    evaluations = [entry for entry in run.log if "eval_loss" in entry]
    assert len(evaluations) >= 2
    for entry in evaluations:
        kd = entry["eval_dskd/kd"] + entry["eval_dskd/ce_unpaired"]
        assert entry["eval_loss"] == pytest.approx(0.5 * entry["eval_dskd/ce"] + 0.5 * kd, abs=1e-5)
    assert evaluations[-1]["eval_dskd/ce"] < evaluations[0]["eval_dskd/ce"]
    assert "\n  a validation prompt: " in run.output
    from safetensors.torch import load_file

    # Model and projectors of one checkpoint, that of the least validation loss, which is not the last.
    assert evaluations[-1]["eval_loss"] > evaluations[-2]["eval_loss"]
    for file in ("model.safetensors", "dskd/projectors.safetensors"):
        found, best, last = (load_file(run.out / folder / file) for folder in ("", "checkpoint-2", "checkpoint-4"))
        assert all((found[key] == best[key]).all() for key in best), file
        assert not all((found[key] == last[key]).all() for key in last), file


@pytest.mark.parametrize("asked", [None, False])
def test_the_best_checkpoint_by_a_term_is_that_of_its_least_value(train, asked):
    evaluated = {"val_set_size": 0.25, "eval_steps": 2, "save_steps": 2, "load_best_model_at_end": True}
    run = train(**evaluated, metric_for_best_model="eval_dskd/ce", greater_is_better=asked)
    values = [entry["eval_dskd/ce"] for entry in run.log if "eval_loss" in entry]
    assert len(values) >= 2 and values[-1] < values[0]
    state = json.loads((run.out / "checkpoint-4" / "trainer_state.json").read_text())
    assert state["best_metric"] == pytest.approx(min(values), abs=1e-6)


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
    assert (run.out / "dskd/projectors.safetensors").is_file()
    # Axolotl's fused kernels would have allocated on a GPU.
    assert "dskd: no GPU here, so LoRA trains without Axolotl's fused kernels: lora_mlp_kernel, " in run.output
    assert str(Path(tiny["student"]).parent) not in (run.out / "README.md").read_text()


@pytest.mark.parametrize("kind", ["alpaca", "completion"])
def test_other_datasets(train, tiny, kind):
    run = train(
        datasets=[{"path": tiny["data"], "ds_type": "json", "type": kind}],
        sequence_len=64 if kind == "completion" else 256,
    )
    assert run.curve()


def test_preprocess_then_train_then_evaluate(train, recipe, run_axolotl):
    prepared = train("prepare", command="preprocess", val_set_size=0.25)
    (share,) = set(re.findall(r"[\d.]+ % aligned with the teacher", prepared.output))
    trained = train("out", val_set_size=0.25)
    # The prepared rows are used again, and a part of them is kept for the evaluation.
    (again,) = set(re.findall(r"of the response tokens of 36 training rows, the first, ([\d.]+) % al", trained.output))
    assert float(again) == pytest.approx(float(share.split()[0]), abs=5)
    evaluated = train("out", command="evaluate", val_set_size=0.25)
    assert (Path(evaluated.out) / "eval_summary.csv").is_file()


@pytest.mark.parametrize(
    "launcher",
    [
        "accelerate",
        pytest.param("torchrun", marks=pytest.mark.more),
        pytest.param("python", marks=pytest.mark.more),
    ],
)
def test_launchers(recipe, run_axolotl, launcher):
    recipe = {**recipe, "dataset_num_proc": 2}  # processes that end when the rows are prepared
    # No launcher starts more than one process without GPUs; the first two start a new interpreter.
    options = {"plugins": ["dskd_plugin.DSKDPlugin"]} if launcher == "torchrun" else {}
    run = run_axolotl({**recipe, **options, "max_steps": 2}, launcher=launcher, fresh=True)
    assert run.code == 0, run.output[-3000:]
    assert run.curve() and "stopped by" not in run.output and "Traceback" not in run.output


def test_plugin_without_a_block_is_plain_axolotl(recipe, run_axolotl):
    plain = run_axolotl({key: value for key, value in recipe.items() if key not in ("dskd", "plugins")})
    expected = plain.curve("loss", "grad_norm")
    listed = run_axolotl({key: value for key, value in recipe.items() if key != "dskd"})
    assert listed.curve("loss", "grad_norm") == expected
    assert "no `dskd:` block" in listed.output and "no `dskd:` block" not in plain.output
    assert not (listed.out / "dskd_state.json").exists()


def test_an_entry_without_pairs_trains_by_cross_entropy_beside_others(train, recipe, tmp_path):
    """The teacher's template writes other words than the data in the second entry; steps of it alone have no pair."""
    template = tmp_path / "other.jinja"
    template.write_text(
        "{% for m in messages %}[{{ m.role }}]{{ m.content | replace('stone', 'river') }}</s>{% endfor %}"
    )
    entries = []
    for name, answer in (("good", "blue lamp"), ("bad", "blue stone.")):
        file = tmp_path / f"{name}.jsonl"
        messages = [{"role": "user", "content": "red"}, {"role": "assistant", "content": answer}]
        file.write_text(f"{json.dumps({'messages': messages})}\n" * 4)
        entries.append({"path": str(file), "ds_type": "json", "type": "chat_template"})
    teacher = {**recipe["dskd"]["teacher"], "chat_template": str(template)}
    run = train(
        datasets=entries,
        dskd={"teacher": teacher},
        micro_batch_size=1,
        gradient_accumulation_steps=1,
        max_steps=8,
        save_steps=8,
        dataset_num_proc=2,
    )
    assert re.search(r"bad\.jsonl: .*none aligned of .*student 'blue stone\.'.*cross-entropy alone", run.output)
    steps = [entry for entry in run.log if "loss" in entry]
    assert all(math.isfinite(entry["loss"]) and entry["dskd/ce"] > 0 for entry in steps)
    shares = [entry["dskd/align_ratio"] for entry in steps]
    assert shares.count(0.0) == 4 and sum(share > 0 for share in shares) == 4
