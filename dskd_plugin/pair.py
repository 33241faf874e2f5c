"""What two tokenizers have in common: the alignment to use and the shared vocabulary."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from dskd_plugin.core.events import Events
from dskd_plugin.core.overlap import Overlap, identity
from dskd_plugin.errors import SettingError
from dskd_plugin.methods import method_of
from dskd_plugin.settings import Settings
from dskd_plugin.text.align import Aligner
from dskd_plugin.text.pieces import shared_id_events, vocabulary_events
from dskd_plugin.text.tokens import TokenTable, ids_of_bytes, overlap, same_tokenizer
from dskd_plugin.text.turn_ends import Ends, role_pairs
from dskd_plugin.text.vocabularies import token_table


@dataclass(frozen=True)
class Pair:
    """The token tables of both sides; ``identity`` when they are one tokenizer and used as such."""

    student: TokenTable
    teacher: TokenTable
    identity: bool


def make_pair(student_tokenizer: Any, teacher: TokenTable, settings: Settings) -> Pair:
    """Read the student's vocabulary and settle ``alignment``; ``ValueError`` for settings that do not fit the pair."""
    student = read_table("tokenizer of the student", student_tokenizer)
    same = same_tokenizer(student, teacher)
    if settings.alignment == "identity" and not same:
        raise SettingError(
            "dskd.alignment",
            "'identity' only for one tokenizer",
            (
                f"a student with {student.vocab_size} ids and a teacher with {teacher.vocab_size}, "
                f"{overlap(student, teacher).student_share:.0%} of the student's shared"
            ),
            "Use 'eta' or 'auto'.",
        )
    if method_of(settings).needs_one_tokenizer and not same:
        raise SettingError(
            "dskd.method",
            f"{settings.method!r} only for one tokenizer",
            (
                f"a student with {student.vocab_size} ids and a teacher with {teacher.vocab_size}: their "
                "distributions are over different tokens"
            ),
            "Use 'overlap_kd'.",
        )
    as_one = same and settings.alignment != "eta"
    if settings.span_weight > 0 and as_one:
        raise SettingError(
            "dskd.span_weight",
            "0 for one tokenizer",
            f"{settings.span_weight:g}: every token has a partner of its own, so there are no spans",
            "Remove it.",
        )
    return Pair(student, teacher, as_one)


def aligner(pair: Pair, settings: Settings, ends: Ends, *, whole: bool = False) -> Aligner:
    """How rows are aligned whose turns end so. whole: none was cut."""
    return Aligner(
        pair.student,
        pair.teacher,
        pairing=method_of(settings).pairing(settings),
        identity=pair.identity,
        spans=settings.with_spans,
        student_end=ends[0],
        teacher_end=ends[1],
        whole=whole,
    )


def read_table(name: str, tokenizer: Any) -> TokenTable:
    """The token table, with ``name`` in front of a refusal."""
    try:
        return token_table(tokenizer)
    except SettingError as error:
        where, *rest = error.parts
        raise SettingError(f"{name}: {where}", *rest) from error


def shared_ids(pair: Pair, ends: Sequence[Ends], *, head_rows: tuple[int, int]) -> Overlap:
    """Shared vocabulary within the rows that the two output heads have; every tuple is (student, teacher).

    ends: of the run's datasets, see `run.Sides.ends`.
    """
    if pair.identity:
        teacher_ids = min(head_rows[1], pair.teacher.vocab_size)
        one = identity(min(head_rows[0], pair.student.vocab_size, teacher_ids))
        to_student = torch.full((teacher_ids,), -1)
        to_student[: len(one.student_ids_O)] = one.student_ids_O
        return replace(one, teacher_to_student_V=to_student)
    roles = role_pairs(ends, pair.student, pair.teacher)
    shared = overlap(pair.student, pair.teacher, roles, head_rows)
    if len(shared.student_ids_O) == 0:
        raise SettingError(
            "dskd.teacher.model", "tokenizers that share some tokens", "none in common", "Choose another teacher."
        )
    return shared


