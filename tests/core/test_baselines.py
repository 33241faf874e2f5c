"""The other methods: each is a line in METHODS, and every test below runs over that table."""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dskd_plugin.core.baselines import MappedIds, SameIds, SharedIds, uld
from dskd_plugin.core.blockwise import baseline_loss
from dskd_plugin.core.divergences import divergence
from dskd_plugin.core.heads import Head
from dskd_plugin.core.objective import TERMS, Objective
from dskd_plugin.core.rows import Rows, counts
from dskd_plugin.core.teacher_rows import teacher_rows
from dskd_plugin.core.terms import student_space_sums
from dskd_plugin.core.top_shared import TopSharedCompare

SETTINGS = {"temperature": 2.0, "kd_ratio": 0.5, "spaces": "both", "agreement_mask": True, "compares": "spaces"}

WHOLE = 10**9
TAU = 1.7
SHARED = [(0, 3), (2, 1), (5, 10), (7, 4)]
IMAGE = [0, 0, 3, -1, 8, 3, 2, -1, 1, 7, 5]  # no token for 4 and 6, two for 0 and 3


@dataclass
class Method:
    name: str
    compare: Callable
    oracle: Callable
    teacher_ids: int = 11


def shared_ids():
    return torch.tensor([i for i, _ in SHARED]), torch.tensor([j for _, j in SHARED])


def method_of(kind):
    return Method(
        "kd",
        lambda tau=TAU: SameIds(divergence(kind), tau),
        lambda o: lambda s, t: o.compare_vanilla(s, t, TAU, kind),
        teacher_ids=9,
    )


def overlap_of(kind):
    return Method(
        "overlap_kd",
        lambda tau=TAU: SharedIds(divergence(kind), tau, *shared_ids()),
        lambda o: lambda s, t: o.compare_overlap(s, t, TAU, kind, SHARED),
    )


METHODS = {
    "kd": method_of("forward_kl"),
    "kd_js": method_of("js"),
    "overlap_kd": overlap_of("forward_kl"),
    "overlap_kd_reverse": overlap_of("reverse_kl"),
    "overlap_kd_tvd": overlap_of("tvd"),
    "overlap_kd_support": Method(
        "overlap_kd",
        lambda tau=TAU: TopSharedCompare(divergence("reverse_kl"), tau, 3, *shared_ids()),
        lambda o: lambda s, t: o.compare_support(s, t, TAU, "reverse_kl", SHARED, 3),
    ),
    "uld": Method("uld", lambda tau=TAU: uld(tau), lambda o: lambda s, t: o.compare_uld(s, t, TAU)),
    "mined": Method(
        "mined",
        lambda tau=TAU: MappedIds(tau, torch.tensor(IMAGE), 9),
        lambda o: lambda s, t: o.compare_mapped(s, t, TAU, IMAGE),
    ),
}
METHOD_NAMES = {"sft", *(method.name for method in METHODS.values())}
every_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


@pytest.fixture
def make_baseline_case(make_case):
    """A case whose teacher rows are whole; ce leaves row 1, with a partner, and row 6, without one, out."""

    def build(method, **options):
        case = make_case(**options)
        case.teacher_ids = method.teacher_ids
        with torch.no_grad():
            case.teacher.nan_to_num_(0.4)
        case.ce_rows = [r not in (1, 6) for r in range(len(case.gold))]
        return case

    return build


def rows_of(case):
    return Rows(
        student_RD=case.student,
        labels_R=torch.tensor(case.gold, dtype=torch.long),
        ce_R=torch.tensor(case.ce_rows, dtype=torch.bool),
        teacher_NE=case.teacher,
    )


def objective_of(method, **changes):
    own = {
        "divergence": divergence("forward_kl"),
        "compares": "distributions" if method.oracle else "nothing",
        "kd_ratio": 0.4,
    }
    return Objective(**SETTINGS | own | changes)


def run(case, method, *, block_elements=WHOLE, divisors=None, rows=None, **changes):
    rows, objective = rows_of(case) if rows is None else rows, objective_of(method, **changes)
    return baseline_loss(
        rows,
        student_head=case.student_head(),
        teacher_head=case.teacher_head(),
        compare=method.compare(),
        objective=objective,
        divisors_T=counts(rows, objective) if divisors is None else divisors,
        block_elements=block_elements,
    )


