"""The files of questions: which rows have an answer, for whom, and what may be trained on."""

import json
from pathlib import Path

from quickstart import data

SIZES = {"train": 504, "validation": 112, "heldout": 168, "prompts": 490, "prose": 52000}
GOLD_PER_KIND = 6


def first_of_each_kind(rows: list[data.Example], count: int) -> list[data.Example]:
    """The first `count` rows of each kind, in their order; ValueError when a kind has fewer."""
    taken: dict[str, int] = dict.fromkeys(data.KINDS, 0)
    chosen = []
    for row in rows:
        if taken[row.kind] < count:
            taken[row.kind] += 1
            chosen.append(row)
    short = [kind for kind, found in taken.items() if found < count]
    if short:
        raise ValueError(f"gold rows: expected {count} of each kind, got fewer of {', '.join(short)}. Raise `train`.")
    return chosen


def write(folder: Path, *, seed: int, sizes: dict[str, int] = SIZES) -> None:
    """Write all rows of a seed as JSON lines.

    gold: the few answered questions that teacher and student train on. gold_all: these and the rest of the answered
    ones. prompts: questions without answers. prompts_key: the same with their answers, which only the report reads.
    validation, heldout: for choosing and for measuring. prose: plain text for the student's pretraining.
    """
    splits = data.generate(seed, **sizes)
    everything = splits.pop("train")
    gold = first_of_each_kind(everything, GOLD_PER_KIND)
    data.write(splits | {"gold": gold, "gold_all": everything, "prompts_key": splits["prompts"]}, folder)


def read(file: Path) -> list[dict[str, object]]:
    """The rows of a JSON-lines file."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
