"""Events and the exact target, against loops over floats."""

import math

import pytest
import torch

from dskd_plugin.core.blockwise import dskd_loss
from dskd_plugin.core.divergences import DIVERGENCES, divergence, forward_kl, log_probs
from dskd_plugin.core.events import (
    EventCompare,
    Events,
    Exact,
    events_of,
    events_of_pairs,
    exact_target,
    inside,
    masses,
    teacher_masses,
)
from dskd_plugin.core.objective import RATES, TERMS

KINDS = list(DIVERGENCES)
WHOLE = 10**9
# Events of nine student ids and eleven teacher ids; the last event may lack one side.
TABLES = {
    "both sides": ([0, 0, 1, 2, 2, 2, 3, 4, 4], [0, 1, 1, 2, 3, 3, 4, 4, 0, 2, 1], 5),
    "student's rest": ([0, 0, 1, 2, 2, 2, 3, 4, 4], [0, 1, 1, 2, 3, 3, 3, 0, 0, 2, 1], 5),
    "teacher's rest": ([0, 0, 1, 2, 2, 2, 3, 3, 1], [0, 1, 1, 2, 3, 3, 4, 4, 0, 2, 1], 5),
    "each its own": ([*range(9)], [8, 7, 6, 5, 4, 3, 2, 1, 0, 9, 9], 10),
}


def events(name):
    student, teacher, count = TABLES[name]
    return Events(torch.tensor(student), torch.tensor(teacher), count)


def draw(*shape, seed=0, by=2.0):
    return by * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_ids_of_one_key_are_one_event():
    found = events_of(["a", None, "b", "a", "c"], ["b", "d", "a", None])
    assert found.student_V.tolist() == [0, 2, 1, 0, 2]
    assert found.teacher_U.tolist() == [1, 2, 0, 2]
    assert found.count == 3
    assert (found.student_lacks_last, found.teacher_lacks_last) == (False, False)


@pytest.mark.parametrize(
    ("student", "teacher", "count", "lacks"),
    [
        ("ab", "ba", 2, (False, False)),
        ("abc", "ab", 3, (False, True)),
        ("ab", "abc", 3, (True, False)),
    ],
)
def test_a_rest_is_there_where_a_side_has_one(student, teacher, count, lacks):
    found = events_of(list(student), list(teacher))
    assert (found.count, (found.student_lacks_last, found.teacher_lacks_last)) == (count, lacks)


def test_vocabularies_with_nothing_in_common_are_refused():
    with pytest.raises(ValueError, match="at least one that both have"):
        events_of(["a", None], [None, "b"])


def test_pairs_of_ids():
    found = events_of_pairs([(2, 0), (0, 3)], 3, 4)
    assert (found.student_V.tolist(), found.teacher_U.tolist(), found.count) == ([0, 2, 1], [1, 2, 2, 0], 3)


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("by", [1.0, 300.0])
def test_masses_equal_the_floats(oracle, name, by):
    student, _, count = TABLES[name]
    logits = draw(4, 9, by=by)
    found = masses(log_probs(logits, temperature=1.0), torch.tensor(student), count)
    for n, row in enumerate(logits.tolist()):
        top = max(row)
        for k in range(count):
            members = [z for z, e in zip(row, student, strict=True) if e == k]
            if not members:
                assert found[n, k] == -math.inf
                continue
            # From the likeliest member, so that the floats do not underflow either.
            peak = max(members)
            mass = peak - top + math.log(math.fsum(math.exp(z - peak) for z in members))
            whole = math.log(math.fsum(math.exp(z - top) for z in row))
            assert found[n, k].item() == pytest.approx(mass - whole, rel=1e-9, abs=1e-9)


