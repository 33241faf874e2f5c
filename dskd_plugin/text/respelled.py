"""The tokens of one vocabulary spelled with those of another, for a matrix between the two."""

import itertools
from collections.abc import Iterable
from typing import Any

from dskd_plugin.core.overlap import Overlap
from dskd_plugin.core.vocabulary_matrix import MOST_PIECES, VocabularyMatrix, vocabulary_matrix
from dskd_plugin.text.pieces import FirstPieces, characters, first_pieces
from dskd_plugin.text.tokens import TokenTable, ids_of_bytes


def respelling_matrix(
    student: TokenTable, teacher: tuple[Any, TokenTable], overlap: Overlap, ids: tuple[int, int]
) -> VocabularyMatrix:
    """W of two tokenizers: 1 for the ids that mean the same, falling weights for the pieces of all others.

    teacher: its tokenizer with the table. ids: how many real ids each head has, (student, teacher).
    A special token without a partner has no entry.
    """
    tokenizer, table = teacher
    pairs = zip(overlap.student_ids_O.tolist(), overlap.teacher_ids_O.tolist(), strict=True)
    shared = {own: theirs for own, theirs in pairs if own < ids[0] and theirs < ids[1]}
    id_of = ids_of_bytes(table, ids[1])
    texts = {own: text for own, text in enumerate(student.bytes[: ids[0]]) if text and own not in shared}
    # Two ids may spell the same text, of which one pairs.
    shared |= {own: id_of[text] for own, text in texts.items() if text in id_of}
    found = pieces_of({text for own, text in texts.items() if own not in shared}, first_pieces(tokenizer, table))
    spelled: dict[int, list[int]] = {}
    for own, text in texts.items():
        # What stands behind a piece that the teacher has no token for is not what it would say first.
        sayable = itertools.takewhile(id_of.__contains__, found.get(text, ()))
        spelled[own] = [id_of[piece] for piece in sayable]
    return vocabulary_matrix(shared, spelled)


def pieces_of(texts: Iterable[bytes], cut: FirstPieces) -> dict[bytes, list[bytes]]:
    """The first pieces that a tokenizer cuts from each text: what is left behind one is cut as a text of its own.

    Bytes that are no text by themselves are pieces of one byte.
    """
    found: dict[bytes, list[bytes]] = {text: [] for text in texts}
    first: dict[str, bytes | None] = {}
    for _ in range(MOST_PIECES):
        left = {text: text[sum(map(len, pieces)) :] for text, pieces in found.items()}
        new = sorted({characters(rest) for rest in left.values()} - {"", *first})
        first.update(zip(new, cut(new), strict=True))
        for text, rest in left.items():
            if rest:
                piece = first.get(characters(rest))
                # A tokenizer that changes text may answer with bytes that do not stand there.
                found[text].append(piece if piece and rest.startswith(piece) else rest[:1])
    return found
