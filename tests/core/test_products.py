"""How often rows are multiplied with a head, and that nothing of rows x vocabulary is made on the way."""

import math

import pytest
import torch

from benchmarks.counting import VocabularyWork
from dskd_plugin.core.blockwise import baseline_loss, dskd_loss
from dskd_plugin.core.divergences import forward_kl
from dskd_plugin.core.events import EventCompare, Events, Exact, likeliest_event, masses
from dskd_plugin.core.heads import Head, head_logits
from dskd_plugin.core.objective import TERMS, Objective
from dskd_plugin.core.rows import Rows
from dskd_plugin.core.top_shared import TopSharedCompare

R, N, IDS, TEACHER_IDS, BLOCK = 70, 45, 300, 360, 10
BLOCKS_WITH_PAIRS = 5
TABLE = Events(torch.arange(IDS) % 250, torch.arange(TEACHER_IDS) % 250, 250)


def sample(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def work_of(method, temperature=1.0):
    """What the loss and its backward do with the two heads."""
    spaces = "both" if method == "both" else "student"
    objective = Objective(
        divergence=forward_kl,
        temperature=temperature,
        kd_ratio=0.5,
        spaces=spaces,
        agreement_mask=False,
        compares="distributions" if method in ("overlap", "support") else "spaces",
    )
    rows = Rows(
        student_RD=sample(R, 8).requires_grad_(),
        labels_R=torch.zeros(R, dtype=torch.long),
        teacher_NE=sample(N, 12),
    )
    weight, teacher_weight = sample(IDS, 8).requires_grad_(), sample(TEACHER_IDS, 12)
    parts = {
        "student_head": Head(weight, IDS),
        "teacher_head": Head(teacher_weight, TEACHER_IDS),
        "objective": objective,
        "divisors_T": torch.full((len(TERMS),), R),
        "block_elements": BLOCK * TEACHER_IDS,
    }
    with VocabularyWork({"student": weight, "teacher": teacher_weight}) as work:
        if method == "overlap":
            loss, _ = baseline_loss(rows, compare=EventCompare(forward_kl, temperature, TABLE), **parts)
        elif method == "support":
            shared = torch.arange(250)
            compare = TopSharedCompare(forward_kl, temperature, 16, shared, shared.flip(0))
            loss, _ = baseline_loss(rows, compare=compare, **parts)
        else:
            parts |= {"t2s_Dd": sample(12, 8).requires_grad_(), "s2t_dD": sample(8, 12) if spaces == "both" else None}
            soft = EventCompare(forward_kl, 1.0, TABLE)
            loss, _ = dskd_loss(rows, soft_labels=soft, exact=Exact(TABLE, True), **parts)
        loss.backward()
    assert 0 < work.largest <= BLOCK * TEACHER_IDS
    return work.products["student"], work.products["teacher"]


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_default_method_reads_the_teachers_head_once_per_block(temperature):
    student, teacher = work_of("default", temperature)
    assert (teacher.logits, teacher.calls, teacher.back, teacher.weight) == (N, BLOCKS_WITH_PAIRS, 0, 0)
    # Its own rows and the projected teacher's, forward and back; the weight learns from its own rows alone.
    assert (student.logits, student.back, student.weight) == (R + N, R + N, R)


def test_second_space_adds_the_students_rows_alone():
    student, teacher = work_of("both")
    assert (teacher.logits, teacher.calls, teacher.back, teacher.weight) == (2 * N, 2 * BLOCKS_WITH_PAIRS, N, 0)
    assert (student.logits, student.back, student.weight) == (R + N, R + N, R)


def test_distributions_are_read_once_each():
    student, teacher = work_of("overlap")
    assert (teacher.logits, teacher.calls, teacher.back) == (N, BLOCKS_WITH_PAIRS, 0)
    assert (student.logits, student.back, student.weight) == (R, R, R)


def test_a_support_needs_no_product_with_the_teachers_head():
    student, teacher = work_of("support")
    assert (teacher.logits, teacher.calls, teacher.back, teacher.weight) == (0, 0, 0, 0)
    assert (student.logits, student.back, student.weight) == (R, R, R)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_logits_by_id_are_the_same_numbers(dtype):
    head = Head(sample(20, 8).to(dtype), 18, sample(20, seed=1).to(dtype), scale=1.5, softcap=3.0)
    hidden = sample(5, 8, seed=2).to(dtype)
    plain, by_id = head_logits(hidden, head), head_logits(hidden, head, by_id=True)
    assert by_id.T.is_contiguous()
    assert by_id.dtype == plain.dtype
    if dtype == torch.bfloat16:  # where the bias is added is rounded otherwise
        torch.testing.assert_close(by_id, plain, rtol=1e-2, atol=1e-2)
    else:
        torch.testing.assert_close(by_id, plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("by_id", [True, False])
def test_likeliest_event_is_that_of_the_likeliest_id(by_id):
    logits = sample(6, TEACHER_IDS) * 3
    logits[0] = -500.0  # far below 0, where a sum of plain exponentials is 0
    logits[0, 7] = -400.0
    given = logits.T.contiguous().T if by_id else logits
    event = TABLE.teacher_U.clone()
    event[event == 3] = 4  # an event without any id
    mass, likeliest = likeliest_event(given, event, 250)
    assert likeliest.tolist() == [int(event[max(range(TEACHER_IDS), key=row.__getitem__)]) for row in logits.tolist()]
    assert mass[:, 3].eq(-math.inf).all()


def test_gradient_of_masses_equals_differences():
    logits = sample(3, 9).double().requires_grad_()
    event = torch.tensor([0, 0, 1, 2, 2, 2, 3, 5, 5])  # event 4 is empty
    assert torch.autograd.gradcheck(lambda x: masses(x, event, 6)[:, [0, 1, 2, 3, 5]], logits)
    (plain,) = torch.autograd.grad(masses(logits, event, 6)[:, 2].sum(), logits)
    for n, row in enumerate(logits.tolist()):
        whole = math.fsum(math.exp(z) for z in row[3:6])
        wanted = [math.exp(z) / whole if 3 <= v < 6 else 0.0 for v, z in enumerate(row)]
        assert plain[n].tolist() == pytest.approx(wanted, rel=1e-12)