LEAVES = ("student", "weight", "bias")


def leaves_of(case):
    return [getattr(case, name) for name in LEAVES]


def gradients(case, loss):
    return torch.autograd.grad(loss, leaves_of(case))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 2e-5)])
@every_method
def test_loss_and_gradients_equal_the_floats(oracle, make_baseline_case, method, dtype, tolerance):
    # fp32: central differences of a sum of absolute values keep some of its rounding, hence 2e-5
    case = make_baseline_case(method, seed=1, dtype=dtype, scale=1.3, softcap=4.0)
    divisors = torch.tensor([9, 0, 0, 0, 7, 0, 0])
    loss, sums = run(case, method, block_elements=30, divisors=divisors)
    floats, live = case.floats() | {"ce_rows": case.ce_rows}, case.live()

    def expected(live):
        return oracle.baseline_loss(floats, live, method.oracle(oracle), 0.6 / 9, 0.4 / 7)

    assert loss.item() == pytest.approx(expected(live), rel=tolerance)
    kd = oracle.baseline_loss(floats, live, method.oracle(oracle), 0.0, 1.0)
    assert [x.item() for x in sums["kd"]] == pytest.approx([kd, 5], rel=tolerance)
    assert sums["ce"][1].item() == 5
    for name, got in zip(LEAVES, gradients(case, loss), strict=True):
        wanted = torch.tensor(oracle.gradient(expected, live, name), dtype=torch.float64)
        torch.testing.assert_close(got.double(), wanted, rtol=tolerance, atol=tolerance)


def test_sft_is_the_cross_entropy_alone(oracle, make_baseline_case):
    method = Method("sft", lambda: None, None)
    case = make_baseline_case(method, seed=2)
    rows = dataclasses.replace(rows_of(case), teacher_NE=None)
    objective = objective_of(method, kd_ratio=1.0)  # which means nothing to sft
    loss, sums = baseline_loss(
        rows,
        student_head=case.student_head(),
        teacher_head=None,
        compare=None,
        objective=objective,
        divisors_T=counts(rows, objective),
        block_elements=30,
    )
    floats, live = case.floats() | {"ce_rows": case.ce_rows, "teacher": []}, case.live()
    assert loss.item() == pytest.approx(oracle.baseline_loss(floats, live, None, 1 / 5, 0.0), rel=1e-12)
    for name, got in zip(LEAVES, gradients(case, loss), strict=True):
        wanted = oracle.gradient(lambda live: oracle.baseline_loss(floats, live, None, 1 / 5, 0.0), live, name)
        torch.testing.assert_close(got, torch.tensor(wanted, dtype=torch.float64), rtol=1e-6, atol=1e-9)
    assert [int(sums[term][1]) for term in TERMS] == [5, 0, 0, 0, 0, 0, 0]


@every_method
def test_size_of_the_blocks_does_not_matter(make_baseline_case, method):
    case = make_baseline_case(method, seed=3)
    loss, sums = run(case, method)
    whole = gradients(case, loss)
    for block_elements in (1, 2 * 12, 3 * 12 + 5, 4 * 12, 6 * 12):
        other, other_sums = run(case, method, block_elements=block_elements)
        torch.testing.assert_close(other, loss, rtol=1e-12, atol=0)
        torch.testing.assert_close(other_sums, sums, rtol=1e-12, atol=0)
        for got, expected in zip(gradients(case, other), whole, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-14)


@every_method
def test_many_micro_batches_equal_one(make_baseline_case, method):
    case = make_baseline_case(method, seed=4)
    loss, _ = run(case, method)
    expected = gradients(case, loss)
    rows = rows_of(case)
    batches = []
    for pairs, others in (([4, 1], [6]), ([0], []), ([2, 3], [5])):
        order = pairs + others
        picked = {name: getattr(rows, name)[order] for name in ("student_RD", "labels_R", "ce_R")}
        batches.append(dataclasses.replace(rows, teacher_NE=case.teacher[pairs], **picked))
    divisors = sum(counts(batch, objective_of(method)) for batch in batches)
    assert divisors.tolist() == [5, 0, 0, 0, 5, 0, 0]
    total = sum(run(case, method, rows=batch, divisors=divisors, block_elements=24)[0] for batch in batches)
    torch.testing.assert_close(total, loss, rtol=1e-12, atol=0)
    for got, wanted in zip(gradients(case, total), expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-14)


