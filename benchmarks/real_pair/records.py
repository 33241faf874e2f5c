"""What is kept of the runs: numbers only, one JSON line per run; the first lines hold the documents' sizes in bytes."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.real_pair.measures import HELDOUT, MEASURES, NEWLINE, PROGRAMS
from benchmarks.real_pair.runs import Place
from benchmarks.real_pair.table import BASE, DATA_SETS, Run, block
from benchmarks.study.data import read as read_lines
from benchmarks.study.records import Record, curve, last_line
from benchmarks.study.records import write as write_lines
from benchmarks.study.runs import read_json

SCHEMA = 1


def collect(found: list[Run], place: Place) -> list[Record]:
    """The documents of every data set, then whatever has run, failures included."""
    made: list[Record] = []
    for name in DATA_SETS:
        file = place.out / "data" / f"{name}-heldout.jsonl"
        if file.is_file():
            sizes = [len(row["messages"][-1]["content"].encode()) for row in read_lines(file)]
            made.append({"kind": "documents", "data": name, "gold_bytes": sizes})
    return made + [made_of for run in found if (made_of := record(run, place)) is not None]


def record(run: Run, place: Place) -> Record | None:
    """The record of a run, with `error` where it failed; None when it has not run."""
    folder = place.folder(run)
    measured = [kind for kind in MEASURES if (folder / f"{kind}.json").is_file()]
    trained = (folder / "train.json").is_file()
    log = place.out / "logs" / f"{run.name}.log"
    if not (measured or trained or log.is_file()):
        return None
    made: Record = {"kind": "run", "schema": SCHEMA, "pair": run.pair, "data": run.data, "setting": run.setting}
    if run.setting != BASE:
        made |= {"rate": run.rate, "steps": run.steps, "seed": run.seed}
        if not trained:
            return made | {"error": last_line(log)}
        facts = read_json(folder / "train.json")
        made |= {key: facts[key] for key in ("recipe", "settings", "environment", "date")}
        made["seconds"] = {key: round(value, 1) for key, value in facts["seconds"].items()}
        made["curve"] = curve(facts["log"])
        # A plugin without the setting behaves as the row says, and the recipe cannot say so.
        made["implied"] = sorted(block(run.setting, run.data).keys() - facts["recipe"]["dskd"].keys())
    return made | {kind: scores(kind, read_json(folder / f"{kind}.json")) for kind in measured}


def scores(kind: str, found: dict[str, Any]) -> Record:
    """Bits per document, probabilities per place, flags per program; no text."""
    made: Record = {"date": found["date"], "cpu_seconds": round(found["cpu_seconds"], 1)}
    if kind == HELDOUT:
        made["gold_bits"] = [round(pair[0], 2) for pair in found["gold"]]
    if kind == NEWLINE:
        made["probability"] = [float(f"{value:.3g}") for value in found["probability"]]
    if kind in PROGRAMS:
        made |= {key: found[key] for key in ("passed", "lost")}
    return made


def write(file: Path, records: Iterable[Record]) -> None:
    write_lines(file, records)


def read(file: Path) -> list[Record]:
    """The records of a file; ValueError for another schema."""
    found: list[Record] = read_lines(file)
    for made in found:
        if made["kind"] == "run" and made["schema"] != SCHEMA:
            raise ValueError(
                f"{file}: expected records of schema {SCHEMA}, got schema {made['schema']}. "
                "Write them again with `python -m benchmarks.real_pair records`."
            )
    return found
