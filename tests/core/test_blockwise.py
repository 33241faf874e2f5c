import dataclasses
import math

import pytest
import torch

from dskd_plugin.core.blockwise import dskd_loss
from dskd_plugin.core.divergences import DIVERGENCES, divergence
from dskd_plugin.core.heads import Head
from dskd_plugin.core.objective import TERMS, Objective
from dskd_plugin.core.readings import agreement_of, teacher_argmax
from dskd_plugin.core.rows import Rows, counts, row_masks
from dskd_plugin.core.teacher_rows import teacher_rows
from dskd_plugin.core.terms import project, projected_student, projected_teacher, student_space_sums, teacher_space_sums

SETTINGS = {"temperature": 2.0, "kd_ratio": 0.5, "spaces": "both", "agreement_mask": True, "compares": "spaces"}

KINDS = sorted(DIVERGENCES)
WHOLE = 10**9


def agreement(teacher, t2s, head, label, *, block_elements):
    return agreement_of(project(teacher, t2s), head, label, block_elements=block_elements)


def run(case, block_elements=WHOLE, divisors=None, rows=None, **changes):
    rows = case.rows() if rows is None else rows
    if divisors is None:
        divisors = counts(rows, case.objective(**changes))
    return dskd_loss(rows, **case.parts(**changes), divisors_T=divisors, block_elements=block_elements)


def plain_sums(rows, *, student_head, teacher_head, t2s_Dd, s2t_dD, objective, soft_labels=None):
    """The terms of all rows at once, whose gradients are those of autograd."""
    teacher = teacher_rows(rows, teacher_head, objective, soft_labels=soft_labels)
    t2s_Nd, mask_N = projected_teacher(rows, t2s_Dd), row_masks(rows, objective)["s2t_kd"]
    sums = student_space_sums(
        rows, student_head=student_head, objective=objective, t2s_Nd=t2s_Nd, teacher=teacher, soft_labels=soft_labels
    )
    s2t_ND = projected_student(rows, s2t_dD, mask_N)
    return sums | teacher_space_sums(s2t_ND, teacher=teacher, mask_K=mask_N, head=teacher_head, objective=objective)


def gradients(case, loss, scale=1.0):
    return torch.autograd.grad(loss * scale, list(case.leaves().values()))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 1e-5)])
@pytest.mark.parametrize("kind", ["forward_kl", "adaptive_kl", "tvd"])
def test_loss_and_gradients_equal_the_floats(oracle, make_case, kind, dtype, tolerance):
    case = make_case(seed=1, divergence=kind, dtype=dtype, scale=1.3, softcap=4.0)
    divisors = {"ce": 9, "t2s_kd": 4, "t2s_ce": 5, "s2t_kd": 7, "kd": 0, "span_kl": 0, "ce_unpaired": 0}
    floats, live = case.floats(divisors), case.live()
    loss, sums = run(case, block_elements=40, divisors=torch.tensor(list(divisors.values())))
    assert loss.item() == pytest.approx(oracle.loss(floats, live), rel=tolerance)
    expected = oracle.terms(floats, live)
    for name in expected:
        assert [x.item() for x in sums[name]] == pytest.approx(expected[name], rel=tolerance), name
        assert not sums[name][0].requires_grad
    for name, got in zip(case.leaves(), gradients(case, loss), strict=True):
        wanted = oracle.gradient(lambda live: oracle.loss(floats, live), live, name)
        wanted = torch.tensor(wanted, dtype=torch.float64)
        torch.testing.assert_close(got.double(), wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    "settings",
    [
        {"spaces": "student"},
        {"spaces": "teacher"},
        {"kd_ratio": 0.0},
        {"kd_ratio": 1.0},
        {"kd_ratio": 1.0, "spaces": "teacher"},
        {"agreement_mask": False},
        {"image": [3, -1, 0, 0, 8, 1, -1, 2, 7, 5, 4]},
        {"image": [3, -1, 0, 0, 8, 1, -1, 2, 7, 5, 4], "spaces": "student", "agreement_mask": False},
    ],
)
def test_settings_equal_the_floats_and_keep_every_input_attached(oracle, make_case, settings):
    case = make_case(seed=2, **settings)
    divisors = dict(zip(TERMS, counts(case.rows(), case.objective()).tolist(), strict=True))
    floats, live = case.floats(divisors), case.live()
    loss, sums = run(case, block_elements=30)
    assert loss.item() == pytest.approx(oracle.loss(floats, live), rel=1e-9)
    for name, got in zip(case.leaves(), gradients(case, loss), strict=True):
        wanted = torch.tensor(oracle.gradient(lambda live: oracle.loss(floats, live), live, name))
        torch.testing.assert_close(got.float(), wanted, rtol=1e-5, atol=1e-6)
    assert {name: int(sums[name][1]) for name in TERMS} == divisors


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_size_of_the_blocks_does_not_matter(make_case, kind, dtype):
    case = make_case(seed=3, divergence=kind, dtype=dtype)
    loss, sums = run(case)
    whole = gradients(case, loss)
    for block_elements in (1, 2 * 12, 3 * 12 + 5, 4 * 12, 5 * 12, 6 * 12, 7 * 12, 100 * 12):
        other, other_sums = run(case, block_elements)
        torch.testing.assert_close(other, loss, rtol=1e-5 if dtype == torch.float32 else 1e-12, atol=0)
        for name in sums:
            torch.testing.assert_close(other_sums[name], sums[name], rtol=1e-5, atol=1e-7)
        for got, expected in zip(gradients(case, other), whole, strict=True):
            tolerance = 1e-5 if dtype == torch.float32 else 1e-12
            torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


