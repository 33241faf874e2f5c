"""What ``dskd generate`` is asked for, checked before the teacher is loaded."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import click

from dskd_plugin.cli.answers_cache import check_cache
from dskd_plugin.cli.asked_prompts import (
    answerable_rows,
    asked_rows,
    check_target,
    check_tokens,
    student_rendering,
    tell_one_sided,
)
from dskd_plugin.cli.device import device_named
from dskd_plugin.cli.generated_files import template_setting
from dskd_plugin.generation.messages import check_reasoning

if TYPE_CHECKING:
    from dskd_plugin.generation.answers import Sampling
    from dskd_plugin.host.prompts import Source


class Options(TypedDict):
    """The options of the command."""

    out: Path | None
    write_recipe: Path | None
    recipe_rows: str | None
    plain_recipe: bool
    cache: Path | None
    ask: str
    teacher: int | None
    max_new_tokens: int
    temperature: float
    top_p: float | None
    top_k: int | None
    seed: int | None
    batch_size: int | None
    limit: int | None
    device: str
    keep_unfinished: bool
    reasoning: str
    skip_long: bool
    overwrite: bool


def check_usage(options: Options) -> None:
    """Raise ``UsageError`` for options without effect beside the others."""
    given = {"--top-p": options["top_p"], "--top-k": options["top_k"], "--seed": options["seed"]}
    unused = [name for name, value in given.items() if value is not None and options["temperature"] == 0]
    if unused:
        raise click.UsageError(f"{', '.join(unused)}: expected --temperature above 0 beside it, got 0. Set it.")
    of_recipe = {
        "--recipe-rows": options["recipe_rows"],
        "--plain-recipe": options["plain_recipe"] or None,
        "--cache": options["cache"],
    }
    unused = [name for name, value in of_recipe.items() if value is not None and options["write_recipe"] is None]
    if unused:
        raise click.UsageError(f"{', '.join(unused)}: expected --write-recipe FILE beside it, got none. Set it.")
    if options["plain_recipe"] and options["cache"] is not None:
        raise click.UsageError("--cache: expected a recipe that distils, got --plain-recipe. Leave one of them out.")


@dataclass(frozen=True)
class Job:
    """What is to be done, checked. recipe, written: the recipe's file and its content.

    out, answers_file: where the dataset goes, and the answers until then; goes_on: an earlier run wrote the dataset and
    was stopped while it built the cache. every, asked: all prompts of the recipe, and those that are answered, of
    `chosen` many. template: a setting that the student's recipe lacks; student: how its rows are rendered, if it has a
    template.
    """

    recipe: Path
    written: dict[str, Any]
    source: "Source"
    out: Path
    answers_file: Path
    goes_on: bool
    every: Any
    chosen: int
    asked: Any
    template: dict[str, object]
    student: Any
    sampling: "Sampling"
    batch_size: int
    device: str


def checked(recipe: Path, options: Options) -> Job:
    """Everything that can be known before the teacher is loaded; ``ValueError`` for what is wrong."""
    from dskd_plugin.generation.answers import Sampling
    from dskd_plugin.host.prompts import checked_recipe, load_recipe, read_prompts

    unread = ("output_dir", "lora_model_dir", "dataset_prepared_path", "test_datasets")
    written = checked_recipe(recipe, unread=unread)
    cache, write_recipe, new_tokens = options["cache"], options["write_recipe"], options["max_new_tokens"]
    out = options["out"] or _default_out(written, options["teacher"])
    if write_recipe is not None and write_recipe.absolute() == out.absolute():
        raise click.UsageError(f"--write-recipe: expected another file than the dataset's, got {out}. Change one.")
    answers_file = out.with_name(out.name + ".partial")
    # Only while a cache is built are answers kept beside the dataset that was made of them.
    goes_on = cache is not None and answers_file.exists() and out.exists()
    for path in (out, write_recipe):
        if path is not None:
            check_target(path, options["overwrite"] or goes_on, recipe, written)
    source = load_recipe(recipe, written, options["teacher"])
    if cache is not None and written["dskd"].get("teachers"):
        raise click.UsageError(
            "--cache: expected one teacher, got dskd.teachers. Name a `cache` for each in the written recipe and run "
            "`dskd cache build` on that."
        )
    check_reasoning(source.form, options["reasoning"])
    device = device_named(options["device"])
    every = read_prompts(source, options["limit"] if options["ask"] == "all" else None)
    chosen = asked_rows(every, options["ask"], options["limit"])
    asked = answerable_rows(chosen, source, new_tokens, options["skip_long"])
    check_tokens(asked, source)
    template = template_setting(written, source)
    student = student_rendering(source, written, template)
    if student is not None:
        tell_one_sided(asked, source, student)
    if cache is not None:
        check_cache(cache, source, len(asked), new_tokens)
    top_p, top_k, seed = options["top_p"] or 1.0, options["top_k"] or 0, options["seed"] or 0
    return Job(
        recipe=recipe,
        written=written,
        source=source,
        out=out,
        answers_file=answers_file,
        goes_on=goes_on,
        every=every,
        chosen=len(chosen),
        asked=asked,
        template=template,
        student=student,
        sampling=Sampling(new_tokens, options["temperature"], top_p, top_k, seed),
        batch_size=options["batch_size"] or (32 if device.startswith("cuda") else 8),
        device=device,
    )


def _default_out(written: dict[str, Any], teacher: int | None) -> Path:
    by = f"-teacher{teacher}" if teacher else ""
    return Path(f"{str(written.get('output_dir') or './model-out').rstrip('/')}-generated{by}.jsonl")
