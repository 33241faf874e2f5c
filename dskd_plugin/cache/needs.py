"""Which of the teacher's hidden states a dataset needs, sample by sample.

A state depends on the teacher and on what it has read, so a sample is known by its teacher tokens alone: order,
packing, ranks and epochs do not matter, nor do the student and the method, which only choose among its rows.
"""

import hashlib
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

KEY_BYTES = 16
COLUMNS = ("teacher_input_ids", "aligned_teacher", "aligned_more", "spans")


@dataclass(frozen=True)
class Needed:
    """The rows that one sample of a dataset needs. place: its number there; positions: sorted, without repeats."""

    place: int
    key: bytes
    length: int
    positions: np.ndarray


@dataclass
class Want:
    """A sample to be computed: where to find its tokens, as (number of the dataset, place), and what is needed."""

    at: tuple[int, int]
    length: int
    positions: np.ndarray


def key_of(ids: np.ndarray) -> bytes:
    """The key of a sample: a digest of its teacher token ids."""
    return hashlib.blake2b(np.ascontiguousarray(ids, dtype="<i4").tobytes(), digest_size=KEY_BYTES).digest()


def positions_of(length: int, targets: np.ndarray, spans: np.ndarray, more: np.ndarray | None = None) -> np.ndarray:
    """Positions before the aligned targets and before the tokens of the spans, as the collator asks for them.

    length: tokens of the teacher's row; targets: positions of ``aligned_teacher``; spans: flat, four numbers each.
    more: ``aligned_more``, how many tokens behind each target are wanted as well; None for none.
    """
    spans_C4 = spans.reshape(-1, 4)
    spans_C4 = spans_C4[(spans_C4[:, 2] > 0) & (spans_C4[:, 3] <= length)]
    of_spans = [np.arange(start, stop) for start, stop in spans_C4[:, 2:]]
    last = targets if more is None else targets + more
    there = (targets > 0) & (last < length)
    reached = np.flatnonzero(there & (last > targets))
    of_reach = [np.arange(targets[k] + 1, last[k] + 1) for k in reached]
    all_targets = np.concatenate([targets[there], *of_reach, *of_spans])
    return np.unique(all_targets).astype(np.int32) - 1


def needed(dataset: Any) -> Iterator[Needed]:
    """What each sample of a prepared dataset needs; samples of which nothing is needed are left out."""
    place = 0
    columns = [column for column in COLUMNS if column in dataset.column_names]
    for table in dataset.select_columns(columns).with_format("arrow").iter(1000):
        ids, targets = _lists(table["teacher_input_ids"]), _lists(table["aligned_teacher"])
        spans = _lists(table["spans"]) if "spans" in columns else [np.zeros(0, int)] * len(ids)
        more = _lists(table["aligned_more"]) if "aligned_more" in columns else [None] * len(ids)
        for row in zip(ids, targets, spans, more, strict=True):
            positions = positions_of(len(row[0]), *row[1:])
            if len(positions):
                yield Needed(place, key_of(row[0]), len(row[0]), positions)
            place += 1


def wanted(datasets: Iterable[Any]) -> dict[bytes, Want]:
    """What all samples of several datasets need, each sample once."""
    found: dict[bytes, Want] = {}
    for number, dataset in enumerate(datasets):
        for one in needed(dataset):
            known = found.get(one.key)
            if known is None:
                found[one.key] = Want((number, one.place), one.length, one.positions)
            elif not np.array_equal(known.positions, one.positions):
                known.positions = np.union1d(known.positions, one.positions)
    return found


def _lists(column: Any) -> list[np.ndarray]:
    """The lists of an Arrow column, as arrays that share its memory."""
    found = []
    for chunk in column.chunks:
        values = chunk.values.to_numpy(zero_copy_only=False)
        offsets = chunk.offsets.to_numpy()
        found += [values[start:stop] for start, stop in itertools.pairwise(offsets)]
    return found
