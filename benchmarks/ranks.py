"""`python -m benchmarks.ranks`: what a rank of a run holds and sends, with one rank and with several.

The real `axolotl train` under torchrun, DDP over gloo on CPU processes with random weights. Held: the largest resident
memory of a rank, with the teacher and with `method: sft`, which loads none. Sent: bytes through the loopback device of
a network of its own, in the steps beyond the first two, each byte counted once. Linux; needs `unshare` and `ip`.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks import results, tiny
from benchmarks.options import parser_of
from benchmarks.results import Row

MIB = 2**20
ENGINES = Path(__file__).parents[1] / "tests" / "e2e" / "cpu_engines.py"
FEW = 2
# A network of its own, in which the command runs and whose loopback device then says what has gone through it.
ALONE = 'ip link set lo up && "$@" >"$LOG" 2>&1 && grep "lo:" /proc/net/dev >"$COUNTED"'
SENT = 8  # of the numbers behind the device's name: bytes sent


def made(folder: Path, teacher_layers: int) -> dict[str, Any]:
    """A recipe whose teacher is most of a rank's weights."""
    student_tokenizer, teacher_tokenizer = tiny.byte_level_tokenizer(420, 1), tiny.sentencepiece_tokenizer(460, 2)
    rows = tiny.conversations(64, 3)
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    pair = {
        "student": tiny.save_model(folder / "student", student_tokenizer, width=256, num_hidden_layers=4),
        "teacher": tiny.save_model(
            folder / "teacher", teacher_tokenizer, "qwen3", width=512, num_hidden_layers=teacher_layers, seed=1
        ),
        "data": str(folder / "train.jsonl"),
    }
    return {**tiny.small_recipe(pair, folder), "gradient_accumulation_steps": 1, "save_only_model": True}


def run(recipe: dict[str, Any], folder: Path, ranks: int, steps: int) -> tuple[int, int]:
    """Train; (largest resident bytes of a rank, bytes sent by all ranks)."""
    file, log, counted = folder / "recipe.yaml", folder / "log", folder / "counted"
    file.write_text(yaml.safe_dump({**recipe, "max_steps": steps, "save_steps": steps}), encoding="utf-8")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    variables = {**os.environ, "AXOLOTL_DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    child = os.posix_spawnp(
        "unshare",
        ["unshare", "--map-root-user", "--net", "sh", "-c", ALONE, "sh", *torchrun, str(ENGINES), str(file)],
        {**variables, "LOG": str(log), "COUNTED": str(counted)},
    )
    _, status, used = os.wait4(child, 0)
    if status != 0:
        raise RuntimeError(log.read_text(errors="replace")[-2000:] if log.exists() else "unshare and ip are needed")
    return 1024 * used.ru_maxrss, int(counted.read_text().split(":")[1].split()[SENT])


def main(words: list[str] | None = None) -> None:
    parser = parser_of("ranks", __doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--teacher-layers", type=int, default=24)
    options = parser.parse_args(words)
    found = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        recipe = made(folder, options.teacher_layers)
        size = (folder / "teacher" / "model.safetensors").stat().st_size
        trained = (folder / "student" / "model.safetensors").stat().st_size + 4 * 256 * 512  # and the projector
        for ranks in options.ranks:
            with_teacher, few = run(recipe, folder, ranks, FEW)
            with_teacher, many = run(recipe, folder, ranks, options.steps)
            alone, _ = run(
                {**recipe, "dskd": {"method": "sft", "teacher": recipe["dskd"]["teacher"]}}, folder, ranks, FEW
            )
            sent = (many - few) / (options.steps - FEW) / ranks
            expected = 2 * (ranks - 1) / ranks * trained
            held = f"{size / MIB:.0f} MiB of teacher"
            more = with_teacher - alone
            found += [
                Row(f"{ranks} ranks, MiB of a rank", f"{with_teacher / MIB:.0f}", "", ""),
                Row(f"{ranks} ranks, MiB of a rank beyond sft", f"{more / MIB:.0f}", held, f"{more / size:.2f}"),
            ]
            against = f"2 (ranks - 1) / ranks x {trained / MIB:.2f} MiB of gradients"
            ratio = f"{sent / expected:.3f}" if expected else ""
            found.append(Row(f"{ranks} ranks, MiB sent by a rank in a step", f"{sent / MIB:.3f}", against, ratio))
            print(found[-3:], flush=True)
    setting = f"student 4 x 256, teacher {options.teacher_layers} x 512, float32, DDP over gloo"
    command = results.command_of("benchmarks.ranks", words)
    results.append("ranks", torch.device("cpu"), setting, found, command, options.results)


if __name__ == "__main__":
    main()
