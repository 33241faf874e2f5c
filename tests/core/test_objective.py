import dataclasses
import math

import pytest
import torch

from dskd_plugin.core.blockwise import dskd_loss
from dskd_plugin.core.divergences import DIVERGENCES, divergence
from dskd_plugin.core.heads import Head, head_logits
from dskd_plugin.core.objective import RATES, TERMS, Objective, term_weights
from dskd_plugin.core.rows import counts, row_masks

SETTINGS = {"temperature": 2.0, "kd_ratio": 0.5, "spaces": "both", "agreement_mask": True, "compares": "spaces"}

KINDS = sorted(DIVERGENCES)
DSKD_TERMS = TERMS[:4]
DSKD_RATES = RATES[:2]  # the others are those of an exact target
HEADS = {
    "plain": {"bias": False, "padding": 0},
    "padded": {"bias": False, "padding": 3},
    "bias": {"bias": True},
    "scale": {"bias": True, "scale": 0.25},
    "softcap": {"bias": True, "softcap": 1.5},
    "all": {"bias": True, "padding": 5, "scale": 1.7, "softcap": 3.0},
}
IMAGES = [[3, -1, 0, 0, 8, 1, -1, 2, 7, 5, 4], [-1, -1, 2, -1, -1, -1, -1, -1, -1, -1, -1]]
REACHED = {
    "ce": {"student", "weight", "bias"},
    "t2s_kd": {"student", "weight", "bias"},
    "t2s_ce": {"t2s"},
    "s2t_kd": {"student"},
}
EVERYTHING = {"student", "weight", "bias", "t2s", "s2t", "teacher", "teacher_weight", "teacher_bias"}


def term_sums(rows, **parts):
    """Name -> (sum with its own gradients, count) of each term of the objective, and of each rate.

    A loss whose divisor is the share of one term, and 0 for all others, is the sum of that term.
    """
    objective, found = parts["objective"], {}
    shares = objective.shares()
    for term in objective.terms:
        divisors = torch.tensor([shares[term] if name == term else 0.0 for name in TERMS], dtype=torch.float64)
        loss, sums = dskd_loss(rows, **parts, divisors_T=divisors, block_elements=10**9)
        torch.testing.assert_close(loss, sums[term][0], rtol=1e-6, atol=0)
        found[term] = loss, sums[term][1]
    return found | {rate: sums[rate] for rate in DSKD_RATES}


def with_rows(sums):
    return {name for name, (_, count) in sums.items() if count > 0}


def check_against_floats(oracle, case, tolerance):
    """Every term, every count and every gradient of every term."""
    floats, live = case.floats(), case.live()
    expected = oracle.terms(floats, live)
    sums = term_sums(case.rows(), **case.parts())
    assert set(sums) == set(expected)
    for name, (total, count) in sums.items():
        assert total.item() == pytest.approx(expected[name][0], rel=tolerance, abs=tolerance), name
        assert count.item() == expected[name][1], name
    for term in case.objective().terms:
        found = torch.autograd.grad(sums[term][0], list(case.leaves().values()), retain_graph=True, allow_unused=True)
        for name, gradient in zip(case.leaves(), found, strict=True):
            wanted = oracle.gradient(lambda live, term=term: oracle.terms(floats, live)[term][0], live, name)
            got = torch.zeros_like(case.leaves()[name]) if gradient is None else gradient
            torch.testing.assert_close(
                got.double(),
                torch.tensor(wanted, dtype=torch.float64),
                rtol=tolerance,
                atol=tolerance,
                msg=lambda text, term=term, name=name: f"d {term} / d {name}: {text}",
            )


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 1e-5)])
@pytest.mark.parametrize("kind", KINDS)
def test_terms_and_gradients_equal_the_floats(oracle, make_case, kind, dtype, tolerance):
    case = make_case(divergence=kind, dtype=dtype, bias=True, padding=2)
    check_against_floats(oracle, case, tolerance)


@pytest.mark.parametrize("head", HEADS)
def test_heads(oracle, make_case, head):
    check_against_floats(oracle, make_case(seed=1, **HEADS[head]), 1e-6)


@pytest.mark.parametrize("image", IMAGES)
@pytest.mark.parametrize("head", HEADS)
def test_soft_labels(oracle, make_case, head, image):
    check_against_floats(oracle, make_case(seed=6, image=image, **HEADS[head]), 1e-6)


