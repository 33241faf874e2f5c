"""What is kept of the runs: numbers only, one JSON line for each run, and one for each quickstart."""

from pathlib import Path

from transformers import AutoTokenizer

from benchmarks.scarce.runs import RESULTS, questions, result
from benchmarks.scarce.table import Run
from benchmarks.study.records import Record
from benchmarks.study.runs import read_json

OTHERS = ("sft", "sft_all", "teacher")  # what the quickstart measured beside SeqKD and DSKD


def of_quickstart(out: Path, student: str, seed: int) -> Record | None:
    """The models that every recipe of a student and a seed is compared with, and how the two tokenizers agree."""
    file = questions(out, student, seed) / RESULTS
    if not file.is_file():
        return None
    found = read_json(file)
    made: Record = {"kind": "quickstart", "student": student, "seed": seed, "rows": found["rows"]}
    made["shared_ids"] = round(_shared_ids(file.parent), 4)
    made["align_ratio"] = round(found["dskd"]["align_ratio"], 4)
    for name in OTHERS:
        answers = found["models"][name]["answers"]
        made[name] = {
            "bits": [round(one["bits"], 3) for one in answers],
            "bytes": [one["bytes"] for one in answers],
            "right": [int(one["right"]) for one in answers],
        }
    return made


def _shared_ids(folder: Path) -> float:
    """Share of the student's ids that the teacher's tokenizer has too; both are BPE over the same letters for bytes."""
    own, teachers = (set(AutoTokenizer.from_pretrained(folder / name).get_vocab()) for name in ("student", "teacher"))
    return len(own & teachers) / len(own)


def of_run(out: Path, run: Run) -> Record | None:
    file = result(out, run)
    if not file.is_file():
        return None
    return {"kind": "run", "student": run.student, "recipe": run.recipe, "seed": run.seed} | dict(read_json(file))


def merged(earlier: list[Record], made: list[Record]) -> list[Record]:
    """The records of a file with newer ones in place of the same runs."""
    kept = {_key(one): one for one in earlier} | {_key(one): one for one in made}
    return list(kept.values())


def _key(one: Record) -> tuple[str, str, str | None, int]:
    return one["kind"], one["student"], one.get("recipe"), one["seed"]
