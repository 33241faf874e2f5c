"""Rows as both sides have read them: what is too long leaves, what teaches nothing is refused, the rest is told."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dskd_plugin import pair_advice
from dskd_plugin.columns import IGNORE, dataset_of, numbered, row_of
from dskd_plugin.errors import SettingError
from dskd_plugin.host import dataset_report
from dskd_plugin.host.dataset_report import NOTES, ONE_SIDED, PARTED, REFUSED, UNMATCHED
from dskd_plugin.log import LOG
from dskd_plugin.run import Run, Sides
from dskd_plugin.teachers.reader import TeacherReader
from dskd_plugin.text.align import REACH


@dataclass
class Checked:
    """rows: those to train on; unpaired, promptless: what is wrong with them unless another dataset makes up for it."""

    rows: Any
    unpaired: list[SettingError] = field(default_factory=list)
    promptless: list[SettingError] = field(default_factory=list)


def checked(name: str, every: Any, sides: Sides, number: int) -> Checked:
    """The rows that fit the teacher, what they hold in the log; an error for a dataset that teaches nothing.

    every: rows with the columns of all teachers. number: of this one in their list, from 1.
    """
    run, rows = sides.run, len(every)
    if "teacher_input_ids" not in every.column_names:
        raise SettingError(
            name,
            "rows with the fields that this entry names",
            f"none; what the rows have: {', '.join(every.column_names)}",
            "Check field_messages, message_property_mappings and the other field names of the entry.",
        )
    dataset = dataset_of(every, number, NOTES)
    _check_readable(name, dataset, sides)
    notes = list(dataset[PARTED]) if rows else []
    unmatched = int(np.sum(dataset[UNMATCHED])) if rows else 0
    if line := dataset_report.parted(notes, unmatched):
        LOG.warning("dskd: %s: %s.", name, line)
    every, over_long = _fitting(name, every, run, number)
    dataset = dataset_of(every, number, NOTES)
    if rows:
        unmatched = int(np.sum(dataset[UNMATCHED]))
    responses, aligned = _responses_in(dataset), int(_lengths(dataset, "aligned_student").sum())
    in_spans = _span_tokens(dataset) if "spans" in dataset.column_names else None
    if rows and not len(dataset):
        raise SettingError(
            name,
            f"rows that fit the teacher ({run.teacher.sequence_len} tokens)",
            f"none: all {rows} are longer",
            "Raise dskd.teacher.sequence_len, shorten the rows, or set excess_length_strategy: truncate.",
        )
    if responses == 0:
        raise SettingError(
            name,
            "rows with response tokens to train on",
            f"none in {rows} rows",
            "Check the field names, roles_to_train, train_on_inputs and the chat template. Prompts without "
            "answers are for `dskd generate`: train the recipe that it writes.",
        )
    of_spans = "" if in_spans is None else f", {100 * in_spans / responses:.1f} % in spans"
    LOG.info(
        "dskd: %s: %d rows, %d response tokens, %s%s; %d over-long teacher rows (%s), "
        "%d responses without a counterpart",
        *(name, rows, responses, pair_advice.of_dataset(aligned / responses), of_spans),
        *(over_long, _excess_strategy(run) if over_long else "none", unmatched),
    )
    found = Checked(every.remove_columns([numbered(note, number) for note in NOTES]))
    if not aligned and not in_spans and run.method.needs_teacher:
        found.unpaired.append(dataset_report.unpaired(name, responses, notes, sides.pair, run.settings))
    if run.settings.on_policy is not None and not any(dataset["teacher_prompt"]):
        found.promptless.append(dataset_report.promptless(name, rows))
    return found


def _check_readable(name: str, dataset: Any, sides: Sides) -> None:
    """Refuse rows that a side cannot read, and tell of what one side alone reads."""
    teacher = sides.run.teacher
    refusals = list(dataset[REFUSED]) if len(dataset) else []
    if refusal := dataset_report.refused(name, refusals, len(dataset)):
        raise refusal
    if refusal := _beyond_rows(name, dataset, teacher):
        raise refusal
    _tell_one_sided(name, dataset, *sides.tokenizers)


def _tell_one_sided(name: str, dataset: Any, tokenizer: Any, teacher_tokenizer: Any) -> None:
    found = dataset_report.one_sided(list(dataset[ONE_SIDED]) if len(dataset) else [])
    if found is None:
        return
    place, texts, said = found
    row = dataset[place]
    renderings = tokenizer.decode(row["input_ids"]), teacher_tokenizer.decode(row["teacher_input_ids"])
    LOG.warning("dskd: %s: %s.", name, dataset_report.one_sided_line(said, place, texts[0].text, renderings))


def _beyond_rows(name: str, dataset: Any, reader: TeacherReader) -> SettingError | None:
    """The error about a row with a token that the teacher has no embedding for; None where there is none."""
    first = 0
    for batch in dataset.select_columns(["teacher_input_ids"]).with_format("arrow").iter(1000):
        ids = batch["teacher_input_ids"].combine_chunks()
        if len(ids.flatten()) and ids.flatten().to_numpy(zero_copy_only=False).max() >= reader.rows:
            place, row = next((k, row) for k, row in enumerate(ids.to_pylist()) if max(row, default=0) >= reader.rows)
            return dataset_report.beyond_rows(name, first + place, row, reader.tokenizer, reader.rows)
        first += len(ids)
    return None


def _excess_strategy(run: Run) -> str:
    return str(run.recipe.excess_length_strategy or "drop").lower()


def _fitting(name: str, dataset: Any, run: Run, number: int) -> tuple[Any, int]:
    """The dataset by Axolotl's own rule for rows that are too long, and how many were too long for the teacher.

    number: of the teacher, whose columns are looked at.
    """
    limit, processes = run.teacher.sequence_len, run.recipe.dataset_num_proc
    over_long = int(np.sum(_lengths(dataset, numbered("teacher_input_ids", number)) > limit))
    if not over_long:
        return dataset, 0
    if _excess_strategy(run) == "raise":
        raise SettingError(
            name,
            f"teacher rows of at most {limit} tokens (excess_length_strategy: raise)",
            f"{over_long} longer ones",
            "Raise dskd.teacher.sequence_len or shorten the rows.",
        )
    if _excess_strategy(run) == "truncate":
        cut = _Truncate(limit, pairs=run.method.in_pairs, number=number)
        return dataset.map(cut, num_proc=processes, desc="Truncating teacher rows"), over_long
    return dataset.filter(_Fits(limit, number), num_proc=processes, desc="Dropping over-long teacher rows"), over_long


@dataclass
class _Fits:
    limit: int
    number: int

    def __call__(self, row: dict[str, Any]) -> bool:
        return len(row[numbered("teacher_input_ids", self.number)]) <= self.limit


@dataclass
class _Truncate:
    """Cut the side of the teacher of this number; pairs: the two aligned columns go together, else each on its own."""

    limit: int
    pairs: bool
    number: int

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        row = row_of(row, self.number)
        more = row.get("aligned_more") or [0] * len(row["aligned_teacher"])
        kept = [k for k, position in enumerate(row["aligned_teacher"]) if position + more[k] < self.limit]
        new = {"teacher_input_ids": row["teacher_input_ids"][: self.limit]}
        for column in ("aligned_teacher", *(("aligned_student", *REACH) if self.pairs else ())):
            if column in row:
                new[column] = [row[column][k] for k in kept]
        if "spans" in row:
            spans = [row["spans"][k : k + 4] for k in range(0, len(row["spans"]), 4)]
            new["spans"] = [position for span in spans if span[3] <= self.limit for position in span]
        if row.get("teacher_prompt", 0) > self.limit:
            new["teacher_prompt"] = 0
        return {numbered(column, self.number): value for column, value in new.items()}


def _responses_in(dataset: Any) -> int:
    """Response tokens to train on."""
    count = 0
    for batch in dataset.select_columns(["labels"]).with_format("arrow").iter(1000):
        labels = batch["labels"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
        count += int(np.count_nonzero(labels != IGNORE))
    return count


def _span_tokens(dataset: Any) -> int:
    """Student tokens within spans."""
    flat = (
        batch["spans"].combine_chunks().flatten().to_numpy(zero_copy_only=False).reshape(-1, 4)
        for batch in dataset.select_columns(["spans"]).with_format("arrow").iter(1000)
    )
    return sum(int(np.sum(spans[:, 1] - spans[:, 0])) for spans in flat)


def _lengths(dataset: Any, column: str) -> Any:
    parts = [
        batch[column].combine_chunks().value_lengths().to_numpy(zero_copy_only=False)
        for batch in dataset.select_columns([column]).with_format("arrow").iter(1000)
    ]
    return np.concatenate(parts) if parts else np.zeros(0, dtype=int)