def pair_events(
    pair: Pair,
    tokenizers: tuple[Any, Any],
    overlap: Overlap,
    settings: Settings,
    ends: Sequence[Ends],
    ids: tuple[int, int],
) -> Events:
    """What both sides can say next. ids: how many real ids each head has; every tuple is (student, teacher)."""
    if pair.identity or settings.shared == "ids":
        return shared_id_events(overlap, ids)
    roles = role_pairs(ends, pair.student, pair.teacher)
    return vocabulary_events((tokenizers[0], pair.student), (tokenizers[1], pair.teacher), roles, ids=ids)


def nearest_ids(student: TokenTable, teacher: TokenTable, roles: Iterable[tuple[int, int]] = ()) -> torch.Tensor:
    """Student id [V] nearest to each id of the teacher: least Levenshtein distance of the token bytes.

    Of several ids with the same bytes one is taken, see `preferred`; of several at the same distance an ordinary token
    comes before a byte-fallback token, then the lowest id.
    roles: (student id, teacher id) that mean the same whatever their bytes, see `role_pairs`; the first pair of a
    teacher id counts, then the end-of-sequence tokens. -1 for other special tokens and ids that do not exist.
    Source: vocabulary mapping of minimum edit distance (arXiv 2401.10491).
    """
    found = ids_of_bytes(student)
    of = dict(sorted(found.items(), key=lambda item: (item[1] in student.byte_tokens, item[1])))
    nearest = (
        {} if not of else _nearest(list(of), [text for text in dict.fromkeys(teacher.bytes) if text and text not in of])
    )
    nearest |= {text: text for text in of}
    ids = [of[nearest[text]] if text and of else -1 for text in teacher.bytes]
    named = [*roles, (student.eos, teacher.eos)]
    for student_id, teacher_id in reversed(named):
        if student_id is not None and teacher_id is not None:
            ids[teacher_id] = student_id
    return torch.tensor(ids, dtype=torch.long)


def _nearest(words: list[bytes], unknown: list[bytes]) -> dict[bytes, bytes]:
    """For each unknown text the first of the words that are nearest to it.

    Words are tried by rising difference in length, which the distance cannot be below, until it exceeds the best.
    """
    from rapidfuzz.distance import Levenshtein
    from rapidfuzz.process import cdist

    longest = max(map(len, [*words, *unknown]), default=0)
    dtype = np.uint8 if longest < 255 else np.uint16
    by_length: dict[int, list[int]] = {}
    for place, word in enumerate(words):
        by_length.setdefault(len(word), []).append(place)
    groups: dict[int, list[bytes]] = {}
    for text in unknown:
        groups.setdefault(len(text), []).append(text)
    found: dict[bytes, bytes] = {}
    for length, texts in groups.items():
        for start in range(0, len(texts), 4096):
            block = texts[start : start + 4096]
            best, rank = np.full(len(block), longest + 1), np.full(len(block), len(words))
            for size in sorted(by_length, key=lambda size: abs(size - length)):
                open_rows = np.flatnonzero(best >= abs(size - length))
                if not len(open_rows):
                    break
                for at in range(0, len(by_length[size]), 16384):
                    ranks = by_length[size][at : at + 16384]
                    distances = cdist(
                        [block[k] for k in open_rows],
                        [words[k] for k in ranks],
                        scorer=Levenshtein.distance,
                        score_cutoff=int(best[open_rows].max()),
                        dtype=dtype,
                        workers=-1,
                    )
                    column = distances.argmin(1)
                    distance = distances[np.arange(len(open_rows)), column]
                    candidate = np.asarray(ranks)[column]
                    better = (distance < best[open_rows]) | (
                        (distance == best[open_rows]) & (candidate < rank[open_rows])
                    )
                    best[open_rows[better]], rank[open_rows[better]] = distance[better], candidate[better]
            found |= {text: words[k] for text, k in zip(block, rank.tolist(), strict=True)}
    return found
