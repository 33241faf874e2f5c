"""Small models, tokenizers and conversations made from nothing: for tests and for comparisons of two checkouts."""

import json
import random
import shutil
from pathlib import Path
from typing import Any

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
INST = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% elif m.role == 'system' %}[SYS] {{ m.content }} [/SYS]"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
WORDS = [
    "red",
    "blue",
    "green",
    "stone",
    "river",
    "bread",
    "lamp",
    "seven",
    "twelve",
    "naïve",
    "café",
    "日本",
    "maths",
    "code",
    "def",
    "return",
    "if",
    "else",
    "the",
    "a",
    "of",
]


def conversations(rows: int, seed: int, turns: int = 2) -> list[dict[str, Any]]:
    rng = random.Random(seed)

    def text(low: int, high: int) -> str:
        words = [rng.choice(WORDS) for _ in range(rng.randint(low, high))]
        return " ".join(words) + rng.choice([".", "!", "\n- item\n", " 12 + 30 = 42", " 🙂"])

    return [
        {
            "messages": [
                message
                for _ in range(rng.randint(1, turns))
                for message in (
                    {"role": "user", "content": text(3, 9)},
                    {"role": "assistant", "content": text(4, 14).strip()},
                )
            ],
            "instruction": text(3, 9),
            "input": "",
            "output": text(4, 14),
            "text": text(60, 90),
        }
        for _ in range(rows)
    ]


def byte_level_tokenizer(vocab: int, seed: int) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([row["text"] for row in conversations(80, seed)], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", model_max_length=512
    )
    fast.chat_template = CHATML
    return fast


def sentencepiece_tokenizer(vocab: int, seed: int) -> Any:
    """SentencePiece-like BPE: '▁' for spaces, byte fallback, no dummy prefix inside a conversation."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")  # for training only, as SentencePiece does
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=special + [f"<0x{byte:02X}>" for byte in range(256)],
        show_progress=False,
    )
    tokenizer.train_from_iterator([row["text"] for row in conversations(80, seed)], trainer)
    state = json.loads(tokenizer.to_str())
    state["added_tokens"], state["pre_tokenizer"] = [], None
    tokenizer = Tokenizer.from_str(json.dumps(state))
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<unk>"
    )
    fast.chat_template = INST
    return fast


def save_model(folder: Path, tokenizer: Any, family: str = "llama", **sizes: Any) -> str:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(sizes.pop("seed", 0))
    width = sizes.pop("width", 32)
    options = {
        "vocab_size": len(tokenizer),
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": width // 4,
        "max_position_embeddings": 512,
        "initializer_range": 0.3,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "tie_word_embeddings": False,
        **sizes,
    }
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **options))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def wordpiece_copy(model: str, folder: Path) -> str:
    """The folder: a copy of a model with a WordPiece tokenizer, which does not tell what its tokens spell."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    shutil.copytree(model, folder)
    tokenizer = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1, "##b": 2}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]").save_pretrained(folder)
    return str(folder)


def make_pair(root: Path, **sizes: Any) -> dict[str, str]:
    """Folders: student (byte-level BPE, Llama), teacher (SentencePiece-like, Qwen3), sibling (as the student), data.

    sizes: settings of all three models, see `save_model`.
    """
    student_tokenizer, teacher_tokenizer = byte_level_tokenizer(420, 1), sentencepiece_tokenizer(460, 2)
    data = root / "train.jsonl"
    data.write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in conversations(48, 3)), encoding="utf-8"
    )
    return {
        "student": save_model(root / "student", student_tokenizer, **sizes),
        "teacher": save_model(root / "teacher", teacher_tokenizer, "qwen3", width=48, seed=1, **sizes),
        "sibling": save_model(root / "sibling", student_tokenizer, "qwen3", width=48, seed=2, **sizes),
        "data": str(data),
    }


def small_recipe(pair: dict[str, str], folder: Path) -> dict[str, Any]:
    """A complete recipe of four steps over a pair of `make_pair`; what it writes goes into the folder."""
    return {
        "base_model": pair["student"],
        "plugins": ["dskd"],
        "dskd": {
            "teacher": {"model": pair["teacher"], "dtype": "float32"},
            "projector": {"learning_rate": 0.002},
            "spaces": "both",  # every term
            "agreement_mask": True,  # rows that only the models can tell
        },
        "chat_template": "tokenizer_default",
        "datasets": [{"path": pair["data"], "ds_type": "json", "type": "chat_template"}],
        "dataset_prepared_path": str(folder / "prepared"),
        "dataset_num_proc": 1,
        "output_dir": str(folder / "out"),
        "sequence_len": 256,
        "micro_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 4,
        "learning_rate": 0.001,
        "lr_scheduler": "constant",
        "optimizer": "adamw_torch",
        "logging_steps": 1,
        "save_steps": 2,
        "seed": 7,
        "bf16": False,
        "fp16": False,
        "tf32": False,
        "flash_attention": False,
        "sdp_attention": True,
        "gradient_checkpointing": False,
        "dataloader_num_workers": 0,
        "dataloader_pin_memory": False,
    }
