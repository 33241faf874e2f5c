"""The recipe, read by Axolotl's own ``load_cfg`` with the plugin in it: what is refused, and what stays untouched."""

import json
import shutil
from pathlib import Path

import pytest
import yaml

from benchmarks.tiny import wordpiece_copy

pytestmark = pytest.mark.usefixtures("fresh_plugin_manager")


@pytest.fixture
def load(recipe, tmp_path):
    def load(changes=None, block=None, drop=()):
        from axolotl.cli.config import load_cfg

        changed = {**recipe, **(changes or {})}
        if block is not None:
            changed["dskd"] = {**changed["dskd"], **block}
        for key in drop:
            changed.pop(key)
        file = tmp_path / "recipe.yaml"
        file.write_text(yaml.safe_dump(changed))
        return load_cfg(str(file))

    return load


def encoder(tiny, tmp_path):
    from transformers import BertConfig, BertForMaskedLM

    folder = tmp_path / "bert"
    config = BertConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=460
    )
    BertForMaskedLM(config).save_pretrained(folder)
    for file in Path(tiny["teacher"]).glob("*token*"):
        shutil.copy(file, folder)
    return {"block": {"teacher": {"model": str(folder)}}}


def without_template(tiny, tmp_path):
    folder = tmp_path / "base"
    shutil.copytree(tiny["teacher"], folder)
    (folder / "chat_template.jinja").unlink()
    return {"block": {"teacher": {"model": str(folder)}}}


def without_tokenizer(tiny, tmp_path):
    folder = tmp_path / "weights-alone"
    shutil.copytree(tiny["teacher"], folder, ignore=shutil.ignore_patterns("*token*"))
    return {"block": {"teacher": {"model": str(folder)}}}


def cut_short(side):
    def make(tiny, tmp_path):
        folder = tmp_path / "cut"
        shutil.copytree(tiny[side], folder)
        weights = folder / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-1000])
        return (
            {"block": {"teacher": {"model": str(folder)}}}
            if side == "teacher"
            else {"changes": {"base_model": str(folder)}}
        )

    return make


