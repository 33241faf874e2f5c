"""`dskd plan`: its numbers against real steps, real optimizers and sums by hand; what it advises; what it refuses."""

import functools
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import CliRunner

from benchmarks.memory import peak
from benchmarks.shapes import METHODS, Bench, Size
from dskd_plugin.cli import main
from dskd_plugin.plan import make
from dskd_plugin.plan.facts import STATES_LIKE_WEIGHTS, facts_of
from dskd_plugin.plan.memory import memory_of
from dskd_plugin.plan.models import student_of, teacher_of
from dskd_plugin.preflight import check_recipe
from dskd_plugin.settings import parse_settings

GIB = 2**30


def side(layers, width, vocab, **more):
    return {
        "num_hidden_layers": layers,
        "hidden_size": width,
        "intermediate_size": 3 * width,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": vocab,
        "tie_word_embeddings": True,
        "max_position_embeddings": 512,
        **more,
    }


SIZES = {
    "layers weigh most": Size(("llama", side(12, 128, 300)), ("qwen2", side(3, 96, 400)), 4, 192, 1),
    "vocabularies weigh most": Size(("llama", side(2, 64, 9000)), ("qwen2", side(2, 96, 12000)), 2, 64, 1),
    "head apart": Size(
        ("llama", side(6, 96, 4000, tie_word_embeddings=False)), ("qwen2", side(3, 96, 4000)), 2, 128, 1
    ),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """folders(size): configurations alone, no weights."""
    from transformers import AutoConfig

    def write(name):
        folder = tmp_path_factory.mktemp("plan")
        for role, (family, options) in zip(
            ("student", "teacher"), (SIZES[name].student, SIZES[name].teacher), strict=True
        ):
            AutoConfig.for_model(family, **options).save_pretrained(folder / role)
        return folder

    return functools.cache(write)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("method", list(METHODS))
@pytest.mark.parametrize("name", list(SIZES))
def test_the_bytes_of_a_step_are_those_of_a_real_one(name, method, checkpointing, folders):
    """All tensors of a real step are counted by torch's profiler. Rows without a partner make it a little smaller."""
    size, folder = SIZES[name], folders(name)
    bench = Bench(size, torch.device("cpu"))
    bench.student.train()
    if checkpointing:
        bench.student.gradient_checkpointing_enable({"use_reentrant": False})
    loss = bench.loss(method)
    real = peak(lambda: bench.step(loss, with_teacher=method != "sft"), bench.device)

    recipe = {
        "base_model": str(folder / "student"),
        "dskd": {"teacher": {"model": str(folder / "teacher"), "dtype": "float32"}, **METHODS[method]},
        "micro_batch_size": size.rows,
        "sequence_len": size.tokens,
        "gradient_checkpointing": checkpointing,
        "bf16": False,
        "flash_attention": True,  # without padding torch's own attention keeps no more
    }
    facts = facts_of(recipe, parse_settings(recipe["dskd"]), 1, on_gpu=False)
    memory = memory_of(facts, student_of(facts), None if method == "sft" else teacher_of(facts))
    found = {key: round(value / 2**20, 1) for key, value in memory.moments.items()}
    assert 0.9 < max(memory.moments.values()) / real < 1.25, (real / 2**20, found)


@pytest.mark.parametrize(
    ("name", "make_optimizer"),
    [
        ("adamw_torch", lambda weights: torch.optim.AdamW(weights)),
        ("adamw_torch_fused", lambda weights: torch.optim.AdamW(weights, fused=True)),
        ("rmsprop", lambda weights: torch.optim.RMSprop(weights)),
        ("sgd", lambda weights: torch.optim.SGD(weights)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_optimizers_keep_what_the_table_says(name, make_optimizer, dtype):
    weight = torch.nn.Parameter(torch.ones(64, 32, dtype=dtype))
    optimizer = make_optimizer([weight])
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    kept = [value for state in optimizer.state.values() for value in state.values() if value.numel() > 1]
    size = weight.element_size()
    assert sum(value.numel() * value.element_size() for value in kept) == STATES_LIKE_WEIGHTS[name] * size * 64 * 32


@pytest.fixture
def recipe(folders):
    folder = folders("layers weigh most")
    return {
        "base_model": str(folder / "student"),
        "plugins": ["dskd"],
        "dskd": {"teacher": {"model": str(folder / "teacher")}},
        "datasets": [{"path": "rows.jsonl", "type": "chat_template"}],
        "bf16": True,
        "micro_batch_size": 4,
        "sequence_len": 192,
    }


def of(recipe, ranks=1, **changes):
    recipe = {**recipe, **changes}
    return make(recipe, ranks=ranks, on_gpu=True)


def test_weights_are_counted_as_the_configuration_has_them(recipe):
    plan = of(recipe)
    width, inner, vocab, layers = 128, 384, 300, 12
    attention = 2 * width * width + 2 * width * (width // 2)
    inside = layers * (attention + 3 * width * inner + 2 * width) + width
    assert plan.student.counts.all == inside + vocab * width
    # Embedding and head, one here, are in float32; the others in bfloat16.
    assert plan.student.bytes == 2 * inside + 4 * vocab * width
    assert plan.memory.stays["optimizer's states"] == 2 * plan.student.bytes + 2 * 4 * 96 * width


def test_an_adapter_trains_its_own_weights_alone(recipe):
    plan = of(recipe, adapter="qlora", load_in_4bit=True, lora_r=8, lora_target_linear=True)
    width, inner, layers = 128, 384, 12
    sides = [(width, width), (width, width // 2), (width, width // 2), (width, width)]
    sides += [(width, inner), (width, inner), (inner, width)]
    trained = layers * sum(8 * (inputs + outputs) for inputs, outputs in sides)
    assert plan.student.counts.trained == {4: trained}
    linear = layers * sum(inputs * outputs for inputs, outputs in sides)
    rest = plan.student.counts.all - linear - trained
    assert plan.student.bytes == pytest.approx(linear * (0.5 + 1 / 64) + 2 * rest + 4 * trained, abs=1)


ZERO = {"bf16": {"enabled": True}}


@pytest.mark.parametrize(
    ("changes", "states", "weights"),
    [
        ({}, 1, 1),
        ({"deepspeed": {"zero_optimization": {"stage": 1}, **ZERO}}, 4, 1),
        ({"deepspeed": {"zero_optimization": {"stage": 2}, **ZERO}}, 4, 1),
        ({"deepspeed": {"zero_optimization": {"stage": 3}, **ZERO}}, 4, 4),
        ({"fsdp_config": {"state_dict_type": "FULL_STATE_DICT"}, "fsdp_version": 2}, 4, 4),
    ],
    ids=["DDP", "ZeRO-1", "ZeRO-2", "ZeRO-3", "FSDP2"],
)
def test_engines_split_what_they_split(recipe, changes, states, weights):
    whole, split = of(recipe, **changes), of(recipe, ranks=4, **changes)
    projector = 96 * 128
    kept = [plan.memory.stays["optimizer's states"] for plan in (whole, split)]
    if "deepspeed" in changes:
        assert kept[0] == 12 * (whole.student.counts.all + projector)
    else:  # the projector is not split
        kept = [size - 8 * projector for size in kept]
    assert kept[1] == kept[0] // states
    assert split.memory.stays["student's weights"] == whole.student.bytes // weights
    assert split.work.network > 0 == whole.work.network


@pytest.mark.axolotl
@pytest.mark.parametrize("on_gpu", [True, False], ids=["GPU", "CPU"])
@pytest.mark.parametrize("bf16", ["silent", None, "auto", True, False])
@pytest.mark.parametrize("others", [{}, {"fp16": True}, {"fp16": False}, {"float16": True}, {"load_in_8bit": True}])
def test_the_dtype_is_the_one_that_axolotl_loads_the_student_in(others, bf16, on_gpu, recipe, monkeypatch):
    from axolotl.utils import config
    from axolotl.utils.dict import DictDefault
    from axolotl.utils.schemas.config import AxolotlInputConfig

    monkeypatch.setattr(config, "is_torch_bf16_gpu_available", lambda: on_gpu)
    del recipe["bf16"]
    given = {**others, **({} if bf16 == "silent" else {"bf16": bf16})}
    defaults = {key: AxolotlInputConfig.model_fields[key].default for key in ("bf16", "fp16", "float16", "bfloat16")}
    resolved = DictDefault({**defaults, **given})
    config.resolve_dtype(resolved)
    changed = {**recipe, **given}
    facts = facts_of(changed, parse_settings(changed["dskd"]), 1, on_gpu)
    assert f"torch.{facts.weights}" == str(resolved.torch_dtype)


@pytest.mark.parametrize(
    ("bf16", "enabled", "dtype"),
    [(False, "auto", "float32"), (True, "auto", "bfloat16"), (False, True, "bfloat16"), (False, False, "float32")],
)
def test_a_precision_that_the_engine_leaves_open_is_that_of_the_recipe(bf16, enabled, dtype, recipe):
    file = json.loads((Path(__file__).parents[2] / "recipes/deepspeed/zero2.json").read_text())
    assert file["bf16"] == file["fp16"] == {"enabled": "auto"}
    assert of(recipe, bf16=bf16, deepspeed={**file, "bf16": {"enabled": enabled}}).facts.weights == dtype


def test_a_stage_that_deepspeed_does_not_have_is_told(recipe):
    with pytest.raises(ValueError, match=r"deepspeed: expected a zero_optimization.stage from 0 to 3, got 4\."):
        of(recipe, deepspeed={"zero_optimization": {"stage": 4}, **ZERO})


def test_numbers_in_quotes_are_numbers(recipe):
    written = of(recipe, sequence_len="64", micro_batch_size="2")
    assert written.memory.stays == of(recipe, sequence_len=64, micro_batch_size=2).memory.stays
    quoted, plain = (of(recipe, deepspeed={"zero_optimization": {"stage": stage}, **ZERO}) for stage in ("2", 2))
    assert quoted.facts.engine == plain.facts.engine == "ZeRO-2"
    with pytest.raises(
        ValueError, match=r"micro_batch_size: expected a whole number, got 'two'\. Write the number alone"
    ):
        of(recipe, micro_batch_size="two")


def test_what_deepspeed_keeps_on_the_cpu_is_not_on_the_gpu(recipe):
    zero = {"stage": 2, "offload_optimizer": {"device": "cpu"}}
    plan = of(recipe, deepspeed={"zero_optimization": zero, **ZERO})
    assert plan.memory.stays["optimizer's states"] == 0
    assert plan.memory.host == 12 * (plan.student.counts.all + 96 * 128)


def test_a_cache_and_sft_need_no_decoder_of_the_teacher(recipe):
    teacher = recipe["dskd"]["teacher"]
    cached = of(recipe, dskd={"teacher": {**teacher, "cache": "states"}})
    assert "teacher's decoder" in of(recipe).memory.stays
    assert "teacher's decoder" not in cached.memory.stays and "teacher's output head" in cached.memory.stays
    assert cached.work.read == 4 * 192 * 96 * 2
    sft = of(recipe, dskd={"teacher": teacher, "method": "sft"})
    assert not any("teacher" in name for name in [*sft.memory.stays, *sft.memory.moments, *sft.work.flops])


@pytest.mark.parametrize("cached", [False, True])
def test_states_of_the_teacher_are_held_for_a_whole_step_and_twice_while_it_reads(cached, recipe):
    """As the trainer holds them: those of 4 micro-batches, and of the step before until the last of these are there."""
    teacher = {**recipe["dskd"]["teacher"], **({"cache": "states"} if cached else {})}
    made = {k: of(recipe, dskd={"teacher": teacher}, gradient_accumulation_steps=k).memory for k in (2, 4)}
    one = 4 * 192 * 96 * 2
    more = {name: made[4].moments[name] - made[2].moments[name] for name in made[2].moments}
    reading = "teacher's states" if cached else "teacher's forward"
    assert more == {**dict.fromkeys(more, 2 * one), reading: 4 * one}
    assert made[4].stays == made[2].stays


def test_smaller_micro_batches_of_the_same_step_need_as_many_states_of_the_teacher(recipe):
    """Gradients are held either way, so that the last moment of a step has nothing else."""
    plans = [of(recipe, micro_batch_size=n, gradient_accumulation_steps=16 // n) for n in (4, 1)]
    assert {plan.memory.moments["optimizer's step"] for plan in plans} == {16 * 192 * 96 * 2}


def test_a_teacher_elsewhere_leaves_its_head_and_one_that_waits_comes_to_read(recipe):
    teacher = recipe["dskd"]["teacher"]
    here = of(recipe)
    held = here.memory.stays["teacher's decoder"]
    head = here.memory.stays["teacher's output head"]
    assert of(recipe, dskd={"teacher": {**teacher, "device": "cuda:0"}}).memory == here.memory
    for device, on_the_cpu in (("cpu", held + head), (["cuda:1"], 0)):
        away = of(recipe, dskd={"teacher": {**teacher, "device": device}})
        assert away.memory.host - here.memory.host == on_the_cpu
        assert "teacher's decoder" not in away.memory.stays and "teacher's forward" not in away.memory.moments
        assert away.memory.stays["teacher's output head"] == head
    waits = of(recipe, dskd={"teacher": {**teacher, "offload": True}})
    assert "teacher's decoder" not in waits.memory.stays and waits.memory.host == held + head
    # Embedding and head are one there: it comes along with the decoder.
    longer = waits.memory.moments["teacher's forward"] - here.memory.moments["teacher's forward"]
    assert longer == held + head
    on_cpu = make({**recipe, "dskd": {"teacher": {**teacher, "offload": True}}}, ranks=1, on_gpu=False)
    assert on_cpu.memory.stays["teacher's decoder"] == held  # nothing to leave for


def test_longer_rows_need_more(recipe):
    short, long = (make(recipe, ranks=1, on_gpu=True, tokens=tokens) for tokens in (64, 192))
    assert long.student.lived.kept == pytest.approx(3 * short.student.lived.kept, rel=0.02)


def test_advice_ends_with_what_fits(recipe):
    now = of(recipe, ranks=2)
    context = now.memory.stays["CUDA context"]  # weighs more than models of this size
    limit = (context + 0.6 * (now.memory.peak - context)) / 0.93 / GIB
    plan = make(recipe, ranks=2, on_gpu=True, gpu_memory=limit)
    sizes = [now.memory.peak, *(one.together.peak for one in plan.helpful)]
    assert sizes == sorted(sizes, reverse=True) and len(sizes) > 1
    assert sizes[-1] <= 0.93 * limit * GIB < sizes[-2]
    assert not make(recipe, ranks=2, on_gpu=True, gpu_memory=2 * limit).helpful
    # What a change says is what it was planned with.
    for one in plan.helpful:
        key = one.change.lines.split(":")[0]
        value = one.change.recipe
        for part in key.split("."):
            value = value[part]
        assert value


def test_advice_for_far_too_little_goes_through_all_changes(recipe):
    plan = make(recipe, ranks=16, on_gpu=True, gpu_memory=0.01)
    said = " ".join(one.change.lines for one in plan.helpful)
    for word in ("cache", "zero2", "gradient_checkpointing", "micro_batch_size: 1", "zero3"):
        assert word in said


FSDP2 = {"fsdp_config": {"state_dict_type": "FULL_STATE_DICT"}, "fsdp_version": 2}


@pytest.mark.axolotl
@pytest.mark.parametrize(
    ("block", "others"),
    [
        ({"teacher": {"offload": True}}, {}),
        ({"teacher": {"offload": True}, "on_policy": {"fraction": 0.5}}, {}),
        ({}, FSDP2),
        ({}, {"optimizer": "muon"}),
        ({}, {"optimizer": "flash_adamw"}),
    ],
    ids=["offload", "offload, on-policy", "FSDP2", "muon", "flash_adamw"],
)
def test_no_change_is_advised_that_would_be_refused(block, others, recipe):
    from axolotl.utils.schemas.config import AxolotlInputConfig

    # Enough for Axolotl to look at the rest of a recipe.
    whole = {**recipe, **others, "learning_rate": 1e-4, "num_epochs": 1, "flash_attention": False}
    whole["dskd"] = {**block, "teacher": {**recipe["dskd"]["teacher"], **block.get("teacher", {})}}
    plan = make(whole, ranks=2, on_gpu=True, gpu_memory=0.01)
    assert plan.helpful
    for one in plan.helpful:
        changed = plan.facts.with_recipe(**one.change.recipe)  # the plugin's settings are read here
        check_recipe(changed.recipe)
        AxolotlInputConfig(**{key: value for key, value in changed.recipe.items() if key not in ("dskd", "plugins")})


def run(tmp_path, recipe, *options):
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe))
    return CliRunner().invoke(main, ["plan", str(file), *options])


def test_the_command_reads_no_weights_and_no_rows(recipe, tmp_path):
    assert not list(Path(recipe["base_model"]).parent.rglob("*.safetensors"))
    done = run(tmp_path, recipe, "--gpus", "2", "--gpu-memory", "80")
    assert done.exit_code == 0, done.output
    assert "student of 2.40 M" in done.output and "2 GPUs with DDP" in done.output
    assert "Fits: " in done.output.splitlines()[-1]
    told = json.loads(run(tmp_path, recipe, "--json").stdout)
    assert told["memory"]["peak"] == of(recipe).memory.peak


def test_the_command_says_what_to_change(recipe, tmp_path):
    done = run(tmp_path, recipe, "--gpu-memory", "0.01")
    assert done.exit_code == 0
    assert "Does not fit" in done.output and "gradient_checkpointing: true" in done.output
    assert "Even together they are not enough" in done.output.splitlines()[-1]


def test_an_unknown_optimizer_is_said(recipe, tmp_path):
    assert "'prodigy' is not known here: counted like Adam" in run(tmp_path, {**recipe, "optimizer": "prodigy"}).output


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"base_model": None}, "base_model: expected the student"),
        ({"deepspeed": "no/such.json"}, "deepspeed: expected a JSON file"),
        ({"dskd": {"teacher": {"model": "x"}, "methd": "dskd"}}, "Did you mean 'method'?"),
        ({"rl": "dpo"}, "rl: expected it unset"),
    ],
)
def test_mistakes_are_told(recipe, tmp_path, changes, told):
    done = run(tmp_path, {**recipe, **changes})
    assert done.exit_code == 1 and told in done.output and "Traceback" not in done.output


def test_a_missing_configuration_is_told(recipe, tmp_path):
    shutil.copytree(Path(recipe["base_model"]).parent, tmp_path / "models")
    (tmp_path / "models" / "teacher" / "config.json").unlink()
    block = {"teacher": {"model": str(tmp_path / "models" / "teacher")}}
    done = run(tmp_path, {**recipe, "dskd": block})
    assert done.exit_code == 1 and "dskd.teacher.model" in done.output and "Traceback" not in done.output


def test_a_cpu_has_no_gpus(recipe, tmp_path):
    done = run(tmp_path, recipe, "--cpu", "--gpus", "2")
    assert done.exit_code == 2 and "--cpu" in done.output


def test_facts_stay_what_they_are_but_for_the_change(recipe):
    facts = facts_of(recipe, parse_settings(recipe["dskd"]), 2, on_gpu=True)
    assert replace(facts.with_recipe(optimizer="sgd"), optimizer=facts.optimizer, recipe=facts.recipe) == facts


def test_a_split_student_is_whole_while_it_answers(recipe):
    block = {**recipe["dskd"], "on_policy": {"fraction": 1}}
    split = {"fsdp_config": {"state_dict_type": "FULL_STATE_DICT"}, "fsdp_version": 2}
    plan = of(recipe, ranks=4, dskd=block, **split)
    states = 4 * 192 * 96 * 2  # of the teacher, from the step before
    assert plan.memory.moments["answers"] == plan.student.bytes - plan.student.bytes // 4 + states
    assert of(recipe, ranks=4, dskd=block).memory.moments["answers"] == states
