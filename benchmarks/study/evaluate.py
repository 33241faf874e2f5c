"""Scores of one model on one split: bits per byte by our own count, greedy answers through `dskd-eval`.

Bits per byte are taken of the gold answers and of the tuned teacher's own greedy answers: likelihood of the gold
text alone would favour plain fine-tuning, which maximises just that.
"""

import json
import os
from pathlib import Path
from typing import Any

import yaml

from benchmarks.study import data
from quickstart.measure import answer_tokens

LIMITS = {"qa": 24, "text": 96}  # new tokens of an answer
SCORED, ANSWERED = 16, 32  # sequences at a time on a CPU
TASKS = {"qa": ("answers",), "text": ("answers", "numbers")}


def write_tasks(folder: Path, task: str, split: str) -> list[Path]:
    """The task files of `dskd-eval` for one split, beside their rows."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = data.read(folder.parent / "data" / f"{task}-{split}.jsonl")
    files = []
    for scorer, name in (("rouge_l", "answers"), ("number", "numbers")):
        if name not in TASKS[task]:
            continue
        chosen = [
            {
                "system": row["messages"][0]["content"],
                "question": row["messages"][1]["content"],
                "answer": row["messages"][2]["content"],
            }
            for row in rows
            if name == "answers" or row["kind"] == "gsm8k"
        ]
        title = f"{task}_{split}_{name}"
        data.write(chosen, folder / f"{title}.jsonl")
        block = {
            "task": title,
            "data": f"{title}.jsonl",
            "description": "{{system}}",
            "prompt": "{{question}}",
            "reference": "answer",
            "scorer": scorer,
            "max_new_tokens": LIMITS[task],
        }
        files.append(folder / f"{title}.yaml")
        files[-1].write_text(yaml.safe_dump(block, sort_keys=False), encoding="utf-8")
    return files


def greedy(model: Path, files: list[Path], output: Path) -> dict[str, list[dict[str, Any]]]:
    """Samples of `dskd-eval` by task name, in the order of the rows; the run's folder is `output`."""
    from dskd_eval.cli import main

    arguments = ["--model", f"model={model}", "--output", str(output), "--dtype", "float32"]
    arguments += ["--batch-size", str(batch(ANSWERED)), "--cache", str(output.with_suffix(".sqlite"))]
    for file in files:
        arguments += ["--task-file", str(file)]
    if (output / "run.json").is_file():
        arguments.append("--resume")
    main.main(args=arguments, prog_name="dskd-eval", standalone_mode=False)
    samples: dict[str, list[dict[str, Any]]] = {}
    for sample in data.read(output / "samples.jsonl"):
        samples.setdefault(sample["task"], []).append(sample)
    return samples


def batch(on_cpu: int) -> int:
    import torch

    return 4 * on_cpu if torch.cuda.is_available() else on_cpu


def answer_nats(folder: Path, conversations: list[list[dict[str, str]]]) -> list[float]:
    """-log p of each conversation's last turn under the model in `folder`, in nats, in its own chat template."""
    import torch
    from torch.nn.functional import cross_entropy
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().to(device)
    encoded = [_encode(tokenizer, messages) for messages in conversations]
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i][0]))
    nats = [0.0] * len(encoded)
    with torch.inference_mode():
        for at in range(0, len(order), batch(SCORED)):
            chosen = order[at : at + batch(SCORED)]
            longest = max(len(encoded[i][0]) for i in chosen)
            ids = torch.zeros(len(chosen), longest, dtype=torch.long)
            mask = torch.zeros_like(ids)
            for row, i in enumerate(chosen):
                ids[row, : len(encoded[i][0])] = torch.tensor(encoded[i][0])
                mask[row, : len(encoded[i][0])] = 1
            hidden = model.model(ids.to(device), attention_mask=mask.to(device), use_cache=False).last_hidden_state
            for row, i in enumerate(chosen):
                picked = torch.tensor(encoded[i][1])
                logits = model.lm_head(hidden[row, picked - 1])
                targets = ids[row, picked].to(device)
                nats[i] = float(cross_entropy(logits.double(), targets, reduction="sum"))
    return nats


