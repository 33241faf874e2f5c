"""The teacher said in the student's tokens by bytes: against loops over all its tokens, in blocks, and in memory."""

import dataclasses
import itertools

import pytest
import torch
from hypothesis import given as such_that
from hypothesis import settings
from hypothesis import strategies as st

from dskd_plugin.core.blockwise import baseline_loss
from dskd_plugin.core.divergences import DIVERGENCES, divergence
from dskd_plugin.core.heads import Head
from dskd_plugin.core.objective import TERMS, Objective
from dskd_plugin.core.prefixes import PrefixCompare
from dskd_plugin.core.rows import Rows
from dskd_plugin.text.align import align
from dskd_plugin.text.prefix_maps import PrefixMaps, maps_by_ids
from dskd_plugin.text.tokens import TokenTable

KINDS = sorted(set(DIVERGENCES) - {"reverse_kl", "adaptive_kl"})
WHOLE = 10**9
STUDENT = [b"a", b"b", b"ab", b"abba", b"bb", b" a", b" ", None, b"c"]
TEACHER = [b"a", b"b", b"ba", b"abb", b"abbac", b"aa", b" ", b"bbac", None, None, b"bab"]
END, STOP = 7, 8
# Gold token, bytes by which it begins inside the teacher's token, that token, further ones that it reaches into.
ROWS = {
    "together": (0, 0, 0, []),
    "inside": (4, 1, 3, []),
    "inside, to the end of another": (1, 1, 2, []),
    "two teacher tokens": (3, 0, 3, [0]),
    "three teacher tokens": (3, 0, 0, [1, 2]),
    "inside, and beyond": (3, 1, 10, [2]),
    "a dummy space of its own": (5, -1, 0, []),
    "end of turn": (END, 0, STOP, []),
}
PLACED = list(ROWS.values())
DIVISORS = torch.tensor([10, 0, 0, 0, 8, 0, 0])


def table(texts):
    special = frozenset(k for k, text in enumerate(texts) if text is None)
    return TokenTable(
        bytes=list(texts),
        literal=[text or b"<>" for text in texts],
        special=special,
        added=special,
        kind="byte-level",
    )


def to_student():
    """Student id of each teacher id with the same bytes or the same role."""
    known = [STUDENT.index(text) if text is not None and text in STUDENT else -1 for text in TEACHER]
    known[STOP] = END
    return known


@pytest.fixture(scope="module")
def maps():
    return maps_by_ids(table(STUDENT), table(TEACHER), to_student(), len(STUDENT), torch.device("cpu"))


def make(make_case, **settings):
    """A case of 8 pairs among 10 rows, and the teacher's further states."""
    case = make_case(rows=10, pairs=len(PLACED), **settings).whole()
    case.gold[: len(PLACED)] = [gold for gold, *_ in PLACED]
    count = sum(len(further) for *_, further in PLACED)
    generator = torch.Generator().manual_seed(7)
    further = torch.randn(count, case.teacher.shape[1], generator=generator, dtype=torch.float64)
    return case, further.to(case.teacher.dtype)


def given(case, further, maps, **changes):
    rows = Rows(
        student_RD=case.student,
        labels_R=torch.tensor(case.gold),
        teacher_NE=case.teacher,
        places=maps.places(*zip(*PLACED, strict=True)).of_states(further),
    )
    return dataclasses.replace(rows, **changes)


def run(case, rows, maps, *, kind="js", tau=1.7, block_elements=WHOLE, divisors=DIVISORS, **options):
    compare = PrefixCompare(divergence(kind), tau, maps.together, maps.residual + 1)
    return case.compared(compare, kind, tau, rows=rows, divisors=divisors, block_elements=block_elements, **options)


def masses_of(oracle, floats, further, tau):
    """The oracle's target of each pair."""
    states, found = further.double().tolist(), []
    for n, (gold, offset, target, more) in enumerate(PLACED):
        along = [floats["teacher"][n], *(states.pop(0) for _ in more)]
        rows = [oracle.softmax(oracle.logits(h, floats["teacher_head"])[: len(TEACHER)], tau) for h in along]
        begun, lead = (TEACHER[target] or b"")[: max(0, offset)], (STUDENT[gold] or b"")[: max(0, -offset)]
        said = [target, *more]
        found.append(oracle.prefix_target(rows, TEACHER, STUDENT, {STOP: END}, begun=begun, lead=lead, said=said))
    return found


