"""The tokens of one real vocabulary in the pieces of another."""

import pytest

from dskd_plugin.core.vocabulary_matrix import MOST_PIECES
from dskd_plugin.text.pieces import first_pieces
from dskd_plugin.text.respelled import pieces_of, respelling_matrix
from dskd_plugin.text.tokens import overlap
from dskd_plugin.text.vocabularies import encode

PAIRS = [("smollm2", "qwen-fast"), ("qwen-fast", "smollm2"), ("smollm2", "mistral"), ("mistral", "smollm2")]


@pytest.mark.parametrize("name", ["smollm2", "qwen-fast", "mistral"])
def test_pieces_spell_the_text_as_far_as_they_go(zoo, name):
    entry = zoo(name)
    texts = {b"201", b" unbelievably", b"\n    return", "naïve 漢字".encode(), b"\xe6\xbc", b"a" * 40, b"", b" "}
    found = pieces_of(texts, first_pieces(entry.tokenizer, entry.table))
    assert set(found) == texts and found[b""] == []
    for text, pieces in found.items():
        assert len(pieces) <= MOST_PIECES and text.startswith(b"".join(pieces))
        assert len(pieces) == MOST_PIECES or b"".join(pieces) == text
        assert all(piece in entry.table.bytes or len(piece) == 1 for piece in pieces)
    assert found[b"\xe6\xbc"] == [b"\xe6", b"\xbc"]  # bytes that are no text


@pytest.mark.parametrize("name", ["smollm2", "qwen-fast"])
def test_pieces_of_words_are_those_of_the_tokenizer(zoo, name):
    """What is left behind a piece is mostly cut as it was within the whole word."""
    entry = zoo(name)
    words = ["unbelievably", "x = 201 + 7", "Tokenizers!", "return", "internationalisation"]
    found = pieces_of({word.encode() for word in words}, first_pieces(entry.tokenizer, entry.table))
    for word in words:
        expected = [entry.table.bytes[token] for token in encode(entry.tokenizer, word)]
        assert found[word.encode()][0] == expected[0]
        assert found[word.encode()] == expected[:MOST_PIECES] or len(word) > 12


@pytest.mark.parametrize(("student", "teacher"), PAIRS)
def test_a_matrix_of_two_vocabularies(zoo, student, teacher):
    one, other = zoo(student), zoo(teacher)
    sizes = one.table.vocab_size, other.table.vocab_size
    shared = overlap(one.table, other.table)
    matrix = respelling_matrix(one.table, (other.tokenizer, other.table), shared, sizes)
    rows, columns = {}, (matrix.student_E, matrix.teacher_E, matrix.weights_E)
    for own, theirs, weight in zip(*(column.tolist() for column in columns), strict=True):
        rows.setdefault(own, []).append((theirs, weight))
    pairs = dict(zip(shared.student_ids_O.tolist(), shared.teacher_ids_O.tolist(), strict=True))
    assert all(rows[own] == [(theirs, 1.0)] for own, theirs in pairs.items())
    several = lacking = 0
    for own, text in enumerate(one.table.bytes):
        if text is None:
            assert own not in rows or own in pairs
            continue
        if own not in rows:
            # Bytes that the other vocabulary has no token for.
            assert student != "smollm2"
            lacking += 1
            continue
        found = sorted(rows[own], key=lambda entry: -entry[1])
        assert len(found) <= MOST_PIECES and sum(weight for _, weight in found) == pytest.approx(1)
        assert text.startswith(other.table.bytes[found[0][0]])
        several += len(found) > 1
    assert several > 1000 and lacking < 0.001 * len(rows)


def test_heads_bound_the_ids(zoo):
    one, other = zoo("smollm2"), zoo("qwen-fast")
    shared = overlap(one.table, other.table)
    matrix = respelling_matrix(one.table, (other.tokenizer, other.table), shared, (500, 700))
    assert matrix.student_E.max() < 500 and matrix.teacher_E.max() < 700 and len(matrix.student_E) > 300