@pytest.mark.parametrize("agreement_mask", [True, False])
@pytest.mark.parametrize("rows", [(1, 1), (1, 0), (5, 0), (5, 5)])
def test_few_rows_and_few_pairs(oracle, make_case, rows, agreement_mask):
    case = make_case(seed=2, rows=rows[0], pairs=rows[1], agreement_mask=agreement_mask)
    if rows[1]:
        check_against_floats(oracle, case, 1e-6)
    else:
        sums = term_sums(case.rows(), **case.parts())
        assert with_rows(sums) == {"ce"}
        assert counts(case.rows(), case.objective()).tolist() == [rows[0], 0, 0, 0, 0, 0, 0]


def test_pairs_that_no_term_takes(make_case):
    case = make_case(seed=2, rows=3, pairs=2)
    case.label, case.agree, case.s2t_rows = [-1, -1], [False, False], [False, False]
    with torch.no_grad():
        case.teacher.fill_(math.nan)
    sums = term_sums(case.rows(), **case.parts())
    total = sum(sums[term][0] for term in DSKD_TERMS)
    found = torch.autograd.grad(total, list(case.leaves().values()))
    assert all(gradient.isfinite().all() for gradient in found)
    for term in DSKD_TERMS[1:]:
        assert [x.item() for x in sums[term]] == [0, 0]
        assert sums[term][0].requires_grad


def test_nan_of_left_out_rows_does_not_enter_the_backward(make_case):
    case = make_case(seed=2)
    with torch.no_grad():
        case.student[4] = math.nan  # neither space takes pair 4; without ce the row is left out
    with torch.autograd.detect_anomaly(check_nan=True):
        sums = term_sums(case.rows(), **case.parts(kd_ratio=1.0, spaces="teacher"))
        sums["s2t_kd"][0].backward()
    assert case.student.grad.isfinite().all()
    assert torch.equal(case.student.grad[4], torch.zeros(4, dtype=torch.float64))


@pytest.mark.parametrize("term", DSKD_TERMS)
def test_who_gets_gradients(make_case, term):
    case = make_case(seed=3)
    case.label, case.agree = [1, 2, 3, 4, 5], [True] * 5
    case.s2t_rows = [True] * 5
    with torch.no_grad():
        case.teacher.nan_to_num_(0.3)
    sums = term_sums(case.rows(), **case.parts())
    given = {name: getattr(case, name) for name in EVERYTHING}
    found = torch.autograd.grad(sums[term][0], list(given.values()), allow_unused=True)
    reached = {name for name, g in zip(given, found, strict=True) if g is not None and g.abs().max() > 0}
    assert reached == REACHED[term]


def test_counts_are_those_of_the_sums(make_case):
    for mask in (True, False):
        case = make_case(seed=4, agreement_mask=mask)
        sums = term_sums(case.rows(), **case.parts())
        got = counts(case.rows(), case.objective())
        assert got.dtype == torch.long
        assert got.tolist() == [*(int(sums[term][1]) for term in DSKD_TERMS), 0, 0, 0]
        assert got.tolist()[:4] == [7, 2 if mask else 3, 3, 3]


def test_counts_need_no_hidden_states(make_case):
    case = make_case(seed=4)
    expected = counts(case.rows(), case.objective())
    rows = dataclasses.replace(case.rows(), student_RD=torch.empty(0, 0), teacher_NE=torch.empty(0, 0))
    assert torch.equal(counts(rows, case.objective()), expected)


@pytest.mark.parametrize(
    ("settings", "present", "divisors"),
    [
        ({"spaces": "student"}, {"ce", "t2s_kd", "t2s_ce", "t2s_agreement"}, [7, 2, 3, 0, 0, 0, 0]),
        ({"spaces": "teacher"}, {"ce", "s2t_kd", "s2t_agreement"}, [7, 0, 0, 3, 0, 0, 0]),
        ({"kd_ratio": 0.0}, {"ce"}, [7, 0, 0, 0, 0, 0, 0]),
        ({"kd_ratio": 1.0}, set(DSKD_TERMS + DSKD_RATES) - {"ce"}, [0, 2, 3, 3, 0, 0, 0]),
    ],
)
def test_terms_without_weight_are_left_out(make_case, settings, present, divisors):
    case = make_case(seed=4, **settings)
    parts = case.parts()
    if settings.get("spaces") == "student" or settings.get("kd_ratio") == 0:
        parts["s2t_dD"] = None
    if settings.get("spaces") == "teacher" or settings.get("kd_ratio") == 0:
        parts["t2s_Dd"] = None
    assert with_rows(term_sums(case.rows(), **parts)) == present
    assert counts(case.rows(), case.objective()).tolist() == divisors


