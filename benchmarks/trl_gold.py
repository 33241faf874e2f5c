"""`python -m benchmarks.trl_gold`: a step of this plugin beside a step of TRL's GOLD trainer, on the same rows.

GOLD (hybrid loss, off-policy, its own defaults) is what one would take without this plugin for two tokenizers. Each
candidate trains in a process of its own, as its users start it, twice over the same rows in float32 on the CPU: the
second pass is timed, in CPU seconds from the end of a step to the end of the next, and the largest resident memory of
the process is read. Without models the pair has random weights.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks import results, tiny
from benchmarks.options import parser_of
from benchmarks.plan import MIB, SIZES, pair, resident
from benchmarks.results import Row

TRL = "TRL GOLD"
# Blocks of the recipe, without the teacher.
OURS: dict[str, dict[str, Any]] = {
    "dskd": {},
    "dskd, both spaces": {"spaces": "both"},
    "overlap_kd": {"method": "overlap_kd"},
    "csd, balanced": {"method": "csd", "kd_weight": "balanced"},
    "gold of this plugin": {"method": "gold"},
}
PASSES = 2
ROWS = 4  # of a step


# -- in the process of a candidate -------------------------------------------------------------------------------------


def clock(file: Path) -> Any:
    """A callback that keeps this process's CPU seconds at the end of every step."""
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.seconds: list[float] = []

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            self.seconds.append(time.process_time())

        def on_train_end(self, *args: Any, **kwargs: Any) -> None:
            file.write_text(json.dumps(self.seconds), encoding="utf-8")

    return Clock()


def train_here(name: str, folder: Path) -> None:
    """Train the recipe of the folder; leaves `seconds.json`."""
    file = folder / "seconds.json"
    if name == TRL:
        train_gold(yaml.safe_load((folder / "recipe.yaml").read_text(encoding="utf-8")), file)
        return
    from benchmarks.study.launch import axolotl
    from dskd_plugin.host.trainer import on_create

    on_create.append(lambda trainer: trainer.add_callback(clock(file)))
    axolotl(["train", "recipe.yaml", "--launcher", "python"], folder)


def train_gold(recipe: dict[str, Any], file: Path) -> None:
    """The same training by TRL."""
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl.experimental.gold import GOLDConfig, GOLDTrainer

    names = recipe["base_model"], recipe["dskd"]["teacher"]["model"]
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32, attn_implementation="sdpa") for name in names
    )
    rows = load_dataset("json", data_files=recipe["datasets"][0]["path"], split="train").select_columns(["messages"])
    arguments = GOLDConfig(
        output_dir=recipe["output_dir"],
        use_uld_loss=True,
        uld_use_hybrid_loss=True,
        lmbda=0.0,
        teacher_tokenizer_name_or_path=names[1],
        max_length=recipe["sequence_len"],
        max_completion_length=recipe["sequence_len"] // 2,  # of sampled answers alone: there are none
        per_device_train_batch_size=recipe["micro_batch_size"],
        gradient_accumulation_steps=1,
        num_train_epochs=recipe["num_epochs"],
        learning_rate=recipe["learning_rate"],
        optim=recipe["optimizer"],
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
    )
    trainer = GOLDTrainer(
        model=student,
        teacher_model=teacher,
        args=arguments,
        train_dataset=rows,
        processing_class=AutoTokenizer.from_pretrained(names[0]),
        callbacks=[clock(file)],
    )
    trainer.train()


# -- the comparison ----------------------------------------------------------------------------------------------------


def run(name: str, recipe: dict[str, Any], folder: Path) -> tuple[float, int]:
    """CPU seconds of a step of the second pass, and bytes."""
    block = {**OURS.get(name, {}), "teacher": recipe["dskd"]["teacher"]}
    (folder / "recipe.yaml").write_text(yaml.safe_dump({**recipe, "dskd": block}), encoding="utf-8")
    most = resident([sys.executable, "-m", "benchmarks.trl_gold", "--alone", name, str(folder)])
    ends = json.loads((folder / "seconds.json").read_text(encoding="utf-8"))
    steps = len(ends) // PASSES
    return (ends[-1] - ends[steps - 1]) / (len(ends) - steps), most


def main(words: list[str] | None = None) -> None:
    parser = parser_of("trl_gold", __doc__)
    parser.add_argument("--alone", nargs=2, metavar=("NAME", "DIR"), help="train one candidate in this process")
    parser.add_argument("--teacher", help="folder of a model; with --student and --rows")
    parser.add_argument("--student", help="folder of a model")
    parser.add_argument("--rows", type=Path, help="JSON lines with `messages`")
    parser.add_argument("--size", choices=list(SIZES), default="small", help="of random models")
    parser.add_argument("--steps", type=int, default=4, help="of one pass over the rows")
    parser.add_argument("--methods", nargs="+", choices=list(OURS), default=list(OURS))
    options = parser.parse_args(words)
    if options.alone:
        train_here(options.alone[0], Path(options.alone[1]))
        return
    given = [options.teacher, options.student, options.rows]
    if any(given) and not all(given):
        parser.error("--teacher, --student and --rows: expected all three or none. Add what is missing.")
    found = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if all(given):
            sides = {"student": options.student, "teacher": options.teacher}
            places = {side: str(Path(place).resolve()) for side, place in sides.items()}
            recipe = tiny.small_recipe(places | {"data": str(folder / "train.jsonl")}, folder)
            recipe |= {"micro_batch_size": ROWS, "sequence_len": 1024, "learning_rate": 1e-5}
            rows, what = options.rows, " -> ".join(Path(sides[side]).name for side in ("teacher", "student"))
        else:
            # GOLD takes tokenizers alone that are byte-level.
            recipe, tokens = pair(folder, options.size, ROWS, 512, tiny.byte_level_tokenizer(460, 2))
            rows = Path(recipe["datasets"][0]["path"])
            what = f"{options.size}: {SIZES[options.size][1]} -> {SIZES[options.size][0]}, {tokens} tokens a row"
        kept = rows.read_text(encoding="utf-8").splitlines(keepends=True)[: ROWS * options.steps]
        Path(recipe["datasets"][0]["path"]).write_text("".join(kept), encoding="utf-8")
        recipe |= {"num_epochs": PASSES, "gradient_accumulation_steps": 1, "save_strategy": "no"}
        recipe.pop("max_steps", None)
        recipe.pop("save_steps", None)
        base, most = run(TRL, recipe, folder)
        found += [Row(f"{TRL}, s a step", f"{base:.3g}"), Row(f"{TRL}, resident MiB", f"{most / MIB:.0f}")]
        for method in options.methods:
            seconds, size = run(method, recipe, folder)
            found.append(Row(f"{method}, s a step", f"{seconds:.3g}", TRL, f"{seconds / base:.3f}"))
            found.append(Row(f"{method}, resident MiB", f"{size / MIB:.0f}", TRL, f"{size / most:.3f}"))
    setting = f"{what}; {options.steps} steps of {ROWS} rows, float32"
    command = results.command_of("benchmarks.trl_gold", words)
    results.append(
        "trl_gold",
        torch.device("cpu"),
        setting,
        found,
        # Names in place of paths, which hold on one machine alone.
        [Path(word).name if Path(word).exists() else word for word in command],
        options.results,
    )


if __name__ == "__main__":
    os.environ.setdefault("AXOLOTL_DO_NOT_TRACK", "1")
    main()
