"""Held-out measurements that are comparable across tokenizers: bits per byte and exact match."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

BATCH = 32
ANSWER_TOKENS = 48


@dataclass(frozen=True)
class Score:
    """bits_per_byte: of the gold answers, >= 0; exact_match: share of right greedy answers in [0, 1]."""

    bits_per_byte: float
    exact_match: float
    by_kind: dict[str, float]
    replies: list[str]


def exact_match(reply: str, gold: str) -> bool:
    """True when both are the same text up to surrounding and repeated white space."""
    return reply.split() == gold.split()


def bits_per_byte(nats: float, text: Sequence[str]) -> float:
    """nats / (ln 2 x UTF-8 bytes of all texts), one unit for every tokenizer; ValueError without text."""
    size = sum(len(part.encode()) for part in text)
    if size == 0:
        raise ValueError("held-out answers: expected some text, got none. Check the held-out file.")
    return nats / math.log(2) / size


def answer_tokens(offsets: Sequence[tuple[int, int]], start: int, end: int) -> list[int]:
    """Indices of the tokens that cover any character of [start, end); zero-width tokens cover none."""
    return [i for i, (first, last) in enumerate(offsets) if first < last and first < end and last > start]


def measure(folder: str | Path, rows_file: Path, *, limit: int | None = None) -> Score:
    """Score the model in `folder`, in its own chat template, on the conversations of a JSON-lines file."""
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().to(device)
    rows = [json.loads(line) for line in rows_file.read_text(encoding="utf-8").splitlines()][:limit]
    golds = [row["messages"][-1]["content"] for row in rows]
    replies: list[str] = []
    nats = 0.0
    with torch.inference_mode():
        for at in range(0, len(rows), BATCH):
            batch = rows[at : at + BATCH]
            nats += sum(_answer_nats(model, tokenizer, row["messages"]) for row in batch)
            replies += _replies(model, tokenizer, [row["messages"][:-1] for row in batch])
    hits = [exact_match(reply, gold) for reply, gold in zip(replies, golds, strict=True)]
    kinds = sorted({row["kind"] for row in rows})
    return Score(
        bits_per_byte=bits_per_byte(nats, golds),
        exact_match=sum(hits) / len(hits),
        by_kind={k: _mean(h for h, row in zip(hits, rows, strict=True) if row["kind"] == k) for k in kinds},
        replies=replies,
    )


def _mean(values: Any) -> float:
    values = list(values)
    return sum(values) / len(values)


def _answer_nats(model: Any, tokenizer: Any, messages: list[dict[str, str]]) -> float:
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    answer = messages[-1]["content"]
    start = text.rfind(answer)
    if start < 0:
        raise ValueError(
            f"chat template of {tokenizer.name_or_path}: expected the answer {answer!r} in the rendered "
            "conversation, got it changed or left out. Use a teacher whose template keeps the answer."
        )
    encoded = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False, return_tensors="pt")
    picked = torch.tensor(answer_tokens(encoded["offset_mapping"][0].tolist(), start, start + len(answer)))
    ids = encoded["input_ids"].to(model.device)
    logits = model(ids, logits_to_keep=picked.to(model.device) - 1).logits[0]
    return float(cross_entropy(logits.double(), ids[0, picked], reduction="sum"))


def _replies(model: Any, tokenizer: Any, prompts: list[list[dict[str, str]]]) -> list[str]:
    texts = [tokenizer.apply_chat_template(p, tokenize=False, add_generation_prompt=True) for p in prompts]
    encoded = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False).to(model.device)
    encoded.pop("token_type_ids", None)
    out = model.generate(**encoded, max_new_tokens=ANSWER_TOKENS, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    return tokenizer.batch_decode(out[:, encoded["input_ids"].shape[1] :], skip_special_tokens=True)
