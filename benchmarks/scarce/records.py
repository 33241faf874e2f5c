"""What is kept of the runs: numbers only, one JSON line for each recipe and seed, and one for each quickstart."""

from pathlib import Path

from benchmarks.scarce.runs import RESULTS, questions, result
from benchmarks.scarce.table import Run
from benchmarks.study.records import Record
from benchmarks.study.runs import read_json

OTHERS = ("sft", "sft_all", "teacher")  # what the quickstart measured beside SeqKD and DSKD


def of_quickstart(out: Path, seed: int) -> Record | None:
    """The models that every recipe of a seed is compared with."""
    file = questions(out, seed) / RESULTS
    if not file.is_file():
        return None
    found = read_json(file)
    made: Record = {"kind": "quickstart", "seed": seed, "rows": found["rows"]}
    for name in OTHERS:
        answers = found["models"][name]["answers"]
        made[name] = {
            "bits": [round(one["bits"], 3) for one in answers],
            "bytes": [one["bytes"] for one in answers],
            "right": [int(one["right"]) for one in answers],
        }
    return made


def of_run(out: Path, run: Run) -> Record | None:
    file = result(out, run)
    if not file.is_file():
        return None
    return {"kind": "run", "recipe": run.recipe, "seed": run.seed} | dict(read_json(file))


def merged(earlier: list[Record], made: list[Record]) -> list[Record]:
    """The records of a file with newer ones in place of the same runs."""
    kept = {(one["kind"], one.get("recipe"), one["seed"]): one for one in earlier}
    kept |= {(one["kind"], one.get("recipe"), one["seed"]): one for one in made}
    return list(kept.values())
