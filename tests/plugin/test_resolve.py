"""What a model is made of, as the plugin and the evaluator find it: one table of models, whose parts are said by hand.

Each model is made as people make them, with `save_pretrained` of transformers and PEFT. Its logits before it was saved
are the oracle of its weights.
"""

import json
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.axolotl
pytest.importorskip("lm_eval")

PROBE_IDS = torch.arange(3, 15)[None]
OTHER = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{{ eos_token }}{% endfor %}"
TOOLS = "{{ (tools or []) | length }} tools\n{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}\n"
NAMED = {"default": "{% for m in messages %}\n{{ m.role }}: {{ m.content }}\n{% endfor %}\n", "tool_use": TOOLS}


@dataclass
class Case:
    """A model as a recipe names it, and its parts as the test knows them."""

    teacher: dict[str, Any]
    weights: str
    tokenizer: str
    template: str
    adapter: str | None = None
    vocab: int | None = None  # tokens of the tokenizer, where it is not the base's
    rows: int | None = None  # of the embeddings, where they are not the base's
    ends: set[str] = field(default_factory=lambda: {"</s>"})
    logits: torch.Tensor | None = None


def lora(base, folder, *, tokens=(), rows=None, with_tokenizer=True, template=None, **settings):
    """A LoRA of ``base`` with weights that change it, saved to ``folder``; its logits."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_special_tokens({"additional_special_tokens": list(tokens)})
    if rows or tokens:
        model.resize_token_embeddings(rows or len(tokenizer))
    settings = {"target_modules": ["q_proj", "up_proj"], **settings}
    adapted = get_peft_model(model, LoraConfig(r=4, lora_alpha=32, **settings))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name or "lora_embedding_B" in name:
                parameter.normal_(0, 0.1)
    adapted.save_pretrained(folder)
    if template is not None:
        tokenizer.chat_template = template or None
    if with_tokenizer:
        tokenizer.save_pretrained(folder)
    with torch.no_grad():
        return adapted.eval()(PROBE_IDS).logits


def whole(base, tmp):
    return Case({"model": base}, base, base, "[INST]")


def adapter_without_a_tokenizer(base, tmp):
    logits = lora(base, tmp / "lora", with_tokenizer=False)
    return Case({"model": base, "adapter": str(tmp / "lora")}, base, base, "[INST]", str(tmp / "lora"), logits=logits)


def axolotl_lora(base, tmp):
    """`special_tokens: {pad_token: '[PAD]'}` in plain Axolotl: embeddings and tokenizer of one row more."""
    from transformers import AutoConfig, AutoTokenizer

    logits = lora(base, tmp / "lora", tokens=["[PAD]"], template=OTHER)
    AutoConfig.from_pretrained(base).save_pretrained(tmp / "lora")  # so does Axolotl
    more = len(AutoTokenizer.from_pretrained(base)) + 1
    return Case({}, base, str(tmp / "lora"), "<|{{ m.role }}|>", str(tmp / "lora"), more, more, logits=logits)


def resized_adapter(base, tmp):
    case = axolotl_lora(base, tmp)
    case.teacher = {"model": base, "adapter": case.adapter}
    return case


def adapter_as_model(base, tmp):
    case = axolotl_lora(base, tmp)
    case.teacher = {"model": case.adapter}
    return case


def adapter_beside_its_base(base, tmp):
    shutil.copytree(base, tmp / "lora" / "base")
    logits = lora(base, tmp / "lora", with_tokenizer=False)
    name_base(tmp / "lora", "base")
    found = str(tmp / "lora" / "base")
    return Case({"model": str(tmp / "lora")}, found, found, "[INST]", str(tmp / "lora"), logits=logits)


def name_base(adapter, base):
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": base}))


def rows_padded_to_a_multiple(base, tmp):
    """Axolotl's resize_token_embeddings_to_32x: more rows than tokens."""
    from transformers import AutoTokenizer

    logits = lora(base, tmp / "lora", tokens=["[PAD]"], rows=512)
    more = len(AutoTokenizer.from_pretrained(base)) + 1
    return Case(
        {"model": str(tmp / "lora")}, base, str(tmp / "lora"), "[INST]", str(tmp / "lora"), more, 512, logits=logits
    )


