"""Methods that compare segments: each against plain loops over its formula, and the engine that they share."""

import dataclasses
import math
from dataclasses import dataclass

import pytest
import torch

from benchmarks.counting import VocabularyWork
from dskd_plugin.core.baselines import SharedIds, uld
from dskd_plugin.core.blockwise import baseline_loss, segment_loss
from dskd_plugin.core.common_support import CommonSupport, Completions
from dskd_plugin.core.divergences import DIVERGENCES, divergence
from dskd_plugin.core.events import events_of_pairs
from dskd_plugin.core.extended import ExtendedCompare
from dskd_plugin.core.heads import Head, head_logits
from dskd_plugin.core.hybrid import HybridCompare
from dskd_plugin.core.likelihood import LikelihoodCompare
from dskd_plugin.core.objective import Objective
from dskd_plugin.core.readings import segment_values
from dskd_plugin.core.rows import Rows, counts
from dskd_plugin.core.segments import SegmentCompare, Segments, Side, cut, followed_by, put_first
from dskd_plugin.core.terms import span_sums

WHOLE = 10**9
TAU = 1.7
# The tokens that stand at the response rows and at the teacher's rows: "ab" = "a" + "b", "b" + "c" = "bc".
GOLDS = [0, 4, 3, 1, 2, 2, 5, 8, 6, 7, 3, 0]
TEACHER_GOLDS = [3, 9, 3, 9, 2, 2, 8, 1, 7]

# (student rows, teacher rows, whether they are a pair); of 12 response rows and 9 teacher rows
PAIR, OTHER_PAIR = ([0], [0], True), ([4], [1], True)
ONE_TO_MANY, MANY_TO_ONE, MANY_TO_MANY = ([2], [2, 3], False), ([3, 5], [4], False), ([6, 7, 8], [5, 6], False)
APART = ([9], [7], False)  # one token each that cover the same bytes behind another space
CASES = {
    "pairs": [PAIR, OTHER_PAIR],
    "1:n": [ONE_TO_MANY],
    "n:1": [MANY_TO_ONE],
    "m:n": [MANY_TO_MANY],
    "all": [PAIR, OTHER_PAIR, ONE_TO_MANY, MANY_TO_ONE, MANY_TO_MANY, APART],
}
KINDS = sorted(DIVERGENCES)


@dataclass(frozen=True)
class Vocabularies:
    """Bytes by id, and the pairs (student id, teacher id) of the shared tokens."""

    student: list[bytes | None]
    teacher: list[bytes | None]

    @property
    def pairs(self):
        return [(i, self.teacher.index(text)) for i, text in enumerate(self.student) if text and text in self.teacher]

    @property
    def ids(self):
        return torch.tensor([i for i, _ in self.pairs]), torch.tensor([j for _, j in self.pairs])


SMALL = Vocabularies(
    [b"a", b"b", b"c", b"ab", b"d", b"e", b"abc", b"f", None],
    [b"d", b"c", b"bc", b"a", b"f", b"abd", b"cd", None, b"bd", b"b", b"e"],
)
LARGE = Vocabularies(
    [b"%d" % k if k < 300 else None for k in range(400)], [b"%d" % (299 - k) if k < 300 else None for k in range(420)]
)
IDS = SMALL.ids


def extended(kind, tau, words=SMALL):
    def plain(oracle, student, teacher, paired):
        return oracle.extended(student, teacher, paired, tau, kind, words.pairs)

    return ExtendedCompare(divergence(kind), tau, *words.ids), plain


def common_support(kind, tau, words=SMALL):
    def plain(oracle, student, teacher, paired):
        return oracle.common_support(student, teacher, paired, tau, kind, words.pairs, (words.student, words.teacher))

    events = events_of_pairs(words.pairs, len(words.student), len(words.teacher))
    return CommonSupport(divergence(kind), tau, events, Completions(words.student, words.teacher)), plain


def likelihood(kind, tau, words=SMALL):
    return LikelihoodCompare(3.0), lambda oracle, student, teacher, paired: oracle.likelihood(student, teacher, 3.0)