@every_method
def test_rows_with_nan_that_no_term_takes(make_baseline_case, method):
    case = make_baseline_case(method, seed=5)
    loss, _ = run(case, method, block_elements=24)
    clean = gradients(case, loss)
    with torch.no_grad():
        case.student[6] = math.nan
    dirty, _ = run(case, method, block_elements=24)
    assert torch.equal(dirty, loss)
    for got, wanted in zip(gradients(case, dirty), clean, strict=True):
        assert torch.equal(got, wanted)


@every_method
@pytest.mark.parametrize(("rows", "pairs"), [(0, 0), (2, 0), (1, 1)])
def test_few_rows_keep_the_graph(make_baseline_case, method, rows, pairs):
    case = make_baseline_case(method, seed=6, rows=rows, pairs=pairs)
    loss, sums = run(case, method)
    found = gradients(case, loss)
    assert all(g.isfinite().all() for g in found)
    assert sums["kd"][1] == pairs
    if not rows:
        assert loss.item() == 0


@every_method
def test_the_teacher_gets_no_gradient(make_baseline_case, method):
    case = make_baseline_case(method, seed=7)
    loss, _ = run(case, method)
    frozen = [case.teacher, case.teacher_weight, case.teacher_bias]
    assert torch.autograd.grad(loss, frozen, allow_unused=True, retain_graph=True) == (None,) * 3
    logits = torch.randn(3, method.teacher_ids, dtype=torch.float64, requires_grad=True)
    own = torch.randn(3, 9, dtype=torch.float64, requires_grad=True)
    method.compare()(student_NV=own, teacher_NV=logits).sum().backward()
    assert logits.grad is None
    assert own.grad.abs().max() > 0


@every_method
def test_kd_alone_and_ce_alone(make_baseline_case, method):
    case = make_baseline_case(method, seed=8)
    both, sums = run(case, method)
    kd_alone, kd_sums = run(case, method, kd_ratio=1.0)
    torch.testing.assert_close(kd_alone, sums["kd"][0] / 5, rtol=1e-12, atol=0)
    assert [x.item() for x in kd_sums["ce"]] == [0, 0]
    ce_alone, ce_sums = run(case, method, kd_ratio=0.0)
    assert [x.item() for x in ce_sums["kd"]] == [0, 0]
    torch.testing.assert_close(both, 0.6 * ce_alone + 0.4 * kd_alone, rtol=1e-12, atol=0)


# --- what each comparison means ------------------------------------------------------------------------


def draw(*shape, seed=0, by=2.0):
    return by * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@every_method
def test_temperature_moves_it(method):
    student, teacher = draw(4, 9), draw(4, method.teacher_ids, seed=1)
    one, other = (method.compare(tau)(student_NV=student, teacher_NV=teacher) for tau in (1.0, 3.0))
    assert (one - other).abs().min() > 1e-3


@every_method
def test_a_constant_on_the_logits_changes_nothing(method):
    student, teacher = draw(4, 9), draw(4, method.teacher_ids, seed=1)
    one = method.compare()(student_NV=student, teacher_NV=teacher)
    other = method.compare()(student_NV=student + 100, teacher_NV=teacher - 70)
    torch.testing.assert_close(other, one, rtol=1e-11, atol=1e-12)


@every_method
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_logits_are_finite(method, dtype):
    student = draw(6, 9, by=1e4).to(dtype).requires_grad_()
    teacher = draw(6, method.teacher_ids, seed=1, by=1e4).to(dtype)
    # a teacher that is sure of ids without a partner
    teacher[0, 3] = teacher[1, 7] = teacher[2, 0] = 1e5
    value = method.compare()(student_NV=student, teacher_NV=teacher)
    assert value.isfinite().all()
    value.sum().backward()
    assert student.grad.isfinite().all()


