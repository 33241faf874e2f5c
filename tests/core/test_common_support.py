"""What two vocabularies can complete behind one prefix, and the rest at prefixes of any likelihood."""

import pytest
import torch

from dskd_plugin.core.common_support import CommonSupport, Completions
from dskd_plugin.core.divergences import forward_kl
from dskd_plugin.core.events import events_of_pairs
from dskd_plugin.core.segments import Side

WORDS = (
    [b"a", b"b", b"ab", b"abc", b"abd", b"b c", None, b"ab", b"d"],
    [b"b", b"bc", b"a", b"bd", b"ab", None, b"c", b"d"],
)


@pytest.mark.parametrize(
    ("ids", "sizes", "expected"),
    [
        ((2, 0), (1, 2), [(2, 0), (3, 1), (4, 3)]),  # "ab", "abc" and "abd" after "a": "b", "bc" and "bd"
        ((3, 6), (1, 3), [(3, 6), (4, 7)]),  # after "ab": "c" and "d"
        ((1, 4), (2, 1), [(1, 4)]),  # the teacher's "ab" after "a"; it has no "abc"
        ((7, 0), (1, 2), [(7, 0)]),  # an id whose bytes another one stands for
        ((3, 0), (1, 2), [(3, 0)]),  # bytes that do not fit
        ((6, 0), (1, 2), [(6, 0)]),  # no bytes
        ((2, 4), (1, 1), [(2, 4)]),
        ((3, 1), (2, 2), [(3, 1)]),
    ],
)
def test_completions_of_a_text(ids, sizes, expected):
    own, theirs = Completions(*WORDS).of_span(*ids, sizes)
    assert list(zip(own.tolist(), theirs.tolist(), strict=True)) == expected


def test_completions_are_the_ids_that_stand_for_their_bytes():
    """Not the lowest where another one is said."""
    completions = Completions(*WORDS, {b"ab": 7, b"abc": 3}, {b"b": 0, b"bc": 1})
    assert [ids.tolist() for ids in completions.of_span(7, 0, (1, 2))] == [[7, 3], [0, 1]]


@pytest.mark.parametrize("before", [0.0, -1e-9, -1e-5, -3.0, -80.0, -2000.0])
def test_a_prefix_of_any_likelihood_has_finite_values_and_gradients(before):
    """From certain to impossible; the events still sum to 1."""
    completions = Completions([b"a", b"b", b"ab", b"c", None], [b"c", b"b", b"abc", b"bc", None, b"a"])
    compare = CommonSupport(forward_kl, 1.0, events_of_pairs([(0, 5), (1, 1), (3, 0)], 5, 6), completions)
    draw = torch.Generator().manual_seed(0)
    others = torch.tensor([before], dtype=torch.float32, requires_grad=True)
    student = Side(
        logits_BV=torch.randn(1, 5, generator=draw).requires_grad_(),
        ids_B=torch.tensor([3]),
        others_B=others,
        sizes_B=torch.tensor([2]),
    )
    teacher = Side(
        logits_BV=torch.randn(1, 6, generator=draw),
        ids_B=torch.tensor([2]),
        others_B=torch.zeros(1),
        sizes_B=torch.tensor([1]),
    )
    ids, _, there = compare.event_ids(student, teacher)
    said = compare.event_log_probs(student, ids, there)
    assert said.exp().sum().item() == pytest.approx(1, abs=2e-6)
    found = compare(student=student, teacher=teacher, paired_B=torch.tensor([False]))
    found.sum().backward()
    assert found.isfinite().all() and others.grad.isfinite().all() and student.logits_BV.grad.isfinite().all()