@pytest.mark.parametrize("tau", [1.0, 1.7])
@pytest.mark.parametrize("rows", [1, 2, 100])
def test_targets_equal_a_walk_through_all_teacher_tokens(oracle, make_case, maps, rows, tau):
    case, further = make(make_case, seed=1)
    compare = PrefixCompare(divergence("js"), tau, maps.together, maps.residual + 1)
    head = case.teacher_head().detach().real()

    def logits_of(states):
        return torch.nn.functional.linear(states, head.weight_VD, head.bias_V)

    target = compare.target(case.teacher.detach(), given(case, further, maps).places, logits_of, rows=rows).exp()
    torch.testing.assert_close(target.sum(-1), torch.ones(len(PLACED), dtype=torch.float64), rtol=0, atol=1e-12)
    for name, found, wanted in zip(ROWS, target.tolist(), masses_of(oracle, case.floats(), further, tau), strict=True):
        assert found == pytest.approx(wanted, abs=1e-12), name


@st.composite
def cut_texts(draw):
    """A text, where two tokenizers cut it, and further tokens of both."""
    text = draw(st.text("ab \n", min_size=1, max_size=9)).encode()
    sides = []
    for _ in range(2):
        cuts = sorted(draw(st.sets(st.integers(1, max(1, len(text) - 1)), max_size=len(text))))
        bounds = [0, *[cut for cut in cuts if cut < len(text)], len(text)]
        more = draw(st.lists(st.text("ab \n", min_size=1, max_size=4), max_size=6))
        sides.append(([text[start:stop] for start, stop in itertools.pairwise(bounds)], [one.encode() for one in more]))
    return sides


@settings(max_examples=300, deadline=None)
@such_that(sides=cut_texts(), seed=st.integers(0, 10**6), tau=st.sampled_from([1.0, 2.5]))
def test_rows_of_any_two_cuts_of_a_text_equal_a_walk_over_its_bytes(oracle, sides, seed, tau):
    """From the tokens of both sides to the target: placed, mapped, weighed; nothing is left out and no mass lost."""
    vocabularies = [[*dict.fromkeys(pieces + more), None] for pieces, more in sides]
    ours, theirs = ([v.index(piece) for piece in pieces] for v, (pieces, _) in zip(vocabularies, sides, strict=True))
    student, teacher = vocabularies
    ends = len(student) - 1, len(teacher) - 1
    tables = table(student), table(teacher)
    ids, other = [*ours, ends[0]], [*theirs, ends[1]]
    options = {"student_end": ends[0], "teacher_end": ends[1], "pairing": "bytes"}
    found = align(ids, [True] * len(ids), other, [True] * len(other), *tables, **options)
    assert found.student_N == list(range(len(ids)))
    known = [student.index(text) if text is not None and text in student else -1 for text in teacher]
    known[-1] = ends[0]
    maps = maps_by_ids(*tables, known, len(student), torch.device("cpu"))
    logits = 2 * torch.randn(len(other), len(teacher), generator=torch.Generator().manual_seed(seed)).double()
    further = [list(range(j + 1, j + 1 + more)) for j, more in zip(found.teacher_N, found.more_N, strict=True)]
    placed = [
        (ids[i], offset, other[j], [other[k] for k in more])
        for i, j, offset, more in zip(found.student_N, found.teacher_N, found.offsets_N, further, strict=True)
    ]
    states = logits[[k for more in further for k in more]]
    places = maps.places(*zip(*placed, strict=True)).of_states(states)
    compare = PrefixCompare(divergence("js"), tau, maps.together, maps.residual + 1)
    target = compare.target(logits[found.teacher_N], places, lambda rows: rows, rows=3).exp()
    torch.testing.assert_close(target.sum(-1), torch.ones(len(ids), dtype=torch.float64), rtol=0, atol=1e-12)
    starts = [[sum(map(len, pieces[:k])) for k in range(len(pieces) + 1)] for pieces, _ in sides]
    for row, start in enumerate(starts[0]):
        # The teacher token that holds this byte, and those up to the end of the student's.
        first = max(k for k, place in enumerate(starts[1]) if place <= start)
        stop = start + len(student[ids[row]] or b"")
        along = [first, *(k for k in range(first + 1, len(other) - 1) if starts[1][k] < stop)]
        expected = oracle.prefix_target(
            [oracle.softmax(logits[k].tolist(), tau) for k in along],
            teacher,
            student,
            {ends[1]: ends[0]},
            begun=(teacher[other[first]] or b"")[: start - starts[1][first]],
            said=[other[k] for k in along],
        )
        assert target[row].tolist() == pytest.approx(expected, abs=1e-12), (row, sides)