def hybrid(kind, tau, words=SMALL):
    def plain(oracle, student, teacher, paired):
        return oracle.hybrid(student, teacher, tau, 0.3, (0.7, 1.3), words.pairs)

    sizes = {"student_ids": len(words.student), "teacher_ids": len(words.teacher)}
    return HybridCompare(0.3, tau, (0.7, 1.3), *words.ids, **sizes), plain


# name -> (kind of divergence, temperature, vocabularies) -> (the comparison, the same in plain loops)
METHODS = {"span_kd": extended, "csd": common_support, "alm": likelihood, "gold": hybrid}


def rows_of(case, segments, compare, *, ce=True, rows=None):
    """Rows as the loss makes them, by loops: the open tokens first, in the order of the segments.

    rows: response rows that are there; all of the case by default.
    """
    at = -1 if compare.opens == "last" else 0
    opens = [own[at] for own, _, _ in segments]
    rows = list(range(len(case.gold))) if rows is None else rows
    order = opens + [r for r in rows if r not in opens]
    others = [(order.index(r), g) for g, (own, _, _) in enumerate(segments) for r in own if r != opens[g]]
    golds = torch.tensor(TEACHER_GOLDS)
    read = [(t, g) for g, (_, theirs, _) in enumerate(segments) for t in theirs]
    if compare.whole_teacher:
        read = [(t, g) for t, g in read if t != segments[g][1][at]]
    states = [t for t, _ in read]
    values, _ = segment_values(case.teacher[states], case.teacher_head(), golds[states], compare, block_elements=WHOLE)
    teacher_others = [0.0] * len(segments)
    for (_, g), value in zip(read, values.tolist(), strict=True):
        teacher_others[g] += value
    taken = torch.zeros(len(order), dtype=torch.bool)
    taken[[p for p, _ in others]] = True
    teacher_opens = [theirs[at] for _, theirs, _ in segments]

    def ids(values):
        return torch.tensor(values, dtype=torch.long)

    return Rows(
        student_RD=case.student[order],
        labels_R=ids(case.gold)[order],
        ce_R=torch.full((len(order),), ce),
        teacher_NE=case.teacher[teacher_opens],
        taken_R=taken,
        segments=Segments(
            order_R=ids(order),
            paired_G=torch.tensor([paired for _, _, paired in segments], dtype=torch.bool),
            others_P=ids([p for p, _ in others]),
            of_P=ids([g for _, g in others]),
            sizes_G=ids([len(own) for own, _, _ in segments]),
            teacher_ids_G=golds[teacher_opens],
            teacher_others_G=torch.tensor(teacher_others, dtype=torch.float64),
            teacher_sizes_G=ids([len(theirs) for _, theirs, _ in segments]),
        ),
    )


def objective_of(kind="forward_kl", tau=TAU, **changes):
    chosen = {"kd_ratio": 0.4, "spaces": "student", "agreement_mask": False, "compares": "distributions"} | changes
    return Objective(divergence=divergence(kind), temperature=tau, **chosen)


def run(case, segments, compare, *, rows=None, divisors=None, block_elements=40, **changes):
    rows = rows_of(case, segments, compare) if rows is None else rows
    objective = objective_of(**changes)
    return segment_loss(
        rows,
        student_head=case.student_head(),
        teacher_head=case.teacher_head(),
        compare=compare,
        objective=objective,
        divisors_T=counts(rows, objective) if divisors is None else divisors,
        block_elements=block_elements,
    )


@pytest.fixture
def make(make_case):
    def build(**settings):
        case = make_case(rows=12, pairs=9, **settings)
        with torch.no_grad():
            case.teacher.nan_to_num_(0.4)
        case.gold = GOLDS
        return case

    return build


LEAVES = ("student", "weight", "bias")
DIVISORS = torch.tensor([9, 0, 0, 0, 7, 0, 0])
HEADS = [{}, {"scale": 1.3, "softcap": 4.0}, {"bias": False, "padding": 0}]


