"""The model card of a student: base, teacher, method, data and settings, and no path of the machine it was made on."""

import os
import re
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCardData

from dskd_plugin.host.summary import changes
from dskd_plugin.methods import method_of
from dskd_plugin.whole_file import write_whole

HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
SIZES = (
    ("num_epochs", "epochs"),
    ("learning_rate", "learning rate"),
    ("micro_batch_size", "micro batch"),
    ("gradient_accumulation_steps", "gradient accumulation"),
    ("sequence_len", "sequence length"),
    ("seed", "seed"),
)


def public_name(value: str) -> str:
    """``value`` without the folders above it where it is a path of this machine."""
    path = value.removeprefix("file://")
    absolute = os.path.isabs(path) or path.startswith("~") or bool(re.match(r"[A-Za-z]:[\\/]", path))
    is_path = absolute and "\n" not in path and (re.search(r"[/\\].*[/\\]", path) or os.path.exists(path))
    return re.split(r"[/\\]", path.rstrip("/\\"))[-1] if is_path else value


def public(recipe: Any) -> Any:
    """The recipe with every path of this machine reduced to the name of its file or folder."""
    if isinstance(recipe, dict):
        return {key: public(value) for key, value in recipe.items()}
    if isinstance(recipe, list):
        return [public(value) for value in recipe]
    return public_name(recipe) if isinstance(recipe, str) else recipe


def card(trainer: Any, recipe: dict[str, Any], settings: Any) -> str:
    """The text of README.md."""
    base, name = str(recipe["base_model"]), public_name(os.path.abspath(trainer.args.output_dir))
    paths = [str(entry["path"]) for entry in recipe.get("datasets") or ()]
    data = ModelCardData(
        base_model=base if _on_hub(base) else None,
        datasets=[path for path in paths if _on_hub(path)] or None,
        library_name="peft" if recipe.get("adapter") else "transformers",
        tags=["axolotl", "dskd", "generated_from_trainer"],
    )
    distilled = method_of(settings).needs_teacher
    teachers = [one.teacher for one in settings.each]
    named = " and ".join(f"`{public_name(teacher.model)}`" for teacher in teachers)
    by = f"distilled from {named}" if distilled else "fine-tuned"
    facts = {
        "base": f"`{public_name(base)}`",
        "teacher": _teachers(teachers, settings.weights) if distilled else "none (method: sft)",
        "method": _method(settings),
        "data": ", ".join(f"`{public_name(path)}`" for path in paths),
        "training": f"{trainer.state.global_step} steps; "
        + ", ".join(f"{title} {recipe[key]}" for key, title in SIZES if recipe.get(key) is not None),
        "first and last logged": ", ".join(
            f"{key} {first:.3f} -> {last:.3f}" for key, (first, last) in changes(trainer.state.log_history).items()
        ),
    }
    rows = [f"| {key} | {value} |" for key, value in facts.items() if value]
    versions = ", ".join(f"{package} {version(package)}" for package in ("axolotl", "transformers", "torch"))
    return "\n".join(
        [
            f"---\n{data.to_yaml()}\n---\n",
            f"# {name}\n",
            f"`{public_name(base)}`, {by} with dskd inside [Axolotl](https://github.com/axolotl-ai-cloud/axolotl).\n",
            "| | |\n| --- | --- |",
            *rows,
            "\n## Recipe\n\nPaths are reduced to the names of files and folders.\n",
            f"```yaml\n{yaml.safe_dump(public(recipe), sort_keys=False, allow_unicode=True)}```\n",
            f"Made with {versions} and dskd {_own_version()}.\n",
        ]
    )


def write(trainer: Any) -> None:
    """README.md in the output folder, from the recipe as the user asked for it."""
    from axolotl.cli.args import TrainerCliArgs

    # Axolotl puts these beside the settings of the recipe.
    of_command = {"axolotl_config_path", *(field.name for field in fields(TrainerCliArgs))}
    recipe = {key: value for key, value in trainer.run.asked.items() if key not in of_command}
    text = card(trainer, recipe, trainer.run.settings)
    write_whole(Path(trainer.args.output_dir) / "README.md", [text])


def _own_version() -> str:
    from dskd_plugin import __version__

    return __version__


def _on_hub(name: str) -> bool:
    return bool(HUB_ID.fullmatch(name)) and not Path(name).exists()


def _teachers(teachers: list[Any], weights: list[float]) -> str:
    described = [f"`{public_name(teacher.model)}`{_details(teacher)}" for teacher in teachers]
    if len(teachers) == 1:
        return described[0]
    return "; ".join(f"{text}, weight {weight:.3g}" for text, weight in zip(described, weights, strict=True))


def _details(teacher: Any) -> str:
    given = {"revision": teacher.revision, "adapter": teacher.adapter and public_name(teacher.adapter)}
    given |= {"dtype": teacher.dtype, "quantization": None if teacher.quantization == "none" else teacher.quantization}
    return "".join(f", {key} {value}" for key, value in given.items() if value)


def _method(settings: Any) -> str:
    """The method and every other setting of the block that the recipe names."""
    rest = settings.model_dump(exclude_unset=True, exclude={"teacher", "teachers", "method"})
    words = [f"{key}: {value}" for key, value in rest.items()]
    return f"`{settings.method}`" + (f" with {', '.join(words)}" if words else " with the defaults")