def test_masses_of_impossible_ids_have_no_gradient_and_no_nan():
    logits = draw(2, 9)
    logits[:, :2] = -math.inf
    logits.requires_grad_()
    student, _, count = TABLES["both sides"]
    found = masses(log_probs(logits, temperature=1.0), torch.tensor(student), count)
    assert found[:, 0].tolist() == [-math.inf, -math.inf]
    found[:, 1:].sum().backward()
    assert logits.grad.isfinite().all()
    assert logits.grad[:, :2].eq(0).all()


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", TABLES)
def test_events_compared_equal_the_floats(oracle, name, kind, temperature):
    student, teacher = draw(3, 9).requires_grad_(), draw(3, 11, seed=1)
    compare = EventCompare(divergence(kind), temperature, events(name))
    found = compare(student_NV=student, teacher_NV=teacher)
    student_event, teacher_event, count = TABLES[name]
    for n in range(3):
        q, p = (oracle.softmax(x[n].tolist(), temperature) for x in (student, teacher))
        wanted = oracle.wanted_masses(p, q, student_event, teacher_event, count)
        own = oracle.event_masses(q, student_event, count)
        assert found[n].item() == pytest.approx(oracle.distance_of(kind, wanted, own, own), rel=1e-9)
    found.sum().backward()
    assert student.grad.isfinite().all()
    # What a constant on all logits changes is nothing.
    torch.testing.assert_close(student.grad.sum(-1), torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-12)


def target_of(student, share, teacher, table):
    """The exact target from log-probabilities over ids."""
    return exact_target(
        share_NV=share,
        share_NK=masses(share, table.student_V, table.count),
        target_NK=teacher_masses(
            masses(student, table.student_V, table.count), masses(teacher, table.teacher_U, table.count), table
        ),
        events=table,
    )


