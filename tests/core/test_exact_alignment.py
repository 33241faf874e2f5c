"""Byte spans of two tokenizations, against all pairs of all tokens."""

import itertools
import time
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dskd_plugin.core.exact_alignment import match_covers, match_spans, match_starts


def spans(lengths):
    starts, ends, at = [], [], 0
    for length in lengths:
        starts.append(at)
        at += length
        ends.append(at)
    return starts, ends


def brute_force(ours, theirs):
    return [
        (i, j)
        for i, mine in enumerate(zip(*ours, strict=True))
        for j, yours in enumerate(zip(*theirs, strict=True))
        if mine == yours and mine[1] > mine[0]
    ]


lengths = st.lists(st.integers(0, 4), max_size=30)


@settings(max_examples=300, deadline=None)
@given(lengths, lengths)
def test_equals_brute_force(student, teacher):
    ours, theirs = spans(student), spans(teacher)
    assert match_spans(*ours, *theirs) == brute_force(ours, theirs)


@settings(max_examples=200, deadline=None)
@given(lengths, lengths, st.sets(st.integers(0, 29)))
def test_tokens_without_a_span_pair_with_nothing_and_disturb_nothing(student, teacher, unknown):
    ours, theirs = spans(student), spans(teacher)
    for k in unknown:
        if k < len(student):
            ours[0][k] = ours[1][k] = 0
    assert match_spans(*ours, *theirs) == brute_force(ours, theirs)


@pytest.mark.parametrize(
    ("student", "teacher", "pairs"),
    [
        ([], [], []),
        ([3], [], []),
        ([3], [3], [(0, 0)]),
        ([1, 2], [3], []),
        ([1, 2, 4], [3, 4], [(2, 1)]),
        ([0, 2, 0, 2], [2, 0, 2], [(1, 0), (3, 2)]),
        ([2, 1, 1], [1, 2, 1], [(2, 2)]),
    ],
)
def test_examples(student, teacher, pairs):
    assert match_spans(*spans(student), *spans(teacher)) == pairs


def test_time_grows_with_the_tokens_not_with_their_product():
    ours, theirs = spans([1, 2, 3, 4] * 25_000), spans([2, 1, 3, 4] * 25_000)
    start = time.perf_counter()
    assert len(match_spans(*ours, *theirs)) == 50_000
    assert time.perf_counter() - start < 1


def test_unequal_lengths_are_refused():
    with pytest.raises(ValueError, match="as many starts as ends on each side, got student 1 and 2"):
        match_spans([0], [1, 2], [], [])


@given(st.data())
def test_starts_equal_brute_force(data):
    length = data.draw(st.integers(0, 12))
    sides = []
    for _ in range(2):
        cuts = sorted(data.draw(st.sets(st.integers(1, max(1, length - 1)), max_size=length))) if length else []
        bounds = [0, *[cut for cut in cuts if cut < length], length]
        sides.append([*pairwise(bounds)])
    ours, theirs = sides
    wanted = [
        (i, j)
        for i, (start, end) in enumerate(ours)
        for j, (other, stop) in enumerate(theirs)
        if start == other and end > start and stop > other
    ]
    starts = [[start for start, _ in side] for side in sides]
    ends = [[end for _, end in side] for side in sides]
    assert match_starts(starts[0], ends[0], starts[1], ends[1]) == wanted


@settings(max_examples=300, deadline=None)
@given(lengths, lengths, st.sets(st.integers(0, 29)), st.sets(st.integers(0, 29)))
def test_covers_equal_brute_force(student, teacher, unknown, other_unknown):
    """Every byte of a span lies in spans of the teacher that follow one another."""
    sides = [spans(student), spans(teacher)]
    for (starts, ends), lost in zip(sides, (unknown, other_unknown), strict=True):
        for k in lost & set(range(len(starts))):
            starts[k] = ends[k] = 0
    ours, theirs = (list(zip(*side, strict=True)) for side in sides)
    wanted = []
    for i, (start, end) in enumerate(ours):
        for j, more in itertools.product(range(len(theirs)), range(len(theirs))):
            run = theirs[j : j + more + 1]
            if end <= start or len(run) <= more or any(f <= s for s, f in run):
                continue
            holds_first, holds_last = run[0][0] <= start < run[0][1], run[-1][0] < end <= run[-1][1]
            if holds_first and holds_last and all(f == s for (_, f), (s, _) in pairwise(run)):
                wanted.append((i, j, more))
    assert match_covers(*sides[0], *sides[1]) == wanted
