import math

import pytest
import torch

from dskd_plugin.core.divergences import DIVERGENCES, divergence, log_probs

# kind -> knob values that move the result; {} the defaults
CASES = [
    ("forward_kl", {}),
    ("reverse_kl", {}),
    ("js", {}),
    ("js", {"teacher_share": 0.2}),
    ("skewed_forward_kl", {}),
    ("skewed_forward_kl", {"skew": 0.45}),
    ("skewed_reverse_kl", {}),
    ("skewed_reverse_kl", {"skew": 0.45}),
    ("adaptive_kl", {}),
    ("adaptive_kl", {"head_mass": 0.9}),
    ("tvd", {}),
]
KINDS = sorted(DIVERGENCES)
# where one side alone excludes an id, these are defined (finite)
FINITE_ONE_SIDED = {
    "js": "both",
    "skewed_forward_kl": "both",
    "skewed_reverse_kl": "both",
    "tvd": "both",
    "forward_kl": "teacher",
    "reverse_kl": "student",
}
INF = math.inf


def logits(*shape, seed=0, scale=2.0):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(*shape, generator=generator, dtype=torch.float64)


def value(kind, student_logits, teacher_logits, temperature=1.0, **knobs):
    return divergence(kind, **knobs)(
        student_NV=log_probs(student_logits, temperature=temperature),
        teacher_NV=log_probs(teacher_logits, temperature=temperature),
    )


def test_every_divergence_has_a_case():
    assert {kind for kind, _ in CASES} == set(DIVERGENCES)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize(("kind", "knobs"), CASES)
