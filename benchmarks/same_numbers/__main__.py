"""`python -m benchmarks.same_numbers OLD NEW`: whether two checkouts train alike, bit for bit.

Every run of the table is trained by both checkouts from the same tiny models, and some are trained on by the new one
from a checkpoint of the old one. Compared are the logged loss, gradient norm and terms of each step, those of each
evaluation, and all tensors of the saved student and its projectors. Exit code 1 where something differs.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file

from benchmarks.same_numbers.table import RESUMED, runs
from benchmarks.tiny import make_pair, small_recipe

WORKER = Path(__file__).with_name("worker.py")
# Entries of a step that are times, not numbers of the training.
NO_NUMBERS = ("runtime", "per_second", "memory", "seconds", "tokens")


class Checkout:
    """A checkout and the process that trains with it."""

    def __init__(self, root: Path) -> None:
        path = os.pathsep.join((str(root), str(root / "eval")))
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        command = [sys.executable, str(WORKER)]
        environment = {**os.environ, "PYTHONPATH": path}
        self._worker = subprocess.Popen(command, env=environment, text=True, cwd="/", **pipes)
        loaded = Path(self._answer())
        if root not in loaded.parents:
            raise ValueError(f"{root}: expected a checkout with dskd_plugin/, got the plugin from {loaded.parent}.")

    def _answer(self) -> Any:
        line = self._worker.stdout.readline()  # type: ignore[union-attr]
        if not line:
            raise RuntimeError(f"{WORKER}: ended with {self._worker.wait()} before it answered")
        return json.loads(line)

    def train(self, recipe: dict[str, Any]) -> int:
        out = Path(recipe["output_dir"])
        file = out.parent / f"{out.name}.yaml"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
        order = {"recipe": str(file), "log": str(out.parent / f"{out.name}.log")}
        print(json.dumps(order), file=self._worker.stdin, flush=True)
        return int(self._answer())


def recipe_of(changes: dict[str, Any], pair: dict[str, str], folder: Path) -> dict[str, Any]:
    changes = dict(changes)
    teacher = {"model": pair[changes.pop("teacher")], "dtype": "float32"}
    block = {"teacher": teacher, **changes.pop("dskd")}
    return {**small_recipe(pair, folder), **changes, "dskd": block}


def history(out: Path) -> list[dict[str, float]]:
    """The numbers of each logged step and evaluation."""
    last = max(out.glob("checkpoint-*/trainer_state.json"), key=lambda file: int(file.parent.name.split("-")[1]))
    entries = json.loads(last.read_text(encoding="utf-8"))["log_history"]
    found = []
    for entry in entries:
        found.append({key: value for key, value in entry.items() if not any(word in key for word in NO_NUMBERS)})
    return found


def tensors(out: Path) -> dict[str, torch.Tensor]:
    """All tensors that the run saved, by file and name."""
    found = {}
    for file in sorted(out.glob("*.safetensors")):
        found |= {f"{file.name}: {name}": value for name, value in load_file(file).items()}
    return found


def differences(old: Path, new: Path) -> list[str]:
    """What two finished runs differ in; empty where they are the same bit for bit."""
    found = []
    ours, theirs = history(new), history(old)
    if len(ours) != len(theirs):
        found.append(f"{len(theirs)} and {len(ours)} log entries")
    for before, after in zip(theirs, ours, strict=False):
        for key in sorted(before.keys() & after.keys()):
            if before[key] != after[key]:
                found.append(f"step {before.get('step')} {key}: {before[key]!r} and {after[key]!r}")
    saved, expected = tensors(new), tensors(old)
    if saved.keys() != expected.keys():
        found.append(f"saved tensors: {sorted(saved.keys() ^ expected.keys())}")
    for name in sorted(saved.keys() & expected.keys()):
        if not torch.equal(saved[name], expected[name]):
            found.append(f"{name}: by at most {(saved[name] - expected[name]).abs().max():.2e}")
    return found


def compare(
    name: str, changes: dict[str, Any], pair: dict[str, str], sides: dict[str, Checkout], to: Path
) -> list[str]:
    """Train one run with both checkouts and say what differs."""
    recipes = {side: recipe_of(changes, pair, to / side / name) for side in sides}
    codes = {side: sides[side].train(recipe) for side, recipe in recipes.items()}
    if any(codes.values()):
        failed = [f"{side} ended with {code}, see {to / side / name}/out.log" for side, code in codes.items() if code]
        return failed
    found = differences(*(Path(recipes[side]["output_dir"]) for side in ("old", "new")))
    if name in RESUMED:
        out = Path(recipes["old"]["output_dir"])
        on = {**recipes["old"], "output_dir": str(to / "new" / name / "resumed")}
        code = sides["new"].train({**on, "resume_from_checkpoint": str(out / "checkpoint-2")})
        again = [f"ended with {code}"] if code else differences(out, Path(on["output_dir"]))
        found += [f"resumed from a checkpoint of the old: {line}" for line in again]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.same_numbers", description=__doc__.splitlines()[0])
    parser.add_argument("old", type=Path, help="checkout before the change, e.g. a git worktree")
    parser.add_argument("new", type=Path, help="checkout after the change")
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=list(runs()), help="only these runs")
    parser.add_argument("--out", type=Path, help="keep recipes, logs and models here (default: a temporary folder)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        to = (options.out or Path(temporary)).resolve()
        (to / "pair").mkdir(parents=True, exist_ok=True)
        pair = make_pair(to / "pair")
        sides = {"old": Checkout(options.old.resolve()), "new": Checkout(options.new.resolve())}
        different = 0
        for name, changes in runs().items():
            if options.only and name not in options.only:
                continue
            found = compare(name, changes, pair, sides, to)
            different += bool(found)
            resumed = " (also resumed)" if name in RESUMED else ""
            print(f"{name:20s} {'; '.join(found[:3]) if found else 'the same' + resumed}", flush=True)
    print("everything is the same" if not different else f"{different} runs differ")
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
