"""Stages that are done once: a finished folder is reused while its inputs stay, a killed one is redone."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

MARKER = "stage.json"


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
    """What a finished stage left in its marker file: `inputs` and `seconds`; None when it is not finished."""
    marker = folder / MARKER
    return json.loads(marker.read_text(encoding="utf-8")) if marker.is_file() else None


def stage(folder: Path, title: str, inputs: str | None, build: Callable[[Path], None]) -> float:
    """Fill `folder` with `build` unless it was finished from the same inputs (None: always build).

    `build` writes into a folder beside it, which takes the name only when it is complete. Returns the seconds
    that building took, now or then.
    """
    done = finished(folder)
    if done is not None and inputs is not None and done["inputs"] == inputs:
        print(f"{title}: reused from {folder} (its inputs did not change)", flush=True)
        return float(done["seconds"])
    print(f"{title} ...", flush=True)
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    started = time.monotonic()
    build(partial)
    seconds = time.monotonic() - started
    (partial / MARKER).write_text(json.dumps({"inputs": inputs, "seconds": seconds}), encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    print(f"{title}: {seconds:.0f} s, in {folder}", flush=True)
    return seconds


def axolotl_command() -> str:
    """The `axolotl` program beside this Python, else on PATH; ValueError when there is none."""
    found = shutil.which("axolotl", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    if found is None:
        raise ValueError(
            f"axolotl: expected the command beside {sys.executable} or on PATH, found none. "
            "Run `pip install -e '.[train]'`, or start the quickstart with `make quickstart`."
        )
    return found


def axolotl_train(recipe: Path, output: Path, log: Path, *, seed: int, offline: bool) -> None:
    """`axolotl train RECIPE` in the recipe's folder, its output in `log`; RuntimeError when it fails."""
    command = [axolotl_command(), "train", recipe.name, "--launcher", "python", "--seed", str(seed)]
    command += ["--output-dir", str(output.resolve())]
    environment = {"AXOLOTL_DO_NOT_TRACK": "1", "TOKENIZERS_PARALLELISM": "false"} | os.environ
    if offline:
        environment |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    log.parent.mkdir(parents=True, exist_ok=True)
    print(f"  axolotl train {recipe}   (log: {log})", flush=True)
    with (
        log.open("w", encoding="utf-8") as sink,
        subprocess.Popen(command, cwd=recipe.parent, env=environment, stdout=sink, stderr=subprocess.STDOUT) as run,
    ):
        try:
            _follow(run, log)
        except BaseException:
            run.terminate()
            raise
    if run.returncode != 0:
        last = "\n".join(_lines(log)[-15:])
        raise RuntimeError(
            f"axolotl train {recipe}: expected exit code 0, got {run.returncode}. Read {log}; it ends with:\n{last}"
        )


def _lines(log: Path) -> list[str]:
    text = log.read_text(encoding="utf-8", errors="replace")
    return [line.strip() for line in re.split(r"[\r\n]+", text) if line.strip()]


def _follow(run: "subprocess.Popen[bytes]", log: Path) -> None:
    while run.poll() is None:
        try:
            run.wait(timeout=5)
        except subprocess.TimeoutExpired:
            steps = re.findall(r"\| (\d+/\d+) \[", log.read_text(encoding="utf-8", errors="replace")[-4000:])
            if steps and sys.stdout.isatty():
                print(f"\r  step {steps[-1]} ", end="", flush=True)
    if sys.stdout.isatty():
        print("\r", end="")
