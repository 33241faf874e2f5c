"""What is kept of the runs: numbers only, one JSON line per run, no prompt and no answer of any benchmark.

The first lines name the documents of each split by their sizes in bytes; a run holds its scores in that order.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.study import data
from benchmarks.study.runs import Run, read_json

SCHEMA = 1
FLAGS = ("exact", "same_as_teacher")
Record = dict[str, Any]


def documents(out: Path, task: str, split: str) -> Record:
    """Bytes of the gold and of the teacher's answer of each document."""
    rows = data.read(out / "data" / f"{task}-{split}.jsonl")
    made: Record = {"kind": "documents", "task": task, "split": split}
    made["gold_bytes"] = [len(row["messages"][-1]["content"].encode()) for row in rows]
    made["source"] = [row["kind"] for row in rows]
    file = out / f"teacher-{task}-{split}.json"
    if file.is_file():
        made["teacher_bytes"] = [len(text.encode()) if text.strip() else 0 for text in read_json(file)]
        made["teacher"] = scores(read_json(out / "teacher-eval" / f"{task}-{split}.json"))
    return made


def scores(found: dict[str, Any]) -> Record:
    """Bits per document (two decimals), right-or-wrong flags, Rouge-L; the text of the replies is left out."""
    made: Record = {}
    for key in ("gold", "teacher"):
        if key in found:
            made[f"{key}_bits"] = [round(pair[0], 2) for pair in found[key]]
    made |= {key: [int(value) for value in found[key]] for key in FLAGS if key in found}
    if "rouge_l" in found:
        made["rouge_l"] = [round(value, 3) for value in found["rouge_l"]]
    return made


def record(run: Run, out: Path, phase: str) -> Record:
    """The record of a run; one that failed has `error` in place of its numbers."""
    folder = run.folder(out)
    made: Record = {
        "kind": "run",
        "schema": SCHEMA,
        "phase": phase,
        "task": run.task,
        "pair": run.pair,
        "method": run.method,
        "ablation": run.ablation,
        "rate": run.rate,
        "seed": run.seed,
    }
    if not (folder / "train.json").is_file():
        return made | {"error": last_line(out / "logs" / f"{run.name}.log")}
    trained = read_json(folder / "train.json")
    made |= {key: trained[key] for key in ("recipe", "environment")}
    made["seconds"] = {key: round(value, 1) for key, value in trained["seconds"].items()}
    if trained.get("memory"):
        made["memory"] = {key: round(value, 2) for key, value in trained["memory"].items()}
    made["curve"] = curve(trained["log"])
    likelihood = folder / "validation-likelihood.json"
    if likelihood.is_file():
        made["validation_bits"] = round(sum(pair[0] for pair in read_json(likelihood)["gold"]), 2)
    for split in ("validation", "heldout"):
        if (folder / f"{split}.json").is_file():
            made[split] = scores(read_json(folder / f"{split}.json"))
    return made


def merged(earlier: list[Record], made: list[Record]) -> list[Record]:
    """The records of a file with those of this folder in place of the same runs; runs that only the file has stay.

    A run that failed here takes no place of a finished one. ValueError where documents of the file are others than
    those of this folder.
    """
    kept = {_key(record): record for record in earlier}
    for record in made:
        key = _key(record)
        before = kept.get(key)
        if record["kind"] == "documents" and before is not None and before["gold_bytes"] != record["gold_bytes"]:
            where = ", ".join(str(part) for part in key[1:] if part is not None)
            raise ValueError(
                f"records: expected the documents of {where} as in the file, got others. Name another file."
            )
        if before is None or "error" not in record:
            kept[key] = record
    return list(kept.values())


def _key(record: Record) -> tuple[Any, ...]:
    names = ("kind", "task", "data", "split", "pair", "method", "setting", "ablation", "rate", "steps", "seed")
    return tuple(record.get(name) for name in names)


def gradients(run: Run, file: Path) -> Record:
    """Norms and cosines of the terms' gradients at the probed steps."""
    found = [{key: round(value, 4) for key, value in probe.items()} for probe in data.read(file)]
    where = {"task": run.task, "pair": run.pair, "method": run.method, "rate": run.rate, "seed": run.seed}
    return {"kind": "gradients", **where, "probes": found}


def curve(log: list[dict[str, Any]]) -> dict[str, list[float]]:
    """Logged series by name: steps, loss, gradient norm and the plugin's terms and rates."""
    entries = [entry for entry in log if "loss" in entry]
    names = sorted({key for entry in entries for key in entry if key.startswith("dskd/")} | {"loss", "grad_norm"})
    made = {"step": [float(entry["step"]) for entry in entries]}
    return made | {name: [round(float(entry[name]), 4) for entry in entries if name in entry] for name in names}


def last_line(log: Path) -> str:
    """What a failed run said last, without paths of this machine."""
    if not log.is_file():
        return "no log"
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return " ".join(word for word in (lines[-1] if lines else "empty log").split() if not word.startswith("/"))[:300]


def write(file: Path, records: Iterable[Record]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(made, ensure_ascii=False, separators=(",", ":")) + "\n" for made in records)
    file.write_text(text, encoding="utf-8")


def read(file: Path) -> list[Record]:
    """The records of a file; ValueError for another schema."""
    found = data.read(file)
    for made in found:
        if made["kind"] == "run" and made["schema"] != SCHEMA:
            raise ValueError(
                f"{file}: expected records of schema {SCHEMA}, got schema {made['schema']}. "
                "Write them again with `python -m benchmarks.study records`."
            )
    return found
