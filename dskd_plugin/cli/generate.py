"""``dskd generate``: sequence-level distillation, the teacher's answers as an ordinary Axolotl dataset."""

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

import click
import yaml

from dskd_plugin.cli.answers_cache import build_cache, reads_from
from dskd_plugin.cli.generate_job import Job, Options, check_usage, checked
from dskd_plugin.cli.generated_files import (
    check_same,
    conditions_of,
    dataset_entry,
    manifest_of,
    thinking_field,
    with_answers,
    write_dataset,
    write_new_recipe,
)
from dskd_plugin.errors import DSKDSetupError
from dskd_plugin.generation.messages import as_message

if TYPE_CHECKING:
    from dskd_plugin.cli.progress import Progress
    from dskd_plugin.generation.answers import Answer, Partial, Writer
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
def generate(recipe: Path, **options: Unpack[Options]) -> None:
    """Let the teacher of RECIPE answer the prompts of its `datasets` and write a dataset to train on.

    The last user turn of every conversation is answered; a stopped run goes on when it is started again.
    """
    check_usage(options)
    job = checked(recipe, options)

    from dskd_plugin.generation.answers import Partial, batches

    made_with = conditions_of(job.source, job.sampling, job.batch_size, job.device, job.asked)
    written_with = {**made_with, "reasoning": options["reasoning"], "keep_unfinished": options["keep_unfinished"]}
    if job.goes_on and not options["overwrite"]:
        check_same(job.out, written_with)
    job.out.parent.mkdir(parents=True, exist_ok=True)
    in_batches = batches([len(ids) for ids in job.asked["prompt_ids"]], job.batch_size)
    partial = Partial(job.answers_file, made_with, in_batches, overwrite=options["overwrite"])
    click.get_current_context().call_on_close(partial.close)
    load = functools.cache(lambda: _teacher(job.source, job.device))
    try:
        speed = _generate(job, partial, load)
    except KeyboardInterrupt:
        done = f"{len(partial.answers)} of {len(job.asked)}"
        click.echo(f"\nStopped after {done} answers; the same command goes on from there.", err=True)
        sys.exit(130)
    counts = _write(job, partial, written_with, options["reasoning"])
    if options["cache"] is None:
        partial.remove()
    _report(job, counts, speed, options)
    _write_recipe(job, counts, options, load)
    if options["cache"] is not None:
        partial.remove()


def _teacher(source: "Source", device: str) -> "Teacher":
    import torch

    from dskd_plugin.host.teacher_source import live

    return live(source.run, device=torch.device(device), packed=False, attn_implementation=None)


def _generate(job: Job, partial: "Partial", load: Callable[[], "Teacher"]) -> float | None:
    """Answer what is missing; returns tokens per second, None when nothing was."""
    from dskd_plugin.cli.progress import Progress
    from dskd_plugin.generation.answers import Writer

    remaining = list(partial.remaining())
    if not remaining:
        return None
    teacher, reader = load(), job.source.teacher
    writer = Writer(
        teacher.model,
        reader.tokenizer,
        vocab_size=reader.table.vocab_size,
        ends=job.source.ends,
        sampling=job.sampling,
    )
    with Progress(len(job.asked), partial.answers, job.sampling.max_new_tokens) as progress:
        for batch in remaining:
            partial.append(_answers(writer, job.asked, batch, progress, job.device))
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


def _write(job: Job, partial: "Partial", written_with: dict[str, Any], reasoning: str) -> dict[str, Any]:
    """The dataset and its manifest; returns what was counted."""
    field, asked = thinking_field(job.written), job.asked["messages"]
    answers = [as_message(answer, job.source.form, reasoning, asked[answer.row], field) for answer in partial.answers]
    tokens = sum(answer.tokens for answer in partial.answers)
    return write_dataset(job.out, written_with, answers, tokens, job.asked, job.recipe)


def _report(job: Job, counts: dict[str, Any], speed: float | None, options: Options) -> None:
    keep, reasoning, field = options["keep_unfinished"], options["reasoning"], thinking_field(job.written)
    click.echo(
        f"{counts['written']} of {counts['prompts']} answers written, {counts['tokens']} tokens"
        + (f", {speed:.0f} tokens/s" if speed else "")
    )
    if counts["unfinished"]:
        fate = "kept" if keep else "left out; raise --max-new-tokens or use --keep-unfinished"
        click.echo(f"{counts['unfinished']} answers cut at {job.sampling.max_new_tokens} tokens ({fate})")
    if counts["reasoned"]:
        fates = {"keep": "in the text", "drop": "left out", "field": f"in the field {field}"}
        click.echo(f"{counts['reasoned']} answers reason first (--reasoning {reasoning}: {fates[reasoning]})")
    if counts["reasoning_without_answer"]:
        fate = "kept" if keep and reasoning == "keep" else "left out"
        click.echo(f"{counts['reasoning_without_answer']} answers end within their reasoning ({fate})")
    if counts["empty"]:
        click.echo(f"{counts['empty']} empty answers (left out)")
    if skipped := job.chosen - len(job.asked):
        click.echo(f"{skipped} rows without a turn to answer or too long for the teacher (left out)")
    click.echo(f"Dataset: {job.out}\nMade with: {manifest_of(job.out)}")
    if reasoning == "field" and counts["reasoned"] and job.student is not None and field not in job.student.template:
        click.echo(f"The student's chat template does not read {field}: it will not see the reasoning.")


def _write_recipe(job: Job, counts: dict[str, Any], options: Options, load: Callable[[], "Teacher"]) -> None:
    """The recipe that trains on the answers, and its teacher cache, where they are asked for; else lines to copy."""
    to, cache = options["write_recipe"], options["cache"]
    entry = dataset_entry(job.out, counts, job.written)
    if to is None:
        click.echo("In the recipe, beside or in place of its datasets:\n")
        lines = {"datasets": [entry], **job.template}
        click.echo(yaml.safe_dump(lines, sort_keys=False, allow_unicode=True), nl=False)
        return
    own = [] if options["recipe_rows"] == "generated" else with_answers(job.written["datasets"], job.every)
    changes = {"datasets": [*own, entry], **job.template, **({} if cache is None else reads_from(job.written, cache))}
    write_new_recipe(to, job.out, job.written, changes, plain=options["plain_recipe"], overwrite=options["overwrite"])
    if cache is not None:
        try:
            build_cache(to, cache, load)
        except KeyboardInterrupt:
            click.echo("\nStopped; the same command goes on with the cache.", err=True)
            sys.exit(130)
    click.echo(f"Next: axolotl train {to}")