def test_the_longer_token_of_a_text_gets_what_the_chain_rule_says(oracle, make_case, maps):
    """By hand: the student's "abba" over the teacher's "a", "b", "ba"."""
    case, further = make(make_case, seed=2)
    floats = case.floats()
    n = list(ROWS).index("three teacher tokens")
    at = sum(len(more) for *_, more in PLACED[:n])
    states = [floats["teacher"][n], *further[at : at + 2].tolist()]
    first, second, third = (
        oracle.softmax(oracle.logits(h, floats["teacher_head"])[: len(TEACHER)], 1.0) for h in states
    )
    a, b, ba, bab, abbac, bbac = (TEACHER.index(text) for text in (b"a", b"b", b"ba", b"bab", b"abbac", b"bbac"))
    expected = first[abbac] + first[a] * (second[bbac] + second[b] * (third[ba] + third[bab]))
    assert masses_of(oracle, floats, further, 1.0)[n][STUDENT.index(b"abba")] == pytest.approx(expected, rel=1e-12)
    head = case.teacher_head().detach().real()
    target = PrefixCompare(divergence("js"), 1.0, maps.together, maps.residual + 1).target(
        case.teacher.detach(),
        given(case, further, maps).places,
        lambda states: torch.nn.functional.linear(states, head.weight_VD, head.bias_V),
        rows=3,
    )
    assert target[n, STUDENT.index(b"abba")].exp().item() == pytest.approx(expected, rel=1e-12)


