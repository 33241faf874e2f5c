"""``dskd generate``: sequence-level distillation, the teacher's answers as an ordinary Axolotl dataset."""

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import yaml

from dskd_plugin.cli.answers_cache import build_cache, check_cache, reads_from
from dskd_plugin.cli.asked_prompts import (
    answerable_rows,
    asked_rows,
    check_target,
    check_tokens,
    student_rendering,
    tell_one_sided,
)
from dskd_plugin.cli.device import device_named
from dskd_plugin.cli.generated_files import (
    check_same,
    conditions_of,
    dataset_entry,
    manifest_of,
    template_setting,
    thinking_field,
    with_answers,
    write_dataset,
    write_new_recipe,
)
from dskd_plugin.errors import DSKDSetupError
from dskd_plugin.generation.messages import as_message, check_reasoning

if TYPE_CHECKING:
    from dskd_plugin.cli.progress import Progress
    from dskd_plugin.generation.answers import Answer, Partial, Sampling, Writer
    from dskd_plugin.host.prompts import Source
    from dskd_plugin.teachers.live import Teacher


@click.command()
@click.argument("recipe", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    help="[default: <output_dir>-generated.jsonl, with --teacher N -generated-teacherN.jsonl]",
)
@click.option(
    "--write-recipe",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Also write a recipe that distils on the recipe's own answers and the teacher's.",
)
@click.option(
    "--recipe-rows",
    type=click.Choice(["both", "generated"]),
    help="In the written recipe: the entries that have answers and the generated rows, or these alone. [default: both]",
)
@click.option("--plain-recipe", is_flag=True, help="The written recipe without `dskd:`: plain fine-tuning, no teacher.")
@click.option(
    "--cache",
    type=click.Path(path_type=Path),
    help="With --write-recipe: also build that recipe's teacher cache into this folder, with the teacher in memory.",
)
@click.option(
    "--ask",
    type=click.Choice(["all", "unanswered"]),
    default="all",
    show_default=True,
    help="Which rows the teacher answers: all, or those without an answer of their own.",
)
@click.option("--teacher", type=click.IntRange(min=1), help="With dskd.teachers: the number of the one that answers.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=512, show_default=True, help="Longest answer.")
@click.option(
    "--temperature", type=click.FloatRange(0, 100), default=0.0, show_default=True, help="0: the most likely token."
)
@click.option("--top-p", type=click.FloatRange(0, 1, min_open=True), help="Sample from this total probability.")
@click.option("--top-k", type=click.IntRange(min=1), help="Sample from the k most likely tokens.")
@click.option("--seed", type=click.IntRange(min=0), help="Of the sampling. [default: 0]")
@click.option("--batch-size", type=click.IntRange(min=1), help="[default: 8 on a CPU, 32 on a GPU]")
@click.option("--limit", type=click.IntRange(min=1), help="Only the first N rows.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:N or mps.")
@click.option(
    "--keep-unfinished/--drop-unfinished",
    default=False,
    show_default=True,
    help="Answers cut at --max-new-tokens: keep them or leave them out.",
)
@click.option(
    "--reasoning",
    type=click.Choice(["keep", "drop", "field"]),
    default="keep",
    show_default=True,
    help="What the teacher writes before its final answer: in the text, left out, or in a field of the message.",
)
@click.option("--skip-long", is_flag=True, help="Leave out prompts that leave no room for an answer.")
@click.option("--overwrite", is_flag=True, help="Replace an earlier result or an unfinished one with other settings.")
def generate(
    recipe: Path,
    out: Path | None,
    write_recipe: Path | None,
    recipe_rows: str | None,
    plain_recipe: bool,
    cache: Path | None,
    ask: str,
    teacher: int | None,
    max_new_tokens: int,
    temperature: float,
    top_p: float | None,
    top_k: int | None,
    seed: int | None,
    batch_size: int | None,
    limit: int | None,
    device: str,
    keep_unfinished: bool,
    reasoning: str,
    skip_long: bool,
    overwrite: bool,
) -> None:
    """Let the teacher of RECIPE answer the prompts of its `datasets` and write a dataset to train on.

    The last user turn of every conversation is answered; a stopped run goes on when it is started again.
    """
    given = {"--top-p": top_p, "--top-k": top_k, "--seed": seed}
    unused = [name for name, value in given.items() if value is not None and temperature == 0]
    if unused:
        raise click.UsageError(f"{', '.join(unused)}: expected --temperature above 0 beside it, got 0. Set it.")
    of_recipe = {"--recipe-rows": recipe_rows, "--plain-recipe": plain_recipe or None, "--cache": cache}
    unused = [name for name, value in of_recipe.items() if value is not None and write_recipe is None]
    if unused:
        raise click.UsageError(f"{', '.join(unused)}: expected --write-recipe FILE beside it, got none. Set it.")
    if plain_recipe and cache is not None:
        raise click.UsageError("--cache: expected a recipe that distils, got --plain-recipe. Leave one of them out.")

    from dskd_plugin.host.prompts import checked_recipe, load_recipe, read_prompts

    unread = ("output_dir", "lora_model_dir", "dataset_prepared_path", "test_datasets")
    written = checked_recipe(recipe, unread=unread)
    by = f"-teacher{teacher}" if teacher else ""
    out = out or Path(f"{str(written.get('output_dir') or './model-out').rstrip('/')}-generated{by}.jsonl")
    if write_recipe is not None and write_recipe.absolute() == out.absolute():
        raise click.UsageError(f"--write-recipe: expected another file than the dataset's, got {out}. Change one.")
    answers_file = out.with_name(out.name + ".partial")
    # Only while a cache is built are answers kept beside the dataset that was made of them.
    goes_on = cache is not None and answers_file.exists() and out.exists()
    for path in (out, write_recipe):
        if path is not None:
            check_target(path, overwrite or goes_on, recipe, written)

    from dskd_plugin.generation.answers import Partial, Sampling, batches

    source = load_recipe(recipe, written, teacher)
    if cache is not None and written["dskd"].get("teachers"):
        raise click.UsageError(
            "--cache: expected one teacher, got dskd.teachers. Name a `cache` for each in the written recipe and run "
            "`dskd cache build` on that."
        )
    check_reasoning(source.form, reasoning)
    target = device_named(device)
    every = read_prompts(source, limit if ask == "all" else None)
    rows = asked_rows(every, ask, limit)
    kept = answerable_rows(rows, source, max_new_tokens, skip_long)
    check_tokens(kept, source)
    template = template_setting(written, source)
    student = student_rendering(source, written, template)
    if student is not None:
        tell_one_sided(kept, source, student)
    if cache is not None:
        check_cache(cache, source, len(kept), max_new_tokens)
    sampling = Sampling(max_new_tokens, temperature, top_p or 1.0, top_k or 0, seed or 0)
    size = batch_size or (32 if target.startswith("cuda") else 8)
    lengths = [len(ids) for ids in kept["prompt_ids"]]
    made_with = conditions_of(source, sampling, size, target, kept)
    written_with = {**made_with, "reasoning": reasoning, "keep_unfinished": keep_unfinished}
    if goes_on and not overwrite:
        check_same(out, written_with)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = Partial(answers_file, made_with, batches(lengths, size), overwrite=overwrite)
    click.get_current_context().call_on_close(partial.close)
    load = functools.cache(lambda: _teacher(source, target))
    try:
        speed = _generate(source, sampling, target, partial, kept, load)
    except KeyboardInterrupt:
        click.echo(
            f"\nStopped after {len(partial.answers)} of {len(kept)} answers; the same command goes on from there.",
            err=True,
        )
        sys.exit(130)
    field, asked = thinking_field(written), kept["messages"]
    answers = [as_message(answer, source.form, reasoning, asked[answer.row], field) for answer in partial.answers]
    counts = write_dataset(out, written_with, answers, sum(answer.tokens for answer in partial.answers), kept, recipe)
    if cache is None:
        partial.remove()
    _report(
        *(counts, speed, out, max_new_tokens, keep_unfinished),
        reasoning=reasoning,
        field=field,
        skipped=len(rows) - len(kept),
    )
    entry = dataset_entry(out, counts, written)
    if reasoning == "field" and counts["reasoned"] and student is not None and field not in student.template:
        click.echo(f"The student's chat template does not read {field}: it will not see the reasoning.")
    if write_recipe is None:
        click.echo("In the recipe, beside or in place of its datasets:\n")
        click.echo(yaml.safe_dump({"datasets": [entry], **template}, sort_keys=False, allow_unicode=True), nl=False)
        return
    own = [] if recipe_rows == "generated" else with_answers(written["datasets"], every)
    changes = {"datasets": [*own, entry], **template, **({} if cache is None else reads_from(written, cache))}
    write_new_recipe(write_recipe, out, written, changes, plain=plain_recipe, overwrite=overwrite)
    if cache is not None:
        try:
            build_cache(write_recipe, cache, load)
        except KeyboardInterrupt:
            click.echo("\nStopped; the same command goes on with the cache.", err=True)
            sys.exit(130)
        partial.remove()
    click.echo(f"Next: axolotl train {write_recipe}")


def _teacher(source: "Source", device: str) -> "Teacher":
    import torch

    from dskd_plugin.host.teacher_source import live

    return live(source.run, device=torch.device(device), packed=False, attn_implementation=None)


def _generate(
    source: "Source",
    sampling: "Sampling",
    device: str,
    partial: "Partial",
    rows: Any,
    load: Callable[[], "Teacher"],
) -> float | None:
    """Answer what is missing; returns tokens per second, None when nothing was."""
    from dskd_plugin.cli.progress import Progress
    from dskd_plugin.generation.answers import Writer

    remaining = list(partial.remaining())
    if not remaining:
        return None
    teacher = load()
    writer = Writer(
        teacher.model,
        source.teacher.tokenizer,
        vocab_size=source.teacher.table.vocab_size,
        ends=source.ends,
        sampling=sampling,
    )
    with Progress(len(rows), partial.answers, sampling.max_new_tokens) as progress:
        for batch in remaining:
            partial.append(_answers(writer, rows, batch, progress, device))
        return progress.speed


def _answers(writer: "Writer", rows: Any, batch: list[int], progress: "Progress", device: str) -> "list[Answer]":
    """Answers to the prompts of a batch, in halves where it does not fit: the same ones up to rounding."""
    import torch

    before = progress.tokens, progress.ended
    try:
        return writer.answer(batch, [rows[row]["prompt_ids"] for row in batch], progress.told)
    except torch.OutOfMemoryError as error:
        if len(batch) == 1:
            raise DSKDSetupError(
                "--max-new-tokens",
                f"one prompt and its answer that fit on {device}",
                f"row {batch[0]}, which does not ({str(error).splitlines()[0]})",
                "Lower --max-new-tokens, or leave long prompts out.",
            ) from error
    progress.back_to(*before)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    half = len(batch) // 2
    parts = [_answers(writer, rows, part, progress, device) for part in (batch[:half], batch[half:])]
    return [answer for part in parts for answer in part]


def _report(
    counts: dict[str, object],
    speed: float | None,
    out: Path,
    max_new_tokens: int,
    keep_unfinished: bool,
    *,
    reasoning: str,
    field: str,
    skipped: int,
) -> None:
    click.echo(
        f"{counts['written']} of {counts['prompts']} answers written, {counts['tokens']} tokens"
        + (f", {speed:.0f} tokens/s" if speed else "")
    )
    if counts["unfinished"]:
        fate = "kept" if keep_unfinished else "left out; raise --max-new-tokens or use --keep-unfinished"
        click.echo(f"{counts['unfinished']} answers cut at {max_new_tokens} tokens ({fate})")
    if counts["reasoned"]:
        fates = {"keep": "in the text", "drop": "left out", "field": f"in the field {field}"}
        click.echo(f"{counts['reasoned']} answers reason first (--reasoning {reasoning}: {fates[reasoning]})")
    if counts["reasoning_without_answer"]:
        fate = "kept" if keep_unfinished and reasoning == "keep" else "left out"
        click.echo(f"{counts['reasoning_without_answer']} answers end within their reasoning ({fate})")
    if counts["empty"]:
        click.echo(f"{counts['empty']} empty answers (left out)")
    if skipped:
        click.echo(f"{skipped} rows without a turn to answer or too long for the teacher (left out)")
    click.echo(f"Dataset: {out}\nMade with: {manifest_of(out)}")
