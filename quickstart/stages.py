"""Stages that are done once: a finished folder is reused while its inputs stay, a killed one is redone."""

import hashlib
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

MARKER = "stage.json"


@dataclass(frozen=True)
class Cost:
    """seconds: by the clock; cpu_seconds: of the processes that the stage started, summed over cores."""

    seconds: float
    cpu_seconds: float


def digest(*parts: str | Path) -> str:
    """Hash of texts and files; a path stands for the content of that file or of all files below it."""
    total = hashlib.sha256()
    for part in parts:
        files = [part] if isinstance(part, str) else sorted(p for p in [part, *part.rglob("*")] if p.is_file())
        for file in files:
            content = file.encode() if isinstance(file, str) else file.read_bytes()
            total.update(hashlib.sha256(content).digest())
    return total.hexdigest()[:16]


def finished(folder: Path) -> dict[str, Any] | None:
    """What a finished stage left in its marker file: `inputs` and its cost; None when it is not finished."""
    marker = folder / MARKER
    return json.loads(marker.read_text(encoding="utf-8")) if marker.is_file() else None


def stage(folder: Path, title: str, inputs: str, build: Callable[[Path], float | None]) -> Cost:
    """Fill `folder` with `build` unless it was finished from the same inputs; returns the cost, now or then.

    `build` writes into a folder of the same name in `<folder>.partial`, from where it moves when it is complete, and
    returns the CPU seconds of the processes that it started, if any.
    """
    done = finished(folder)
    if done is not None and done["inputs"] == inputs:
        tqdm.write(f"{title}: reused from {folder} (its inputs did not change)")
        return Cost(done["seconds"], done.get("cpu_seconds", 0.0))
    around = folder.with_name(folder.name + ".partial")
    # Under its own name, which the model card takes for the student's.
    partial = around / folder.name
    shutil.rmtree(around, ignore_errors=True)
    partial.mkdir(parents=True)
    started = time.monotonic()
    cpu_seconds = build(partial) or 0.0
    cost = Cost(time.monotonic() - started, cpu_seconds)
    marker = {"inputs": inputs, "seconds": cost.seconds, "cpu_seconds": cpu_seconds}
    (partial / MARKER).write_text(json.dumps(marker), encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    around.rmdir()
    tqdm.write(f"{title}: {cost.seconds:.0f} s, in {folder}")
    return cost