def test_overlap_of_everything_is_plain_distillation():
    student, teacher = draw(4, 9), draw(4, 9, seed=1)
    everything = torch.arange(9)
    for kind in ("forward_kl", "js", "adaptive_kl"):
        one = SameIds(divergence(kind), 1.5)(student_NV=student, teacher_NV=teacher)
        other = SharedIds(divergence(kind), 1.5, everything, everything)(student_NV=student, teacher_NV=teacher)
        assert torch.equal(one, other)


def test_overlap_ignores_the_other_ids():
    student, teacher = draw(4, 9).requires_grad_(), draw(4, 11, seed=1)
    compare = METHODS["overlap_kd"].compare()
    before = compare(student_NV=student, teacher_NV=teacher)
    (gradient,) = torch.autograd.grad(before.sum(), student)
    with torch.no_grad():
        student[:, [1, 3, 4, 6, 8]] += 50
        teacher[:, [0, 2, 5, 6, 7, 8, 9]] -= 50
    assert torch.equal(compare(student_NV=student, teacher_NV=teacher), before)
    assert torch.equal(gradient[:, [1, 3, 4, 6, 8]], torch.zeros(4, 5, dtype=torch.float64))


def test_uld_knows_no_ids():
    student, teacher = draw(4, 9), draw(4, 11, seed=1)
    before = uld(1.5)(student_NV=student, teacher_NV=teacher)
    mixed = uld(1.5)(student_NV=student.flip(-1), teacher_NV=teacher.roll(3, -1))
    torch.testing.assert_close(mixed, before, rtol=1e-12, atol=0)
    torch.testing.assert_close(
        uld(1.5)(student_NV=teacher, teacher_NV=teacher.flip(-1)), torch.zeros(4, dtype=torch.float64)
    )
    torch.testing.assert_close(uld(1.5)(student_NV=teacher, teacher_NV=student), before, rtol=1e-12, atol=0)


def test_mined_with_each_token_its_own_image_is_plain_distillation():
    student, teacher = draw(4, 9).requires_grad_(), draw(4, 9, seed=1)
    one = SameIds(divergence("forward_kl"), 1.5)(student_NV=student, teacher_NV=teacher)
    other = MappedIds(1.5, torch.arange(9), 9)(student_NV=student, teacher_NV=teacher)
    torch.testing.assert_close(other, one, rtol=1e-12, atol=1e-14)


def test_mined_mass_without_an_image_is_left_out():
    student, teacher = draw(4, 9), draw(4, 11, seed=1)
    compare = METHODS["mined"].compare()
    before = compare(student_NV=student, teacher_NV=teacher)
    teacher[:, [3, 7]] = 1e6
    assert torch.equal(compare(student_NV=student, teacher_NV=teacher), before)


logit = st.floats(-60, 60, allow_nan=False)


@settings(max_examples=60, deadline=None)
@given(
    student=st.lists(logit, min_size=9, max_size=9),
    teacher=st.lists(logit, min_size=11, max_size=11),
    name=st.sampled_from(sorted(METHODS)),
)
def test_every_comparison_is_a_distance(student, teacher, name):
    method = METHODS[name]
    own = torch.tensor([student], dtype=torch.float64, requires_grad=True)
    other = torch.tensor([teacher[: method.teacher_ids]], dtype=torch.float64)
    value = method.compare()(student_NV=own, teacher_NV=other)
    assert value.shape == (1,)
    assert -1e-12 <= value.item() < (2 if name == "uld" else math.inf)
    value.sum().backward()
    assert own.grad.isfinite().all()
    assert own.grad.sum().abs() < 1e-9


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: SharedIds(divergence("js"), 1.0, torch.arange(3), torch.arange(2)), "got 3 and 2"),
        (lambda: SharedIds(divergence("js"), 1.0, torch.arange(0), torch.arange(0)), "got 0 and 0"),
        (lambda: MappedIds(1.0, torch.tensor([0, 9]), 9), "below 9 .* got 2 up to 9"),
        (lambda: MappedIds(1.0, torch.tensor([-1, -1]), 9), "got 0 up to -1"),
        (lambda: uld(0.0)(student_NV=draw(1, 3), teacher_NV=draw(1, 3)), r"temperature: .* got 0.0"),
        (
            lambda: SameIds(divergence("js"), 1.0)(student_NV=draw(2, 3), teacher_NV=draw(2, 4)),
            r"got \(2, 3\) and \(2, 4\)",
        ),
    ],
)
def test_what_does_not_fit_is_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