HEADS = [{}, {"scale": 1.3, "softcap": 4.0}, {"bias": False, "padding": 0}]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 2e-5)])
@pytest.mark.parametrize(("head", "tau"), [(0, 1.0), (1, 1.7), (2, 1.0)])
@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_equal_the_floats(oracle, make_case, maps, kind, head, tau, dtype, tolerance):
    case, further = make(make_case, seed=3, dtype=dtype, **HEADS[head])
    rows = given(case, further, maps)
    loss, sums = run(case, rows, maps, kind=kind, tau=tau, block_elements=40)
    floats, live = case.floats() | {"ce_rows": [True] * 10}, case.live()
    targets = masses_of(oracle, floats, further, tau)

    def of_kd(live):
        live_head = {**floats["head"], "weight": live["weight"], "bias": live["bias"]}
        z = [oracle.logits(live["student"][n], live_head)[: len(STUDENT)] for n in range(len(PLACED))]
        return sum(
            oracle.compare_masses(oracle.softmax(one, tau), masses, kind)
            for one, masses in zip(z, targets, strict=True)
        )

    def expected(live):
        return oracle.baseline_loss({**floats, "teacher": []}, live, None, 0.6 / 10, 0.0) + 0.4 / 8 * of_kd(live)

    assert loss.item() == pytest.approx(expected(live), rel=tolerance)
    assert [x.item() for x in sums["kd"]] == pytest.approx([of_kd(live), 8], rel=tolerance)
    for name in ("student", "weight", "bias"):
        if getattr(case, name) is None:
            continue
        (got,) = torch.autograd.grad(loss, getattr(case, name), retain_graph=True)
        wanted = torch.tensor(oracle.gradient(expected, live, name), dtype=torch.float64)
        torch.testing.assert_close(got.double(), wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_is_that_of_the_plain_formula(oracle, make_case, maps, kind):
    """In float64, to more digits than differences give: autograd of the formula written with whole tensors."""
    case, further = make(make_case, seed=4)
    loss, _ = run(case, given(case, further, maps), maps, kind=kind, tau=1.0)
    targets = torch.tensor(masses_of(oracle, case.floats(), further, 1.0), dtype=torch.float64)
    z = torch.nn.functional.linear(case.student, case.weight, case.bias)
    q = torch.softmax(z[: len(PLACED), : len(STUDENT)], -1)
    reached = targets[:, :-1] > 0
    pooled = torch.cat([torch.where(reached, q, 0), torch.where(reached, 0, q).sum(-1, keepdim=True)], -1)
    p, q = (side.clamp(min=1e-300) for side in (targets, pooled))

    def kl(a, b):
        return (a * (a / b).log()).sum()

    whole = {
        "forward_kl": lambda: kl(p, q),
        "js": lambda: 0.5 * kl(p, 0.5 * (p + q)) + 0.5 * kl(q, 0.5 * (p + q)),
        "skewed_forward_kl": lambda: kl(p, 0.1 * p + 0.9 * q),
        "skewed_reverse_kl": lambda: kl(q, 0.9 * p + 0.1 * q),
        "tvd": lambda: 0.5 * (p - q).abs().sum(),
    }[kind]()
    plain = 0.6 * torch.nn.functional.cross_entropy(z, torch.tensor(case.gold)) + 0.4 / 8 * whole
    assert loss.item() == pytest.approx(plain.item(), rel=1e-12)
    leaves = [case.student, case.weight, case.bias]
    for got, wanted in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(plain, leaves), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("block_elements", [1, 24, 40, 60])
def test_size_of_the_blocks_does_not_matter(make_case, maps, block_elements):
    case, further = make(make_case, seed=5)
    rows = given(case, further, maps, kd_N=torch.tensor([True] * 7 + [False]))
    whole, sums = run(case, rows, maps, divisors=None)
    parts, part_sums = run(case, rows, maps, divisors=None, block_elements=block_elements)
    assert parts.item() == pytest.approx(whole.item(), rel=1e-12)
    assert [x.item() for x in part_sums["kd"]] == pytest.approx([x.item() for x in sums["kd"]], rel=1e-12)
    leaves = list(case.leaves().values())[:3]
    for one, other in zip(torch.autograd.grad(whole, leaves), torch.autograd.grad(parts, leaves), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("kept", [[], [0], [1, 5], [*range(8)]])
def test_rows_that_are_not_compared_keep_their_cross_entropy(make_case, maps, kept):
    """Whatever their states hold; with unpaired_ce the whole of it."""
    case, further = make(make_case, seed=6)
    mask = torch.tensor([n in kept for n in range(len(PLACED))])
    _, sums = run(case, given(case, further, maps), maps, divisors=None)
    teacher = torch.where(mask[:, None], case.teacher.detach(), float("nan"))
    masked = given(case, further, maps, kd_N=mask, teacher_NE=teacher)
    loss, found = run(case, masked, maps, divisors=None, unpaired_ce=True)
    assert loss.isfinite() and found["kd"][1] == len(kept)
    z = torch.nn.functional.linear(case.student, case.weight, case.bias)
    ce = torch.nn.functional.cross_entropy(z, torch.tensor(case.gold), reduction="none")
    left = [n for n in range(10) if n not in kept]
    assert found["ce_unpaired"][0].item() == pytest.approx(ce[left].sum().item(), rel=1e-12)
    if len(kept) == len(PLACED):
        assert found["kd"][0].item() == sums["kd"][0].item()


def test_rows_that_begin_together_need_one_map(make_case, maps):
    student, teacher = torch.randn(4, 9).double().requires_grad_(), torch.randn(4, 11).double()
    compare = PrefixCompare(divergence("js"), 1.3, maps.together, maps.residual + 1)
    found = compare(student_NV=student, teacher_NV=teacher)
    places = maps.places([0] * 4, [0] * 4, [0] * 4, [()] * 4).of_states(teacher[:0])
    assert len(places.maps) == 1
    target = compare.target(teacher, places, lambda states: states, rows=4)
    assert torch.equal(found, compare.of_target(student_NV=student, target_NC=target))


def test_what_the_student_cannot_say_is_left_to_it():
    """A student whose every token the teacher can open has no residual: the teacher's is shared out as it shares."""
    texts, other = [b"a", b"b"], [b"a", b"b", None]
    maps = maps_by_ids(table(texts), table(other), [0, 1, -1], 2, torch.device("cpu"))
    teacher = torch.tensor([[1.0, 0.5, 2.0]]).double()
    own = (teacher[:, :2].log_softmax(-1)).clone().requires_grad_()
    for kind in KINDS:
        loss = PrefixCompare(divergence(kind), 1.0, maps.together, 3)(student_NV=own, teacher_NV=teacher)
        (gradient,) = torch.autograd.grad(loss.sum(), own)
        assert loss.abs().max() < 1e-12
        assert kind == "tvd" or gradient.abs().max() < 1e-12


def test_low_probabilities_stay_finite(maps):
    """Where a softmax in floats has nothing but zeros left."""
    compare = PrefixCompare(divergence("js"), 1.0, maps.together, maps.residual + 1)
    student, teacher = 300 * torch.randn(6, 9), 300 * torch.randn(6, 11)
    student.requires_grad_()
    loss = compare(student_NV=student, teacher_NV=teacher)
    loss.sum().backward()
    assert loss.isfinite().all() and student.grad.isfinite().all()


def test_nothing_of_rows_by_vocabulary_is_made(largest):
    """Also where all student tokens reach into further teacher tokens."""
    rows, ids, teacher_ids, block = 200, 300, 360, 10
    generator = torch.Generator().manual_seed(0)

    def sample(*shape):
        return torch.randn(*shape, generator=generator)

    ours = [b"%03d" % k for k in range(ids)]
    theirs = [b"%02d" % k for k in range(100)] + [b"%04d" % k for k in range(teacher_ids - 100)]
    maps = maps_by_ids(table(ours), table(theirs), [-1] * teacher_ids, ids, torch.device("cpu"))
    placed = [(k % ids, 0, k % ids // 10, [k % 100]) for k in range(rows)]
    given = Rows(
        student_RD=sample(rows, 8).requires_grad_(),
        labels_R=torch.tensor([gold for gold, *_ in placed]),
        teacher_NE=sample(rows, 12),
        places=maps.places(*zip(*placed, strict=True)).of_states(sample(rows, 12)),
    )
    objective = Objective(
        divergence=divergence("js"),
        temperature=1.0,
        kd_ratio=0.5,
        spaces="student",
        agreement_mask=False,
        compares="distributions",
    )
    with largest() as spy:
        loss, _ = baseline_loss(
            given,
            student_head=Head(sample(ids, 8).requires_grad_(), ids),
            teacher_head=Head(sample(teacher_ids, 12), teacher_ids),
            compare=PrefixCompare(divergence("js"), 1.0, maps.together, ids + 1),
            objective=objective,
            divisors_T=torch.full((len(TERMS),), rows),
            block_elements=block * teacher_ids,
        )
        loss.backward()
    assert spy.elements <= max(teacher_ids * 12, rows * 12, block * teacher_ids)


def test_maps_are_made_once_for_the_same_bytes(maps):
    fresh = PrefixMaps(table(STUDENT), table(TEACHER), opens=to_student(), classes={b"a": 0}, residual=9, device="cpu")
    assert fresh.inside(b"ab") is fresh.inside(b"ab") and fresh.after(b"a") is fresh.after(b"a")
    assert fresh.inside(b"") is fresh.after(b"") is fresh.together
    places = maps.places(*zip(*PLACED, strict=True))
    assert len(places.maps) == len({id(one) for one in places.maps}) < len(places.map_N) + len(places.map_Q)