def test_equals_plain_autograd(make_case):
    case = make_case(seed=4, divergence="js")
    sums = plain_sums(case.rows(), **case.parts())
    divisors = torch.tensor([11, 3, 4, 6, 0, 0, 0])
    shares = {"ce": 0.6, "t2s_kd": 0.4, "t2s_ce": 0.4, "s2t_kd": 0.4}
    plain = sum(shares[term] * sums[term][0] / divisors[TERMS.index(term)] for term in shares)
    loss, _ = run(case, block_elements=24, divisors=divisors)
    torch.testing.assert_close(loss, plain, rtol=1e-12, atol=0)
    for got, expected in zip(gradients(case, loss), gradients(case, plain), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-14)


def test_gradcheck(make_case):
    # agreement mask and labels are fixed; stop-gradients are not seen because each input is checked where
    # the loss depends on it through live paths alone
    case = make_case(seed=5, rows=4, pairs=3)
    divisors = counts(case.rows(), case.objective())

    def by_student(student):
        rows = dataclasses.replace(case.rows(), student_RD=student)
        return run(case, block_elements=24, rows=rows, divisors=divisors)[0]

    def by_map(t2s):
        parts = case.parts() | {"t2s_Dd": t2s}
        ce_only = divisors * torch.tensor([0, 0, 1, 0, 0, 0, 0])
        return dskd_loss(case.rows(), **parts, divisors_T=ce_only, block_elements=24)[0]

    assert torch.autograd.gradcheck(by_student, case.student)
    assert torch.autograd.gradcheck(by_map, case.t2s)


def slice_rows(case, response, pairs):
    """A micro-batch of the given response rows and pairs, in the given order."""
    rows = case.rows()
    order = [*pairs, *(r for r in response if r not in pairs)]
    picked = {name: getattr(rows, name)[pairs] for name in ("teacher_NE", "label_N", "agree_N", "s2t_N")}
    return dataclasses.replace(rows, student_RD=case.student[order], labels_R=rows.labels_R[order], **picked)


@pytest.mark.parametrize(
    "parts", [[[0, 1, 2, 3], [4, 5, 6]], [[6], [5], [4], [3], [2], [1], [0]], [[5, 6], [0, 1, 2, 3, 4]]]
)
def test_many_micro_batches_equal_one(make_case, parts):
    case = make_case(seed=6)
    loss, sums = run(case, block_elements=24)
    expected = gradients(case, loss)
    batches = [slice_rows(case, part, [r for r in part if r < 5]) for part in parts]
    divisors = sum(counts(batch, case.objective()) for batch in batches)
    assert torch.equal(divisors, counts(case.rows(), case.objective()))
    found = [run(case, block_elements=24, rows=batch, divisors=divisors) for batch in batches]
    total = sum(part for part, _ in found)
    torch.testing.assert_close(total, loss, rtol=1e-12, atol=0)
    for got, wanted in zip(gradients(case, total), expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-14)
    for name in sums:
        added = [sum(part[name][i] for _, part in found) for i in range(2)]
        torch.testing.assert_close(added, list(sums[name]), rtol=1e-12, atol=0)