def adapter_cut_short(tiny, tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    folder = tmp_path / "adapter"
    model = AutoModelForCausalLM.from_pretrained(tiny["teacher"])
    get_peft_model(model, LoraConfig(target_modules=["q_proj"], r=2)).save_pretrained(folder)
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    return {"block": {"teacher": {"model": tiny["teacher"], "adapter": str(folder)}}}


def wordpiece(tiny, tmp_path):
    return {"block": {"teacher": {"model": wordpiece_copy(tiny["teacher"], tmp_path / "wordpiece")}}}


def own(**kwargs):
    return lambda tiny, tmp_path: kwargs


# name -> (what makes the recipe wrong, what the message says)
BAD = {
    "missing teacher folder": (
        own(block={"teacher": {"model": "/no/such/folder"}}),
        ["dskd.teacher.model", "/no/such/folder", "does not exist"],
    ),
    "teacher that is no hub id": (
        own(block={"teacher": {"model": "no-such-org/no-such-model"}}),
        ["dskd.teacher.model", "no-such-org"],
    ),
    "missing adapter": (
        lambda tiny, tmp: {"block": {"teacher": {"model": tiny["teacher"], "adapter": "/no/adapter"}}},
        ["dskd.teacher.adapter", "/no/adapter"],
    ),
    "teacher without template": (
        without_template,
        ["dskd.teacher.chat_template", "dskd.teacher.chat_template: <name|file>"],
    ),
    "teacher without tokenizer": (without_tokenizer, ["dskd.teacher.model: expected a tokenizer beside the model"]),
    "unknown template": (
        lambda tiny, tmp: {"block": {"teacher": {"model": tiny["teacher"], "chat_template": "chatmll"}}},
        ["dskd.teacher.chat_template", "'chatmll'"],
    ),
    "encoder": (encoder, ["dskd.teacher.model", "decoder-only", "bert"]),
    "wordpiece": (wordpiece, ["tokenizer of dskd.teacher.model", "WordPiece"]),
    "teacher cut short": (cut_short("teacher"), ["model.safetensors: expected", "cut short"]),
    "student cut short": (cut_short("student"), ["model.safetensors: expected", "cut short"]),
    "unknown divergence": (
        own(block={"divergence": {"kind": "forward"}}),
        ["dskd.divergence.kind", "forward_kl"],
    ),
    "misspelt key": (own(block={"temprature": 1.0}), ["dskd.temprature", "'temperature'"]),
    "misspelt block": (
        lambda tiny, tmp: {"changes": {"dsdk": {"teacher": {"model": "x"}}}, "drop": ["dskd"]},
        ["dsdk: expected the key 'dskd'"],
    ),
    "empty block": (own(changes={"dskd": None}), ["dskd: expected a block of settings, got None"]),
    "identity with two tokenizers": (
        own(block={"alignment": "identity"}),
        [
            "dskd.alignment: expected 'identity' only for one tokenizer",
            "student with 357 ids",
            "teacher with 418",
        ],
    ),
    "kd_ratio": (own(block={"kd_ratio": 1.5}), ["dskd.kd_ratio", "1.5"]),
    "temperature": (own(block={"temperature": -1}), ["dskd.temperature", "-1"]),
    "top_vocab": (own(block={"projector": {"top_vocab": 0}}), ["dskd.projector.top_vocab", "got 0"]),
    "block without plugins": (
        own(drop=["plugins"]),
        ["plugins: expected 'dskd' in the list", "plugins: [dskd]"],
    ),
    "adapter cut short": (
        adapter_cut_short,
        ["adapter_model.safetensors: expected", "cut short"],
    ),
    "teacher row beyond its positions": (
        lambda tiny, tmp: {"block": {"teacher": {"model": tiny["teacher"], "sequence_len": 513}}},
        ["dskd.teacher.sequence_len: expected at most the 512 positions", "513"],
    ),
    "one_cycle": (own(changes={"lr_scheduler": "one_cycle"}), ["lr_scheduler: expected a schedule", "'one_cycle'"]),
    "student over several devices": (own(changes={"device_map": "auto"}), ["device_map: expected it unset", "'auto'"]),
    "compiled student": (own(changes={"torch_compile": True}), ["torch_compile: expected it unset"]),
    "preference training": (own(changes={"rl": "dpo"}), ["rl: expected it unset", "'dpo'"]),
    "label smoothing": (
        own(changes={"label_smoothing_factor": 0.1}),
        ["label_smoothing_factor: expected it unset"],
    ),
    "kd across tokenizers": (
        lambda tiny, tmp: {"changes": {"dskd": {"teacher": {"model": tiny["teacher"]}, "method": "kd"}}},
        ["dskd.method: expected", "one tokenizer", "overlap_kd"],
    ),
    "spans with one tokenizer": (
        lambda tiny, tmp: {"block": {"teacher": {"model": tiny["sibling"]}, "span_weight": 1.0}},
        ["dskd.span_weight"],
    ),
    "fsdp 1": (
        own(changes={"fsdp_config": {"state_dict_type": "FULL_STATE_DICT"}, "fsdp_version": 1}),
        ["fsdp_version: expected 2"],
    ),
    "sharded save": (
        own(changes={"fsdp_config": {"state_dict_type": "SHARDED_STATE_DICT"}, "fsdp_version": 2}),
        ["fsdp_config.state_dict_type: expected FULL_STATE_DICT"],
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_refused_before_anything_is_written(load, recipe, tiny, tmp_path, name):
    make, says = BAD[name]
    wrong = make(tiny, tmp_path)
    with pytest.raises(Exception) as error:
        load(**wrong)
    assert isinstance(error.value, ValueError), repr(error.value)
    for part in says:
        assert part in str(error.value)
    assert not Path(recipe["output_dir"]).exists()
    assert not Path(recipe["dataset_prepared_path"]).exists()


def test_deepspeed_file_with_an_optimizer_is_refused(load, tmp_path):
    file = tmp_path / "zero.json"
    file.write_text(json.dumps({"optimizer": {"type": "AdamW"}, "zero_optimization": {"stage": 2}}))
    with pytest.raises(ValueError, match="deepspeed: expected a file without an optimizer, got 'AdamW'"):
        load({"deepspeed": str(file)})


def test_deepspeed_file_with_a_scheduler_is_refused(load, tmp_path):
    file = tmp_path / "zero.json"
    file.write_text(json.dumps({"scheduler": {"type": "WarmupLR"}, "zero_optimization": {"stage": 2}}))
    with pytest.raises(ValueError, match="deepspeed: expected a file without a scheduler, got 'WarmupLR'"):
        load({"deepspeed": str(file)})


def test_without_a_block_every_hook_is_inert(load):
    from axolotl.integrations.base import PluginManager

    cfg = load(drop=["dskd"])
    assert cfg.dskd is None and "dskd-" not in (cfg.dataset_prepared_path or "")
    plugin = PluginManager.get_instance().plugins["dskd"]
    assert plugin.get_trainer_cls(cfg) is None
    assert plugin.get_collator_cls_and_kwargs(cfg) is None
    assert plugin.get_training_args(cfg) is None


@pytest.mark.parametrize("name", ["dskd", "dskd_plugin.DSKDPlugin", "dskd_plugin.host.plugin.DSKDPlugin"])
def test_both_names_give_the_plugin(load, name):
    from axolotl.integrations.base import PluginManager

    from dskd_plugin.host.trainer import DSKDTrainer

    cfg = load({"plugins": [name]})
    assert issubclass(PluginManager.get_instance().get_trainer_cls(cfg), DSKDTrainer)
    # Without defaults, see `DSKDArgs.as_written`.
    assert cfg.dskd["teacher"]["model"] and "temperature" not in cfg.dskd


# What must change the folder of prepared rows, and what must not.
CHANGES = {
    "teacher": lambda tiny, tmp: {"block": {"teacher": {"model": tiny["sibling"]}}},
    "template": lambda tiny, tmp: {
        "block": {"teacher": {"model": tiny["teacher"], "dtype": "float32", "chat_template": "chatml"}}
    },
    "sequence_len": lambda tiny, tmp: {
        "block": {"teacher": {"model": tiny["teacher"], "dtype": "float32", "sequence_len": 99}}
    },
    "alignment": own(block={"alignment": "eta"}),
    "over-long rows": own(changes={"excess_length_strategy": "truncate"}),
}


@pytest.mark.parametrize("name", CHANGES)
def test_prepared_rows_are_not_shared_by_different_settings(load, tiny, tmp_path, name):
    first = load().dataset_prepared_path
    assert load(block={"temperature": 3.0}).dataset_prepared_path == first
    assert load(**CHANGES[name](tiny, tmp_path)).dataset_prepared_path != first


def test_retraining_the_students_tokenizer_in_place_changes_the_folder(load, tiny, tmp_path):
    folder = tmp_path / "student"
    shutil.copytree(tiny["student"], folder)
    first = load({"base_model": str(folder)}).dataset_prepared_path
    file = folder / "tokenizer.json"
    file.write_text(file.read_text().replace('"version": "1.0"', '"version":  "1.0"'))
    assert load({"base_model": str(folder)}).dataset_prepared_path != first