def adapter_on_embeddings_and_head(base, tmp):
    """LoRA on the embeddings themselves, trained with two tokens more."""
    from transformers import AutoTokenizer

    logits = lora(base, tmp / "lora", tokens=["<a>", "<b>"], target_modules=["embed_tokens", "lm_head", "q_proj"])
    more = len(AutoTokenizer.from_pretrained(base)) + 2
    return Case(
        {"model": str(tmp / "lora")}, base, str(tmp / "lora"), "[INST]", str(tmp / "lora"), more, more, logits=logits
    )


def adapter_with_trained_embeddings(base, tmp):
    from transformers import AutoTokenizer

    logits = lora(base, tmp / "lora", tokens=["<a>"], modules_to_save=["embed_tokens", "lm_head"])
    more = len(AutoTokenizer.from_pretrained(base)) + 1
    return Case(
        {"model": str(tmp / "lora")}, base, str(tmp / "lora"), "[INST]", str(tmp / "lora"), more, more, logits=logits
    )


def adapter_with_a_template_alone(base, tmp):
    logits = lora(base, tmp / "lora", with_tokenizer=False)
    (tmp / "lora" / "chat_template.jinja").write_text(OTHER)
    return Case({"model": str(tmp / "lora")}, base, base, "<|{{ m.role }}|>", str(tmp / "lora"), logits=logits)


def adapter_whose_tokenizer_has_no_template(base, tmp):
    logits = lora(base, tmp / "lora", template="")
    return Case({"model": str(tmp / "lora")}, base, str(tmp / "lora"), "[INST]", str(tmp / "lora"), logits=logits)


def tokenizer_config_alone(base, tmp):
    """No vocabulary: the tokenizer is the base's."""
    logits = lora(base, tmp / "lora")
    (tmp / "lora" / "tokenizer.json").unlink()
    return Case({"model": str(tmp / "lora")}, base, base, "[INST]", str(tmp / "lora"), logits=logits)


def ends_of_the_adapter(base, tmp):
    logits = lora(base, tmp / "lora")
    (tmp / "lora" / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 2]}))
    ends = {"<s>", "</s>"}
    return Case(
        {"model": str(tmp / "lora")}, base, str(tmp / "lora"), "[INST]", str(tmp / "lora"), ends=ends, logits=logits
    )


def ends_of_the_configuration(base, tmp):
    folder = shutil.copytree(base, tmp / "model")
    (folder / "generation_config.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "eos_token_id": [1, 2]}))
    return Case({"model": str(folder)}, str(folder), str(folder), "[INST]", ends={"<s>", "</s>"})


def end_of_the_template(base, tmp):
    folder = shutil.copytree(base, tmp / "model")
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}<s>\n{% endfor %}")
    return Case({"model": str(folder)}, str(folder), str(folder), "<s>", ends={"<s>", "</s>"})


def several_templates(base, tmp):
    from transformers import AutoTokenizer

    folder = shutil.copytree(base, tmp / "model")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = NAMED
    tokenizer.save_pretrained(folder)
    return Case({"model": str(folder)}, str(folder), str(folder), "{{ m.role }}: {{ m.content }}")


def several_templates_of_old(base, tmp):
    """As tokenizer_config.json had them before they got files of their own."""
    folder = shutil.copytree(base, tmp / "model")
    (folder / "chat_template.jinja").unlink()
    file = folder / "tokenizer_config.json"
    listed = [{"name": name, "template": text} for name, text in NAMED.items()]
    file.write_text(json.dumps({**json.loads(file.read_text()), "chat_template": listed}))
    return Case({"model": str(folder)}, str(folder), str(folder), "{{ m.role }}: {{ m.content }}")


def one_of_several(base, tmp):
    case = several_templates(base, tmp)
    case.teacher |= {"chat_template": "tool_use"}
    case.template = "[{{ m.role }}]"
    return case


def one_of_several_without_a_default(base, tmp):
    case = several_templates_of_old(base, tmp)
    file = Path(case.weights) / "tokenizer_config.json"
    file.write_text(file.read_text().replace('"default"', '"rag"'))
    case.teacher |= {"chat_template": "rag"}
    return case


def template_of_axolotl(base, tmp):
    return Case({"model": base, "chat_template": "alpaca"}, base, base, "### Instruction:")


