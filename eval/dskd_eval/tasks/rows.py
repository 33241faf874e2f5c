"""The rows of a task: those to answer, and those that may serve as shots."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

from dskd_eval import data
from dskd_eval.data import LoadedData
from dskd_eval.schema import DataRecord
from dskd_eval.tasks import planning
from dskd_eval.tasks.spec import TaskSpec


@dataclass(frozen=True)
class TaskData:
    """Rows of a task: those to answer, and those that may serve as shots."""

    test: LoadedData | None
    shots: LoadedData | None

    def record(self) -> dict[str, DataRecord]:
        splits = {"test": self.test, "shots": self.shots}
        return {name: loaded.record() for name, loaded in splits.items() if loaded is not None}


def load_data(spec: TaskSpec, directory: Path | None, num_fewshot: int | None = None) -> TaskData:
    """Rows of a task, checked. A task with lm-eval's own `dataset_path` loads its data itself.

    num_fewshot: as for `planning.plan`; rows for shots are read only where some style uses them.
    """
    shots = any(planning.plan(spec, chat=chat, num_fewshot=num_fewshot).shots for chat in (False, True))
    splits = {split: sources for split, sources in spec.data.items() if split == "test" or shots}
    loaded = {split: data.load(sources, directory) for split, sources in splits.items()}
    return TaskData(loaded.get("test"), loaded.get("shots"))


def choose_documents(total: int, limit: int | None, seed: int) -> list[int]:
    """Sorted ids of a seeded random subset; a larger limit contains a smaller one."""
    if limit is None or limit >= total:
        return list(range(total))
    order = list(range(total))
    random.Random(seed).shuffle(order)
    return sorted(order[:limit])
