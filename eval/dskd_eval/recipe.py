"""The models of a training recipe: teacher, untouched student, its output, and an SFT output beside it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import yaml

from dskd_eval.errors import UserError
from dskd_eval.models import ModelRef, default_name, holds_weights

# A training leaves this file in its output_dir until it has ended.
_PARTIAL = "PARTIAL.txt"


def models_of(path: Path) -> list[ModelRef]:
    """Teacher or teachers (of the `dskd:` block), base (`base_model`), student (`output_dir`), and sft if there is one.

    The SFT output is the `output_dir` of a recipe `sft.yaml` in the same folder, once its training has ended.
    Relative folders are looked up from the working directory, as Axolotl does, then from the recipe's
    folder. Raises UserError: unreadable recipe, no base_model, no trained student.
    """
    recipe = _read(path)
    where = f"recipe {path.name}"
    base = recipe.get("base_model")
    if not isinstance(base, str):
        raise UserError(where, expected="base_model", got="none", fix="Give an Axolotl recipe.")
    refs = _teachers(recipe, path)
    source = _place(base, path)
    options = _pairs(recipe.get("chat_template_kwargs"), where)
    revision = recipe.get("revision_of_model")
    kept = None if revision is None else str(revision)
    refs.append(ModelRef(f"base {default_name(source)}", source, "base", kept, template_options=options))
    if (sft := _sft_output(path)) is not None and sft != _output(recipe, path):
        its = _pairs(_read(path.parent / "sft.yaml").get("chat_template_kwargs"), "recipe sft.yaml")
        refs.append(ModelRef(f"sft {default_name(str(sft))}", str(sft), "sft", template_options=its))
    output = _output(recipe, path)
    if output is None or not holds_weights(output):
        raise UserError(
            f"{where}, output_dir",
            expected="the folder of a trained student",
            got=f"no weights in {output}" if output else "no output_dir",
            fix=f"Train first: axolotl train {path}.",
        )
    if _is_partial(output):
        raise UserError(
            f"{where}, output_dir",
            expected="the folder of a trained student",
            got=f"{output}, whose {_PARTIAL} says that its training did not end",
            fix=f"Go on as that file says, or evaluate what is there with --model {output}.",
        )
    name = f"student {default_name(str(output))}"
    refs.append(ModelRef(name, str(output), "student", template_options=options))
    return refs


def _teachers(recipe: dict[str, object], path: Path) -> list[ModelRef]:
    """The teacher or teachers, where the recipe has any; of two with one name the later ones get a number."""
    block = recipe.get("dskd")
    if not isinstance(block, dict):
        return []
    several = block.get("teachers")
    if not several:
        one = block.get("teacher")
        return [_teacher(one, "dskd.teacher", recipe, path)] if one else []
    if not isinstance(several, list):
        raise UserError(
            f"recipe {path.name}, dskd.teachers",
            expected="a list of teachers",
            got=repr(several),
            fix="Write `- model: HUB_ID_OR_FOLDER` for each.",
        )
    found: list[ModelRef] = []
    for number, entry in enumerate(several, start=1):
        made = _teacher(entry, f"dskd.teachers[{number - 1}]", recipe, path)
        taken = any(made.name == other.name for other in found)
        found.append(replace(made, name=f"{made.name} ({number})") if taken else made)
    return found


def _teacher(entry: object, setting: str, recipe: dict[str, object], path: Path) -> ModelRef:
    """A teacher as a recipe names it: a mapping, or its hub id or folder alone."""
    where = f"recipe {path.name}"
    teacher = {"model": entry} if isinstance(entry, str) else entry
    if not isinstance(teacher, dict) or not isinstance(teacher.get("model"), str):
        raise UserError(
            f"{where}, {setting}.model",
            expected="a hub id or folder",
            got=repr(entry),
            fix="Name the teacher.",
        )
    source = _place(teacher["model"], path)
    adapter = teacher.get("adapter")
    own = teacher.get("chat_template_kwargs")
    return ModelRef(
        f"teacher {default_name(source)}",
        source,
        "teacher",
        teacher.get("revision"),
        _place(adapter, path) if adapter else None,
        _template(teacher.get("chat_template"), path),
        _pairs(recipe.get("chat_template_kwargs") if own is None else own, where),
    )


def _template(choice: object, path: Path) -> str:
    """A chat template as the recipe names it; a file is looked up in the working directory, then beside the recipe."""
    files = [file for file in (Path(str(choice)), path.parent / str(choice)) if file.is_file()]
    return str(files[0].resolve()) if choice and files else str(choice or "tokenizer_default")


def _pairs(options: object, where: str) -> tuple[tuple[str, object], ...]:
    """The variables of a chat template."""
    if not options:
        return ()
    if not isinstance(options, dict):
        raise UserError(
            f"{where}, chat_template_kwargs",
            expected="a mapping of the template's variables",
            got=repr(options),
            fix="Write it as {enable_thinking: false}.",
        )
    return tuple(options.items())


def _read(path: Path) -> dict[str, object]:
    try:
        recipe: object = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        problem = " ".join(str(error).split())[:200]
        raise UserError(f"--recipe {path}", expected="a readable YAML recipe", got=problem, fix="Check it.") from error
    if not isinstance(recipe, dict):
        raise UserError(
            f"--recipe {path}",
            expected="a mapping of settings",
            got=type(recipe).__name__,
            fix="Give a recipe.",
        )
    return recipe


def _place(source: str, path: Path) -> str:
    """A folder relative to the working directory or to the recipe, absolute; a hub id stays as it is."""
    for candidate in (Path(source).expanduser(), path.parent / source):
        if candidate.is_dir():
            return str(candidate.resolve())
    return source


def _output(recipe: dict[str, object], path: Path) -> Path | None:
    output = recipe.get("output_dir")
    return Path(_place(str(output), path)) if output else None


def _is_partial(folder: Path) -> bool:
    return (folder / _PARTIAL).is_file()


def _sft_output(path: Path) -> Path | None:
    beside = path.parent / "sft.yaml"
    if beside == path or not beside.is_file():
        return None
    output = _output(_read(beside), beside)
    return output if output is not None and holds_weights(output) and not _is_partial(output) else None
