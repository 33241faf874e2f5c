"""Held-out measurements that are comparable across tokenizers: bits per byte and exact match."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

BATCH = 32
ANSWER_TOKENS = 48


@dataclass(frozen=True)
class Answered:
    """One question: bits of its gold answer and that answer's UTF-8 bytes, the model's greedy reply, right or not."""

    question: str
    gold: str
    kind: str
    bits: float
    bytes: int
    reply: str
    right: bool


def exact_match(reply: str, gold: str) -> bool:
    """True when both are the same text up to surrounding and repeated white space."""
    return reply.split() == gold.split()


def answer_tokens(offsets: Sequence[tuple[int, int]], start: int, end: int) -> list[int]:
    """Indices of the tokens that cover any character of [start, end); zero-width tokens cover none."""
    return [i for i, (first, last) in enumerate(offsets) if first < last and first < end and last > start]


def measure(
    folder: str | Path, rows_file: Path, *, title: str, limit: int | None = None, threads: int | None = None
) -> list[Answered]:
    """Let the model in `folder` answer the conversations of a JSON-lines file, in its own chat template.

    threads: of this process from now on; None leaves them as they are.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().to(device)
    rows = [json.loads(line) for line in rows_file.read_text(encoding="utf-8").splitlines()][:limit]
    answered: list[Answered] = []
    with torch.inference_mode(), tqdm(total=len(rows), desc=title, leave=False) as bar:
        for at in range(0, len(rows), BATCH):
            batch = rows[at : at + BATCH]
            replies = _replies(model, tokenizer, [row["messages"][:-1] for row in batch])
            for row, reply in zip(batch, replies, strict=True):
                answered.append(_scored(row, _answer_nats(model, tokenizer, row["messages"]), reply))
                bar.update()
    return answered


def _scored(row: dict[str, Any], nats: float, reply: str) -> Answered:
    question, gold = row["messages"][-2]["content"], row["messages"][-1]["content"]
    bits, size = nats / math.log(2), len(gold.encode())
    return Answered(question, gold, row["kind"], bits, size, reply, exact_match(reply, gold))


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