@pytest.mark.parametrize(("rows", "pairs"), [(0, 0), (1, 0), (1, 1), (4, 0)])
def test_few_rows_keep_the_graph(make_case, rows, pairs):
    case = make_case(seed=7, rows=rows, pairs=pairs)
    loss, sums = run(case, block_elements=24)
    found = gradients(case, loss)
    assert all(g.isfinite().all() for g in found)
    assert [g.shape for g in found] == [x.shape for x in case.leaves().values()]
    assert int(sums["ce"][1]) == rows
    if not rows:
        assert loss.item() == 0


def test_rows_with_nan_that_no_term_takes(make_case):
    case = make_case(seed=8)
    assert case.teacher.isnan().any()
    loss, _ = run(case, block_elements=24)
    dirty = gradients(case, loss)
    with torch.no_grad():
        case.teacher.nan_to_num_(3.0)
    clean_loss, _ = run(case, block_elements=24)
    assert torch.equal(loss, clean_loss)
    for got, wanted in zip(dirty, gradients(case, clean_loss), strict=True):
        assert torch.equal(got, wanted)


def test_student_rows_with_nan_beyond_the_pairs_without_ce(make_case):
    case = make_case(seed=8, kd_ratio=1.0)
    expected, _ = run(case)
    wanted = gradients(case, expected)
    with torch.no_grad():
        case.student[5:] = math.nan
    loss, _ = run(case)
    assert torch.equal(loss, expected)
    for got, clean in zip(gradients(case, loss), wanted, strict=True):
        assert torch.equal(got, clean)


def test_projector_warm_up_leaves_the_student_to_ce(make_case):
    case = make_case(seed=9)
    plain, sums = run(case, block_elements=24)
    expected = gradients(case, plain)
    divisors = counts(case.rows(), case.objective())
    objective = dataclasses.replace(case.objective(), projectors_alone=True)
    parts = case.parts() | {"objective": objective}
    loss, warm_sums = dskd_loss(case.rows(), **parts, divisors_T=divisors, block_elements=24)
    torch.testing.assert_close(warm_sums, sums, rtol=0, atol=0)
    means = {term: sums[term][0] / sums[term][1] for term in ("ce", "t2s_ce")}
    torch.testing.assert_close(loss, 0.6 * means["ce"] + 0.4 * means["t2s_ce"], rtol=1e-12, atol=0)
    *of_student, of_map = gradients(case, loss)
    torch.testing.assert_close(of_map, expected[-1], rtol=1e-12, atol=1e-14)
    ce_alone, _ = run(case, divisors=divisors * torch.tensor([1, 0, 0, 0, 0, 0, 0]))
    for got, wanted in zip(of_student, gradients(case, ce_alone), strict=False):
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-14)


def test_infinite_terms_without_weight_do_not_reach_the_loss(make_case):
    """In the warm-up a term is measured, whatever it is, and not followed."""

    def endless(*, student_NV, teacher_NV):
        return (student_NV + teacher_NV).sum(-1) * math.inf

    case = make_case(seed=9)
    objective = dataclasses.replace(case.objective(), projectors_alone=True, divergence=endless)
    parts = case.parts() | {"objective": objective}
    loss, sums = dskd_loss(case.rows(), **parts, divisors_T=counts(case.rows(), objective), block_elements=24)
    assert not sums["t2s_kd"][0].isfinite()
    assert loss.isfinite()
    assert all(g.isfinite().all() for g in gradients(case, loss))


def test_teacher_side_gets_no_gradient(make_case):
    case = make_case(seed=9)
    loss, _ = run(case)
    frozen = [case.teacher, case.teacher_weight, case.teacher_bias, case.s2t]
    assert torch.autograd.grad(loss, frozen, allow_unused=True) == (None,) * 4


def test_only_asked_gradients_are_made(make_case):
    case = make_case(seed=9)
    case.weight = case.weight.detach()  # a student trained with adapters
    case.bias = case.bias.detach()
    loss, _ = run(case, block_elements=24)
    saved = [x for x in loss.grad_fn.saved_tensors if x is not None]
    loss.backward()
    assert case.student.grad.abs().max() > 0
    assert case.t2s.grad.abs().max() > 0
    assert sorted(tuple(x.shape) for x in saved) == sorted([(), tuple(case.student.shape), tuple(case.t2s.shape)])


def test_one_gradient_per_input(make_case):
    case = make_case(seed=9)
    calls = {name: 0 for name in case.leaves()}
    for name, leaf in case.leaves().items():
        leaf.register_hook(lambda _, name=name: calls.__setitem__(name, calls[name] + 1))
    run(case, block_elements=12)[0].backward()
    assert calls == dict.fromkeys(calls, 1)


