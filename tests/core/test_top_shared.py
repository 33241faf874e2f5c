"""The few shared ids that the student finds likeliest: against plain loops, and what is read of the teacher's head."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dskd_plugin.core.baselines import SharedIds
from dskd_plugin.core.blockwise import baseline_loss
from dskd_plugin.core.divergences import DIVERGENCES, divergence
from dskd_plugin.core.heads import Head, head_logits, logits_at
from dskd_plugin.core.objective import Objective
from dskd_plugin.core.rows import Rows, counts
from dskd_plugin.core.top_shared import TopSharedCompare

KINDS = sorted(DIVERGENCES)
PAIRS = [(0, 3), (1, 9), (2, 1), (4, 0), (5, 10), (7, 4)]
IDS = torch.tensor([i for i, _ in PAIRS]), torch.tensor([j for _, j in PAIRS])
DIVISORS = torch.tensor([9, 0, 0, 0, 7, 0, 0])


def run(case, size, *, kind="forward_kl", tau=1.7, block_elements=40, divisors=DIVISORS):
    compare = TopSharedCompare(divergence(kind), tau, size, *IDS)
    return case.compared(compare, kind, tau, divisors=divisors, block_elements=block_elements)


LEAVES = ("student", "weight", "bias")
HEADS = [{}, {"scale": 1.3, "softcap": 4.0}, {"bias": False, "padding": 0}, {"scale": 0.5}]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 2e-5)])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("size", "tau"), [(2, 1.0), (3, 1.7), (6, 1.0)])
def test_loss_and_gradients_equal_the_floats(oracle, make_case, kind, size, tau, dtype, tolerance):
    case = make_case(seed=1, dtype=dtype, **HEADS[size % len(HEADS)]).whole()
    loss, sums = run(case, size, kind=kind, tau=tau)
    floats, live = case.floats() | {"ce_rows": [True] * 7}, case.live()
    # The weights of adaptive_kl are constants of the derivative: only its value is compared.
    leaves = [name for name in LEAVES if getattr(case, name) is not None and kind != "adaptive_kl"]

    def compare(z_s, z_t):
        return oracle.compare_support(z_s, z_t, tau, kind, PAIRS, size)

    def expected(live):
        return oracle.baseline_loss(floats, live, compare, 0.6 / 9, 0.4 / 7)

    assert loss.item() == pytest.approx(expected(live), rel=tolerance)
    kd = oracle.baseline_loss(floats, live, compare, 0.0, 1.0)
    assert [x.item() for x in sums["kd"]] == pytest.approx([kd, 5], rel=tolerance)
    for name in leaves:
        (got,) = torch.autograd.grad(loss, getattr(case, name), retain_graph=True)
        wanted = torch.tensor(oracle.gradient(expected, live, name), dtype=torch.float64)
        torch.testing.assert_close(got.double(), wanted, rtol=tolerance, atol=tolerance)


def test_the_size_moves_the_loss_and_all_shared_ids_are_the_overlap(make_case):
    case = make_case(seed=2).whole()
    losses = [run(case, size, divisors=None)[0].item() for size in (2, 3, 6, 100)]
    assert abs(losses[0] - losses[1]) > 1e-3 < abs(losses[1] - losses[2])
    student, teacher = torch.randn(4, 9).double().requires_grad_(), torch.randn(4, 11).double()
    plain = SharedIds(divergence("js"), 1.7, *IDS)(student_NV=student, teacher_NV=teacher)
    for size in (6, 100):
        found = TopSharedCompare(divergence("js"), 1.7, size, *IDS)(student_NV=student, teacher_NV=teacher)
        torch.testing.assert_close(found, plain, rtol=1e-12, atol=1e-14)
    assert losses[2] == losses[3]


def test_ids_that_are_not_chosen_mean_nothing():
    student = torch.tensor([[0.0, 5.0, 4.0, 9.0, 3.0, 1.0, 9.0, -2.0, 9.0]]).double().requires_grad_()
    teacher = torch.randn(1, 11).double()
    compare = TopSharedCompare(divergence("reverse_kl"), 1.0, 3, *IDS)
    assert sorted(compare.ids(student)[0][0].tolist()) == [1, 2, 4]  # 3, 6 and 8 are not shared
    assert sorted(compare.ids(student)[1][0].tolist()) == [0, 1, 9]
    before = compare(student_NV=student, teacher_NV=teacher)
    (gradient,) = torch.autograd.grad(before.sum(), student)
    assert gradient[0, [0, 3, 5, 6, 7, 8]].abs().max() == 0 < gradient.abs().max()
    teacher[:, [2, 3, 4, 5, 6, 7, 8, 10]] += 50
    assert torch.equal(compare(student_NV=student, teacher_NV=teacher), before)


@pytest.mark.parametrize("elements", [1, 40, 10**6])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_logits_of_some_ids_are_those_of_the_whole_head(dtype, elements):
    draw = torch.Generator().manual_seed(0)
    head = Head(
        torch.randn(20, 8, generator=draw).to(dtype), 18, torch.randn(20, generator=draw).to(dtype), 1.5, softcap=3.0
    )
    hidden, ids = torch.randn(5, 8, generator=draw).to(dtype), torch.randint(18, (5, 4), generator=draw)
    found, plain = logits_at(hidden, head, ids, elements=elements), head_logits(hidden, head).gather(1, ids)
    assert found.dtype == plain.dtype
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[
        dtype
    ]  # bf16: rounded before the bias
    torch.testing.assert_close(found, plain, rtol=tolerance, atol=tolerance)
    assert logits_at(hidden[:0], head, ids[:0], elements=elements).shape == (0, 4)


class Gathered(TorchDispatchMode):
    """Sees the largest tensor that is gathered, and whether it is of the head's rows."""

    def __init__(self, width):
        super().__init__()
        self.width, self.elements, self.times = width, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.index_select.default and out.shape[1] == self.width:
            self.elements, self.times = max(self.elements, out.numel()), self.times + 1
        return out


def test_no_more_of_the_teachers_head_is_gathered_than_a_block_of_logits():
    rows, ids, teacher_ids, width = 60, 100, 5000, 64
    shared = torch.arange(ids)
    objective = Objective(
        divergence=divergence("reverse_kl"),
        temperature=1.0,
        kd_ratio=0.5,
        spaces="student",
        agreement_mask=False,
        compares="distributions",
    )
    batch = Rows(
        student_RD=torch.randn(rows, 8, requires_grad=True),
        labels_R=torch.zeros(rows, dtype=torch.long),
        teacher_NE=torch.randn(rows, width),
    )
    with Gathered(width) as spy:
        loss, _ = baseline_loss(
            batch,
            student_head=Head(torch.randn(ids, 8, requires_grad=True), ids),
            teacher_head=Head(torch.randn(teacher_ids, width), teacher_ids),
            compare=TopSharedCompare(divergence("reverse_kl"), 1.0, 16, shared, shared.flip(0)),
            objective=objective,
            divisors_T=counts(batch, objective),
            block_elements=60 * ids,
        )
        loss.backward()
    assert 0 < spy.elements <= 60 * ids < rows * 16 * width
    assert spy.times > 1


@pytest.mark.parametrize(
    ("size", "ids", "message"),
    [
        (1, IDS, "size: expected at least 2, got 1"),
        (3, (IDS[0][:1], IDS[1][:1]), "at least two, got 1 and 1"),
        (3, (IDS[0], IDS[1][:2]), "got 6 and 2"),
    ],
)
def test_what_does_not_fit_is_refused(size, ids, message):
    with pytest.raises(ValueError, match=message):
        TopSharedCompare(divergence("js"), 1.0, size, *ids)