def _encode(tokenizer: Any, messages: list[dict[str, str]]) -> tuple[list[int], list[int]]:
    """Token ids of the conversation and the positions of those that cover the answer's text."""
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    answer = messages[-1]["content"]
    start = text.rfind(answer)
    encoded = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)
    return encoded["input_ids"], answer_tokens(encoded["offset_mapping"], start, start + len(answer))


def likelihood(folder: Path, rows: list[dict[str, Any]], answers: list[str] | None = None) -> list[list[float]]:
    """[bits, bytes] of each row's answer, or of `answers` in its place; an empty answer has 0 bits and 0 bytes."""
    texts = [row["messages"][-1]["content"] for row in rows] if answers is None else answers
    filled = [i for i, text in enumerate(texts) if text.strip()]
    conversations = [[*rows[i]["messages"][:-1], {"role": "assistant", "content": texts[i]}] for i in filled]
    found = dict(zip(filled, answer_nats(folder, conversations), strict=True))
    return [
        [found[i] / 0.6931471805599453, float(len(text.encode()))] if i in found else [0.0, 0.0]
        for i, text in enumerate(texts)
    ]


def validation(out: Path, model: Path, task: str) -> dict[str, Any]:
    """Bits per byte of the gold answers of the validation rows."""
    pairs = likelihood(model, data.read(out / "data" / f"{task}-validation.jsonl"))
    return {"gold": pairs}


def heldout(out: Path, model: Path, task: str, work: Path, *, split: str = "heldout") -> dict[str, Any]:
    """Per document: [bits, bytes] of gold and teacher answers, exact match, Rouge-L, and equality with the teacher."""
    rows = data.read(out / "data" / f"{task}-{split}.jsonl")
    samples = greedy(model, [out / "tasks" / f"{task}_{split}_{name}.yaml" for name in TASKS[task]], work)
    answers = samples[f"{task}_{split}_answers"]
    replies = [reply(sample) for sample in answers]
    found: dict[str, Any] = {
        "gold": likelihood(model, rows),
        "rouge_l": [metric(sample, "rouge_l") for sample in answers],
    }
    if task == "qa":
        found["exact"] = [metric(sample, "exact_match") for sample in answers]
    else:
        found["exact"] = [metric(sample, "flexible") for sample in samples[f"{task}_{split}_numbers"]]
    teacher_file = out / f"teacher-{task}-{split}.json"
    if teacher_file.is_file():
        teacher = json.loads(teacher_file.read_text(encoding="utf-8"))
        found["teacher"] = likelihood(model, rows, teacher)
        found["same_as_teacher"] = [float(a.split() == b.split()) for a, b in zip(replies, teacher, strict=True)]
    found["replies"] = replies
    return found


def reply(sample: dict[str, Any]) -> str:
    text = sample["answers"][0]
    return text if isinstance(text, str) else text["text"]


def metric(sample: dict[str, Any], name: str) -> float:
    return float(sample["metrics"][name])


def teacher_answers(out: Path, task: str, split: str) -> None:
    """The tuned teacher's scores and greedy answers of a split, written to `teacher-<task>-<split>.json`."""
    found = heldout(out, out / f"teacher-{task}", task, out / "teacher-eval" / f"{task}-{split}", split=split)
    replies = found.pop("replies")
    (out / "teacher-eval" / f"{task}-{split}.json").write_text(json.dumps(found), encoding="utf-8")
    partial = out / f"teacher-{task}-{split}.{os.getpid()}"
    partial.write_text(json.dumps(replies, ensure_ascii=False), encoding="utf-8")
    partial.replace(out / f"teacher-{task}-{split}.json")