def gradients(case, loss):
    leaves = [getattr(case, name) for name in LEAVES if getattr(case, name) is not None]
    found = torch.autograd.grad(loss, leaves, retain_graph=True, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, found, strict=True)]


@pytest.mark.parametrize("segments", CASES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", METHODS)
def test_loss_and_gradients_equal_the_floats(oracle, make, name, kind, segments):
    number = KINDS.index(kind)
    case, tau = make(seed=number, **HEADS[number % len(HEADS)]), (1.0, TAU)[number % 2]
    compare, plain = METHODS[name](kind, tau)
    loss, sums = run(case, CASES[segments], compare, divisors=DIVISORS, kind=kind, tau=tau)
    floats, live = case.floats(), case.live()

    def kd(live):
        return oracle.segments_loss(floats, live, CASES[segments], TEACHER_GOLDS, lambda *of: plain(oracle, *of))

    def expected(live):
        return 0.4 / 7 * kd(live) + oracle.weighted_cross_entropy(floats, live, [0.6 / 9] * 12)

    assert [x.item() for x in sums["kd"]] == pytest.approx([kd(live), len(CASES[segments])], rel=1e-9)
    assert loss.item() == pytest.approx(expected(live), rel=1e-9)
    if kind == "adaptive_kl":  # its weights are constants of the derivative: only its value is compared
        return
    found = gradients(case, loss)
    for leaf, got in zip([name for name in LEAVES if live[name] is not None], found, strict=True):
        wanted = torch.tensor(oracle.gradient(expected, live, leaf), dtype=torch.float64)
        torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", METHODS)
def test_every_token_of_the_students_segments_is_moved_and_no_other(make, name):
    case = make(seed=1)
    compare, _ = METHODS[name]("reverse_kl", TAU)
    loss, _ = run(case, CASES["all"], compare, kd_ratio=1.0)
    (by_row,) = torch.autograd.grad(loss, case.student)
    moved = {row for row in range(12) if by_row[row].abs().max() > 1e-9}
    assert moved == {row for own, _, _ in CASES["all"] for row in own}


@pytest.mark.parametrize("block_elements", [1, 40, 90])
@pytest.mark.parametrize("name", METHODS)
def test_blocks_equal_the_whole(make, name, block_elements):
    case = make(seed=2, scale=1.3, softcap=4.0)
    compare, _ = METHODS[name]("js", TAU)
    whole, sums = run(case, CASES["all"], compare, block_elements=WHOLE)
    loss, found = run(case, CASES["all"], compare, block_elements=block_elements)
    torch.testing.assert_close(loss, whole, rtol=1e-12, atol=0)
    assert all(found[term][1] == sums[term][1] for term in sums)
    for got, expected in zip(gradients(case, loss), gradients(case, whole), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("name", METHODS)
def test_the_gradient_is_that_of_plain_autograd(make, name):
    """Without blocks and without a rule of its own: the comparison on logits of one graph."""
    case = make(seed=3)
    compare, _ = METHODS[name]("js", TAU)
    loss, _ = run(case, CASES["all"], compare, divisors=torch.tensor([0, 0, 0, 0, 1, 0, 0]))
    rows = rows_of(case, CASES["all"], compare)
    segments, opens = rows.segments, rows.pairs
    head, teacher_head = case.student_head(), case.teacher_head()
    logits = head.scale * (rows.student_RD @ head.weight_VD.T + head.bias_V)[:, : head.vocab_size]
    teacher = (rows.teacher_NE @ teacher_head.weight_VD.T + teacher_head.bias_V)[:, : teacher_head.vocab_size]
    values = logits / TAU if compare.reads == "logits" else torch.log_softmax(logits / compare.temperature, -1)
    chosen = values.gather(1, rows.labels_R[:, None])[segments.others_P, 0]
    others = torch.zeros(opens, dtype=torch.float64).index_add(0, segments.of_P, chosen)
    bound = segments.bound(compare, slice(0, opens), rows.labels_R[:opens], others)
    plain = 0.4 * bound(student_NV=logits[:opens], teacher_NV=teacher).sum()
    torch.testing.assert_close(loss, plain, rtol=1e-12, atol=0)
    for got, expected in zip(gradients(case, loss), gradients(case, plain), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("name", METHODS)
def test_many_micro_batches_equal_one(make, name):
    case = make(seed=4)
    compare, _ = METHODS[name]("forward_kl", TAU)
    loss, _ = run(case, CASES["all"], compare)
    divisors, total = torch.tensor([12, 0, 0, 0, 6, 0, 0]), 0.0
    for segments, rows in (
        ([OTHER_PAIR, MANY_TO_MANY], [4, 6, 7, 8, 10]),
        ([PAIR, ONE_TO_MANY, MANY_TO_ONE, APART], [0, 1, 2, 3, 5, 9, 11]),
        ([], []),
    ):
        batch = rows_of(case, segments, compare, rows=rows)
        total = total + run(case, segments, compare, rows=batch, divisors=divisors)[0]
    torch.testing.assert_close(total, loss, rtol=1e-12, atol=0)
    for got, expected in zip(gradients(case, total), gradients(case, loss), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("kd_ratio", [0.4, 1.0])
@pytest.mark.parametrize("name", METHODS)
def test_segments_need_no_gold_rows(make, name, kd_ratio):
    """On sampled answers ce takes no row."""
    case = make(seed=5)
    compare, _ = METHODS[name]("forward_kl", TAU)
    silent = rows_of(case, CASES["all"], compare, ce=False)
    loss, sums = run(case, CASES["all"], compare, rows=silent, kd_ratio=kd_ratio)
    assert sums["ce"][1] == 0
    plain, _ = run(case, CASES["all"], compare, divisors=torch.tensor([0, 0, 0, 0, 6, 0, 0]))
    torch.testing.assert_close(loss, kd_ratio / 0.4 * plain, rtol=1e-12, atol=0)
    for got, expected in zip(gradients(case, loss), gradients(case, plain), strict=True):
        torch.testing.assert_close(got, kd_ratio / 0.4 * expected, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("rows", [[], [10, 11]])
@pytest.mark.parametrize("name", METHODS)
def test_without_a_segment_the_loss_is_the_cross_entropy(make, name, rows):
    case = make(seed=6)
    compare, _ = METHODS[name]("forward_kl", TAU)
    batch = rows_of(case, [], compare, rows=rows)
    loss, sums = run(case, [], compare, rows=batch)
    assert sums["kd"] == (0, 0) and sums["ce"][1] == len(rows)
    expected, _ = baseline_loss(
        dataclasses.replace(batch, segments=None),
        student_head=case.student_head(),
        teacher_head=case.teacher_head(),
        compare=None,
        objective=objective_of(),
        divisors_T=counts(batch, objective_of()),
        block_elements=WHOLE,
    )
    assert loss.requires_grad
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", METHODS)
def test_rows_of_a_span_are_no_rows_without_a_partner(oracle, make, name):
    case = make(seed=7)
    compare, _ = METHODS[name]("forward_kl", TAU)
    loss, sums = run(case, CASES["all"], compare, unpaired_ce=True)
    share, _ = run(case, CASES["all"], compare)
    floats, live = case.floats(), case.live()
    of_rows = oracle.weighted_cross_entropy(floats, live, [float(r in (1, 10, 11)) for r in range(12)])
    assert [x.item() for x in sums["ce_unpaired"]] == pytest.approx([of_rows, 12], rel=1e-12)
    assert (loss - share).item() == pytest.approx(0.4 * of_rows / 12, rel=1e-9)


@pytest.mark.parametrize("name", METHODS)
def test_evaluation_and_a_scale_change_what_they_should_alone(make, name):
    case = make(seed=8)
    compare, _ = METHODS[name]("forward_kl", TAU)
    loss, sums = run(case, CASES["all"], compare)
    with torch.no_grad():
        plain, found = run(case, CASES["all"], compare)
    assert plain.item() == loss.item()
    assert all(found[term][0].item() == sums[term][0].item() for term in sums)
    scaled, _ = run(case, CASES["all"], compare, kd_scale=3.0)
    kd, number = sums["kd"]
    assert (scaled - loss).item() == pytest.approx((0.4 * 2 * kd / number).item(), rel=1e-9)


ROWS, PAIRED, SPANS, BLOCK = 600, 200, 66, 10
SPAN_TOKENS = 3 * SPANS


class Large:
    """Many rows: a third are pairs, a third in spans of three tokens on each side."""

    def __init__(self, name, dtype):
        draw = torch.Generator().manual_seed(1)

        def rounded(*shape, by=1.0):
            return (by * torch.randn(*shape, generator=draw, dtype=torch.float64)).to(dtype)

        self.student, self.weight = rounded(ROWS, 32).requires_grad_(), rounded(400, 32, by=0.2).requires_grad_()
        self.states, self.teacher_weight = rounded(ROWS, 48), rounded(420, 48, by=0.2)
        self.labels = torch.randint(400, (ROWS,), generator=draw)
        self.teacher_ids = torch.randint(400, (PAIRED + SPAN_TOKENS,), generator=draw)
        self.compare, _ = METHODS[name]("forward_kl", 1.0, LARGE)

    def loss(self):
        compare, number = self.compare, PAIRED + SPANS
        of_P = torch.cat([torch.arange(PAIRED), PAIRED + torch.arange(SPAN_TOKENS) // 3])
        tokens = torch.arange(len(of_P))
        own, teacher_head = cut(tokens, of_P, number, compare.opens), Head(self.teacher_weight, 420)
        order, place = put_first(own.open_G, ROWS)
        read = own.others_P if compare.whole_teacher else tokens
        values, _ = segment_values(
            self.states[read], teacher_head, self.teacher_ids[read], compare, block_elements=BLOCK * 420
        )
        batch = Rows(
            student_RD=self.student,
            labels_R=self.labels,
            teacher_NE=self.states[own.open_G],
            segments=Segments(
                order_R=order,
                paired_G=torch.arange(number) < PAIRED,
                others_P=place[own.others_P],
                of_P=own.of_P,
                sizes_G=own.sizes_G,
                teacher_ids_G=self.teacher_ids[own.open_G],
                teacher_others_G=span_sums(values, of_P[read], number),
                teacher_sizes_G=own.sizes_G,
            ),
        )
        loss, _ = segment_loss(
            batch,
            student_head=Head(self.weight, 400),
            teacher_head=teacher_head,
            compare=compare,
            objective=objective_of(),
            divisors_T=counts(batch, objective_of()),
            block_elements=BLOCK * 420,
        )
        return loss

    def with_gradients(self):
        loss = self.loss()
        return loss.detach(), torch.autograd.grad(loss, [self.student, self.weight])


@pytest.mark.parametrize("name", METHODS)
def test_nothing_of_rows_by_vocabulary_is_made(largest, name):
    case = Large(name, torch.float32)
    with largest() as spy:
        case.with_gradients()
    assert spy.elements <= max(ROWS * 48, 420 * 48, 2 * BLOCK * 420)


@pytest.mark.parametrize("name", METHODS)
def test_heads_are_read_as_often_as_the_docs_say(name):
    case = Large(name, torch.float32)
    with VocabularyWork({"student": case.weight, "teacher": case.teacher_weight}) as work:
        case.loss().backward()
    student, teacher = work.products["student"], work.products["teacher"]
    if case.compare.reads == "logits":  # one row of the head for each token that is not open
        expected = ROWS, PAIRED + SPANS
    else:  # the student's other tokens are read before the loss as well; each of the teacher's once
        expected = ROWS + SPAN_TOKENS - SPANS, PAIRED + SPAN_TOKENS
    assert (student.logits, teacher.logits) == expected
    assert (student.back, student.weight, teacher.back, teacher.weight) == (ROWS, ROWS, 0, 0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", METHODS)
def test_low_precision_stays_near_fp64(name, dtype):
    loss, found = Large(name, dtype).with_gradients()
    truth_loss, truth = Large(name, torch.float64).with_gradients()
    # Inputs are rounded to the dtype, and so are the products of the head.
    tolerance = max(16 * torch.finfo(dtype).eps, 1e-5)
    assert abs(loss - truth_loss) <= tolerance * truth_loss
    for got, exact in zip(found, truth, strict=True):
        assert got.dtype == dtype
        assert (got.double() - exact).norm() <= 4 * tolerance * exact.norm()


# --- the parts --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("opens", ["first", "last"])
def test_segments_are_cut(opens):
    found = cut(torch.tensor([5, 9, 2, 7, 0, 1]), torch.tensor([0, 1, 1, 2, 2, 2]), 3, opens)
    assert found.sizes_G.tolist() == [1, 2, 3]
    expected = ([5, 9, 7], [2, 0, 1], [1, 2, 2]) if opens == "first" else ([5, 2, 1], [9, 7, 0], [1, 2, 2])
    assert (found.open_G.tolist(), found.others_P.tolist(), found.of_P.tolist()) == expected
    none = torch.zeros(0, dtype=torch.long)
    assert [len(x) for x in vars(cut(none, none, 0, opens)).values()] == [0, 0, 0, 0]


def test_some_rows_are_put_first():
    order, place = put_first(torch.tensor([4, 1]), 6)
    assert order.tolist() == [4, 1, 0, 2, 3, 5]
    assert [order.tolist().index(row) for row in range(6)] == place.tolist()
    assert [x.tolist() for x in put_first(torch.tensor([], dtype=torch.long), 3)] == [[0, 1, 2]] * 2


def test_what_stands_right_after_a_segment():
    positions = torch.tensor([3, 9, 4, 5, 6])  # two pairs, then a span of the three tokens from 4
    assert followed_by(positions, torch.tensor([0, 1, 2, 2, 2]), 3).tolist() == [2, -1, -1]
    assert followed_by(positions[[0, 2]], torch.tensor([0, 1]), 2).tolist() == [1, -1]
    none = torch.zeros(0, dtype=torch.long)
    assert followed_by(none, none, 0).shape == (0,)


@pytest.mark.parametrize("name", METHODS)
def test_segments_that_are_left_out_count_nothing(make, name):
    case = make(seed=11)
    compare, _ = METHODS[name]("forward_kl", TAU)
    kept = torch.tensor([True, False, True, False, False, True])
    rows = dataclasses.replace(rows_of(case, CASES["all"], compare), kd_N=kept)
    some = [segment for segment, there in zip(CASES["all"], kept.tolist(), strict=True) if there]
    loss, sums = run(case, CASES["all"], compare, rows=rows)
    expected, _ = run(case, some, compare)
    assert sums["kd"][1] == 3
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    for got, wanted in zip(gradients(case, loss), gradients(case, expected), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("block_elements", [1, 30, WHOLE])
@pytest.mark.parametrize("reads", ["log_probs", "logits"])
def test_values_of_tokens_equal_the_floats(oracle, make, reads, block_elements):
    case = make(seed=9, scale=1.3, softcap=3.0, padding=4)
    compare = SegmentCompare()
    compare.reads, compare.temperature = reads, TAU
    golds = torch.tensor(case.gold)
    head, of_V = case.student_head(), torch.arange(case.ids) % 2 == 0
    found, none = segment_values(case.student, head, golds, compare, block_elements=block_elements)
    floats, expected, masses = case.floats(), [], []
    for hidden, gold in zip(floats["student"], case.gold, strict=True):
        z = oracle.logits(hidden, floats["head"])[: case.ids]
        masses.append(math.fsum(oracle.softmax(z)[::2]))
        expected.append(z[gold] / TAU if reads == "logits" else math.log(oracle.softmax(z, TAU)[gold]))
    assert found.tolist() == pytest.approx(expected, rel=1e-12) and not found.requires_grad and not len(none)
    if reads == "log_probs":
        again, mass = segment_values(case.student, head, golds, compare, block_elements=block_elements, of_V=of_V)
        assert again.equal(found) and mass.tolist() == pytest.approx(masses, rel=1e-12)
    none = torch.zeros(0, dtype=torch.long)
    assert segment_values(case.student[:0], head, none, compare, block_elements=9)[0].shape == (0,)


# --- span_kd ------------------------------------------------------------------------------------------------


def test_a_pair_is_a_pair_of_shared_ids(make):
    """Where all segments are pairs the entry of the span is left out, and the rest is the shared vocabulary."""
    case = make(seed=10)
    compare, _ = extended("js", TAU)
    loss, _ = run(case, CASES["pairs"], compare)
    plain, _ = baseline_loss(
        dataclasses.replace(rows_of(case, CASES["pairs"], compare), segments=None),
        student_head=case.student_head(),
        teacher_head=case.teacher_head(),
        compare=SharedIds(divergence("js"), TAU, *IDS),
        objective=objective_of(),
        divisors_T=torch.tensor([12, 0, 0, 0, 2, 0, 0]),
        block_elements=WHOLE,
    )
    torch.testing.assert_close(loss, plain, rtol=1e-12, atol=0)


@pytest.mark.parametrize("ids", [(IDS[0][:0], IDS[1][:0]), (IDS[0], IDS[1][:2])])
def test_no_shared_ids_are_refused(ids):
    with pytest.raises(ValueError, match="shared ids: expected as many"):
        ExtendedCompare(divergence("js"), 1.0, *ids)


# --- gold ---------------------------------------------------------------------------------------------------


def hybrid_of(case, weights, ids=IDS, beta=0.5):
    return HybridCompare(beta, TAU, weights, *ids, student_ids=case.ids, teacher_ids=case.teacher_ids)


def test_both_weights_and_the_share_move_the_loss(make):
    case = make(seed=12)
    first, second, both = (
        run(case, CASES["all"], hybrid_of(case, weights))[1]["kd"][0].item() for weights in ((1, 0), (0, 1), (2, 3))
    )
    assert 2 * first + 3 * second == pytest.approx(both, rel=1e-12) and first > 0 < second
    other = run(case, CASES["all"], hybrid_of(case, (1, 0), beta=0.1))[1]["kd"][0].item()
    assert other != pytest.approx(first, rel=0.01)


def test_without_a_matched_id_all_are_compared_by_rank(make):
    case = make(seed=13)
    none = IDS[0][:0], IDS[1][:0]
    _, sums = run(case, CASES["pairs"], hybrid_of(case, (1, 1), ids=none))
    rows = rows_of(case, CASES["pairs"], hybrid_of(case, (1, 1)))
    teacher = head_logits(rows.teacher_NE, case.teacher_head().real())
    expected = uld(TAU)(
        student_NV=head_logits(rows.student_RD[:2], case.student_head())[:, : case.ids], teacher_NV=teacher
    )
    torch.testing.assert_close(sums["kd"][0], expected.sum().detach(), rtol=1e-12, atol=0)
    with pytest.raises(ValueError, match="matched ids: expected as many"):
        hybrid_of(case, (1, 1), ids=(IDS[0], IDS[1][:2]))


def test_equal_sides_are_left_alone():
    """Nothing is renormalised, and still neither part moves a student that agrees."""
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 9, generator=draw, dtype=torch.float64)
    shared, others = torch.tensor([0, 1, 2, 5, 7]), torch.tensor([0.0, -1.0, -0.3, 0.0]).double()
    sizes, ids = torch.tensor([1, 2, 3, 1]), torch.zeros(4, dtype=torch.long)
    own = Side(logits_BV=logits.clone().requires_grad_(), ids_B=ids, others_B=others.requires_grad_(), sizes_B=sizes)
    theirs = Side(logits_BV=logits, ids_B=ids, others_B=others.detach(), sizes_B=sizes)
    compare = HybridCompare(0.3, 1.0, (1.0, 1.0), shared, shared, student_ids=9, teacher_ids=9)
    found = compare(student=own, teacher=theirs, paired_B=sizes == 1)
    assert found.abs().max() < 1e-15
    found.sum().backward()
    assert own.logits_BV.grad.abs().max() < 1e-15 and others.grad.abs().max() < 1e-15
