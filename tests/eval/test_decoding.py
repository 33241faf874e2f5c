"""Answers of SentencePiece tokenizers as text: the first space of a text is theirs, that of an answer is not."""

from __future__ import annotations

import gzip
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from conftest_models import make_recital
from dskd_eval import models, programs, reasoning
from dskd_eval.backends import hf
from dskd_eval.backends.base import GenerationSettings, Prompt
from dskd_eval.backends.decoding import decode
from dskd_eval.lmeval.eval_lm import EvalLM
from dskd_eval.tasks import render, selection
from lm_eval.api.instance import Instance

PROMPT = "def total(xs):\n"
BODY = "    return sum(xs)\n"


@pytest.fixture(scope="module")
def zoo() -> Any:
    file = Path(__file__).parents[1] / "plugin" / "tokenizer_zoo.py"
    spec = importlib.util.spec_from_file_location("published_tokenizers", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def ids_of(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


@pytest.mark.parametrize("name", ["mistral", "mistral_always"])
def test_solutions_of_humaneval_keep_their_indentation(zoo: Any, name: str, data_dir: Path) -> None:
    tokenizer = getattr(zoo, name)()
    with gzip.open(data_dir / "humaneval" / "HumanEval.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    spec = selection.builtin_tasks()["humaneval"]
    for row in rows:
        before, whole = ids_of(tokenizer, row["prompt"]), ids_of(tokenizer, row["prompt"] + row["canonical_solution"])
        assert whole[: len(before)] == before
        text = decode(tokenizer, whole[len(before) :], before=before[-1:])
        assert text == row["canonical_solution"]
        compile(programs.program_of(text, render.code_parts(spec, row)).text, "solution", "exec")


@pytest.mark.parametrize(
    ("before", "text"),
    [("x =", " 4"), ("a", "b"), ("x\n", "\n  y"), ("é", " é"), ("(", "("), ("f ", "  g"), ("日", "本 語"), ("a", "")],
)
def test_an_answer_goes_on_with_the_prompt(zoo: Any, before: str, text: str) -> None:
    tokenizer = zoo.mistral()
    first, rest = ids_of(tokenizer, before), ids_of(tokenizer, "\n" + text)
    assert decode(tokenizer, rest[2:], before=first[-1:]) == text


def test_text_after_a_special_marker_keeps_its_indentation(zoo: Any) -> None:
    tokenizer = zoo.mistral()
    tokenizer.add_special_tokens({"additional_special_tokens": ["[THINK]", "[/THINK]"]})
    pairs = reasoning.choose("auto", ["[THINK]"])
    text = "[THINK] x [/THINK]    return 1"
    assert decode(tokenizer, ids_of(tokenizer, text), pairs) == text


WHITE = ["\tdef f():\n    return 1\n", "\n\n\ty = 'é 日本'", "  lead  two ", "\n", " "]


@pytest.mark.parametrize("name", ["mistral", "mistral-slow", "unigram-slow", "tekken-fast", "byte-level"])
@pytest.mark.parametrize("text", WHITE)
def test_answers_keep_every_byte(zoo: Any, name: str, text: str) -> None:
    """Also those of SentencePiece models that transformers does not convert: their bytes are no names of bytes."""
    tokenizer = zoo.ZOO[name][0]()
    before = ids_of(tokenizer, "Say 5")
    whole = ids_of(tokenizer, "Say 5" + text)
    assert whole[: len(before)] == before
    assert decode(tokenizer, whole[len(before) :], before=before[-1:]) == text


@pytest.mark.parametrize("text", WHITE)
def test_answers_after_a_marker_of_an_unconverted_model_keep_every_byte(zoo: Any, text: str) -> None:
    tokenizer = zoo.TAGGED["unigram-slow"]()
    pairs = reasoning.choose("auto", ["<think>"])
    whole = f"<think>four</think>{text}"
    assert decode(tokenizer, ids_of(tokenizer, whole), pairs) == whole


def test_a_folder_in_the_form_of_mistral_reads_as_an_ordinary_tokenizer(zoo: Any, tmp_path: Path) -> None:
    """A Mistral model with tekken.json alone: transformers hands out a class without vocabulary or template."""
    import transformers

    theirs = zoo.ZOO["tekken"][0]()
    theirs.save_pretrained(tmp_path)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = transformers.MistralConfig(vocab_size=131072, num_key_value_heads=1, head_dim=8, **sizes)
    transformers.MistralForCausalLM(config).save_pretrained(tmp_path)
    assert not hasattr(transformers.AutoTokenizer.from_pretrained(tmp_path), "get_added_vocab")
    model = hf.HFBackend(models.locate(models.parse_model(str(tmp_path))), dtype="float32", device="cpu")
    for text in WHITE:
        ids = model.encode("Say 5" + text, special_tokens=True)
        assert ids == theirs("Say 5" + text)["input_ids"]
        assert decode(model.tokenizer, ids) == "Say 5" + text
    assert model.end_tokens == [theirs.eos_token_id]


@pytest.fixture(scope="module")
def reciting(zoo: Any, tmp_path_factory: pytest.TempPathFactory) -> hf.HFBackend:
    """A model that goes on with a prompt of its length by the body of a function."""
    tokenizer = zoo.mistral()
    begin = len(tokenizer(PROMPT)["input_ids"])
    script = ids_of(tokenizer, PROMPT + BODY)[len(ids_of(tokenizer, PROMPT)) :]
    folder = tmp_path_factory.mktemp("mistral")
    make_recital(folder, tokenizer, begin - 1, [*script, tokenizer.eos_token_id])
    return hf.HFBackend(models.locate(models.parse_model(str(folder))), dtype="float32", device="cpu")


@pytest.mark.parametrize(
    ("stop", "expected"), [((), BODY), (("return",), "    "), (("    ret",), ""), ((":\n",), BODY), ((" (",), BODY)]
)
def test_a_model_completes_a_prompt(reciting: hf.HFBackend, stop: tuple[str, ...], expected: str) -> None:
    """A stop string may begin with the answer's first space, not with the prompt's last character."""
    prompt = Prompt(PROMPT, reciting.encode(PROMPT, special_tokens=True), {})
    found = reciting.generate([prompt], GenerationSettings(32, stop=stop))[0]
    assert (found.text, found.finish) == (expected, "stop")
    if stop == ("    ret",):
        assert found.new_tokens <= 2


def test_a_reply_begins_anew(reciting: hf.HFBackend) -> None:
    """The space that such tokenizers write before the first word of a reply is none of its text."""
    tokens = reciting.encode(PROMPT, special_tokens=True)
    found = reciting.generate([Prompt(PROMPT, tokens, {}, continues=False)], GenerationSettings(32))[0]
    assert found.text == BODY[1:]


@pytest.mark.parametrize(
    ("roles", "continues"), [((), True), (("user",), False), (("system", "user"), False), (("user", "assistant"), True)]
)
def test_what_an_answer_goes_on_with(reciting: hf.HFBackend, roles: tuple[str, ...], continues: bool) -> None:
    """A text, or a reply that the prompt has begun."""
    model = EvalLM(reciting)
    if roles:
        model.trace.messages[PROMPT] = [{"role": role, "content": "def"} for role in roles]
    request = Instance("generate_until", {}, (PROMPT, {"until": [], "max_gen_toks": 32}), 0)
    assert model.works([request])[0].prompt.continues == continues