def test_rows_beyond_the_pairs_are_not_read_without_ce(make_case):
    case = make_case(seed=5, kd_ratio=1.0)
    expected = term_sums(case.rows(), **case.parts())
    with torch.no_grad():
        case.student[5:] = math.nan
    got = term_sums(case.rows(), **case.parts())
    assert all(torch.equal(got[name][0], expected[name][0]) for name in expected)


def test_s2t_mask_defaults_to_all_pairs(make_case):
    case = make_case(seed=5, pairs=4)
    case.s2t_rows = [True] * 4
    rows = case.rows()
    expected = term_sums(rows, **case.parts())["s2t_kd"]
    got = term_sums(dataclasses.replace(rows, s2t_N=None), **case.parts())["s2t_kd"]
    assert got[1].item() == 4
    assert torch.equal(got[0], expected[0])


def test_agreement_rate_without_mask_is_found_on_the_way(make_case):
    case = make_case(seed=5, agreement_mask=False)
    given = term_sums(case.rows(), **case.parts())["t2s_agreement"]
    found = term_sums(dataclasses.replace(case.rows(), agree_N=None), **case.parts())["t2s_agreement"]
    assert [x.item() for x in given] == [x.item() for x in found] == [2, 3]


def test_agreement_mask_without_agreement_is_refused(make_case):
    case = make_case(seed=5)
    with pytest.raises(ValueError, match="agree_N: expected a bool tensor"):
        term_sums(dataclasses.replace(case.rows(), agree_N=None), **case.parts())


@pytest.mark.parametrize("kind", KINDS)
def test_a_student_equal_to_the_teacher_has_no_distance(make_case, kind):
    case = make_case(seed=6, divergence=kind, rows=4, pairs=4, softcap=2.0, agreement_mask=False)
    with torch.no_grad():
        case.teacher_weight = torch.cat([case.weight, torch.zeros(1, 4)])
        case.teacher_bias = torch.cat([case.bias, torch.zeros(1)])
        case.teacher, case.t2s, case.s2t = case.student.clone(), torch.eye(4).double(), torch.eye(4).double()
    case.teacher_ids, case.s2t_rows, case.label = case.ids, [True] * 4, [0] * 4
    case.to(torch.float64)
    sums = term_sums(case.rows(), **case.parts())
    distance = sums["t2s_kd"][0] + sums["s2t_kd"][0]
    assert distance.item() == 0
    for gradient in torch.autograd.grad(distance, [case.student, case.weight, case.bias]):
        assert gradient.abs().max() < 1e-14


@pytest.mark.parametrize("kind", KINDS)
def test_a_permuted_vocabulary_with_a_permuted_head_changes_nothing(make_case, kind):
    case = make_case(seed=7, divergence=kind, padding=0)
    before = term_sums(case.rows(), **case.parts())
    new_of_old = torch.randperm(9, generator=torch.Generator().manual_seed(1))
    old_of_new = new_of_old.argsort()
    with torch.no_grad():
        case.weight, case.bias = case.weight[old_of_new], case.bias[old_of_new]
    case.gold = [int(new_of_old[y]) for y in case.gold]
    case.label = [int(new_of_old[y]) if y >= 0 else -1 for y in case.label]
    after = term_sums(case.rows(), **case.parts())
    for name in before:
        torch.testing.assert_close(after[name], before[name], rtol=1e-12, atol=1e-12)


def test_padding_rows_do_not_reach_the_distances(make_case):
    case = make_case(seed=8, padding=3)
    before = term_sums(case.rows(), **case.parts())
    with torch.no_grad():
        case.weight[9:] += 1
        case.teacher_weight[11:] += 1
    after = term_sums(case.rows(), **case.parts())
    for name in ("t2s_kd", "s2t_kd", *DSKD_RATES):
        assert torch.equal(after[name][0], before[name][0])
    assert not torch.equal(after["ce"][0], before["ce"][0])


@pytest.mark.parametrize(
    "settings",
    [{"temperature": 1.0}, {"divergence": "reverse_kl"}, {"agreement_mask": False}],
)
def test_every_setting_moves_a_term(make_case, settings):
    case = make_case(seed=9)
    before = term_sums(case.rows(), **case.parts())["t2s_kd"][0]
    after = term_sums(case.rows(), **case.parts(**settings))["t2s_kd"][0]
    assert abs(before.item() - after.item()) > 1e-4


