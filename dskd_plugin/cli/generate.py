"""``dskd generate``: sequence-level distillation, the teacher's answers as an ordinary Axolotl dataset."""

import hashlib
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import yaml

from dskd_plugin.errors import DSKDSetupError, SettingError
from dskd_plugin.generation.messages import FIELD, Written, as_message, check_reasoning

if TYPE_CHECKING:
    from dskd_plugin.generation.answers import Partial, Sampling
    from dskd_plugin.host.prompts import Source

# Settings of a recipe's chat_template entries that say how the student reads a conversation.
_STUDENT_KEYS = (
    *("chat_template", "chat_template_jinja", "roles_to_train", "train_on_eos", "train_on_eot"),
    "split_thinking",
)
_THINKING_KEYS = ("template_thinking_key", "field_thinking")


@click.command()
@click.argument("recipe", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="[default: <output_dir>-generated.jsonl]")
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
    "--ask",
    type=click.Choice(["all", "unanswered"]),
    default="all",
    show_default=True,
    help="Which rows the teacher answers: all, or those without an answer of their own.",
)
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
    ask: str,
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
    of_recipe = {"--recipe-rows": recipe_rows, "--plain-recipe": plain_recipe or None}
    unused = [name for name, value in of_recipe.items() if value is not None and write_recipe is None]
    if unused:
        raise click.UsageError(f"{', '.join(unused)}: expected --write-recipe FILE beside it, got none. Set it.")

    from dskd_plugin.host.prompts import load_recipe, read_prompts, read_recipe

    written = read_recipe(recipe)
    out = out or Path(f"{str(written.get('output_dir') or './model-out').rstrip('/')}-generated.jsonl")
    for path in (out, write_recipe):
        if path is not None:
            _check_target(path, overwrite, recipe)

    from dskd_plugin.generation.answers import Partial, Sampling, batches

    source = load_recipe(recipe, written)
    check_reasoning(source.form, reasoning)
    target = _device(device)
    every = read_prompts(source, limit if ask == "all" else None)
    rows = _asked(every, ask, limit)
    kept = _answerable(rows, source, max_new_tokens, skip_long)
    _check_tokens(kept, source)
    template = _template_setting(written, source)
    student = _student_rendering(source, written, template)
    if student is not None:
        _tell_one_sided(kept, source, student)
    sampling = Sampling(max_new_tokens, temperature, top_p or 1.0, top_k or 0, seed or 0)
    size = batch_size or (32 if target.startswith("cuda") else 8)
    lengths = [len(ids) for ids in kept["prompt_ids"]]
    made_with = _made_with(source, sampling, size, target, kept)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = Partial(out.with_name(out.name + ".partial"), made_with, batches(lengths, size), overwrite=overwrite)
    try:
        speed = _generate(source, sampling, target, partial, kept)
    except KeyboardInterrupt:
        partial.close()
        click.echo(
            f"\nStopped after {len(partial.answers)} of {len(kept)} answers; the same command goes on from there.",
            err=True,
        )
        sys.exit(1)
    field, asked = _thinking_field(written), kept["messages"]
    answers = [as_message(answer, source.form, reasoning, asked[answer.row], field) for answer in partial.answers]
    made_with = {**made_with, "reasoning": reasoning, "keep_unfinished": keep_unfinished}
    counts = _write_dataset(out, made_with, answers, sum(answer.tokens for answer in partial.answers), kept, recipe)
    partial.remove()
    _report(
        *(counts, speed, out, max_new_tokens, keep_unfinished),
        reasoning=reasoning,
        field=field,
        skipped=len(rows) - len(kept),
    )
    entry = _entry(out, counts, written)
    if reasoning == "field" and counts["reasoned"] and student is not None and field not in student.template:
        click.echo(f"The student's chat template does not read {field}: it will not see the reasoning.")
    if write_recipe is None:
        click.echo("In the recipe, beside or in place of its datasets:\n")
        click.echo(yaml.safe_dump({"datasets": [entry], **template}, sort_keys=False, allow_unicode=True), nl=False)
        return
    own = [] if recipe_rows == "generated" else _with_answers(written["datasets"], every)
    _write_recipe(write_recipe, out, written, {"datasets": [*own, entry], **template}, plain_recipe)