def test_equals_the_loop_over_floats(oracle, kind, knobs, temperature):
    student, teacher = logits(6, 9, seed=1), logits(6, 9, seed=2)
    expected = [
        oracle.DISTANCES[kind](oracle.softmax(p, temperature), oracle.softmax(q, temperature), **knobs)
        for q, p in zip(student.tolist(), teacher.tolist(), strict=True)
    ]
    got = value(kind, student, teacher, temperature, **knobs)
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("kind", "knobs"), CASES)
def test_fp32_is_close_to_fp64(kind, knobs):
    student, teacher = logits(16, 200, seed=1), logits(16, 200, seed=2)
    wide = value(kind, student, teacher, 2.0, **knobs)
    narrow = value(kind, student.float(), teacher.float(), 2.0, **knobs)
    assert narrow.dtype == torch.float32
    torch.testing.assert_close(narrow.double(), wide, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_logits_are_widened_first(kind, dtype):
    student, teacher = logits(4, 50, seed=1).to(dtype), logits(4, 50, seed=2).to(dtype)
    got = value(kind, student, teacher, 2.0)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), value(kind, student.double(), teacher.double(), 2.0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scale", [0.0, 1.0, 30.0, 1e5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_zero_with_zero_gradient_on_equal_sides(kind, dtype, scale):
    teacher = logits(5, 40, scale=scale).to(dtype)
    student = teacher.clone().requires_grad_()
    got = value(kind, student, teacher)
    got.sum().backward()
    assert torch.equal(got.detach(), torch.zeros(5, dtype=dtype))
    assert student.grad.abs().max() <= 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize(("kind", "knobs"), CASES)
def test_positive_on_different_sides(kind, knobs):
    assert (value(kind, logits(50, 7, seed=3), logits(50, 7, seed=4), **knobs) > 1e-4).all()


@pytest.mark.parametrize("kind", KINDS)
def test_order_of_the_vocabulary_does_not_matter(kind):
    student, teacher = logits(6, 30, seed=5), logits(6, 30, seed=6)
    teacher[:, 3:9] = teacher[:, 3:4]  # ties, which a sort could break by position
    order = torch.randperm(30, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        value(kind, student[:, order], teacher[:, order]), value(kind, student, teacher), rtol=1e-12, atol=0
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_constant_added_to_logits_does_not_matter(kind):
    student, teacher = logits(6, 30, seed=5), logits(6, 30, seed=6)
    torch.testing.assert_close(
        value(kind, student + 7, teacher - 11), value(kind, student, teacher), rtol=1e-12, atol=1e-14
    )


@pytest.mark.parametrize(("kind", "knobs"), [case for case in CASES if case[0] != "adaptive_kl"])
def test_gradcheck(kind, knobs):
    student, teacher = logits(3, 6, seed=7).requires_grad_(), logits(3, 6, seed=8).requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: value(kind, a, b, 1.5, **knobs), (student, teacher))


def test_weights_of_adaptive_kl_are_not_differentiated(oracle):
    student, teacher = logits(1, 7, seed=9).requires_grad_(), logits(1, 7, seed=10)
    (got,) = torch.autograd.grad(value("adaptive_kl", student, teacher).sum(), student)
    p, start = oracle.softmax(teacher[0].tolist()), oracle.softmax(student[0].tolist())

    def frozen(live):
        return oracle.adaptive(p, oracle.softmax(live["z"]), frozen_q=start)

    expected = oracle.gradient(frozen, {"z": student[0].tolist()}, "z")
    torch.testing.assert_close(got[0], torch.tensor(expected, dtype=torch.float64), rtol=1e-7, atol=1e-9)


def test_adaptive_kl_weighs_head_and_tail():
    # teacher's head at mass 0.5 is id 0; the student errs in the tail alone, so the reverse KL counts alone
    teacher = torch.tensor([[0.6, 0.3, 0.1]], dtype=torch.float64).log()
    student = torch.tensor([[0.6, 0.1, 0.3]], dtype=torch.float64).log()
    got = divergence("adaptive_kl")(student_NV=student, teacher_NV=teacher)
    reverse = divergence("reverse_kl")(student_NV=student, teacher_NV=teacher)
    torch.testing.assert_close(got, reverse, rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_ids_excluded_on_both_sides_count_for_nothing(kind, dtype):
    student, teacher = logits(4, 12, seed=11).to(dtype), logits(4, 12, seed=12).to(dtype)
    kept = [0, 2, 3, 7, 8, 11]
    out = [i for i in range(12) if i not in kept]
    small = student[:, kept].clone().requires_grad_()
    value(kind, small, teacher[:, kept]).sum().backward()
    student[:, out] = teacher[:, out] = -INF
    student.requires_grad_()
    teacher.requires_grad_()
    got = value(kind, student, teacher)
    got.sum().backward()
    torch.testing.assert_close(got, value(kind, small, teacher[:, kept]), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(student.grad[:, kept], small.grad, rtol=1e-5, atol=1e-6)
    assert torch.equal(student.grad[:, out], torch.zeros(4, len(out), dtype=dtype))
    assert teacher.grad.isfinite().all()


@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_id_excluded_on_one_side(oracle, kind, side):
    student, teacher = logits(3, 8, seed=13), logits(3, 8, seed=14)
    (student if side == "student" else teacher)[:, [1, 5]] = -INF
    student.requires_grad_()
    got = value(kind, student, teacher)
    if FINITE_ONE_SIDED.get(kind) not in ("both", side):
        assert not got.isfinite().any()
        return
    expected = [
        oracle.DISTANCES[kind](oracle.softmax(p), oracle.softmax(q))
        for q, p in zip(student.tolist(), teacher.tolist(), strict=True)
    ]
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)
    got.sum().backward()
    assert student.grad.isfinite().all()
    if side == "student":
        assert torch.equal(student.grad[:, [1, 5]], torch.zeros(3, 2, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_extreme_logits_stay_finite(kind, dtype):
    student = torch.tensor([[1e5, 0, -1e5], [0, 0, 0], [-300, 300, 0]], dtype=dtype).requires_grad_()
    teacher = torch.tensor([[-1e5, 0, 1e5], [1e5, 0, 0], [300, -300, 0]], dtype=dtype)
    got = value(kind, student, teacher)
    got.sum().backward()
    assert got.isfinite().all()
    assert student.grad.isfinite().all()


def test_bounds():
    student, teacher = logits(40, 5, seed=15, scale=20), logits(40, 5, seed=16, scale=20)
    assert value("js", student, teacher).max() <= math.log(2) + 1e-12
    assert value("tvd", student, teacher).max() <= 1 + 1e-12
    assert value("skewed_forward_kl", student, teacher).max() <= -math.log(0.1) + 1e-12


@pytest.mark.parametrize(("kind", "knobs"), [case for case in CASES if case[1]])
def test_every_knob_moves_the_result(kind, knobs):
    student, teacher = logits(6, 9, seed=1), logits(6, 9, seed=2)
    plain, moved = value(kind, student, teacher), value(kind, student, teacher, **knobs)
    assert (plain - moved).abs().max() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_temperature_moves_the_result(kind):
    student, teacher = logits(6, 9, seed=1), logits(6, 9, seed=2)
    assert (value(kind, student, teacher, 1.0) - value(kind, student, teacher, 2.0)).abs().max() > 1e-3


def test_teacher_share_belongs_to_the_teacher():
    # the mixture of a large share is the teacher, so the student carries the divergence: (1 - w) KL(q | p)
    student, teacher = logits(4, 5, seed=1), logits(4, 5, seed=2)
    share = 1 - 1e-6
    got = value("js", student, teacher, teacher_share=share) / (1 - share)
    torch.testing.assert_close(got, value("reverse_kl", student, teacher), rtol=1e-4, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_no_row_and_one_id(kind):
    function = divergence(kind)
    assert function(student_NV=torch.zeros(0, 5), teacher_NV=torch.zeros(0, 5)).shape == (0,)
    assert torch.equal(function(student_NV=torch.zeros(2, 1), teacher_NV=torch.zeros(2, 1)), torch.zeros(2))


@pytest.mark.parametrize("kind", KINDS)
def test_unequal_vocabularies_are_refused(kind):
    with pytest.raises(ValueError, match=r"\(2, 5\) and \(2, 6\)"):
        divergence(kind)(student_NV=torch.zeros(2, 5), teacher_NV=torch.zeros(2, 6))


@pytest.mark.parametrize(
    ("kind", "knobs", "message"),
    [
        ("forward", {}, r"^kind: expected one of forward_kl.*got 'forward'"),
        ("forward_kl", {"skew": 0.1}, r"^skew: expected no setting for kind 'forward_kl'"),
        ("js", {"beta": 0.1}, r"^beta: expected teacher_share"),
        ("js", {"teacher_share": 1.0}, r"teacher_share: .* between 0 and 1, got 1\.0"),
        ("skewed_reverse_kl", {"skew": 0.0}, r"skew: .* got 0\.0"),
        ("adaptive_kl", {"head_mass": math.nan}, r"head_mass: .* got nan"),
        ("js", {"student_NV": 0.5}, r"^student_NV: "),
    ],
)
def test_bad_settings_are_refused_before_any_step(kind, knobs, message):
    with pytest.raises(ValueError, match=message):
        divergence(kind, **knobs)


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan])
def test_temperature_must_be_positive(temperature):
    with pytest.raises(ValueError, match=f"temperature: .* got {temperature}"):
        log_probs(torch.zeros(1, 2), temperature=temperature)