def test_weights_of_the_terms():
    got = term_weights(torch.tensor([10, 0, 4, 5, 2, 8, 6]), {"ce": 0.75, "t2s_kd": 9.0, "t2s_ce": 0.25, "kd": 1.0})
    torch.testing.assert_close(got, torch.tensor([0.075, 0, 0.0625, 0, 0.5, 0, 0], dtype=torch.float64))
    assert term_weights(torch.zeros(7, dtype=torch.long), {"ce": 1.0}).tolist() == [0] * 7


@pytest.mark.parametrize(
    ("settings", "shares"),
    [
        ({}, {"ce": 0.75, "t2s_kd": 0.25, "t2s_ce": 0.25, "s2t_kd": 0.25}),
        ({"spaces": "student"}, {"ce": 0.75, "t2s_kd": 0.25, "t2s_ce": 0.25}),
        ({"spaces": "teacher"}, {"ce": 0.75, "s2t_kd": 0.25}),
        ({"kd_ratio": 0.0, "span_weight": 2.0}, {"ce": 1.0}),
        ({"kd_ratio": 1.0, "spaces": "teacher", "span_weight": 2.0}, {"s2t_kd": 1.0, "span_kl": 2.0}),
        ({"compares": "nothing"}, {"ce": 1.0}),
        ({"compares": "nothing", "kd_ratio": 1.0}, {"ce": 1.0}),
        ({"compares": "distributions"}, {"ce": 0.75, "kd": 0.25}),
        ({"compares": "distributions", "span_weight": 2.0}, {"ce": 0.75, "kd": 0.25, "span_kl": 0.5}),
        ({"compares": "distributions", "kd_ratio": 1.0}, {"kd": 1.0}),
        ({"compares": "distributions", "kd_ratio": 0.0}, {"ce": 1.0}),
        ({"compares": "distributions", "unpaired_ce": True}, {"ce": 0.75, "kd": 0.25, "ce_unpaired": 0.25}),
        ({"compares": "distributions", "kd_ratio": 0.0, "unpaired_ce": True}, {"ce": 1.0}),
    ],
)
def test_terms_of_each_method_and_their_shares(settings, shares):
    objective = Objective(**SETTINGS | {"divergence": divergence("js"), "kd_ratio": 0.25} | settings)
    assert objective.terms == tuple(shares)
    assert objective.shares() == shares


@pytest.mark.parametrize(
    ("learned", "shares"),
    [(False, {"ce": 0.75, "t2s_ce": 0.25}), (True, {"ce": 0.75, "t2s_ce": 0.25, "s2t_kd": 0.25})],
)
def test_shares_in_projector_warm_up(learned, shares):
    objective = Objective(
        **SETTINGS | {"divergence": divergence("js"), "kd_ratio": 0.25, "span_weight": 1.0, "projectors_alone": True}
    )
    assert objective.terms == ("ce", "t2s_kd", "t2s_ce", "s2t_kd", "span_kl")
    assert objective.shares(s2t_is_learned=learned) == shares


def test_shares_and_rows_of_the_gold_answers_alone(make_case):
    """Every row keeps its whole cross-entropy, and the projector goes on learning."""
    settings = {"kd_ratio": 0.25, "span_weight": 1.0, "unpaired_ce": True, "gold_alone": True, "kd_scale": 3.0}
    objective = Objective(**SETTINGS | {"divergence": divergence("js")} | settings)
    assert objective.shares() == {"ce": 0.75, "t2s_ce": 0.25, "ce_unpaired": 0.25}
    rows, paired = make_case(seed=3).rows(), dataclasses.replace(objective, gold_alone=False)
    assert row_masks(rows, objective)["ce_unpaired"].all()
    assert not row_masks(rows, paired)["ce_unpaired"].all()
    # What counts in a step is known before the student has read it.
    assert torch.equal(counts(rows, objective), counts(rows, paired))
    with pytest.raises(ValueError, match="gold_alone: expected it only with unpaired_ce"):
        Objective(**SETTINGS | {"divergence": divergence("js"), "gold_alone": True})