def template_in_a_file(base, tmp):
    (tmp / "own.jinja").write_text(OTHER)
    return Case({"model": base, "chat_template": str(tmp / "own.jinja")}, base, base, "<|{{ m.role }}|>")


def fallback_that_is_not_needed(base, tmp):
    return Case({"model": base, "chat_template": "tokenizer_default_fallback_alpaca"}, base, base, "[INST]")


def fallback_that_is_needed(base, tmp):
    folder = shutil.copytree(base, tmp / "model")
    (folder / "chat_template.jinja").unlink()
    teacher = {"model": str(folder), "chat_template": "tokenizer_default_fallback_alpaca"}
    return Case(teacher, str(folder), str(folder), "### Instruction:")


MODELS = {
    function.__name__: function
    for function in (
        whole,
        adapter_without_a_tokenizer,
        resized_adapter,
        adapter_as_model,
        adapter_beside_its_base,
        rows_padded_to_a_multiple,
        adapter_on_embeddings_and_head,
        adapter_with_trained_embeddings,
        adapter_with_a_template_alone,
        adapter_whose_tokenizer_has_no_template,
        tokenizer_config_alone,
        ends_of_the_adapter,
        ends_of_the_configuration,
        end_of_the_template,
        several_templates,
        several_templates_of_old,
        one_of_several,
        one_of_several_without_a_default,
        template_of_axolotl,
        template_in_a_file,
        fallback_that_is_not_needed,
        fallback_that_is_needed,
    )
}


@pytest.fixture(scope="module", params=["untied", "tied"])
def base(request, tiny, build, tmp_path_factory):
    """The tiny teacher, and one whose head is its embeddings."""
    if request.param == "untied":
        return tiny["teacher"]
    tokenizer = build.sentencepiece_tokenizer(460, 2)
    return build.save_model(tmp_path_factory.mktemp("tied") / "model", tokenizer, tie_word_embeddings=True)


def of_the_plugin(case):
    """Reader and weights as a run of the plugin has them."""
    from dskd_plugin.host.named_templates import named_template
    from dskd_plugin.settings import parse_settings
    from dskd_plugin.teachers.live import Teacher
    from dskd_plugin.teachers.reader import answer_ends, read_teacher

    settings = parse_settings({"teacher": {"dtype": "float32", **case.teacher}})
    reader = read_teacher(settings, {"datasets": [{"type": "chat_template"}]}, named_template)
    teacher = Teacher(
        settings.teacher,
        vocab_size=reader.table.vocab_size,
        device=torch.device("cpu"),
        attn_implementation=None,
        packed=False,
        trust_remote_code=False,
    )
    return reader, teacher.model, answer_ends(reader, reader.template)


def of_the_evaluator(case, tmp):
    """Folder, tokenizer and backend as the evaluator has them, from the recipe."""
    import yaml
    from dskd_eval import models, recipe
    from dskd_eval.backends import hf

    student = tmp / "student"
    shutil.copytree(case.weights, student)
    teacher = {key: value for key, value in case.teacher.items() if key != "dtype"}
    (tmp / "recipe.yaml").write_text(
        yaml.safe_dump({"base_model": case.weights, "output_dir": str(student), "dskd": {"teacher": teacher}})
    )
    (ref,) = (one for one in recipe.models_of(tmp / "recipe.yaml") if one.role == "teacher")
    folder = models.locate(ref)
    return folder, hf.HFBackend(folder, dtype="float32", device="cpu")


