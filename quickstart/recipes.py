"""The recipes of the quickstart in its output folder, and the logs that their runs leave."""

import json
from pathlib import Path
from typing import Any

import yaml
from transformers import AutoConfig

from dskd_plugin.folders import checkpoints

Log = list[dict[str, Any]]


def copy(source: Path, out: Path, *, teacher: str | None) -> None:
    """Put the recipes into `out`, where their paths hold; another teacher is written into teacher.yaml."""
    for file in sorted(source.glob("*.yaml")):
        text = file.read_text(encoding="utf-8")
        if file.name == "teacher.yaml" and teacher is not None:
            recipe = yaml.safe_load(text)
            layers = AutoConfig.from_pretrained(teacher).get_text_config().num_hidden_layers
            recipe["base_model"] = teacher
            # Axolotl matches from the start of a name and takes the dots literally.
            recipe["unfrozen_parameters"] = [f"[a-z_.]+.{i}." for i in range(layers * 2 // 3, layers)]
            text = yaml.safe_dump(recipe, sort_keys=False)
        (out / file.name).write_text(text, encoding="utf-8")


def _state(run: Path) -> dict[str, Any]:
    states = [file for path in checkpoints(run) if (file := path / "trainer_state.json").is_file()]
    if not states:
        raise ValueError(f"{run}: expected a checkpoint with trainer_state.json, got none. Set saves_per_epoch: 1.")
    state: dict[str, Any] = json.loads(states[-1].read_text(encoding="utf-8"))
    return state


def log_of(run: Path) -> Log:
    """The logged entries of a finished run, from its last checkpoint."""
    log: Log = _state(run)["log_history"]
    return log


def best_of(run: Path) -> tuple[int, float]:
    """Step and loss of the checkpoint that was best on the validation rows; ValueError when none was chosen."""
    state = _state(run)
    step, loss = state.get("best_global_step"), state.get("best_metric")
    if step is None or loss is None:
        raise ValueError(
            f"{run}: expected a run that chose its best checkpoint, got none chosen. "
            "Set test_datasets and load_best_model_at_end: true in its recipe."
        )
    return int(step), float(loss)


def series(log: Log, key: str) -> tuple[list[float], list[float]]:
    """Steps and values of the log entries that hold `key`."""
    entries = [entry for entry in log if key in entry]
    return [float(entry["step"]) for entry in entries], [float(entry[key]) for entry in entries]


def mean_of(log: Log, key: str, *, part: slice = slice(None)) -> float:
    """Mean of a logged number over the chosen entries; ValueError when it was never logged."""
    values = series(log, key)[1][part]
    if not values:
        raise ValueError(
            f"log of the DSKD run: expected {key!r}, got none: the run was not a distillation. "
            "Check `plugins: [dskd]` and the `dskd:` block of dskd.yaml."
        )
    return sum(values) / len(values)