# --- precision and memory ------------------------------------------------------------------------------

VOCABULARY, TEACHER_VOCABULARY = 400, 460


def larger_compare(name):
    ids = torch.randperm(VOCABULARY, generator=torch.Generator().manual_seed(0))
    if name == "kd":
        return SameIds(divergence("forward_kl"), 2.0)
    if name == "overlap_kd":
        return SharedIds(divergence("forward_kl"), 2.0, ids[:300], ids.flip(0)[:300])
    image_V = torch.arange(TEACHER_VOCABULARY) % 350
    return {"uld": uld(2.0), "mined": MappedIds(2.0, image_V, VOCABULARY)}[name]


def larger(name, dtype, *, rows=96, pairs=64, block=20, truth=False, plain=False):
    """Loss and gradients by student and weight, of tensors rounded to dtype."""
    generator = torch.Generator().manual_seed(3)
    teacher_vocabulary = VOCABULARY if name == "kd" else TEACHER_VOCABULARY

    def rounded(*shape, by=1.0):
        x = (by * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(dtype)
        return x.double() if truth else x

    student, weight = rounded(rows, 32).requires_grad_(), rounded(VOCABULARY, 32, by=0.2).requires_grad_()
    teacher, teacher_weight = rounded(pairs, 48), rounded(teacher_vocabulary, 48, by=0.2)
    gold = torch.randint(VOCABULARY, (rows,), generator=generator)
    batch = Rows(student_RD=student, labels_R=gold, teacher_NE=teacher)
    objective = Objective(**SETTINGS | {"divergence": divergence("forward_kl"), "compares": "distributions"})
    parts = {
        "student_head": Head(weight, VOCABULARY),
        "teacher_head": Head(teacher_weight, teacher_vocabulary),
        "compare": larger_compare(name),
        "objective": objective,
    }
    if plain:
        read = teacher_rows(batch, parts.pop("teacher_head"), objective, compare=parts["compare"])
        sums = student_space_sums(batch, teacher=read, **parts)
        loss = 0.5 * sums["ce"][0] / rows + 0.5 * sums["kd"][0] / pairs
    else:
        divisors = counts(batch, objective)
        loss, _ = baseline_loss(batch, **parts, divisors_T=divisors, block_elements=block * TEACHER_VOCABULARY)
    return loss.detach(), torch.autograd.grad(loss, [student, weight])


LARGER = ("kd", "overlap_kd", "uld", "mined")


def test_every_method_is_tried_in_each_precision():
    assert set(LARGER) == METHOD_NAMES - {"sft"}


@pytest.mark.parametrize("name", LARGER)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_error_budget(name, dtype):
    """No further from fp64 than the unblocked version in the same dtype, plus a floor of that dtype."""
    truth_loss, truth = larger(name, dtype, truth=True)
    plain_loss, plain = larger(name, dtype, plain=True)
    loss, found = larger(name, dtype)
    assert loss.dtype == torch.float32
    assert abs(loss - truth_loss) <= abs(plain_loss - truth_loss) + 1e-5 * truth_loss
    for got, naive, exact in zip(found, plain, truth, strict=True):
        assert got.dtype == dtype
        budget = (naive.double() - exact).abs().max() + torch.finfo(dtype).eps * exact.abs().max()
        assert (got.double() - exact).abs().max() <= budget


@pytest.mark.parametrize("name", LARGER)
def test_nothing_of_rows_by_vocabulary_is_made(name, largest):
    rows, block = 600, 10
    allowed = max(TEACHER_VOCABULARY * 48, rows * 48, block * TEACHER_VOCABULARY)
    with largest() as plain:
        larger(name, torch.float32, rows=rows, pairs=500, plain=True)
    assert plain.elements >= rows * VOCABULARY  # the spy sees it where it exists
    with largest() as spy:
        larger(name, torch.float32, rows=rows, pairs=500, block=block)
    assert spy.elements <= allowed
