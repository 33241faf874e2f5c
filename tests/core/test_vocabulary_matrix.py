"""The student's distribution in the teacher's vocabulary: against plain loops over the entries of the matrix."""

import pytest
import torch

from dskd_plugin.core.baselines import SharedIds
from dskd_plugin.core.divergences import DIVERGENCES, divergence
from dskd_plugin.core.vocabulary_matrix import MatrixCompare, VocabularyMatrix, vocabulary_matrix

KINDS = sorted(DIVERGENCES)
SHARED = {0: 3, 1: 9, 2: 1, 4: 0, 7: 4}
PIECES = {3: [3, 9], 5: [1, 0, 4, 10, 2], 6: [8], 8: []}
# By hand: a tenth of the piece before, four pieces, each row of sum 1.
ENTRIES = [(i, j, 1.0) for i, j in SHARED.items()] + [(3, 3, 1 / 1.1), (3, 9, 0.1 / 1.1), (6, 8, 1.0)]
ENTRIES += [(5, 1, 1 / 1.111), (5, 0, 0.1 / 1.111), (5, 4, 0.01 / 1.111), (5, 10, 0.001 / 1.111)]
DIVISORS = torch.tensor([9, 0, 0, 0, 7, 0, 0])
LEAVES = ("student", "weight", "bias")
HEADS = [{}, {"scale": 1.3, "softcap": 4.0}, {"bias": False, "padding": 0}]


def run(case, size, *, kind="forward_kl", tau=1.7, block_elements=40, divisors=DIVISORS, matrix=None):
    compare = MatrixCompare(divergence(kind), tau, matrix or vocabulary_matrix(SHARED, PIECES), size)
    return case.compared(compare, kind, tau, divisors=divisors, block_elements=block_elements)


def test_entries_are_those_of_the_shared_ids_and_of_the_pieces():
    matrix = vocabulary_matrix(SHARED | {3: 3}, {3: [5], 8: [2]})
    assert matrix.student_E.tolist() == [0, 1, 2, 3, 4, 7, 8] and matrix.teacher_E.tolist() == [3, 9, 1, 3, 0, 4, 2]
    assert matrix.weights_E.tolist() == [1.0] * 7
    matrix = vocabulary_matrix(SHARED, PIECES)
    found = zip(matrix.student_E.tolist(), matrix.teacher_E.tolist(), matrix.weights_E.tolist(), strict=True)
    assert sorted(found) == [pytest.approx(entry) for entry in sorted(ENTRIES)]


@pytest.mark.parametrize("block_elements", [1, 40, 10**9])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("size", "tau"), [(3, 1.0), (4, 1.7), (100, 1.0)])
def test_loss_and_gradients_equal_the_floats(oracle, make_case, kind, size, tau, block_elements):
    case = make_case(seed=1, **HEADS[size % len(HEADS)]).whole()
    loss, sums = run(case, size, kind=kind, tau=tau, block_elements=block_elements)
    floats, live = case.floats() | {"ce_rows": [True] * 7}, case.live()

    def compare(z_s, z_t):
        return oracle.projected(z_s, z_t, tau, kind, ENTRIES, size)

    def expected(live):
        return oracle.baseline_loss(floats, live, compare, 0.6 / 9, 0.4 / 7)

    assert loss.item() == pytest.approx(expected(live), rel=1e-6)
    kd = oracle.baseline_loss(floats, live, compare, 0.0, 1.0)
    assert [x.item() for x in sums["kd"]] == pytest.approx([kd, 5], rel=1e-6)
    if kind == "adaptive_kl" or block_elements != 40:
        return
    for name in [name for name in LEAVES if live[name] is not None]:
        (got,) = torch.autograd.grad(loss, getattr(case, name), retain_graph=True)
        wanted = torch.tensor(oracle.gradient(expected, live, name), dtype=torch.float64)
        torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-8)


def test_a_matrix_of_shared_ids_alone_is_the_overlap():
    draw = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(4, 9, generator=draw).double(), torch.randn(4, 11, generator=draw).double()
    ids = torch.tensor(list(SHARED)), torch.tensor(list(SHARED.values()))
    found = MatrixCompare(divergence("js"), 1.7, vocabulary_matrix(SHARED, {}), 99)(
        student_NV=student, teacher_NV=teacher
    )
    plain = SharedIds(divergence("js"), 1.7, *ids)(student_NV=student, teacher_NV=teacher)
    torch.testing.assert_close(found, plain, rtol=1e-12, atol=1e-14)


def test_mass_of_a_token_reaches_its_pieces():
    """A student that says "201" alone agrees with a teacher that says "2"."""
    matrix = vocabulary_matrix({0: 0, 1: 1}, {2: [1, 0]})
    student = torch.tensor([[-9.0, -9.0, 9.0]]).double().requires_grad_()
    teacher = torch.tensor([[0.0, 10.0]]).double()
    compare = MatrixCompare(divergence("forward_kl"), 1.0, matrix, 2)
    by_ids = SharedIds(divergence("forward_kl"), 1.0, torch.tensor([0, 1]), torch.tensor([0, 1]))
    assert compare(student_NV=student, teacher_NV=teacher).item() < 0.11 < 0.6
    assert by_ids(student_NV=student, teacher_NV=teacher).item() > 0.6
    compare(student_NV=student, teacher_NV=teacher).sum().backward()
    assert student.grad[0, 0] > 0 > student.grad[0, 1]


def test_each_id_matches_its_largest_entry_once():
    matrix = VocabularyMatrix(
        torch.tensor([0, 1, 1, 2, 3, 3, 4, 5]),
        torch.tensor([7, 7, 2, 5, 5, 6, 9, 7]),
        torch.tensor([0.9, 0.3, 0.7, 1.0, 0.9, 0.1, 0.5, 0.9]),
    )
    pairs = {
        least: list(zip(*(x.tolist() for x in matrix.best_pairs(least)), strict=True)) for least in (0.5, 0.6, 1.0)
    }
    # 3 gives way to 2, whose entry is larger, and 5 to 0, which comes first.
    assert pairs == {0.5: [(0, 7), (1, 2), (2, 5), (4, 9)], 0.6: [(0, 7), (1, 2), (2, 5)], 1.0: [(2, 5)]}
    assert [len(x) for x in matrix.best_pairs(2.0)] == [0, 0]


def test_a_matrix_without_an_entry_is_refused():
    with pytest.raises(ValueError, match="matrix: expected at least one entry, got none"):
        MatrixCompare(divergence("js"), 1.0, vocabulary_matrix({}, {8: []}), 4)
