"""Rows of the study: questions of the project's own generator, and short rows of GSM8K and Dolly.

Splits never share a question. The teacher of a task is tuned on more gold rows than a student sees: a student's
`train` rows are the first of the teacher's. GSM8K and Dolly are read from DSKD_DATA, else from ../shared/data,
and never copied into the repository.
"""

import json
import os
import random
import re
from pathlib import Path
from typing import Any

from benchmarks.study.table import Size
from quickstart import data as generator

SEED = 1
STEPS = "Solve step by step and end with #### and the number."
BRIEF = "Answer briefly."

Row = dict[str, Any]


def data_folder() -> Path:
    """Where the public data sets lie; ValueError when they are absent."""
    folder = Path(os.environ.get("DSKD_DATA") or Path(__file__).resolve().parents[3] / "shared" / "data")
    if not (folder / "gsm8k" / "train.jsonl").is_file():
        raise ValueError(
            f"DSKD_DATA: expected a folder with gsm8k/ and dskd/dolly/, got {folder} without gsm8k/train.jsonl. "
            "Set DSKD_DATA to the folder that docs/eval.md describes."
        )
    return folder


def chat(kind: str, system: str, question: str, answer: str) -> Row:
    turns = [("system", system), ("user", question), ("assistant", answer)]
    return {"messages": [{"role": role, "content": text} for role, text in turns], "kind": kind}


def read(file: Path) -> list[Row]:
    with file.open(encoding="utf-8") as lines:  # str.splitlines would also split at U+2028, which JSON leaves as it is
        return [json.loads(line) for line in lines]


def write(rows: list[Row], file: Path) -> None:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    file.write_text(text, encoding="utf-8")


def _gsm8k(rows: list[Row]) -> list[Row]:
    """Chat rows with the calculator marks taken out."""
    return [chat("gsm8k", STEPS, row["question"], re.sub(r"<<.*?>>", "", row["answer"])) for row in rows]


def _dolly(rows: list[Row]) -> list[Row]:
    made = [
        chat("dolly", BRIEF, " ".join(f"{row['instruction']} {row['input']}".split()), row["output"].strip())
        for row in rows
    ]
    return [row for row in made if row["messages"][2]["content"]]


def _short_first(rows: list[Row], longest: tuple[int, int]) -> list[Row]:
    """In a fixed random order, rows with question and answer of at most so many characters before the others."""
    random.Random(SEED).shuffle(rows)

    def is_long(row: Row) -> bool:
        return any(len(row["messages"][turn]["content"]) > limit for turn, limit in zip((1, 2), longest, strict=True))

    return sorted(rows, key=is_long)


def text_splits(size: Size, folder: Path) -> dict[str, list[Row]]:
    """Three quarters GSM8K and one quarter Dolly in each split; the rest of both is plain text for pretraining."""
    gsm8k = (_gsm8k(read(folder / "gsm8k" / f"{split}.jsonl")) for split in ("train", "test"))
    sources = (*gsm8k, _dolly(read(folder / "dskd" / "dolly" / "dev.jsonl")))
    train, test, dolly = (_short_first(rows, size.longest) for rows in sources)
    splits: dict[str, list[Row]] = {}
    counts = {
        "heldout": size.heldout["text"],
        "validation": size.validation["text"],
        "train": size.teacher_rows["text"],
    }
    for split, count in counts.items():
        source, ours = test if split == "heldout" else train, []
        for i in range(count):
            ours.append((dolly if i % 4 == 3 else source).pop(0))
        splits[split] = ours
    rest = train[: size.plain_rows * 3 // 4] + dolly[: size.plain_rows // 4]
    splits["prose"] = [{"text": " ".join(t["content"] for t in row["messages"][1:])[:1200]} for row in rest]
    return splits


def prepare(size: Size, out: Path) -> None:
    """Write `<task>-{teacher,train,validation,heldout}` for both tasks, and `prose`, as JSON lines."""
    stories = generator.generate(
        SEED,
        train=size.teacher_rows["qa"],
        validation=size.validation["qa"],
        heldout=size.heldout["qa"],
        prose=size.prose,
    )
    qa = {
        split: [chat(row.kind, generator.INSTRUCTION, row.question, row.answer) for row in stories[split]]
        for split in ("train", "validation", "heldout")
    }
    text = text_splits(size, data_folder())
    for task, splits in (("qa", qa), ("text", text)):
        for split in ("validation", "heldout"):
            write(splits[split], out / f"{task}-{split}.jsonl")
        write(splits["train"], out / f"{task}-teacher.jsonl")
        write(splits["train"][: size.rows[task]], out / f"{task}-train.jsonl")
    prose = [{"text": row.prose} for row in stories["prose"]] + text["prose"]
    random.Random(SEED).shuffle(prose)
    write(prose, out / "prose.jsonl")