def _check_target(path: Path, overwrite: bool, recipe: Path) -> None:
    """Refuse now what would fail after hours."""
    if path.exists() and path.samefile(recipe):
        raise SettingError(path, "another file than the recipe", "the recipe itself", "Choose another name.")
    if path.exists() and not overwrite:
        raise SettingError(
            path,
            "no file of this name",
            "an earlier result",
            "Name another file with --out, or replace it with --overwrite.",
        )
    nearest = next(folder for folder in path.absolute().parents if folder.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        got = "one without permission to write" if nearest.is_dir() else "a file"
        raise SettingError(path, "a folder to write to", f"{got} at {nearest}", "Choose another file.")


def _device(name: str) -> str:
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise SettingError(
            "--device",
            "auto or a device that torch has here",
            f"{name!r}: {str(error).splitlines()[0]}",
            "Choose another device.",
        ) from None
    return name


def _asked(rows: Any, ask: str, limit: int | None) -> Any:
    """All rows, or the first of those that have no answer of their own."""
    if ask == "all":
        return rows
    unanswered = [row for row, answered in enumerate(rows["answered"]) if not answered]
    if not unanswered:
        raise SettingError(
            "--ask unanswered",
            "rows without an answer",
            f"one in each of {len(rows)} rows",
            "Add a dataset of prompts, or leave the option out.",
        )
    return rows.select(unanswered[:limit])


def _answerable(rows: Any, source: "Source", max_new_tokens: int, skip_long: bool) -> Any:
    """The rows with a prompt that leaves room for an answer; ``ValueError`` when some do not and should."""
    lengths = [len(ids) for ids in rows["prompt_ids"]]
    if not any(lengths):
        raise SettingError(
            "datasets",
            "conversations with a user turn to answer",
            f"none in {len(rows)} rows",
            "Check field_messages, message_property_mappings and roles.",
        )
    room = float("inf") if source.teacher.positions is None else source.teacher.positions - max_new_tokens
    long = [row for row, length in enumerate(lengths) if length > room]
    if long and not skip_long:
        row = max(long, key=lambda row: lengths[row])
        raise SettingError(
            "datasets",
            (
                f"prompts that leave room for --max-new-tokens {max_new_tokens} in the {source.teacher.positions} "
                "positions of the teacher"
            ),
            f"{len(long)} longer ones, up to {lengths[row]} tokens (row {row})",
            "Lower --max-new-tokens, or leave them out with --skip-long.",
        )
    kept = [row for row, length in enumerate(lengths) if 0 < length <= room]
    if not kept:
        raise SettingError(
            "--skip-long",
            "some prompt that leaves room for an answer",
            f"{len(long)} too long ones and no other",
            "Lower --max-new-tokens.",
        )
    return rows.select(kept)


def _check_tokens(rows: Any, source: "Source") -> None:
    """Raise ``ValueError`` for a prompt with a token that the teacher has no embedding for."""
    from dskd_plugin.host.dataset_report import beyond_rows

    for place, ids in enumerate(rows["prompt_ids"]):
        if max(ids) >= source.teacher.rows:
            row = rows[place]
            raise beyond_rows(
                _name(source, row["entry"]), row["row"], ids, source.teacher.tokenizer, source.teacher.rows
            )


def _name(source: "Source", entry: int) -> str:
    return f"datasets: {source.run.recipe['datasets'][entry]['path']}"


@dataclass(frozen=True)
class _Rendering:
    """The prompt that a side reads."""

    tokenizer: Any
    template: str
    options: dict[str, Any]

    def __call__(self, row: dict[str, Any]) -> str:
        text: str = self.tokenizer.apply_chat_template(
            row["messages"],
            tools=row.get("tools"),
            chat_template=self.template,
            add_generation_prompt=True,
            tokenize=False,
            **self.options,
        )
        return text


def _tell_one_sided(rows: Any, source: "Source", student: _Rendering) -> None:
    """Warn, as a run does, of what in the prompts the teacher or the student will not read."""
    from dskd_plugin.host.dataset_report import one_sided, one_sided_line, one_sided_note
    from dskd_plugin.text.read_by import Names, OneSided

    teacher = _Rendering(source.teacher.tokenizer, source.template, source.teacher.template_options)
    reads = OneSided(student, teacher, Names())
    by_entry: dict[int, list[dict[str, Any]]] = {}
    for row in rows.select_columns(["messages", "tools", "entry", "row"]):
        by_entry.setdefault(row["entry"], []).append(row)
    for entry, listed in by_entry.items():
        found = one_sided([one_sided_note(reads.find(_conversation(row))) for row in listed])
        if found is None:
            continue
        place, texts, summary = found
        conversation = _conversation(listed[place])
        renderings = student(conversation), teacher(conversation)
        line = one_sided_line(summary, listed[place]["row"], texts[0].text, renderings)
        click.echo(f"Warning: {_name(source, entry)}: {line}.", err=True)


def _conversation(row: dict[str, Any]) -> dict[str, Any]:
    """A row of prompts in the form that templates take."""
    return {"messages": json.loads(row["messages"]), "tools": json.loads(row["tools"]) if row["tools"] else None}


def _made_with(source: "Source", sampling: "Sampling", batch_size: int, device: str, rows: Any) -> dict[str, Any]:
    """All that decides the answers. A run goes on only where it is unchanged."""
    from importlib.metadata import version

    import torch
    import transformers
    from transformers import AutoConfig

    from dskd_plugin import __version__

    teacher = source.run.settings.teacher
    parts = source.teacher.parts
    config = AutoConfig.from_pretrained(
        parts.weights, revision=parts.revision, trust_remote_code=source.run.trust_remote_code
    )
    return {
        "teacher": {
            **teacher.model_dump(include={"model", "revision", "adapter", "dtype", "quantization"}),
            "commit": getattr(config, "_commit_hash", None),
            "files": _folder_digest(parts.weights),
            "adapter_files": _folder_digest(str(parts.adapter or "")),
            "chat_template": hashlib.sha256(
                json.dumps([source.template, source.teacher.template_options], sort_keys=True).encode()
            ).hexdigest(),
            "ends": source.ends,
            "answers": "with special tokens",
        },
        "settings": {**asdict(sampling), "batch_size": batch_size, "device": device.split(":")[0]},
        "data": {"rows": len(rows), "sha256": _rows_digest(rows)},
        "versions": {
            "dskd": __version__,
            "axolotl": version("axolotl"),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


def _folder_digest(model: str) -> str | None:
    """Names, sizes and times of a local folder's files: a teacher trained again is another teacher."""
    files = sorted(path for path in Path(model).glob("*") if path.is_file()) if model and Path(model).is_dir() else []
    stamps = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return hashlib.sha256(repr(stamps).encode()).hexdigest() if files else None


def _rows_digest(rows: Any) -> str:
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True).encode())
    return digest.hexdigest()


def _generate(source: "Source", sampling: "Sampling", device: str, partial: "Partial", rows: Any) -> float | None:
    """Answer what is missing; returns tokens per second, None when nothing was."""
    import torch

    from dskd_plugin.cli.progress import Progress
    from dskd_plugin.generation.answers import Writer
    from dskd_plugin.teachers.live import Teacher

    remaining = list(partial.remaining())
    if not remaining:
        return None
    teacher = Teacher(
        source.run.settings.teacher,
        vocab_size=source.teacher.table.vocab_size,
        device=torch.device(device),
        attn_implementation=None,
        packed=False,
        trust_remote_code=source.run.trust_remote_code,
    )
    writer = Writer(
        teacher.model,
        source.teacher.tokenizer,
        vocab_size=source.teacher.table.vocab_size,
        ends=source.ends,
        sampling=sampling,
    )
    with Progress(len(rows), partial.answers, sampling.max_new_tokens) as progress:
        for batch in remaining:
            try:
                answers = writer.answer(batch, [rows[row]["prompt_ids"] for row in batch], progress.told)
            except torch.OutOfMemoryError as error:
                raise DSKDSetupError(
                    "--batch-size",
                    f"a batch that fits on {device}",
                    f"{len(batch)} prompts that do not ({str(error).splitlines()[0]})",
                    "Lower --batch-size or --max-new-tokens.",
                ) from error
            partial.append(answers)
        return progress.speed


def _write_dataset(
    out: Path, made_with: dict[str, Any], answers: list[Written], tokens: int, rows: Any, recipe: Path
) -> dict[str, Any]:
    """Dataset and manifest from the complete answers; returns the counts."""
    from dskd_plugin.generation.answers import write_whole

    answers = sorted(answers, key=lambda answer: answer.row)
    used = [answer for answer in answers if not answer.is_empty and (answer.whole or made_with["keep_unfinished"])]
    counts = {
        "prompts": len(answers),
        "written": len(used),
        "empty": sum(answer.is_empty and (answer.whole or not answer.reasoned) for answer in answers),
        "unfinished": sum(not answer.ended and (answer.reasoned or not answer.is_empty) for answer in answers),
        "reasoned": sum(answer.reasoned for answer in answers),
        "reasoning_without_answer": sum(answer.ended and not answer.whole for answer in answers),
        "tokens": tokens,
    }
    if not used:
        raise SettingError(
            out,
            "some whole answer",
            (
                f"{counts['unfinished']} cut at the limit, {counts['empty']} empty ones and "
                f"{counts['reasoning_without_answer']} of reasoning alone"
            ),
            "Raise --max-new-tokens, keep cut answers with --keep-unfinished, or choose another teacher.",
        )
    earlier = any(message["role"] == "assistant" for text in rows["messages"] for message in json.loads(text))
    manifest = {
        **made_with,
        "recipe": {"file": recipe.name, "sha256": hashlib.sha256(recipe.read_bytes()).hexdigest()},
        "counts": counts,
    }
    write_whole(_manifest(out), iter([json.dumps(manifest, indent=2, ensure_ascii=False) + "\n"]))
    write_whole(out, _lines(used, rows, earlier))
    return {**counts, "earlier_answers": earlier}


def _manifest(out: Path) -> Path:
    return out.with_name(f"{out.stem}.manifest.json")


def _lines(answers: list[Written], rows: Any, earlier: bool) -> Iterator[str]:
    """One conversation per line; every message of the file has the same keys, as Arrow wants it."""
    keys = dict.fromkeys(key for text in rows["messages"] for turn in json.loads(text) for key in turn)
    keys |= dict.fromkeys(key for answer in answers for key in answer.message)
    tools = any(rows["tools"])
    for answer in answers:
        row = rows[answer.row]
        turns = [*json.loads(row["messages"]), answer.message]
        messages = [{key: _plain(key, turn.get(key)) for key in keys} for turn in turns]
        if earlier:
            for message in messages:
                message["training"] = message is messages[-1]
        line = {"messages": messages, **({"tools": row["tools"] or None} if tools else {})}
        yield json.dumps(line, ensure_ascii=False) + "\n"


def _plain(key: str, value: Any) -> Any:
    """Arguments of tool calls as JSON text: their keys differ from call to call."""
    if key != "tool_calls" or not value:
        return value
    return [
        {**call, "function": {**call["function"], "arguments": json.dumps(call["function"].get("arguments"))}}
        if isinstance(call.get("function"), dict) and not isinstance(call["function"].get("arguments"), str)
        else call
        for call in value
    ]


def _report(
    counts: dict[str, Any],
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
    click.echo(f"Dataset: {out}\nMade with: {_manifest(out)}")


def _entry(out: Path, counts: dict[str, Any], recipe: dict[str, Any]) -> dict[str, Any]:
    """The entry of the generated rows; the student reads them as it reads the recipe's own conversations."""
    entry: dict[str, Any] = {"path": str(out), "type": "chat_template"}
    chats = _chats(recipe)
    if chats:
        entry |= {key: chats[0][key] for key in _STUDENT_KEYS if key in chats[0]}
        if any(key in chats[0] for key in _THINKING_KEYS):
            # The rows are written under the names that the template knows, whatever they are in the recipe's own.
            entry |= dict.fromkeys(_THINKING_KEYS, _thinking_field(recipe))
    if counts["earlier_answers"]:
        entry["message_field_training"] = "training"
    return entry


def _with_answers(entries: list[dict[str, Any]], rows: Any) -> list[dict[str, Any]]:
    """The entries without those that are prompts only; an entry beyond --limit was not read and stays."""
    read = set(rows["entry"])
    answered = {number for number, own in zip(rows["entry"], rows["answered"], strict=True) if own}
    return [entry for number, entry in enumerate(entries) if number in answered or number not in read]


def _chats(recipe: dict[str, Any]) -> list[dict[str, Any]]:
    return [entry for entry in recipe["datasets"] if entry.get("type") == "chat_template"]


def _thinking_field(recipe: dict[str, Any]) -> str:
    """The field of a message under which the student's template knows its reasoning."""
    return str((_chats(recipe) or [{}])[0].get("template_thinking_key") or FIELD)


def _template_setting(recipe: dict[str, Any], source: "Source") -> dict[str, Any]:
    """A template for a student that has none and needed none until now."""
    needed = not _chats(recipe) and not recipe.get("chat_template") and not _student_has_template(source)
    return {"chat_template": "alpaca"} if needed else {}


def _write_recipe(path: Path, out: Path, recipe: dict[str, Any], changes: dict[str, Any], plain: bool) -> None:
    """The recipe with the new rows, as it is or without what distils."""
    from dskd_plugin.generation.answers import write_whole

    digest = hashlib.sha256(out.read_bytes()).hexdigest()[:12]
    new = {**recipe, **changes}
    if plain:
        del new["dskd"]
        plugins = [name for name in new.pop("plugins") if str(name).split(".")[0] not in ("dskd", "dskd_plugin")]
        new |= {"plugins": plugins} if plugins else {}
    name = "seqkd" if plain else "distilled"
    new["output_dir"] = f"{str(recipe.get('output_dir') or './model-out').rstrip('/')}-{name}"
    # Axolotl knows prepared data by its path, not by its content.
    new["dataset_prepared_path"] = f"{recipe.get('dataset_prepared_path') or 'last_run_prepared'}/generated-{digest}"
    write_whole(path, iter([yaml.safe_dump(new, sort_keys=False, allow_unicode=True)]))
    sources = ", ".join(str(entry["path"]) for entry in new["datasets"])
    click.echo(f"The recipe trains on: {sources}\nNext: axolotl train {path}")


def _student_rendering(source: "Source", recipe: dict[str, Any], template: dict[str, Any]) -> _Rendering | None:
    """How the student will read the rows; None where it has no template, or one for `axolotl train` to explain.

    template: the setting that a student without a template gets.
    """
    run = source.run
    entry, named = (_chats(recipe) or [{}])[0], template.get("chat_template")
    try:
        tokenizer = run.student_tokenizer()
        text = run.templates.named(named, tokenizer) if named else run.student_template(entry, tokenizer)
    except (OSError, ValueError):
        return None
    return _Rendering(tokenizer, text, run.student_template_options)


def _student_has_template(source: "Source") -> bool:
    try:
        return source.run.student_tokenizer().chat_template is not None
    except (OSError, ValueError):  # for `axolotl train` to explain; the answers are written
        return True
