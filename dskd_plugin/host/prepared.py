"""For `dskd cache build`: a recipe's rows as its run prepares them, by Axolotl's own loaders, without a training."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dskd_plugin.errors import SettingError
from dskd_plugin.host.prompts import load_run, read_recipe
from dskd_plugin.run import Sides


@dataclass(frozen=True)
class Prepared:
    """A resolved recipe and its datasets, by what they are for."""

    sides: Sides
    datasets: dict[str, Any]


def named(train: Any, evaluation: Any) -> dict[str, Any]:
    """Datasets by what they are for, those that there are."""
    every = {"training": train, "validation": evaluation}
    return {name: dataset for name, dataset in every.items() if dataset is not None}


def prepare(path: Path) -> Prepared:
    """Read a recipe and prepare its rows, or find them prepared; ``ValueError`` for what is wrong with it."""
    recipe = read_recipe(path)
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
    sides = run.with_student(load_tokenizer(run.recipe))
    return Prepared(sides, named(found.train_dataset, found.eval_dataset))
