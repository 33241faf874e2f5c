"""Rows: MBPP, GSM8K, and few gold answers beside many of the teacher's. None is kept in the repository.

An MBPP prompt is the task and its tests, as published for models that follow instructions. Its solutions get Unix line
ends, four spaces for a tab and no trailing white space, so that they say what a model would write.
"""

import re
from pathlib import Path

from benchmarks.study.data import Row, read, write

TRAIN, HELDOUT = range(601, 975), range(511, 571)  # task_id; 60 held-out rows
FEW = range(601, 661)  # the gold answers of `few`
GSM8K_TRAIN, GSM8K_HELDOUT = 374, 60


def conversation(source: str, question: str, answer: str) -> Row:
    turns = [("user", question), ("assistant", answer)]
    return {"messages": [{"role": role, "content": text} for role, text in turns], "source": source}


def plain_code(code: str) -> str:
    """One form for every solution: `\\n`, four spaces for a tab, nothing after the last character of a line."""
    lines = code.replace("\r\n", "\n").expandtabs(4).split("\n")
    return "\n".join(line.rstrip() for line in lines).strip()


def mbpp(folder: Path) -> dict[int, Row]:
    """Conversations by task_id."""
    found = {}
    for row in read(folder / "mbpp" / "mbpp.jsonl"):
        tests = "\n".join(row["test_list"])
        question = f"{row['text']}\nYour code should pass these tests:\n{tests}"
        found[row["task_id"]] = conversation("mbpp", question, plain_code(row["code"]))
    return found


def gsm8k(file: Path, count: int) -> list[Row]:
    """The first rows, with the calculator marks taken out."""
    rows = read(file)[:count]
    return [conversation("gsm8k", row["question"], re.sub(r"<<.*?>>", "", row["answer"])) for row in rows]


def prepare(folder: Path, to: Path) -> None:
    """Write `<data>-gold.jsonl` and `<data>-heldout.jsonl` for every data set."""
    if not (folder / "mbpp" / "mbpp.jsonl").is_file():
        raise ValueError(
            f"--data: expected a folder with mbpp/ and gsm8k/, got {folder} without mbpp/mbpp.jsonl. "
            "Name the folder that docs/eval.md describes."
        )
    to.mkdir(parents=True, exist_ok=True)
    tasks = mbpp(folder)
    heldout = [tasks[number] for number in HELDOUT]
    splits = {
        "mbpp-gold": [tasks[number] for number in TRAIN],
        "mbpp-heldout": heldout,
        "gsm8k-gold": gsm8k(folder / "gsm8k" / "train.jsonl", GSM8K_TRAIN),
        "gsm8k-heldout": gsm8k(folder / "gsm8k" / "test.jsonl", GSM8K_HELDOUT),
        "few-heldout": heldout,
        "few_gold-gold": [tasks[number] for number in FEW],
        "few_gold-heldout": heldout,
    }
    for name, rows in splits.items():
        write(rows, to / f"{name}.jsonl")


def few(gold: Path, generated: Path, to: Path) -> None:
    """The gold rows of the first tasks, then the teacher's answers to all other prompts."""
    rows = read(gold)
    known = {row["messages"][0]["content"] for row in rows[: len(FEW)]}
    answers = [row for row in read(generated) if row["messages"][0]["content"] not in known]
    # The training flag of generated turns has no match in the gold rows; all answers are trained on.
    kept = [conversation("teacher", row["messages"][0]["content"], row["messages"][-1]["content"]) for row in answers]
    write(rows[: len(FEW)] + kept, to)
