"""Where measured numbers go: one row of results.csv each, with what is needed to measure it again."""

from __future__ import annotations

import csv
import datetime
import os
import platform
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

RESULTS = Path(__file__).with_name("results.csv")
COLUMNS = ("date", "commit", "benchmark", "device", "setting", "metric", "value", "baseline", "ratio", "command")


@dataclass(frozen=True)
class Row:
    """One number. baseline: what it is compared with, by name; ratio: value / the baseline's value."""

    metric: str
    value: str
    baseline: str = ""
    ratio: str = ""


def append(
    benchmark: str, device: torch.device, setting: str, rows: list[Row], command: list[str], to: Path = RESULTS
) -> None:
    """Print the rows and add them to the file. command: as it was typed, without the interpreter's path."""
    new = not to.exists()
    fixed = (datetime.date.today().isoformat(), commit(), benchmark, device_name(device), setting)
    with to.open("a", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        if new:
            writer.writerow(COLUMNS)
        for row in rows:
            against = f"{row.ratio} x {row.baseline}" if row.ratio else row.baseline
            print(f"{row.metric:>44} {row.value:>12} {against}", flush=True)
            writer.writerow([*fixed, row.metric, row.value, row.baseline, row.ratio, shlex.join(command)])


def command_of(module: str, words: list[str] | None = None) -> list[str]:
    """The command line of a benchmark that runs as a module; a results file of its own is left out.

    words: its arguments, None for those of this process.
    """
    words = sys.argv[1:] if words is None else words
    if "--results" in words:
        at = words.index("--results")
        words = words[:at] + words[at + 2 :]
    return ["python", "-m", module, *words]


def commit() -> str:
    """Short name of the commit that runs, with a + where files of it are changed."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=RESULTS.parent, capture_output=True, text=True, check=False)
        return done.stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", "..", ":!results.csv")
    return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")


def device_name(device: torch.device) -> str:
    """What the device calls itself; for a processor with the number of threads in use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text(encoding="utf-8").splitlines()
        names = [line.split(":", 1)[1].strip() for line in lines if "model name" in line]
        vector = "" if any("avx512f" in line for line in lines if line.startswith("flags")) else ", no AVX-512"
        model = f"{names[0]}{vector}" if names else model
    return f"{model}, {torch.get_num_threads()} of {os.cpu_count()} threads"