@pytest.mark.parametrize("by_projected", [True, False])
@pytest.mark.parametrize("name", TABLES)
def test_the_exact_target_equals_the_floats(oracle, name, by_projected):
    student, share, teacher = (log_probs(draw(3, n, seed=s), temperature=1.0) for s, n in enumerate((9, 9, 11)))
    share = share if by_projected else student
    found = target_of(student, share, teacher, events(name)).exp()
    torch.testing.assert_close(found.sum(-1), torch.ones(3, dtype=torch.float64))
    for n in range(3):
        q, between, p = ([math.exp(x) for x in side[n].tolist()] for side in (student, share, teacher))
        assert found[n].tolist() == pytest.approx(oracle.exact_target(p, q, between, *TABLES[name]), rel=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_a_student_that_is_certain_of_what_the_teacher_lacks_has_a_finite_loss(kind):
    """In fp32 its mass of the rest may be exactly 1, or a little more, and leaves the teacher nothing to share."""
    table, rows = events("student's rest"), 1000
    student = draw(rows, 9).float()
    student[:, 7:] += torch.linspace(5, 60, rows)[:, None]
    student.requires_grad_()
    teacher = draw(rows, 11, seed=1).float()
    log_student, log_teacher = (log_probs(x, temperature=1.0) for x in (student, teacher))
    rest = masses(log_student, table.student_V, table.count)[:, -1]
    assert (rest > 0).any() and (rest == 0).any() and (rest < -1e-3).any()  # rounding does all three
    target = target_of(log_student.detach(), log_student.detach(), log_teacher, table)
    assert (target.exp().sum(-1) - 1).abs().max() < 1e-5
    by_ids = divergence(kind)(student_NV=log_student, teacher_NV=target)
    by_events = EventCompare(divergence(kind), 1.0, table)(student_NV=student, teacher_NV=teacher)
    for found in (by_ids, by_events):
        (gradient,) = torch.autograd.grad(found.sum(), student, retain_graph=True)
        assert found.isfinite().all() and gradient.isfinite().all()


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_student_with_the_teachers_masses_is_not_pulled(name, kind):
    """Whatever it does inside an event: only that decides between its tokens."""
    table, teacher = events(name), log_probs(draw(4, 11, seed=1), temperature=1.0)
    student = log_probs(draw(4, 9), temperature=1.0)
    for _ in range(200):  # what one side alone can say follows the student, so that the target moves with it
        student = target_of(student.detach(), student.detach(), teacher, table)
    if not table.student_lacks_last and not table.teacher_lacks_last:
        wanted = masses(teacher, table.teacher_U, table.count)
        torch.testing.assert_close(masses(student, table.student_V, table.count), wanted)
    student = student.requires_grad_()
    target = target_of(student.detach(), student.detach(), teacher, table)
    distance = divergence(kind)(student_NV=log_probs(student, temperature=1.0), teacher_NV=target)
    by_events = EventCompare(divergence(kind), 1.0, table)(student_NV=student, teacher_NV=teacher)
    for found in (distance, by_events):
        assert found.abs().max() < 1e-12
        if kind == "tvd":
            continue  # a kink lies where the sides agree: rounding decides between its slopes
        (gradient,) = torch.autograd.grad(found.sum(), student, retain_graph=True)
        assert gradient.abs().max() < 1e-9


def test_inside_is_the_probability_given_the_event():
    logits = draw(3, 9)
    gold, table = torch.tensor([4, 0, 6]), events("both sides")
    found = inside(logits, masses(logits, table.student_V, table.count), gold, table)
    for n, token in enumerate(gold.tolist()):
        members = [v for v in range(9) if table.student_V[v] == table.student_V[token]]
        weights = [math.exp(logits[n, v].item()) for v in members]
        assert found[n].exp().item() == pytest.approx(math.exp(logits[n, token].item()) / math.fsum(weights))


def run(case, exact, *, soft, block_elements=WHOLE, divisors=None, **changes):
    rows = case.rows()
    rows = type(rows)(student_RD=rows.student_RD, labels_R=rows.labels_R, teacher_NE=rows.teacher_NE)
    parts = case.parts(spaces="student", agreement_mask=False, **changes)
    parts |= {"soft_labels": EventCompare(forward_kl, 1.0, exact.events) if soft else None, "exact": exact}
    if divisors is None:
        counted = {"ce": len(case.gold), "t2s_kd": len(case.teacher), "t2s_ce": len(case.teacher)}
        divisors = torch.tensor([counted.get(term, 0) for term in TERMS])
    return dskd_loss(rows, divisors_T=divisors, block_elements=block_elements, **parts)


def exact_case(make_case, **settings):
    return make_case(pairs=4, spaces="student", agreement_mask=False, **settings)


@pytest.mark.parametrize("shares_inside", [True, False])
@pytest.mark.parametrize("soft", [True, False])
@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "adaptive_kl"])
@pytest.mark.parametrize("name", TABLES)
def test_loss_and_gradients_equal_the_floats(oracle, make_case, name, kind, soft, shares_inside):
    case = exact_case(make_case, seed=2, divergence=kind, scale=1.2, softcap=5.0)
    student, teacher, count = TABLES[name]
    plain = {
        "student_event": student,
        "teacher_event": teacher,
        "count": count,
        "inside": shares_inside,
        "soft": soft,
    }
    floats, live = case.floats(), case.live()
    loss, _ = run(case, Exact(events(name), shares_inside), soft=soft)
    assert loss.item() == pytest.approx(oracle.exact_loss(floats, live, plain), rel=1e-9)
    leaves = list(case.leaves().values())
    for leaf, got in zip(case.leaves(), torch.autograd.grad(loss, leaves), strict=True):
        wanted = oracle.gradient(lambda live: oracle.exact_loss(floats, live, plain), live, leaf)
        torch.testing.assert_close(got, torch.tensor(wanted, dtype=torch.float64), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("block_elements", [1, 40])
def test_size_of_the_blocks_does_not_matter(make_case, block_elements):
    case, exact = exact_case(make_case, seed=3), Exact(events("both sides"), True)
    whole, sums = run(case, exact, soft=True)
    parts, part_sums = run(case, exact, soft=True, block_elements=block_elements)
    assert parts.item() == pytest.approx(whole.item(), rel=1e-12)
    for name in (*TERMS, *RATES):
        assert [x.item() for x in part_sums[name]] == pytest.approx([x.item() for x in sums[name]], rel=1e-12), name
    leaves = list(case.leaves().values())
    for one, other in zip(torch.autograd.grad(whole, leaves), torch.autograd.grad(parts, leaves), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


def test_one_tokenizer_is_pulled_to_the_teacher_itself(make_case):
    """Whatever the projector says."""
    case = exact_case(make_case, seed=4, kd_ratio=1.0)
    names = [*range(9)]
    exact = Exact(Events(torch.tensor(names), torch.tensor([*names, 9, 9]), 10), True)
    _, sums = run(case, exact, soft=True)
    case.teacher_ids = 9
    plain = case.parts()["teacher_head"]
    teacher = torch.nn.functional.linear(case.teacher, plain.weight_VD, plain.bias_V)[:, :9]
    student = torch.nn.functional.linear(case.student[:4], case.weight, case.bias)[:, :9]
    rest = torch.nn.functional.linear(case.teacher, plain.weight_VD, plain.bias_V)[:, :11]
    q, p = log_probs(student, temperature=2.0), log_probs(teacher, temperature=2.0)
    kept = (torch.logsumexp(teacher / 2, -1) - torch.logsumexp(rest / 2, -1)).exp()[:, None]
    # What the student has no id for is left to it.
    target = (kept * p.exp() + (1 - kept) * q.exp()).log()
    assert sums["t2s_kd"][0].item() == pytest.approx(forward_kl(student_NV=q, teacher_NV=target).sum().item(), rel=1e-9)


def test_what_is_seen_inside_events(make_case):
    case, table = exact_case(make_case, seed=5, temperature=1.0), events("both sides")
    _, sums = run(case, Exact(table, False), soft=True)
    lead, rows = 0.0, 0
    for n in range(4):
        members = [v for v in range(9) if table.student_V[v] == table.student_V[case.gold[n]]]
        if len(members) == 1:
            continue
        sides = []
        for hidden in (case.teacher[n] @ case.t2s, case.student[n]):
            z = torch.nn.functional.linear(hidden, case.weight, case.bias)
            sides.append((z[case.gold[n]] - torch.logsumexp(z[members], 0)).item())
        lead, rows = lead + sides[0] - sides[1], rows + 1
    assert rows
    assert [x.item() for x in sums["t2s_inside"]] == pytest.approx([lead, rows], rel=1e-9)


@pytest.mark.parametrize("name", TABLES)
def test_how_much_likelier_the_target_finds_the_event_of_the_gold_token(oracle, make_case, name):
    case, table = exact_case(make_case, seed=7, temperature=2.0), events(name)  # which softens the loss alone
    _, sums = run(case, Exact(table, False), soft=True)
    wanted = 0.0
    for n in range(4):
        own = torch.nn.functional.linear(case.student[n], case.weight, case.bias)[:9]
        theirs = torch.nn.functional.linear(case.teacher[n], case.teacher_weight, case.teacher_bias)[:11]
        q, p = own.softmax(-1).tolist(), theirs.softmax(-1).tolist()
        target = oracle.exact_target(p, q, q, *TABLES[name])
        members = [v for v in range(9) if table.student_V[v] == table.student_V[case.gold[n]]]
        wanted += math.log(sum(target[v] for v in members)) - math.log(sum(q[v] for v in members))
    assert [x.item() for x in sums["teacher_lead"]] == pytest.approx([wanted, 4], rel=1e-9)


def test_agreement_is_of_events(make_case):
    case, table = exact_case(make_case, seed=6), events("both sides")
    _, sums = run(case, Exact(table, False), soft=True)
    agree = 0
    for n in range(4):
        shown = torch.nn.functional.linear(case.teacher[n] @ case.t2s, case.weight, case.bias)[:9].argmax()
        known = torch.nn.functional.linear(case.teacher[n], case.teacher_weight, case.teacher_bias)[:11].argmax()
        agree += int(table.student_V[shown] == table.teacher_U[known])
    assert [x.item() for x in sums["t2s_agreement"]] == [agree, 4]


def test_nothing_of_rows_by_vocabulary_is_made(largest):
    rows, ids, teacher_ids, block = 400, 300, 360, 10
    generator = torch.Generator().manual_seed(0)

    def sample(*shape):
        return torch.randn(*shape, generator=generator)

    from dskd_plugin.core.heads import Head
    from dskd_plugin.core.objective import Objective
    from dskd_plugin.core.rows import Rows

    table = Events(torch.arange(ids) % 250, torch.arange(teacher_ids) % 250, 250)
    objective = Objective(
        divergence=forward_kl,
        temperature=1.0,
        kd_ratio=0.5,
        spaces="student",
        agreement_mask=False,
        compares="spaces",
    )
    given = Rows(
        student_RD=sample(rows, 8).requires_grad_(),
        labels_R=torch.zeros(rows, dtype=torch.long),
        teacher_NE=sample(rows, 12),
    )
    with largest() as spy:
        loss, _ = dskd_loss(
            given,
            student_head=Head(sample(ids, 8).requires_grad_(), ids),
            teacher_head=Head(sample(teacher_ids, 12), teacher_ids),
            t2s_Dd=sample(12, 8).requires_grad_(),
            s2t_dD=None,
            objective=objective,
            divisors_T=torch.full((len(TERMS),), rows),
            block_elements=block * teacher_ids,
            soft_labels=EventCompare(forward_kl, 1.0, table),
            exact=Exact(table, True),
        )
        loss.backward()
    assert spy.elements <= max(teacher_ids * 12, rows * 12, block * teacher_ids)
