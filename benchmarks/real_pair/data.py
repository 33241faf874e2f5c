"""Rows: MBPP, GSM8K, and few gold answers beside many of the teacher's. None is kept in the repository.

An MBPP prompt is the task and its tests, as published for models that follow instructions. Its solutions get Unix line
ends, four spaces for a tab and no trailing white space, so that they say what a model would write. The rows of `few`
ask and answer in the words of `dskd-eval`, so that what they teach is what is measured: a teacher that may answer as
it likes repeats the tests and explains, most of it beyond the limit of tokens.
"""

import re
from pathlib import Path
from typing import Any

import dskd_eval
import jinja2
import yaml

from benchmarks.study.data import Row, read, write

TRAIN, HELDOUT = range(601, 975), range(511, 571)  # task_id; 60 held-out rows
FEW = range(601, 661)  # the gold answers of `few`; the teacher answers the rest of TRAIN
GSM8K_TRAIN, GSM8K_HELDOUT = 374, 60


def conversation(source: str, question: str, answer: str) -> Row:
    turns = [("user", question), ("assistant", answer)]
    return {"messages": [{"role": role, "content": text} for role, text in turns], "source": source}


def plain_code(code: str) -> str:
    """One form for every solution: `\\n`, four spaces for a tab, nothing after the last character of a line."""
    lines = code.replace("\r\n", "\n").expandtabs(4).split("\n")
    return "\n".join(line.rstrip() for line in lines).strip()


def mbpp(tasks: dict[int, dict[str, Any]], numbers: range) -> list[Row]:
    """Conversations of so many tasks."""
    found = []
    for number in numbers:
        task = tasks[number]
        tests = "\n".join(task["test_list"])
        question = f"{task['text']}\nYour code should pass these tests:\n{tests}"
        found.append(conversation("mbpp", question, task["code"]))
    return found


def mbpp_as_evaluated(tasks: dict[int, dict[str, Any]], numbers: range) -> list[Row]:
    """The same in the words of `dskd-eval`, which asks for one code block."""
    file = Path(dskd_eval.__file__).parent / "tasks" / "mbpp.yaml"
    chat = yaml.safe_load(file.read_text(encoding="utf-8"))["styles"]["chat"]
    question, answer = (jinja2.Template(chat[part]) for part in ("doc_to_text", "reference_answer"))
    return [conversation("mbpp", question.render(tasks[number]), answer.render(tasks[number])) for number in numbers]


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
    rows = read(folder / "mbpp" / "mbpp.jsonl")
    tasks = {row["task_id"]: row | {"code": plain_code(row["code"])} for row in rows}
    few_heldout = mbpp_as_evaluated(tasks, HELDOUT)
    splits = {
        "mbpp-gold": mbpp(tasks, TRAIN),
        "mbpp-heldout": mbpp(tasks, HELDOUT),
        "gsm8k-gold": gsm8k(folder / "gsm8k" / "train.jsonl", GSM8K_TRAIN),
        "gsm8k-heldout": gsm8k(folder / "gsm8k" / "test.jsonl", GSM8K_HELDOUT),
        "few-prompts": mbpp_as_evaluated(tasks, range(FEW.stop, TRAIN.stop)),
        "few-heldout": few_heldout,
        "few_gold-gold": mbpp_as_evaluated(tasks, FEW),
        "few_gold-heldout": few_heldout,
    }
    for name, made in splits.items():
        write(made, to / f"{name}.jsonl")


def few(gold: Path, generated: Path, to: Path) -> None:
    """The few gold rows, then the teacher's answers to the other prompts."""
    # The training flag of generated turns has no match in the gold rows; all answers are trained on.
    turns = [row["messages"] for row in read(generated)]
    answers = [conversation("teacher", asked[0]["content"], asked[-1]["content"]) for asked in turns]
    write(read(gold) + answers, to)
