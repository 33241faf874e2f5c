"""Finding models: names, folders, adapters, downloads."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from dskd_eval import models
from dskd_eval.backends import hf
from dskd_eval.errors import UserError
from dskd_eval.models import ModelRef


@pytest.mark.parametrize(
    ("text", "name", "source"),
    [
        ("org/name", "name", "org/name"),
        ("mine=org/name", "mine", "org/name"),
        ("mine=/out/lr=1e-4/student", "mine", "/out/lr=1e-4/student"),
        ("/out/lr=1e-4/student/", "student", "/out/lr=1e-4/student/"),
        ("runs/lr=1e-4/checkpoint-30", "lr=1e-4-checkpoint-30", "runs/lr=1e-4/checkpoint-30"),
        ("größer als=out/x", "größer als", "out/x"),
    ],
)
def test_names_and_sources(text: str, name: str, source: str) -> None:
    assert models.parse_model(text) == ModelRef(name, source)


def test_names_of_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "lr=2" / "der Schüler"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    for text in (".", "./", "../der Schüler/", str(folder)):
        assert models.parse_model(text) == ModelRef("der Schüler", text)
    monkeypatch.chdir(tmp_path)
    assert models.parse_model("lr=2/der Schüler").name == "der Schüler"
    (tmp_path / "a=b").mkdir()
    assert models.parse_model("a=b") == ModelRef("a=b", "a=b")


def test_a_folder_with_spaces_is_evaluated_from_a_relative_path(
    tiny_model: Path, own_task: Callable[..., Path], tmp_path: Path, invoke: Callable[..., Any], monkeypatch: Any
) -> None:
    shutil.copytree(tiny_model, tmp_path / "der Schüler")
    path = own_task()
    monkeypatch.chdir(tmp_path)
    done = invoke("--model", "der Schüler/", "--task-file", path, "--limit", 2, "--output", "o u t")
    assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / "o u t" / "results.json").read_text())
    assert [model["name"] for model in found["models"]] == ["der Schüler"]


def test_every_file_of_a_vocabulary_counts(tiny_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    seen = {models.locate(ModelRef("m", str(folder))).fingerprint}
    for name in ("spiece.model", "qwen.tiktoken", "tekken.json", "vocab.txt", "chat_template.jinja"):
        (folder / name).write_text("x")
        seen.add(models.locate(ModelRef("m", str(folder))).fingerprint)
    assert len(seen) == 6


def test_an_index_of_weights_that_nobody_reads_is_no_fault(tiny_model: Path, tmp_path: Path) -> None:
    """A download takes one form of the weights, and the index of the other comes along."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"a": "pytorch_model-1.bin"}}))
    models.locate(ModelRef("m", str(folder)))
    (folder / "model.safetensors").rename(folder / "pytorch_model-2.bin")
    with pytest.raises(UserError, match=r"got no pytorch_model-1\.bin"):
        models.locate(ModelRef("m", str(folder)))


@pytest.mark.parametrize(("weights", "calls"), [("model.safetensors", 1), ("pytorch_model.bin", 2)])
def test_old_weights_are_downloaded_when_there_are_no_others(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weights: str, calls: int
) -> None:
    """A stand-in for the hub: a folder whose files are handed out by pattern."""
    import fnmatch

    import huggingface_hub

    hub, cache, asked = tmp_path / "hub", tmp_path / "cache", []
    shutil.copytree(tiny_model, hub)
    (hub / "model.safetensors").rename(hub / weights)
    (hub / "consolidated.safetensors").write_text("a second copy")

    def snapshot_download(repo: str, *, allow_patterns: list[str], ignore_patterns: list[str], **_: Any) -> str:
        asked.append(allow_patterns)
        cache.mkdir(exist_ok=True)
        for path in hub.iterdir():
            allowed = any(fnmatch.fnmatch(path.name, pattern) for pattern in allow_patterns)
            if allowed and not any(fnmatch.fnmatch(path.name, pattern) for pattern in ignore_patterns):
                shutil.copy(path, cache)
        return str(cache)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    folder = models.locate(ModelRef("m", "org/name"))
    assert (folder.weights / weights).is_file() and len(asked) == calls
    assert not (folder.weights / "consolidated.safetensors").exists()


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("gpt2", {"n_positions": 96, "n_embd": 32, "n_layer": 1, "n_head": 2}),
        ("opt", {"max_position_embeddings": 96, "hidden_size": 32, "ffn_dim": 32, "word_embed_proj_dim": 32,
                 "num_hidden_layers": 1, "num_attention_heads": 2}),
        ("mpt", {"max_seq_len": 96, "d_model": 32, "n_layers": 1, "n_heads": 2}),
        ("gpt_neox", {"max_position_embeddings": 96, "hidden_size": 32, "intermediate_size": 32,
                      "num_hidden_layers": 1, "num_attention_heads": 2}),
        ("gemma", {"max_position_embeddings": 96, "hidden_size": 32, "intermediate_size": 32, "head_dim": 16,
                   "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}),
    ],
)  # fmt: skip
def test_context_lengths_of_other_families(tmp_path: Path, kind: str, options: dict[str, Any]) -> None:
    """Prompt and answer fill the context that the family's own setting names, and not a token more."""
    from conftest_models import make_tokenizer
    from dskd_eval.lmeval.eval_lm import EvalLM
    from test_run import Request
    from transformers import AutoConfig, AutoModelForCausalLM

    tokenizer = make_tokenizer(tmp_path, chat=False)
    config = AutoConfig.for_model(kind, vocab_size=len(tokenizer), bos_token_id=None, eos_token_id=None,
                                  pad_token_id=None, **options)  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    backend = hf.HFBackend(models.locate(ModelRef("m", str(tmp_path))), dtype="float32", device="cpu")
    lm = EvalLM(backend)
    lm.generate_until([Request(0, "x" * 200, max_gen_toks=64)])
    info = lm.trace.infos[0, 0]
    assert backend.max_length == 96
    assert info.prompt_tokens - info.cut_tokens + info.max_new_tokens == 96
