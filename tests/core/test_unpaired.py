"""Rows that no KD term takes: a share of their cross-entropy, or the whole of it."""

import dataclasses

import pytest
import torch

from dskd_plugin.core.baselines import SameIds
from dskd_plugin.core.blockwise import baseline_loss, cma_loss, dskd_loss
from dskd_plugin.core.divergences import divergence
from dskd_plugin.core.heads import Head
from dskd_plugin.core.objective import TERMS, Objective
from dskd_plugin.core.rows import Rows, counts

# Of the 7 rows of a case the last two have no partner. Row 2 has no label and row 3 no s2t, row 4 neither.
WITHOUT = {"both": [4, 5, 6], "student": [2, 4, 5, 6], "teacher": [3, 4, 5, 6]}


def run(case, rows=None, divisors=None, block_elements=24, unpaired_ce=True, **changes):
    rows = case.rows() if rows is None else rows
    objective = dataclasses.replace(case.objective(**changes), unpaired_ce=unpaired_ce)
    divisors = counts(rows, objective) if divisors is None else divisors
    parts = case.parts(**changes) | {"objective": objective}
    return dskd_loss(rows, **parts, divisors_T=divisors, block_elements=block_elements)


def gradients(case, loss):
    return torch.autograd.grad(loss, list(case.leaves().values()))


def close(found, expected, tolerance=1e-12):
    for got, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kd_ratio", [0.4, 1.0])
@pytest.mark.parametrize(("ce_rows", "open_rows"), [(None, []), ([0, 2, 4, 5], []), (None, [0, 2]), ([0, 4], [0, 1])])
@pytest.mark.parametrize("spaces", WITHOUT)
def test_loss_and_gradients_equal_the_floats(oracle, make_case, spaces, ce_rows, open_rows, kd_ratio):
    """Row by row: weight 1 without a partner or with an open one, else 1 - r, over all rows of the cross-entropy."""
    case = make_case(seed=1, spaces=spaces, kd_ratio=kd_ratio, scale=1.3, softcap=4.0)
    counted = range(7) if ce_rows is None else ce_rows
    rows = case.rows()
    if ce_rows is not None:
        rows = dataclasses.replace(rows, ce_R=torch.tensor([r in ce_rows for r in range(7)]))
    if open_rows:
        rows = dataclasses.replace(rows, open_N=torch.tensor([r in open_rows for r in range(5)]))
    without = {*WITHOUT[spaces], *open_rows}
    divisors = {"ce": 9, "t2s_kd": 4, "t2s_ce": 5, "s2t_kd": 7, "kd": 0, "span_kl": 0, "ce_unpaired": 9}
    loss, sums = run(case, rows, torch.tensor(list(divisors.values())))
    weights = [(1.0 if r in without else 1 - kd_ratio) if r in counted else 0.0 for r in range(7)]
    floats, live = case.floats(divisors | {"ce": 0}), case.live()

    def expected(live):
        return oracle.weighted_cross_entropy(floats, live, weights) / 9 + oracle.loss(floats, live)

    assert loss.item() == pytest.approx(expected(live), rel=1e-9)
    for name, got in zip(case.leaves(), gradients(case, loss), strict=True):
        wanted = torch.tensor(oracle.gradient(expected, live, name), dtype=torch.float64)
        torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-8)
    whole = [float(r in without and r in counted) for r in range(7)]
    all_of = [float(r in counted) for r in range(7)]
    for name, which in (("ce", all_of), ("ce_unpaired", whole)):
        value = oracle.weighted_cross_entropy(floats, live, which)
        assert [x.item() for x in sums[name]] == pytest.approx([value, len(counted)], rel=1e-12), name


def test_it_moves_the_loss_and_leaves_the_other_terms(make_case):
    case = make_case(seed=2)
    (share, share_sums), (whole, sums) = (run(case, unpaired_ce=on) for on in (False, True))
    assert whole.item() - share.item() == pytest.approx(0.4 * sums["ce_unpaired"][0].item() / 7, rel=1e-12)
    assert [x.item() for x in share_sums["ce_unpaired"]] == [0, 0]
    for name in set(sums) - {"ce_unpaired"}:
        assert torch.equal(sums[name][0], share_sums[name][0]), name


def test_where_every_row_has_a_partner_nothing_changes(make_case):
    case = make_case(seed=3, rows=2, pairs=2)
    case.label, case.s2t_rows = [1, 2], [True, True]
    share, whole = (run(case, unpaired_ce=on)[0] for on in (False, True))
    assert torch.equal(whole, share)
    close(gradients(case, whole), gradients(case, share), 1e-15)


