"""Shared vocabulary of two tokenizers: which of their ids are the same token, by bytes and by role.

Shape letters: O shared pairs, V ids of the teacher.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Overlap:
    """Ids of two vocabularies that mean the same.

    student_ids_O, teacher_ids_O: one-to-one pairs, in rising order of the student id.
    teacher_to_student_V: student id of each teacher id, -1 where there is none; many-to-one is possible.
    student_share, teacher_share: share of each side's ids that take part, in [0, 1]: |O| / student ids, and
        teacher ids with a student id / teacher ids.
    collisions: ids, both sides together, whose bytes another id of the same side already has.
    """

    student_ids_O: Tensor
    teacher_ids_O: Tensor
    teacher_to_student_V: Tensor
    student_share: float
    teacher_share: float
    collisions: int


def identity(vocab_size: int) -> Overlap:
    """Overlap of a tokenizer with itself: every id below vocab_size with itself."""
    if vocab_size < 1:
        raise ValueError(f"vocab_size: expected at least 1, got {vocab_size}. Give the number of tokenizer ids.")
    ids = torch.arange(vocab_size)
    return Overlap(ids, ids.clone(), ids.clone(), 1.0, 1.0, 0)


def shared_vocabulary(
    student_bytes: Sequence[bytes | None],
    teacher_bytes: Sequence[bytes | None],
    role_pairs: Iterable[tuple[int, int]] = (),
    *,
    student_byte_tokens: Collection[int] = (),
    teacher_byte_tokens: Collection[int] = (),
    student_added: Collection[int] = (),
    teacher_added: Collection[int] = (),
) -> Overlap:
    """Pairs of ids with the same bytes, and pairs with the same role.

    student_bytes, teacher_bytes: bytes of each id; None for special tokens and holes, which match no bytes.
    role_pairs: (student id, teacher id) that mean the same whatever their bytes, e.g. the end-of-turn tokens.
        They take precedence over bytes; where an id occurs twice, its first pair is the one-to-one pair.
    student_byte_tokens, teacher_byte_tokens: ids of byte-fallback tokens (`<0x41>`). student_added, teacher_added: ids
        of tokens that are found before the others. Of several ids with the same bytes one is taken, see `preferred`.

    The one-to-one pairs are sorted by student id.
    """
    student_of, student_doubles = preferred(student_bytes, student_byte_tokens, student_added)
    teacher_of, teacher_doubles = preferred(teacher_bytes, teacher_byte_tokens, teacher_added)
    to_student = [-1 if text is None else student_of.get(text, -1) for text in teacher_bytes]

    pairs: dict[int, int] = {}
    mapped: set[int] = set()
    paired: set[int] = set()
    for student_id, teacher_id in role_pairs:
        if not (0 <= student_id < len(student_bytes) and 0 <= teacher_id < len(teacher_bytes)):
            raise ValueError(
                f"role_pairs: expected a student id below {len(student_bytes)} and a teacher id below "
                f"{len(teacher_bytes)}, got ({student_id}, {teacher_id}). Give ids of these two tokenizers."
            )
        if teacher_id not in mapped:
            mapped.add(teacher_id)
            to_student[teacher_id] = student_id
            if student_id not in pairs:
                pairs[student_id] = teacher_id
                paired.add(teacher_id)
    for text, student_id in student_of.items():
        teacher = teacher_of.get(text)
        if teacher is not None and student_id not in pairs and teacher not in mapped:
            pairs[student_id] = teacher
    chosen = sorted(pairs.items())
    student_ids_O = torch.tensor([student_id for student_id, _ in chosen], dtype=torch.long)
    teacher_ids_O = torch.tensor([teacher_id for _, teacher_id in chosen], dtype=torch.long)
    known = sum(student_id >= 0 for student_id in to_student)
    return Overlap(
        student_ids_O,
        teacher_ids_O,
        torch.tensor(to_student, dtype=torch.long),
        len(chosen) / max(1, len(student_bytes)),
        known / max(1, len(teacher_bytes)),
        student_doubles + teacher_doubles,
    )


def preferred(
    token_bytes: Sequence[bytes | None], byte_tokens: Collection[int] = (), added: Collection[int] = ()
) -> tuple[dict[bytes, int], int]:
    """The id that stands for each byte string, and how many ids are not the one that stands for theirs.

    Of several it is the one that a tokenizer produces: an added token, which takes the text before the model of the
    vocabulary sees it, then an ordinary one, then a byte token; then the lowest id.
    """
    first, last = frozenset(added), frozenset(byte_tokens)

    def rank(token_id: int) -> tuple[bool, bool, int]:
        return token_id in last, token_id not in first, token_id

    found: dict[bytes, int] = {}
    doubles = 0
    for token_id, text in enumerate(token_bytes):
        if not text:
            continue
        other = found.get(text)
        if other is None or rank(token_id) < rank(other):
            found[text] = token_id
        doubles += other is not None
    return found, doubles


def check_shared(student_ids_O: Tensor, teacher_ids_O: Tensor) -> None:
    """ValueError when the ids of the shared tokens do not pair up or are none."""
    if student_ids_O.shape != teacher_ids_O.shape or not len(student_ids_O):
        raise ValueError(
            f"shared ids: expected as many shared ids of the student as of the teacher and at least one, "
            f"got {len(student_ids_O)} and {len(teacher_ids_O)}. Compare by rank what shares no tokens."
        )
