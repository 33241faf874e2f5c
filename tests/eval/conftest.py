"""Tiny random models, rows made by hand, and the shared benchmark files where they exist."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

os.environ.update(
    HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TQDM_DISABLE="1", TOKENIZERS_PARALLELISM="false"
)

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    found = os.environ.get("DSKD_DATA") or Path(__file__).parents[2].parent / "shared" / "data"
    path = Path(found)
    if not (path / "gsm8k" / "test.jsonl").is_file():
        pytest.skip(f"no benchmark files in {path} (set DSKD_DATA)")
    return path.resolve()


@pytest.fixture(scope="session")
def punkt(data_dir: Path) -> None:
    """NLTK's sentence splitter, from the shared files."""
    import nltk

    nltk.data.path.insert(0, str(data_dir / "nltk_data"))
    try:
        nltk.data.find("tokenizers/punkt_tab")
    except LookupError:
        pytest.skip("no punkt_tab")


def make_tokenizer(folder: Path, *, chat: bool = True, end: bool = True) -> Any:
    """A byte-level tokenizer: every text can be encoded, no training text is needed."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<|im_start|>", "<|im_end|>"] if end else ["<|im_start|>"]
    inner = Tokenizer(models.BPE({token: place for place, token in enumerate(alphabet)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    names = {"eos_token": "<|im_end|>", "pad_token": "<|im_end|>"} if end else {}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, **names)
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    if chat:
        tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder)
    return tokenizer


def make_model(
    folder: Path, *, seed: int = 0, context: int = 4096, chat: bool = True, end: bool = True
) -> Path:
    """A random two-layer Llama in a folder."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = make_tokenizer(folder, chat=chat, end=end)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=context,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def other_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "other", seed=1)


@pytest.fixture
def own_task(tmp_path: Path) -> Callable[..., Path]:
    """Writes a task file with rows beside it; keyword arguments are further keys."""

    def write(rows: list[dict[str, Any]] | None = None, **keys: Any) -> Path:
        import yaml

        rows = rows or [{"question": f"What is {n} + {n}?", "answer": str(n + n)} for n in range(12)]
        (tmp_path / "rows.jsonl").write_text(
            "".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8"
        )
        task = {
            "task": "sums", "data": "rows.jsonl", "prompt": "{{question}}", "reference": "{{answer}}",
            "scorer": "number", "max_new_tokens": 8, **keys,
        }  # fmt: skip
        path = tmp_path / "sums.yaml"
        path.write_text(yaml.safe_dump({key: value for key, value in task.items() if value is not None}))
        return path

    return write


@pytest.fixture
def invoke() -> Callable[..., Any]:
    """Runs the command line in this process; `.output` holds stdout and stderr."""
    from click.testing import CliRunner
    from dskd_eval import cli

    def run(*arguments: object) -> Any:
        return CliRunner().invoke(cli.main, [str(argument) for argument in arguments])

    return run
