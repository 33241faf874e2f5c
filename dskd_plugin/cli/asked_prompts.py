"""Which prompts ``dskd generate`` has answered, and what it refuses before hours of work."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dskd_plugin.cli.generated_files import chat_entries, earlier_result
from dskd_plugin.errors import SettingError
from dskd_plugin.folders import nearest

if TYPE_CHECKING:
    from dskd_plugin.host.prompts import Source


def check_target(path: Path, overwrite: bool, recipe: Path, written: dict[str, Any]) -> None:
    """Refuse now what would fail after hours, or replace what the recipe reads. written: the recipe's content."""
    entries = [*(written.get("datasets") or ()), *(written.get("test_datasets") or ())]
    read = {Path(str(entry.get("path"))).expanduser(): "a data set of the recipe" for entry in entries}
    for file, what in {**read, recipe: "the recipe itself"}.items():
        if path.exists() and file.exists() and path.samefile(file):
            raise SettingError(path, "a file that the recipe does not read", what, "Choose another name.")
    if path.exists() and not overwrite:
        raise earlier_result(path)
    check_writable(path)


def check_writable(path: Path) -> None:
    """Raise ``ValueError`` where the file could not be written."""
    folder = nearest(path.absolute().parent)
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        got = "one without permission to write" if folder.is_dir() else "a file"
        raise SettingError(path, "a folder to write to", f"{got} at {folder}", "Choose another file.")


def asked_rows(rows: Any, ask: str, limit: int | None) -> Any:
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


def answerable_rows(rows: Any, source: "Source", max_new_tokens: int, skip_long: bool) -> Any:
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
            f"Lower --max-new-tokens{', or leave them out with --skip-long' if len(long) < len(lengths) else ''}.",
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


def check_tokens(rows: Any, source: "Source") -> None:
    """Raise ``ValueError`` for a prompt with a token that the teacher has no embedding for."""
    from dskd_plugin.host.dataset_report import beyond_rows

    for place, ids in enumerate(rows["prompt_ids"]):
        if max(ids) >= source.teacher.rows:
            row = rows[place]
            raise beyond_rows(
                entry_name(source, row["entry"]), row["row"], ids, source.teacher.tokenizer, source.teacher.rows
            )


def entry_name(source: "Source", entry: int) -> str:
    return f"datasets: {source.run.recipe['datasets'][entry]['path']}"


@dataclass(frozen=True)
class _Rendering:
    """The prompt that a side reads."""

    tokenizer: Any
    template: str
    options: dict[str, object]

    def __call__(self, row: dict[str, object]) -> str:
        text: str = self.tokenizer.apply_chat_template(
            row["messages"],
            tools=row.get("tools"),
            chat_template=self.template,
            add_generation_prompt=True,
            tokenize=False,
            **self.options,
        )
        return text


def tell_one_sided(rows: Any, source: "Source", student: _Rendering) -> None:
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
        click.echo(f"Warning: {entry_name(source, entry)}: {line}.", err=True)


def _conversation(row: dict[str, Any]) -> dict[str, Any]:
    """A row of prompts in the form that templates take."""
    return {"messages": json.loads(row["messages"]), "tools": json.loads(row["tools"]) if row["tools"] else None}


def student_rendering(source: "Source", recipe: dict[str, Any], template: dict[str, Any]) -> _Rendering | None:
    """How the student will read the rows; None where it has no template, or one for `axolotl train` to explain.

    template: the setting that a student without a template gets.
    """
    run = source.run
    entry, named = (chat_entries(recipe) or [{}])[0], template.get("chat_template")
    try:
        tokenizer = run.student_tokenizer()
        text = run.templates.named(named, tokenizer) if named else run.student_template(entry, tokenizer)
    except (OSError, ValueError):
        return None
    return _Rendering(tokenizer, text, run.student_template_options)
