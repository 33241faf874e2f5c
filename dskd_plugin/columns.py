"""The columns of a prepared row for each teacher: the first one's under plain names, the others' with a number."""

from collections.abc import Mapping
from typing import Any

from dskd_plugin.text.align import REACH

IGNORE = -100  # in the column `labels`: a token that is not trained on

# Of the first teacher; those behind the first three only where the settings ask for them.
COLUMNS = ("teacher_input_ids", "aligned_student", "aligned_teacher", *REACH, "spans", "teacher_prompt")


def numbered(column: str, teacher: int) -> str:
    """The name of a column of the teacher of this number, counted from 1."""
    return column if teacher == 1 else f"{column}_{teacher}"


def columns(teachers: int) -> list[str]:
    """All names that so many teachers may add to a row."""
    return [numbered(column, teacher) for teacher in range(1, teachers + 1) for column in COLUMNS]


def row_of(row: Mapping[str, Any], teacher: int) -> dict[str, Any]:
    """A row as if it had been prepared for this teacher alone."""
    if teacher == 1:
        return dict(row)
    own = {column: row[numbered(column, teacher)] for column in COLUMNS if numbered(column, teacher) in row}
    return {**{key: value for key, value in row.items() if key not in COLUMNS}, **own}


def aligned_share(dataset: Any, most_rows: int) -> tuple[int, float]:
    """Of how many rows, the first ones, which share of the response tokens is aligned, in [0, 1]."""
    rows = dataset.select(range(min(most_rows, len(dataset)))).select_columns(["labels", "aligned_student"])
    responses = sum(sum(label != IGNORE for label in row["labels"]) for row in rows)
    return len(rows), sum(len(row["aligned_student"]) for row in rows) / max(responses, 1)


def dataset_of(dataset: Any, teacher: int, more: tuple[str, ...] = ()) -> Any:
    """A dataset as if it had been prepared for this teacher alone. more: columns beside `COLUMNS`."""
    if dataset is None or teacher == 1:
        return dataset
    names, there = (*COLUMNS, *more), set(dataset.column_names)
    own = {numbered(name, teacher): name for name in names if numbered(name, teacher) in there}
    return dataset.remove_columns([name for name in names if name in there]).rename_columns(own)
