"""One recipe with one seed: its trainings through the `axolotl` command, and its answers to the held-out questions."""

import os
import shutil
import time
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

import yaml

from benchmarks.scarce.students import OWN, STUDENTS
from benchmarks.scarce.table import ROWS, Run, Step
from benchmarks.study import launch, states
from benchmarks.study.runs import environment, read_json, write_json
from quickstart import measure

RESULTS = "results.json"  # of a finished quickstart


def questions(out: Path, student: str, seed: int) -> Path:
    """The folder of the quickstart that has the rows and models of a student and a seed."""
    return out / f"{student}-{seed}"


def result(out: Path, run: Run) -> Path:
    return out / "runs" / f"{run.name}.json"


def make_questions(out: Path, student: str, seed: int) -> None:
    """`python -m quickstart` with this student, unless it has ended; questions and teacher are those of OWN."""
    from quickstart.__main__ import run as quickstart

    folder = questions(out, student, seed)
    if (folder / RESULTS).is_file():
        return
    if student != OWN:
        make_questions(out, OWN, seed)
        for name in ("data", "teacher", "teacher-tuned", "answers"):
            # Links to the files, so that a stage that is done again replaces its own folder alone.
            if not (folder / name).is_dir():
                shutil.copytree(questions(out, OWN, seed) / name, folder / name, copy_function=os.link)
    quickstart(folder, None, seed, tokenizer_of=STUDENTS[student].tokenizer_of)


def finished(out: Path, run: Run) -> bool:
    """Whether the run was made from the same table."""
    file = result(out, run)
    return file.is_file() and read_json(file)["steps"] == [asdict(step) for step in run.steps]


def recipe(step: Step, folder: Path, *, base: str, output: str, seed: int) -> dict[str, Any]:
    """The quickstart's recipe, changed to a step; paths hold in its folder."""
    name = "seqkd" if step.dskd is None else "dskd"
    made: dict[str, Any] = yaml.safe_load((folder / f"{name}.yaml").read_text(encoding="utf-8"))
    if step.dskd is not None:
        made["dskd"] = {"teacher": made["dskd"]["teacher"], **step.dskd}
    made["datasets"] = [
        {"path": path, "type": "chat_template", "field_messages": "messages"} for path in ROWS[step.rows]
    ]
    return made | {
        "base_model": base,
        "output_dir": output,
        # Axolotl names prepared rows after their path; those of one folder are of one seed.
        "dataset_prepared_path": "prepared",
        "dataset_num_proc": 1,
        "dataloader_num_workers": 0,
        "learning_rate": step.rate,
        "micro_batch_size": step.micro_batch,
        "seed": seed,
    }


def work(out: Path, run: Run) -> None:
    """Train step after step, measure the last model, free the disk. Called in a process of its own."""
    from dskd_plugin.host.trainer import on_create

    folder = questions(out, run.student, run.seed)
    # A teacher reads the same rows in every recipe. What a student samples is read once and not kept.
    if not any("on_policy" in (step.dskd or {}) for step in run.steps):
        on_create.append(states.in_folder(folder / "states"))
    base, seconds = "./student", []
    for number, step in enumerate(run.steps, start=1):
        output = f"scarce/{run.recipe}-{number}"
        shutil.rmtree(folder / output, ignore_errors=True)
        made = recipe(step, folder, base=base, output=f"./{output}", seed=run.seed)
        file = folder / f"scarce-{run.recipe}-{number}.yaml"
        file.write_text(yaml.safe_dump(made, sort_keys=False), encoding="utf-8")
        started = time.process_time()
        launch.axolotl(["train", file.name, "--launcher", "python"], folder)
        seconds.append(round(time.process_time() - started, 1))
        base = f"./{output}"
    os.chdir(folder)
    answered = measure.measure(base, Path("data") / "heldout.jsonl", title=run.name)
    found = {
        "steps": [asdict(step) for step in run.steps],
        "bits": [round(one.bits, 3) for one in answered],
        "bytes": [one.bytes for one in answered],
        "right": [int(one.right) for one in answered],
        "cpu_seconds": seconds,
        "environment": environment(),
        "date": date.today().isoformat(),
    }
    write_json(result(out, run), found)
    for number in range(1, len(run.steps) + 1):
        shutil.rmtree(folder / "scarce" / f"{run.recipe}-{number}", ignore_errors=True)