def test_the_gradient_follows_what_multiplies_the_loss(make_case):
    case = make_case(seed=10)
    loss, _ = run(case, block_elements=24)
    plain = torch.autograd.grad(loss, list(case.leaves().values()), retain_graph=True)
    for got, base in zip(gradients(case, loss, 1024.0), plain, strict=True):
        torch.testing.assert_close(got, base * 1024, rtol=1e-14, atol=0)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_values_alone_without_gradients(make_case, context):
    case = make_case(seed=11)
    loss, sums = run(case, block_elements=24)
    with context():
        quiet, quiet_sums = run(case, block_elements=24)
    assert not quiet.requires_grad
    assert torch.equal(quiet, loss.detach())
    assert all(torch.equal(quiet_sums[name][0], sums[name][0]) for name in sums)


@pytest.mark.parametrize("kind", KINDS)
def test_a_permuted_vocabulary_with_a_permuted_head_changes_nothing(make_case, kind):
    case = make_case(seed=12, divergence=kind, padding=0)
    loss, _ = run(case, block_elements=24)
    (before,) = torch.autograd.grad(loss, case.weight)
    new_of_old = torch.randperm(9, generator=torch.Generator().manual_seed(1))
    old_of_new = new_of_old.argsort()
    case.weight, case.bias = case.weight.detach()[old_of_new].requires_grad_(), case.bias.detach()[old_of_new]
    case.gold = [int(new_of_old[y]) for y in case.gold]
    case.label = [int(new_of_old[y]) if y >= 0 else -1 for y in case.label]
    permuted, _ = run(case, block_elements=24)
    torch.testing.assert_close(permuted, loss, rtol=1e-12, atol=0)
    (after,) = torch.autograd.grad(permuted, case.weight)
    torch.testing.assert_close(after, before[old_of_new], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("kind", KINDS)
def test_one_tokenizer_through_the_general_path(make_case, kind):
    """Models of one width and identity maps: both spaces give plain KD of the two heads' logits."""
    case = make_case(seed=13, divergence=kind, rows=4, pairs=4, padding=2, agreement_mask=False, kd_ratio=1.0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        case.teacher_weight, case.teacher_bias = case.weight.clone(), case.bias.clone()
        case.teacher = torch.randn(4, 4, generator=generator, dtype=torch.float64)
        case.t2s = case.s2t = torch.eye(4, dtype=torch.float64)
    case.teacher_ids, case.label, case.s2t_rows = 9, [0, 1, 2, 3], [True] * 4
    case.to(torch.float64)
    _, sums = run(case, block_elements=24)
    student, teacher = (
        x.detach() @ case.weight.detach()[:9].T + case.bias.detach()[:9] for x in (case.student, case.teacher)
    )
    plain = divergence(kind)(
        student_NV=torch.log_softmax(student / 2, -1), teacher_NV=torch.log_softmax(teacher / 2, -1)
    ).sum()
    torch.testing.assert_close(sums["t2s_kd"][0], plain, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(sums["s2t_kd"][0], plain, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("block_elements", [1, 30, WHOLE])
def test_argmaxes(oracle, make_case, block_elements):
    case = make_case(seed=14, padding=3, softcap=3.0)
    with torch.no_grad():
        case.teacher.nan_to_num_(0.5)
        case.teacher_bias[11] = case.bias[9:] = 100  # padding would win
    floats = case.floats()
    expected = [oracle.argmax(oracle.logits(h, floats["teacher_head"])[:11]) for h in floats["teacher"]]
    got = teacher_argmax(case.teacher, case.teacher_head(), block_elements=block_elements)
    assert got.tolist() == expected
    assert got.dtype == torch.long
    agree = agreement(
        case.teacher, case.t2s, case.student_head(), torch.tensor(case.label), block_elements=block_elements
    )
    assert agree.dtype == torch.bool
    assert agree.tolist() == [oracle.agrees(floats, n) for n in range(5)] == [True, True, False, False, False]
    assert not agree.requires_grad


def test_no_rows_have_no_argmax(make_case):
    case = make_case(seed=14, pairs=0)
    assert teacher_argmax(case.teacher, case.teacher_head(), block_elements=10).shape == (0,)
    none = torch.zeros(0, dtype=torch.long)
    assert agreement(case.teacher, case.t2s, case.student_head(), none, block_elements=10).shape == (0,)


# --- precision -----------------------------------------------------------------------------------------


def larger(dtype, *, rows=96, pairs=64, vocabulary=400, seed=0, scale=1.0):
    """Tensors of a more realistic size and their fp64 versions rounded to dtype."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape, by=1.0):
        return (by * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(dtype)

    return {
        "student": draw(rows, 32, by=scale),
        "weight": draw(vocabulary, 32, by=0.2),
        "t2s": draw(48, 32, by=0.15).float(),
        "s2t": draw(32, 48, by=0.15).float(),
        "teacher": draw(pairs, 48),
        "teacher_weight": draw(vocabulary + 60, 48, by=0.2),
        "gold": torch.randint(vocabulary, (rows,), generator=generator),
        "label": torch.randint(vocabulary, (pairs,), generator=generator),
    }


def larger_loss(tensors, dtype=None, *, block_elements=20 * 460, kind="forward_kl", divisor=None, in_spans=True):
    """Loss and gradients by student, weight and t2s."""
    cast = {k: v.to(dtype) if dtype and v.is_floating_point() else v for k, v in tensors.items()}
    leaves = [cast[name].detach().requires_grad_() for name in ("student", "weight", "t2s")]
    rows = Rows(
        student_RD=leaves[0],
        labels_R=cast["gold"],
        teacher_NE=cast["teacher"],
        label_N=cast["label"],
    )
    objective = Objective(**SETTINGS | {"divergence": divergence(kind), "agreement_mask": False})
    parts = {
        "student_head": Head(leaves[1], len(leaves[1])),
        "teacher_head": Head(cast["teacher_weight"], len(cast["teacher_weight"])),
        "t2s_Dd": leaves[2],
        "s2t_dD": cast["s2t"],
        "objective": objective,
    }
    divisors = counts(rows, objective) if divisor is None else torch.full((len(TERMS),), divisor)
    if in_spans:
        loss, _ = dskd_loss(rows, **parts, divisors_T=divisors, block_elements=block_elements)
    else:
        sums = plain_sums(rows, **parts)
        loss = sum(0.5 * sums[term][0] / divisors[TERMS.index(term)] for term in objective.terms)
    return loss.detach(), torch.autograd.grad(loss, leaves)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_error_budget_in_half_precision(kind, dtype):
    """No further from fp64 than the unblocked version in the same dtype, plus a floor of that dtype."""
    tensors = larger(dtype)
    truth_loss, truth = larger_loss(tensors, torch.float64, kind=kind)
    plain_loss, plain = larger_loss(tensors, kind=kind, in_spans=False)
    loss, found = larger_loss(tensors, kind=kind)
    assert loss.dtype == torch.float32
    epsilon = torch.finfo(dtype).eps
    assert abs(loss - truth_loss) <= abs(plain_loss - truth_loss) + 1e-5 * truth_loss
    for got, naive, exact in zip(found, plain, truth, strict=True):
        assert got.dtype == naive.dtype
        budget = (naive.double() - exact).abs().max() + epsilon * exact.abs().max()
        assert (got.double() - exact).abs().max() <= budget


def test_fp32_equals_fp64():
    tensors = larger(torch.float32)
    loss, found = larger_loss(tensors)
    truth_loss, truth = larger_loss(tensors, torch.float64)
    torch.testing.assert_close(loss.double(), truth_loss, rtol=1e-5, atol=0)
    for got, exact in zip(found, truth, strict=True):
        assert (got.double() - exact).norm() <= 1e-5 * exact.norm()


def test_fp16_gradients_do_not_underflow():
    """A step of very many rows: one row's gradients are below what fp16 holds until the scaler lifts them."""
    tensors = larger(torch.float16)
    rows_of_the_step, lift = 10**7, 2.0**16
    _, truth = larger_loss(tensors, torch.float64, divisor=rows_of_the_step)
    cast = {k: v.clone() for k, v in tensors.items()}
    leaves = [cast[name].requires_grad_() for name in ("student", "weight", "t2s")]
    rows = Rows(
        student_RD=leaves[0],
        labels_R=cast["gold"],
        teacher_NE=cast["teacher"],
        label_N=cast["label"],
    )
    loss, _ = dskd_loss(
        rows,
        student_head=Head(leaves[1], 400),
        teacher_head=Head(cast["teacher_weight"], 460),
        t2s_Dd=leaves[2],
        s2t_dD=cast["s2t"],
        objective=Objective(**SETTINGS | {"divergence": divergence("forward_kl"), "agreement_mask": False}),
        divisors_T=torch.full((len(TERMS),), rows_of_the_step),
        block_elements=WHOLE,
    )
    for got, exact in zip(torch.autograd.grad(loss * lift, leaves), truth, strict=True):
        assert (got.double() / lift - exact).norm() <= 1e-2 * exact.norm()


def test_fp16_head_gradient_of_many_rows_does_not_overflow():
    """All rows pull one id the same way: their plain sum exceeds 65504, the mean does not."""
    rows_in_block, hidden = 4096, 100.0
    student = torch.full((rows_in_block, 2), hidden, dtype=torch.float16, requires_grad=True)
    weight = torch.zeros(8, 2, dtype=torch.float16, requires_grad=True)
    none = torch.zeros(0, dtype=torch.long)
    rows = Rows(
        student_RD=student,
        labels_R=torch.zeros(rows_in_block, dtype=torch.long),
        teacher_NE=torch.zeros(0, 2, dtype=torch.float16),
        label_N=none,
    )
    loss, _ = dskd_loss(
        rows,
        student_head=Head(weight, 8),
        teacher_head=Head(torch.zeros(8, 2, dtype=torch.float16), 8),
        t2s_Dd=None,
        s2t_dD=None,
        objective=Objective(**SETTINGS | {"divergence": divergence("forward_kl"), "kd_ratio": 0.0}),
        divisors_T=torch.tensor([rows_in_block, 0, 0, 0, 0, 0, 0]),
        block_elements=WHOLE,
    )
    loss.backward()
    torch.testing.assert_close(weight.grad[0].float(), torch.full((2,), -hidden * 7 / 8), rtol=2e-3, atol=0)


def test_under_autocast_the_heads_follow_it_and_the_losses_stay_fp32():
    tensors = larger(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, found = larger_loss(tensors)
    bf16_heads = tensors | {
        "weight": tensors["weight"].bfloat16(),
        "teacher_weight": tensors["teacher_weight"].bfloat16(),
    }
    expected, wanted = larger_loss(bf16_heads)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, expected)
    assert [g.dtype for g in found] == [torch.float32] * 3
    for got, reference in zip(found, wanted, strict=True):
        torch.testing.assert_close(got.to(reference.dtype), reference, rtol=1e-6, atol=1e-9)


def test_under_autocast_the_agreement_is_that_of_the_loss():
    tensors = larger(torch.float32)
    label = torch.arange(64)
    head = Head(tensors["weight"], 400)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = agreement(tensors["teacher"], tensors["t2s"], head, label, block_elements=4000)
    outside = agreement(
        tensors["teacher"],
        tensors["t2s"],
        Head(tensors["weight"].bfloat16(), 400),
        label,
        block_elements=4000,
    )
    assert torch.equal(inside, outside)


# --- memory --------------------------------------------------------------------------------------------


def test_nothing_of_rows_by_vocabulary_is_made(largest):
    rows, vocabulary, block = 600, 400, 10
    tensors = larger(torch.float32, rows=rows, pairs=500, vocabulary=vocabulary)
    allowed = max((vocabulary + 60) * 48, rows * 48, block * (vocabulary + 60))
    with largest() as plain:
        larger_loss(tensors, in_spans=False)
    assert plain.elements >= rows * vocabulary  # the spy sees it where it exists
    with largest() as spy:
        larger_loss(tensors, block_elements=block * (vocabulary + 60))
    assert spy.elements <= allowed
    head, teacher_head = Head(tensors["weight"], 400), Head(tensors["teacher_weight"], 460)
    with largest() as spy:
        teacher_argmax(tensors["teacher"], teacher_head, block_elements=block * 460)
        agreement(tensors["teacher"], tensors["t2s"], head, tensors["label"], block_elements=block * 460)
    assert spy.elements <= allowed


def test_what_the_graph_holds_does_not_grow_with_the_vocabulary_rows():
    """Between forward and backward: one gradient per input and a scale."""
    rows, vocabulary = 600, 400
    tensors = larger(torch.float32, rows=rows, pairs=500, vocabulary=vocabulary)
    held = []

    def pack(x):
        held.append(x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        larger_loss(tensors, block_elements=20 * 460)
    outside_blocks = rows * 32 + vocabulary * 32 + 48 * 32 + 1
    assert held[-4:] == [1, rows * 32, vocabulary * 32, 48 * 32]
    assert sum(held[-4:]) == outside_blocks
    assert max(held) <= max(20 * 460, rows * 48)
