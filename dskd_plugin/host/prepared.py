"""For `dskd cache build`: a recipe's rows as its run prepares them, by Axolotl's own loaders, without a training."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dskd_plugin.columns import dataset_of
from dskd_plugin.errors import SettingError
from dskd_plugin.host.prompts import checked_recipe, load_run
from dskd_plugin.run import Sides


@dataclass(frozen=True)
class Prepared:
    """A resolved recipe for one of its teachers, and its datasets, by what they are for."""

    sides: Sides
    datasets: dict[str, Any]


def named(train: Any, evaluation: Any) -> dict[str, Any]:
    """Datasets by what they are for, those that there are."""
    every = {"training": train, "validation": evaluation}
    return {name: dataset for name, dataset in every.items() if dataset is not None}


def prepare(path: Path) -> list[Prepared]:
    """Read a recipe and prepare its rows, or find them prepared, for each teacher.

    ``ValueError`` for what is wrong with the recipe.
    """
    recipe = checked_recipe(path, unread=("output_dir", "lora_model_dir"))
    run = load_run(path, recipe)
    if not run.method.needs_teacher:
        raise SettingError(
            "dskd.method",
            "one that compares states of the teacher",
            f"{run.settings.method!r}",
            "Choose another method.",
        )
    from axolotl.common.datasets import load_datasets
    from axolotl.loaders import load_tokenizer

    found = load_datasets(cfg=run.recipe)
    both = found.train_dataset, found.eval_dataset
    return [
        Prepared(sides, named(*(dataset_of(dataset, number) for dataset in both)))
        for number, sides in enumerate(run.sides(load_tokenizer(run.recipe)), start=1)
    ]