def test_ce_takes_the_named_rows(oracle, make_case):
    case = make_case(seed=3)
    ce_R = torch.tensor([True, False, True, False, False, True, False])
    sums = term_sums(dataclasses.replace(case.rows(), ce_R=ce_R), **case.parts())
    floats = case.floats()
    expected = sum(
        oracle.cross_entropy(oracle.logits(floats["student"][r], floats["head"]), case.gold[r]) for r in (0, 2, 5)
    )
    assert [x.item() for x in sums["ce"]] == pytest.approx([expected, 3], rel=1e-12)
    whole = term_sums(case.rows(), **case.parts())
    for name in set(whole) - {"ce"}:
        assert torch.equal(sums[name][0], whole[name][0]), name
    found = torch.autograd.grad(sums["ce"][0], case.student)[0]
    assert found.abs().sum(1).gt(0).tolist() == ce_R.tolist()
    assert counts(dataclasses.replace(case.rows(), ce_R=ce_R), case.objective()).tolist() == [3, 2, 3, 3, 0, 0, 0]


def test_student_rows_with_nan_that_no_term_takes(make_case):
    case = make_case(seed=3)
    rows = dataclasses.replace(case.rows(), ce_R=torch.tensor([True] * 4 + [False] * 3))
    parts = case.parts()

    def run():
        sums = term_sums(rows, **parts)
        total = sum(sums[term][0] for term in DSKD_TERMS)
        return total, torch.autograd.grad(total, [case.student, case.weight, case.t2s])

    total, clean = run()
    with torch.no_grad():
        case.student[4:] = math.nan  # pair 4 has neither a label nor s2t, rows 5 and 6 no partner
    dirty_total, dirty = run()
    assert torch.equal(dirty_total, total)
    assert all(torch.equal(got, wanted) for got, wanted in zip(dirty, clean, strict=True))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"compares": "hints"}, r"compares: expected one of nothing, .* got 'hints'"),
        ({"span_weight": -0.1}, r"span_weight: .* got -0\.1"),
        ({"span_weight": math.inf}, r"span_weight: .* got inf"),
        ({"span_weight": math.nan}, r"span_weight: .* got nan"),
        ({"span_weight": 1.0, "compares": "nothing"}, r"span_weight: .* 0 where nothing is compared, got 1\.0"),
        ({"span_temperature": 0.0}, r"span_temperature: .* got 0\.0"),
        ({"unpaired_ce": True, "compares": "nothing"}, r"unpaired_ce: .* got compares 'nothing'"),
        ({"projectors_alone": True, "compares": "distributions"}, r"projectors_alone: .* got 'distributions'"),
        ({"kd_ratio": 1.5}, r"kd_ratio: .* got 1\.5"),
        ({"kd_ratio": math.nan}, r"kd_ratio: .* got nan"),
        ({"spaces": "neither"}, r"spaces: .* got 'neither'"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Objective(**SETTINGS | {"divergence": divergence("forward_kl")} | settings)


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.float16, 4e-3), (torch.bfloat16, 3e-2)],
)
def test_head_logits_in_each_dtype(oracle, make_case, dtype, tolerance):
    # half precision: rounding of weights and of a product of order 2, hence the looser bounds
    case = make_case(seed=10, scale=1.3, softcap=2.5)
    expected = [oracle.logits(h, case.floats()["head"]) for h in case.floats()["student"]]
    hidden = case.student.detach().clone()
    got = head_logits(hidden, case.to(dtype).student_head())
    assert got.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(got.double(), torch.tensor(expected, dtype=torch.float64), rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"vocab_size": 6}, "got shape \\(5, 3\\) for 6 ids"),
        ({"vocab_size": 0}, "for 0 ids"),
        ({"vocab_size": 5, "bias_V": torch.zeros(4)}, "bias of shape \\(5,\\), got \\(4,\\)"),
        ({"vocab_size": 5, "softcap": 0.0}, "softcap or None, got 0.0"),
    ],
)
def test_heads_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Head(torch.zeros(5, 3), **arguments)


def test_parts_of_a_head():
    weight, bias = torch.randn(5, 3, requires_grad=True), torch.randn(5, requires_grad=True)
    head = Head(weight, 4, bias, 2.0, 7.0)
    real = head.real()
    assert (real.weight_VD.shape, real.bias_V.shape, real.scale, real.softcap) == ((4, 3), (4,), 2.0, 7.0)
    assert not head.detach().weight_VD.requires_grad
    assert not head.detach().bias_V.requires_grad
    hidden = torch.randn(2, 3)
    torch.testing.assert_close(head_logits(hidden, real), head_logits(hidden, head)[:, :4])