def test_rows_without_any_pair_have_the_loss_of_plain_fine_tuning(make_case):
    case = make_case(seed=4, rows=3, pairs=0)
    loss, sums = run(case)
    assert loss.item() == pytest.approx(sums["ce"][0].item() / 3, rel=1e-12)


@pytest.mark.parametrize("parts", [[[0, 1, 2, 3], [4, 5, 6]], [[6], [5], [4], [3], [2], [1], [0]]])
def test_any_split_and_any_blocks_give_the_same(make_case, parts):
    case = make_case(seed=5)
    loss, _ = run(case, block_elements=10**9)
    expected = gradients(case, loss)
    for elements in (1, 24, 36):
        other, _ = run(case, block_elements=elements)
        torch.testing.assert_close(other, loss, rtol=1e-12, atol=0)
        close(gradients(case, other), expected)
    rows, batches = case.rows(), []
    for part in parts:
        pairs = [r for r in part if r < 5]
        order = [*pairs, *(r for r in part if r >= 5)]
        picked = {name: getattr(rows, name)[pairs] for name in ("teacher_NE", "label_N", "agree_N", "s2t_N")}
        batches.append(
            dataclasses.replace(rows, student_RD=case.student[order], labels_R=rows.labels_R[order], **picked)
        )
    objective = dataclasses.replace(case.objective(), unpaired_ce=True)
    divisors = sum(counts(batch, objective) for batch in batches)
    assert divisors.tolist() == [7, 2, 3, 3, 0, 0, 7]
    total = sum(run(case, batch, divisors)[0] for batch in batches)
    torch.testing.assert_close(total, loss, rtol=1e-12, atol=0)
    close(gradients(case, total), expected)


def test_two_distributions_compared(oracle, make_case):
    case = make_case(seed=6, pairs=4)
    case.teacher_ids = 9
    kind, rows = "forward_kl", Rows(student_RD=case.student, labels_R=torch.tensor(case.gold), teacher_NE=case.teacher)
    objective = dataclasses.replace(case.objective(), compares="distributions", unpaired_ce=True)
    loss, _ = baseline_loss(
        rows,
        student_head=case.student_head(),
        teacher_head=case.teacher_head(),
        compare=SameIds(divergence(kind), 2.0),
        objective=objective,
        divisors_T=counts(rows, objective),
        block_elements=24,
    )
    floats = case.floats() | {"ce_rows": [True] * 7}

    def compare(z_s, z_t):
        return oracle.compare_vanilla(z_s, z_t, 2.0, kind)

    of_ce = oracle.weighted_cross_entropy(floats, case.live(), [0.6] * 4 + [1.0] * 3) / 7
    assert loss.item() == pytest.approx(of_ce + oracle.baseline_loss(floats, case.live(), compare, 0, 0.4 / 4))


@pytest.mark.parametrize("spaces", ["both", "student", "teacher"])
def test_with_attention_a_row_that_attended_has_partners(spaces):
    """Rows 0 to 2 could attend and row 1 did not; row 3 belongs to no sample of the teacher's."""
    draw = torch.Generator().manual_seed(0)
    student, weight, t2s = (torch.randn(*shape, generator=draw).double() for shape in ((4, 3), (6, 3), (3, 3)))
    s2t, teacher = torch.randn(5, 2, generator=draw).double(), torch.randn(5, 2, generator=draw).double()
    objective = Objective(
        divergence=divergence("forward_kl"),
        temperature=1.0,
        kd_ratio=0.4,
        spaces=spaces,
        agreement_mask=False,
        compares="spaces",
        unpaired_ce=True,
    )
    rows = Rows(
        student_RD=student,
        labels_R=torch.tensor([1, 0, 3, 2]),
        label_N=torch.tensor([1, -1, 3]),
        s2t_M=torch.tensor([True, True, False, True, True]),
    )
    _, sums = cma_loss(
        rows,
        t2s_Nd=None if spaces == "teacher" else t2s,
        s2t_MD=None if spaces == "student" else s2t,
        teacher_MD=teacher,
        student_head=Head(weight, 6),
        teacher_head=Head(torch.randn(7, 2, generator=draw).double(), 7),
        objective=objective,
        divisors_T=counts(rows, objective),
        block_elements=12,
    )
    nll = torch.nn.functional.cross_entropy(student @ weight.T, rows.labels_R, reduction="none")
    assert sums["ce_unpaired"][0].item() == pytest.approx((nll[1] + nll[3]).item(), rel=1e-12)
    assert counts(rows, objective)[TERMS.index("ce_unpaired")] == 4
