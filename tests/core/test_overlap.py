"""The shared vocabulary of two tokenizers, against a search over all pairs."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dskd_plugin.core.overlap import identity, shared_vocabulary

tokens = st.lists(
    st.one_of(st.none(), st.binary(min_size=0, max_size=2).map(lambda b: bytes(x % 4 for x in b))),
    max_size=20,
)


def best(ids, byte_tokens, added):
    """Added tokens first, then ordinary ones, then byte tokens; of one kind the lowest id."""
    for kind in (added - byte_tokens, set(range(20)) - byte_tokens - added, byte_tokens & added, byte_tokens):
        if kind & set(ids):
            return min(kind & set(ids))
    return None


kinds = st.sets(st.integers(0, 19))


@settings(max_examples=300, deadline=None)
@given(tokens, tokens, st.tuples(kinds, kinds), st.tuples(kinds, kinds))
def test_equals_a_search_over_all_pairs(student, teacher, ours, theirs):
    """ours, theirs: byte tokens and added tokens."""
    found = shared_vocabulary(
        student,
        teacher,
        student_byte_tokens=ours[0],
        teacher_byte_tokens=theirs[0],
        student_added=ours[1],
        teacher_added=theirs[1],
    )
    expected = [best([i for i, b in enumerate(student) if b and b == text], *ours) for text in teacher]
    assert found.teacher_to_student_V.tolist() == [-1 if i is None else i for i in expected]
    pairs = []
    for i, text in enumerate(student):
        same = [k for k, b in enumerate(student) if b == text]
        there = [k for k, b in enumerate(teacher) if b == text]
        if text and there and best(same, *ours) == i:
            pairs.append((i, best(there, *theirs)))
    assert list(zip(found.student_ids_O.tolist(), found.teacher_ids_O.tolist(), strict=True)) == pairs
    doubles = sum(len(filled) - len(set(filled)) for filled in ([b for b in side if b] for side in (student, teacher)))
    assert found.collisions == doubles
    assert found.student_share == len(pairs) / max(1, len(student))
    assert found.teacher_share == sum(i is not None for i in expected) / max(1, len(teacher))


STUDENT = [None, b"a", b"b", b"A", b"A", b"cd"]
TEACHER = [b"cd", b"A", b"zz", None, b"a", None]


def test_roles_take_precedence_and_bytes_fill_the_rest():
    found = shared_vocabulary(STUDENT, TEACHER, [(0, 3), (0, 5)], student_byte_tokens={3})
    assert found.teacher_to_student_V.tolist() == [5, 4, -1, 0, 1, 0]
    assert found.student_ids_O.tolist() == [0, 1, 4, 5]
    assert found.teacher_ids_O.tolist() == [3, 4, 1, 0]
    assert (found.student_share, found.teacher_share, found.collisions) == (4 / 6, 5 / 6, 1)


def test_a_role_overrides_the_bytes_of_its_ids():
    found = shared_vocabulary(STUDENT, TEACHER, [(1, 2)])
    assert found.teacher_to_student_V.tolist() == [5, 3, 1, -1, 1, -1]
    assert (1, 4) not in zip(found.student_ids_O.tolist(), found.teacher_ids_O.tolist(), strict=True)


def test_nothing_shared():
    found = shared_vocabulary([b"a", None], [None, b"b"])
    assert found.student_ids_O.dtype == torch.long and found.student_ids_O.tolist() == []
    assert found.teacher_to_student_V.tolist() == [-1, -1]


def test_identity():
    same = identity(4)
    assert (
        same.student_ids_O.tolist() == same.teacher_ids_O.tolist() == same.teacher_to_student_V.tolist() == [0, 1, 2, 3]
    )
    assert (same.student_share, same.teacher_share, same.collisions) == (1.0, 1.0, 0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: identity(0), "vocab_size: expected at least 1, got 0"),
        (
            lambda: shared_vocabulary([b"a"], [b"a"], [(0, 1)]),
            r"role_pairs: expected a student id below 1 .* got \(0, 1\)",
        ),
        (lambda: shared_vocabulary([b"a"], [b"a"], [(-1, 0)]), r"got \(-1, 0\)"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