@pytest.mark.parametrize("name", MODELS)
def test_plugin_and_evaluator_find_the_same_parts(name, base, tmp_path):
    case = MODELS[name](base, tmp_path)
    reader, model, ends = of_the_plugin(case)
    folder, backend = of_the_evaluator(case, tmp_path)
    real = {part: os.path.realpath(getattr(case, part) or "") for part in ("weights", "tokenizer", "adapter")}
    assert {part: os.path.realpath(getattr(reader.parts, part) or "") for part in real} == real
    assert {part: os.path.realpath(getattr(folder, part) or "") for part in real} == real
    # template
    assert case.template in reader.template
    assert backend.tokenizer.chat_template == reader.template
    # vocabulary
    if case.vocab is not None:
        assert len(reader.tokenizer) == case.vocab
    assert backend.tokenizer.get_vocab() == reader.tokenizer.get_vocab()
    rows = {one.get_input_embeddings().weight.shape[0] for one in (model, backend.model)}
    rows |= {one.get_output_embeddings().weight.shape[0] for one in (model, backend.model)}
    assert rows == {case.rows or json.loads((Path(case.weights) / "config.json").read_text())["vocab_size"]}
    # ends of turn
    assert set(reader.tokenizer.convert_ids_to_tokens(ends)) == case.ends
    assert backend.end_tokens == ends
    # weights
    with torch.no_grad():
        found = [one(PROBE_IDS).logits for one in (model, backend.model)]
    if case.logits is None:
        from transformers import AutoModelForCausalLM

        case.logits = AutoModelForCausalLM.from_pretrained(case.weights, dtype=torch.float32)(PROBE_IDS).logits
    for logits in found:
        torch.testing.assert_close(logits, case.logits, rtol=0, atol=2e-4)


# -- several templates under names ---------------------------------------------------------------------------------

TURNS = [{"role": "user", "content": " one\n"}, {"role": "assistant", "content": "two"}]
WHITE = {
    "plain": NAMED,
    "white space around": {
        "default": "\n\n {{ messages[0].content }} \n\n",
        "tool_use": " \n{{ tools }} \n {# end #}\n",
    },
    "lines of blocks": {
        "default": "  {% for m in messages %}\n  {{ m.content }}\n  {% endfor %}\n",
        "tool_use": "{%- if tools %}\n  {%- set n = tools | length %}\n{% endif %}\n  {{ n }}\n  ",
    },
    "macros": {
        "default": "{% macro say(m) %}<{{ m.content }}>{% endmacro %}{% for m in messages %}{{ say(m) }}{% endfor %}",
        "tool_use": "{% macro say(m) %}[{{ m.content }}]{% endmacro %}{% for m in messages %}{{ say(m) }}{% endfor %}",
    },
    "no tools": {"default": NAMED["default"], "rag": "documents"},
}


@pytest.mark.parametrize("tools", [None, [], [{"type": "function", "function": {"name": "lamp", "parameters": {}}}]])
@pytest.mark.parametrize("kind", WHITE)
def test_the_one_text_chooses_as_transformers_does(kind, tools, build):
    """Every character is that of transformers with the templates under their names."""
    from dskd_eval import templates as of_the_evaluator

    from dskd_plugin.text.templates import one_template

    tokenizer = build.sentencepiece_tokenizer(460, 2)
    tokenizer.chat_template = WHITE[kind]
    expected = tokenizer.apply_chat_template(TURNS, tools=tools, tokenize=False)
    text = one_template(WHITE[kind])
    assert of_the_evaluator.one(WHITE[kind]) == text
    assert tokenizer.apply_chat_template(TURNS, tools=tools, chat_template=text, tokenize=False) == expected


# -- refused -------------------------------------------------------------------------------------------------------


def base_that_is_gone(base, tmp):
    lora(base, tmp / "lora")
    name_base(tmp / "lora", "/no/such/base")
    return {"model": str(tmp / "lora")}


def base_of_another_machine(base, tmp):
    """A relative folder that is not here reads like a hub id."""
    lora(base, tmp / "lora")
    name_base(tmp / "lora", "outputs/base")
    return {"model": str(tmp / "lora")}


def base_without_a_name(base, tmp):
    lora(base, tmp / "lora")
    name_base(tmp / "lora", None)
    return {"model": str(tmp / "lora")}


def two_adapters(base, tmp):
    lora(base, tmp / "lora")
    return {"model": str(tmp / "lora"), "adapter": str(tmp / "lora")}


def adapter_without_weights(base, tmp):
    lora(base, tmp / "lora")
    (tmp / "lora" / "adapter_model.safetensors").unlink()
    return {"model": base, "adapter": str(tmp / "lora")}


