"""The span term: likelihoods of spans in which no token has a partner of its own."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dskd_plugin.core.baselines import uld
from dskd_plugin.core.blockwise import baseline_loss, dskd_loss
from dskd_plugin.core.divergences import binary_kl, divergence
from dskd_plugin.core.heads import Head
from dskd_plugin.core.objective import TERMS, Objective
from dskd_plugin.core.readings import token_log_probs
from dskd_plugin.core.rows import Rows, Spans, counts
from dskd_plugin.core.terms import span_sums, span_term

SETTINGS = {"temperature": 2.0, "kd_ratio": 0.5, "spaces": "both", "agreement_mask": True, "compares": "spaces"}

WHOLE = 10**9
TAU = 3.0
# response rows of each span, in no order and over several blocks; rows 0 to 4 have partners
SPANS = [([1, 6], -2.5), ([5], -0.01), ([0, 2, 3], -40.0)]
LEAVES = ("student", "weight", "bias", "t2s")


def spans_of(parts):
    flat = [(row, number) for number, (rows, _) in enumerate(parts) for row in rows]
    return Spans(
        rows_P=torch.tensor([row for row, _ in flat], dtype=torch.long),
        of_P=torch.tensor([number for _, number in flat], dtype=torch.long),
        teacher_C=torch.tensor([teacher for _, teacher in parts], dtype=torch.float64),
    )


def run(case, *, compares="spaces", parts=SPANS, rows=None, divisors=None, block_elements=WHOLE, **changes):
    rows = dataclasses.replace(case.rows() if rows is None else rows, spans=spans_of(parts))
    chosen = {"span_weight": 0.7, "span_temperature": TAU, "compares": compares} | changes
    objective = dataclasses.replace(case.objective(), **chosen)
    divisors = counts(rows, objective) if divisors is None else divisors
    heads = {"student_head": case.student_head(), "teacher_head": case.teacher_head()}
    common = heads | {"objective": objective, "divisors_T": divisors, "block_elements": block_elements}
    if compares == "spaces":
        return dskd_loss(rows, t2s_Dd=case.t2s, s2t_dD=case.s2t, **common)
    return baseline_loss(rows, compare=uld(2.0), **common)


def whole_teacher(case):
    with torch.no_grad():
        case.teacher.nan_to_num_(0.4)
    return case


def gradients(case, loss):
    leaves = [getattr(case, name) for name in LEAVES]
    found = torch.autograd.grad(loss, leaves, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, found, strict=True)]


@pytest.mark.parametrize("block_elements", [1, 30, WHOLE])
@pytest.mark.parametrize("compares", ["spaces", "distributions"])
def test_the_term_and_its_gradients_equal_the_floats(oracle, make_case, compares, block_elements):
    case = whole_teacher(make_case(seed=1, scale=1.3, softcap=4.0))
    divisors = torch.tensor([9, 4, 5, 7, 6, 11, 0])
    loss, sums = run(case, compares=compares, divisors=divisors, block_elements=block_elements)
    base, _ = run(case, compares=compares, divisors=divisors, parts=[])
    floats, live = case.floats(), case.live()

    def term(live):
        return oracle.spans_loss(floats, live, SPANS, TAU)

    assert [x.item() for x in sums["span_kl"]] == pytest.approx([term(live), 3], rel=1e-12)
    assert not sums["span_kl"][0].requires_grad
    weight = 0.4 * 0.7 / 11
    assert (loss - base).item() == pytest.approx(weight * term(live), rel=1e-9)
    for name, got, without in zip(LEAVES, gradients(case, loss), gradients(case, base), strict=True):
        wanted = torch.tensor(oracle.gradient(term, live, name), dtype=torch.float64)
        torch.testing.assert_close(got - without, weight * wanted, rtol=1e-6, atol=1e-9)


def test_the_gradient_is_that_of_plain_autograd(make_case):
    case = make_case(seed=2)
    loss, _ = run(case, block_elements=24, divisors=torch.tensor([0, 0, 0, 0, 0, 1, 0]))
    head, spans = case.student_head(), spans_of(SPANS)
    logits = head.scale * (case.student[spans.rows_P] @ head.weight_VD.T + head.bias_V)
    gold = torch.tensor(case.gold)[spans.rows_P]
    log_probs = torch.log_softmax(logits, -1).gather(1, gold[:, None])[:, 0]
    plain = 0.4 * 0.7 * span_term(spans, log_probs, temperature=TAU)[0]
    torch.testing.assert_close(loss, plain, rtol=1e-12, atol=0)
    for got, expected in zip(gradients(case, loss), gradients(case, plain), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("kd_ratio", [0.4, 1.0])
def test_spans_need_no_gold_rows(oracle, make_case, kd_ratio):
    """On sampled answers ce takes no row and the spans still count."""
    case = make_case(seed=3)
    rows = dataclasses.replace(case.rows(), ce_R=torch.zeros(7, dtype=torch.bool))
    divisors = torch.tensor([1, 0, 0, 0, 0, 1, 0])
    loss, _ = run(case, rows=rows, divisors=divisors, kd_ratio=kd_ratio, block_elements=24)
    floats, live = case.floats(), case.live()
    assert loss.item() == pytest.approx(kd_ratio * 0.7 * oracle.spans_loss(floats, live, SPANS, TAU), rel=1e-9)
    wanted = oracle.gradient(lambda live: oracle.spans_loss(floats, live, SPANS, TAU), live, "student")
    got = gradients(case, loss)[0]
    torch.testing.assert_close(got, kd_ratio * 0.7 * torch.tensor(wanted, dtype=torch.float64), rtol=1e-6, atol=1e-9)
    assert torch.equal(got[4], torch.zeros(4, dtype=torch.float64))  # in no span


def test_rows_with_nan_that_no_term_takes(make_case):
    case = make_case(seed=4)
    rows = dataclasses.replace(case.rows(), ce_R=torch.tensor([True] * 4 + [False] * 3))
    loss, _ = run(case, rows=rows, parts=SPANS[1:])
    clean = gradients(case, loss)
    with torch.no_grad():
        case.student[6] = math.nan  # no partner, no gold, no span
    dirty, _ = run(case, rows=dataclasses.replace(rows, student_RD=case.student), parts=SPANS[1:])
    assert torch.equal(dirty, loss)
    for got, wanted in zip(gradients(case, dirty), clean, strict=True):
        assert torch.equal(got, wanted)


def test_many_micro_batches_equal_one(make_case):
    case = make_case(seed=5)
    loss, _ = run(case)
    expected = gradients(case, loss)
    rows = case.rows()
    total, divisors, batches = 0, torch.tensor([7, 2, 3, 3, 0, 3, 0]), []
    for pairs, others, parts in (
        ([0, 2, 3], [5], [([3], -0.01), ([0, 1, 2], -40.0)]),
        ([4, 1], [6], [([2, 1], -2.5)]),
    ):
        order = pairs + others
        over_n = {name: getattr(rows, name)[pairs] for name in ("teacher_NE", "label_N", "agree_N", "s2t_N")}
        batches.append(
            (dataclasses.replace(rows, student_RD=case.student[order], labels_R=rows.labels_R[order], **over_n), parts)
        )
    for batch, parts in batches:
        total = total + run(case, rows=batch, parts=parts, divisors=divisors, block_elements=24)[0]
    torch.testing.assert_close(total, loss, rtol=1e-12, atol=0)
    for got, wanted in zip(gradients(case, total), expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-14)


def test_counts(make_case):
    case = make_case(seed=6)
    objective = dataclasses.replace(case.objective(), span_weight=0.5)
    with_spans = dataclasses.replace(case.rows(), spans=spans_of(SPANS))
    assert counts(with_spans, objective).tolist() == [7, 2, 3, 3, 0, 3, 0]
    assert counts(case.rows(), objective).tolist() == [7, 2, 3, 3, 0, 0, 0]
    assert counts(with_spans, case.objective()).tolist() == [7, 2, 3, 3, 0, 0, 0]


@pytest.mark.parametrize("parts", [[], None])
def test_a_batch_without_spans(make_case, parts):
    case = make_case(seed=6)
    expected, _ = run(case, span_weight=0.0)
    rows = dataclasses.replace(case.rows(), spans=None if parts is None else spans_of(parts))
    objective = dataclasses.replace(case.objective(), span_weight=0.5)
    loss, sums = dskd_loss(
        rows, **case.parts() | {"objective": objective}, divisors_T=counts(rows, objective), block_elements=24
    )
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    assert [x.item() for x in sums["span_kl"]] == [0, 0]
    assert all(g.isfinite().all() for g in gradients(case, loss))


def test_a_term_without_weight_is_left_out(make_case):
    case = make_case(seed=7)
    for changes in ({"span_weight": 0.0}, {"kd_ratio": 0.0}):
        loss, sums = run(case, **changes)
        without, _ = run(case, parts=[], **changes)
        assert [x.item() for x in sums["span_kl"]] == [0, 0]
        assert torch.equal(loss, without)


@pytest.mark.parametrize("changes", [{"span_temperature": 30.0}, {"span_weight": 0.9}])
def test_every_setting_moves_the_loss(make_case, changes):
    case = make_case(seed=8)
    assert abs(run(case)[0] - run(case, **changes)[0]).item() > 1e-4


def test_projector_warm_up_measures_spans_but_does_not_follow_them(make_case):
    case = make_case(seed=9)
    _, sums = run(case)
    loss, warm = run(case, projectors_alone=True)
    without, _ = run(case, projectors_alone=True, parts=[])
    assert torch.equal(warm["span_kl"][0], sums["span_kl"][0])
    assert torch.equal(loss, without)
    for got, wanted in zip(gradients(case, loss), gradients(case, without), strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_values_alone_without_gradients(make_case, context):
    case = make_case(seed=10)
    loss, _ = run(case)
    with context():
        quiet, _ = run(case)
    assert not quiet.requires_grad
    assert torch.equal(quiet, loss.detach())


def test_a_model_against_itself_is_no_distance(make_case):
    case = make_case(seed=11)
    log_probs = token_log_probs(case.student, case.student_head(), torch.tensor(case.gold), block_elements=24)
    parts = [(rows, log_probs[rows].sum().item()) for rows, _ in SPANS]
    divisors = torch.tensor([0, 0, 0, 0, 0, 1, 0])
    loss, sums = run(case, parts=parts, divisors=divisors)
    assert sums["span_kl"][0].abs() < 1e-14
    assert all(g.abs().max() < 1e-12 for g in gradients(case, loss))


# --- its parts -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("tau", [1.0, 100.0])
@pytest.mark.parametrize("teacher", [0.0, -1e-9, -1e-3, -0.7, -30.0, -800.0, -1e6])
@pytest.mark.parametrize("student", [0.0, -2e-6, -1e-2, -0.7, -60.0, -900.0, -1e7])
def test_binary_kl_equals_the_decimals(oracle, student, teacher, tau):
    own = torch.tensor([student], dtype=torch.float64, requires_grad=True)
    value = binary_kl(student_C=own, teacher_C=torch.tensor([teacher], dtype=torch.float64), temperature=tau)
    assert value.item() == pytest.approx(oracle.binary_kl(student, teacher, tau), rel=1e-9, abs=1e-13)
    value.backward()
    if student > -1e-6:
        assert own.grad.item() == 0
    else:
        p, q = math.exp(min(teacher, -1e-6) / tau), math.exp(student / tau)
        expected = (q - p) / -math.expm1(student / tau) / tau
        assert own.grad.item() == pytest.approx(expected, rel=1e-6, abs=1e-12)


def test_binary_kl_in_fp32(oracle):
    """Near-certain texts, where 1 - exp(x) has no digits left in fp32 but expm1 has all."""
    pairs = [(-1e-7, -3.0), (-2e-6, -0.4), (-3.0, -1e-7), (-0.5, -1e-5), (-1e-6, -1e-6), (-2000.0, -1e-3)]
    student, teacher = (torch.tensor(side, requires_grad=True) for side in zip(*pairs, strict=True))
    value = binary_kl(student_C=student, teacher_C=teacher.detach(), temperature=100.0)
    assert value.dtype == torch.float32
    # a difference of two numbers of order 0.01 to 1, each good to a few fp32 steps
    assert value.tolist() == pytest.approx([oracle.binary_kl(*pair, 100.0) for pair in pairs], rel=1e-4, abs=2e-7)
    value.sum().backward()
    assert student.grad.isfinite().all()


def test_binary_kl_of_impossible_texts_is_finite():
    none = torch.tensor([-math.inf, -1.0, -math.inf], dtype=torch.float64)
    own = none.flip(0).clone().requires_grad_()
    value = binary_kl(student_C=own, teacher_C=none, temperature=100.0)
    assert value.isfinite().all()
    value.sum().backward()
    assert own.grad.isfinite().all()


@settings(max_examples=80, deadline=None)
@given(student=st.floats(-1e4, 0), teacher=st.floats(-1e4, 0), tau=st.sampled_from([1.0, 10.0, 100.0]))
def test_binary_kl_is_a_distance(student, teacher, tau):
    sides = [torch.tensor([x], dtype=torch.float64, requires_grad=True) for x in (student, teacher)]
    value = binary_kl(student_C=sides[0], teacher_C=sides[1].detach(), temperature=tau)
    assert -1e-12 <= value.item() < math.inf
    value.backward()
    pull = sides[0].grad.item()
    assert math.isfinite(pull)
    if abs(student - teacher) > 1e-3 and student < -1e-6:
        assert pull * (student - teacher) >= 0  # downhill is towards the teacher
    assert binary_kl(student_C=sides[1], teacher_C=sides[1].detach(), temperature=tau).item() == 0


def test_sums_of_spans():
    values = torch.tensor([-1.0, -2.0, -4.0, -8.0])
    got = span_sums(values, torch.tensor([2, 0, 2, 2]), 4)
    assert got.dtype == torch.float64
    assert got.tolist() == [-2.0, 0.0, -13.0, 0.0]


@pytest.mark.parametrize("block_elements", [1, 30, WHOLE])
def test_log_probs_of_tokens(oracle, make_case, block_elements):
    case = make_case(seed=12, scale=1.3, softcap=3.0, padding=4)
    got = token_log_probs(case.student, case.student_head(), torch.tensor(case.gold), block_elements=block_elements)
    floats = case.floats()
    expected = [
        -oracle.cross_entropy(oracle.logits(h, floats["head"]), y)
        for h, y in zip(floats["student"], case.gold, strict=True)
    ]
    assert got.tolist() == pytest.approx(expected, rel=1e-12)
    assert not got.requires_grad
    none = torch.zeros(0, dtype=torch.long)
    assert token_log_probs(case.student[:0], case.student_head(), none, block_elements=9).shape == (0,)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_log_probs_in_half_precision(dtype):
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(20, 16, generator=generator), torch.randn(50, 16, generator=generator)
    hidden, weight, ids = hidden.to(dtype), weight.to(dtype), torch.arange(20)
    got = token_log_probs(hidden, Head(weight, 50), ids, block_elements=150)
    assert got.dtype == torch.float32
    exact = torch.log_softmax(hidden.double() @ weight.double().T, -1)[ids, ids]
    # products of order 4, rounded once to the dtype of the head
    assert (got - exact).abs().max() <= 16 * torch.finfo(dtype).eps


def larger(dtype, truth=False, rows=600, block=10):
    generator = torch.Generator().manual_seed(1)

    def rounded(*shape, by=1.0):
        x = (by * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(dtype)
        return x.double() if truth else x

    student, weight = rounded(rows, 32).requires_grad_(), rounded(400, 32, by=0.2).requires_grad_()
    of_P = torch.arange(rows // 2) // 3
    batch = Rows(
        student_RD=student,
        labels_R=torch.randint(400, (rows,), generator=generator),
        spans=Spans(rows_P=torch.arange(rows // 2) * 2, of_P=of_P, teacher_C=-torch.arange(len(of_P.unique())) / 4),
    )
    objective = Objective(
        **SETTINGS
        | {"divergence": divergence("forward_kl"), "compares": "distributions", "kd_ratio": 1.0, "span_weight": 1.0}
    )
    loss, _ = baseline_loss(
        batch,
        student_head=Head(weight, 400),
        teacher_head=None,
        compare=uld(1.0),
        objective=objective,
        divisors_T=counts(batch, objective),
        block_elements=block * 400,
    )
    return loss.detach(), torch.autograd.grad(loss, [student, weight])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision_stays_near_fp64(dtype):
    loss, found = larger(dtype)
    truth_loss, truth = larger(dtype, truth=True)
    # the products of the head are rounded to its dtype: a few units in the last place of each row's likelihood
    tolerance = 8 * torch.finfo(dtype).eps
    assert abs(loss - truth_loss) <= max(tolerance, 1e-5) * truth_loss
    for got, exact in zip(found, truth, strict=True):
        assert got.dtype == dtype
        assert (got.double() - exact).norm() <= max(tolerance, 1e-5) * exact.norm()


def test_nothing_of_rows_by_vocabulary_is_made(largest):
    with largest() as spy:
        larger(torch.float32, rows=600, block=10)
    assert spy.elements <= max(600 * 32, 400 * 32, 10 * 400)


def test_the_order_of_terms():
    assert TERMS == ("ce", "t2s_kd", "t2s_ce", "s2t_kd", "kd", "span_kl", "ce_unpaired")