def model_without_weights(base, tmp):
    folder = shutil.copytree(base, tmp / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    (folder / "training_args.bin").touch()
    return {"model": str(folder)}


def missing_shard(base, tmp):
    from transformers import AutoModelForCausalLM

    folder = shutil.copytree(base, tmp / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    AutoModelForCausalLM.from_pretrained(base).save_pretrained(folder, max_shard_size="50KB")
    sorted(folder.glob("model-*.safetensors"))[1].unlink()
    return {"model": str(folder)}


def no_default(base, tmp):
    case = one_of_several_without_a_default(base, tmp)
    return {"model": case.teacher["model"]}


def unknown_template(base, tmp):
    case = several_templates(base, tmp)
    return {"model": case.weights, "chat_template": "tool_used"}


REFUSED = {
    "base that is gone": (base_that_is_gone, ["/no/such/base", "adapter_config.json"]),
    "base of another machine": (base_of_another_machine, ["outputs/base", "adapter_config.json"]),
    "base without a name": (base_without_a_name, ["base_model_name_or_path", "adapter_config.json"]),
    "two adapters": (two_adapters, ["Merge the two adapters"]),
    "adapter without weights": (
        adapter_without_weights,
        ["adapter_model.safetensors", "Give the folder that PEFT saved"],
    ),
    "model without weights": (model_without_weights, ["weights", "model.safetensors"]),
    "missing shard": (missing_shard, ["model-00002-of-"]),
    "no default": (no_default, ["named 'default'", "rag, tool_use"]),
    "unknown template": (unknown_template, ["'tool_used'"]),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("when", ["files", "plugin", "evaluator"])
def test_a_model_that_cannot_be_loaded_is_refused_at_once(when, case, tiny, tmp_path):
    """By the files alone, before torch is imported; by the plugin; by the evaluator, before it loads any weights."""
    from dskd_eval import models as evaluated
    from dskd_eval.errors import UserError
    from dskd_eval.models import ModelRef
    from dskd_eval.prepare import prepare
    from dskd_eval.schema import Settings

    from dskd_plugin import preflight
    from dskd_plugin.host.named_templates import named_template
    from dskd_plugin.settings import parse_settings
    from dskd_plugin.teachers.reader import read_teacher

    make, words = REFUSED[case]
    teacher = make(tiny["teacher"], tmp_path)
    block = {"teacher": {"dtype": "float32", **teacher}}
    recipe = {
        "base_model": tiny["student"],
        "plugins": ["dskd"],
        "dskd": block,
        "datasets": [{"type": "chat_template"}],
    }
    with pytest.raises((ValueError, UserError)) as error:
        if when == "files":
            preflight.check_started(recipe, {})
        elif when == "plugin":
            read_teacher(parse_settings(block), recipe, named_template)
        else:
            choice = teacher.get("chat_template", "tokenizer_default")
            ref = ModelRef("teacher", teacher["model"], "teacher", None, teacher.get("adapter"), choice)
            evaluated.locate(ref)
            prepare([ref], [], Settings(), None)
    for word in words:
        assert word in " ".join(str(error.value).split()), error.value
    assert "expected" in str(error.value) and "got" in str(error.value)


def other_base(base, tmp, build):
    narrow = build.save_model(tmp / "narrow", build.sentencepiece_tokenizer(460, 2), "qwen3", width=32)
    lora(narrow, tmp / "lora", with_tokenizer=False)
    return {"model": base, "adapter": str(tmp / "lora")}


def other_family(base, tmp, build):
    sizes = {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 512}
    gpt = build.save_model(tmp / "gpt", build.sentencepiece_tokenizer(460, 2), "gpt2", **sizes)
    lora(gpt, tmp / "lora", with_tokenizer=False, target_modules=["c_attn"])
    return {"model": base, "adapter": str(tmp / "lora")}


def prompt_tuning(base, tmp, build):
    from peft import PromptTuningConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base)
    get_peft_model(model, PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")).save_pretrained(tmp / "lora")
    return {"model": base, "adapter": str(tmp / "lora")}


def tokenizer_of_another_model(base, tmp, build):
    """The template writes a token that the weights have no row for."""
    from transformers import AutoTokenizer

    folder = shutil.copytree(base, tmp / "model")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|turn|>"]})
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}<|turn|>{% endfor %}"
    tokenizer.save_pretrained(folder)
    return {"model": str(folder)}


def configuration_of_another_model(base, tmp, build):
    folder = shutil.copytree(base, tmp / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": config["vocab_size"] + 1}))
    return {"model": str(folder)}


MISFITS = {
    "other configuration": (configuration_of_another_model, ["dskd.teacher.model: expected weights as", "of shape"]),
    "other width": (other_base, ["dskd.teacher.adapter: expected an adapter of", "of shape"]),
    "other family": (other_family, ["dskd.teacher.adapter: expected an adapter of", "c_attn"]),
    "virtual tokens": (prompt_tuning, ["dskd.teacher.adapter", "PROMPT_TUNING"]),
    "token without an embedding": (
        tokenizer_of_another_model,
        ["expected embeddings for all tokens of the chat template", "'<|turn|>'"],
    ),
}


@pytest.mark.parametrize("case", MISFITS)
def test_parts_that_do_not_fit_are_refused_before_rows_are_read(case, tiny, tmp_path, build):
    from dskd_plugin.host.named_templates import named_template
    from dskd_plugin.settings import parse_settings
    from dskd_plugin.teachers.reader import read_teacher

    make, words = MISFITS[case]
    teacher = make(tiny["teacher"], tmp_path, build)
    with pytest.raises(ValueError) as error:
        read_teacher(parse_settings({"teacher": teacher}), {"datasets": [{"type": "chat_template"}]}, named_template)
    for word in words:
        assert word in str(error.value), error.value


@pytest.mark.parametrize(
    ("package", "more"), [("peft", {"adapter": "lora"}), ("bitsandbytes", {"quantization": "4bit"})]
)
def test_a_package_that_is_not_installed_is_missed_at_once(package, more, tiny, tmp_path, monkeypatch):
    from importlib.util import find_spec

    from dskd_plugin import preflight
    from dskd_plugin.teachers import files as teacher_files

    lora(tiny["teacher"], tmp_path / "lora")
    monkeypatch.setattr(teacher_files, "find_spec", lambda name: None if name == package else find_spec(name))
    monkeypatch.chdir(tmp_path)
    recipe = {
        "base_model": tiny["student"],
        "plugins": ["dskd"],
        "dskd": {"teacher": {"model": tiny["teacher"], **more}},
    }
    with pytest.raises(RuntimeError, match=f"expected the package {package} for .*Install it: pip install {package}"):
        preflight.check_started(recipe, {})


def test_weights_with_a_part_missing_are_no_teacher(tiny, tmp_path):
    """transformers would fill it with random numbers and warn."""
    from safetensors.torch import load_file, save_file

    from dskd_plugin.errors import DSKDSetupError

    folder = shutil.copytree(tiny["teacher"], tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(DSKDSetupError, match=r"no weights for 1 of its tensors, such as model.layers.1.mlp.up_proj"):
        of_the_plugin(Case({"model": str(folder)}, str(folder), str(folder), ""))


def test_a_hub_id_may_be_an_adapter(tiny, tmp_path, monkeypatch):
    """An adapter repository in the cache, as the hub's client lays it out; its base is a folder."""
    from huggingface_hub import constants

    from dskd_plugin.teachers.resolve import fetched_adapter, parts_of

    snapshot = tmp_path / "hub" / "models--org--lora" / "snapshots" / "abc"
    lora(tiny["teacher"], snapshot, tokens=["[PAD]"])
    refs = snapshot.parents[1] / "refs"
    refs.mkdir()
    (refs / "main").write_text("abc")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))

    @dataclass
    class Named:
        model: str
        revision: str | None = None
        adapter: str | None = None

    parts = parts_of(Named("org/lora"), fetched_adapter)
    assert (parts.weights, str(parts.adapter), parts.tokenizer) == (tiny["teacher"], str(snapshot), str(snapshot))
    parts = parts_of(Named(tiny["teacher"], adapter="org/lora"), fetched_adapter)
    assert (parts.weights, str(parts.adapter), parts.tokenizer) == (tiny["teacher"], str(snapshot), str(snapshot))


def test_a_student_that_is_an_adapter_is_refused(tiny, tmp_path):
    from dskd_plugin.folders import check_student

    lora(tiny["student"], tmp_path / "lora")
    with pytest.raises(ValueError, match=r"base_model: expected a model with weights of its own.*lora_model_dir"):
        check_student(str(tmp_path / "lora"))
