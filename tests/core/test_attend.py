"""Cross-model attention and the loss on its rows."""

import dataclasses
import math

import pytest
import torch

from dskd_plugin.core.attend import cross_model_attention, partnered
from dskd_plugin.core.blockwise import cma_loss
from dskd_plugin.core.divergences import divergence
from dskd_plugin.core.heads import Head
from dskd_plugin.core.objective import RATES, TERMS, Objective
from dskd_plugin.core.readings import agreement_of
from dskd_plugin.core.rows import Rows, counts

SETTINGS = {"temperature": 2.0, "kd_ratio": 0.5, "spaces": "both", "agreement_mask": True, "compares": "spaces"}

WHOLE = 10**9
DSKD_TERMS = TERMS[:4]
# samples interleaved on both sides; student row 3 and teacher row 4 have no row on the other side, 6 and 5 no sample
SAMPLE = [2, 0, 0, 1, 2, 0, -1]
TEACHER_SAMPLE = [0, 2, 0, 2, 3, -1]
ALONE, TEACHER_ALONE = [3, 6], [4, 5]
INPUTS = ("student", "weight", "bias", "query", "t2s", "s2t")
REACHED = {
    "ce": {"student", "weight", "bias"},
    "t2s_kd": {"student", "weight", "bias"},
    "t2s_ce": {"query", "t2s"},
    "s2t_kd": {"student", "query", "s2t"},
}


@dataclasses.dataclass
class Case:
    """One batch of 9 response rows, of which 7 attend, and 6 teacher rows. Maps in the orientation h W."""

    student: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor
    query: torch.Tensor
    t2s: torch.Tensor
    s2t: torch.Tensor
    student_pairs: torch.Tensor
    teacher_pairs: torch.Tensor
    teacher: torch.Tensor
    argmax_embeddings: torch.Tensor
    teacher_weight: torch.Tensor
    gold: list[int]
    sample: list[int]
    teacher_sample: list[int]
    settings: dict
    softcap: float = 3.0

    def leaves(self):
        return {name: getattr(self, name) for name in INPUTS}

    def module(self):
        """The product's module with this case's leaves as its weights."""
        module = cross_model_attention(self.t2s.shape[1], self.t2s.shape[0], dtype=self.t2s.dtype)
        for name in ("query", "t2s", "s2t"):
            # not a parameter, so that the gradient lands in the leaf of the case
            linear = getattr(module, name)
            del linear.weight
            linear.weight = getattr(self, name).T
        return module

    def student_head(self):
        return Head(self.weight, 9, self.bias, 1.3, self.softcap)

    def teacher_head(self):
        return Head(self.teacher_weight, 11)

    def objective(self, **changes):
        settings = self.settings | changes
        return Objective(**settings | {"compares": "spaces", "divergence": divergence(settings["divergence"])})

    def samples(self):
        return torch.tensor(self.sample, dtype=torch.long), torch.tensor(self.teacher_sample, dtype=torch.long)

    def attention(self, module=None):
        return (module or self.module()).attention(self.student_pairs, self.teacher_pairs, *self.samples())

    def projected(self, detach=False):
        module = self.module()
        shared = self.attention(module)
        states = self.student[: len(self.sample)]
        return (
            module.t2s_rows(shared, self.teacher, self.argmax_embeddings),
            module.s2t_rows(shared, states.detach() if detach else states),
        )

    def rows(self, t2s):
        sample, teacher_sample = self.samples()
        gold = torch.tensor(self.gold, dtype=torch.long)
        label = torch.where(partnered(sample, teacher_sample), gold[: len(sample)], -1)
        return Rows(
            student_RD=self.student,
            labels_R=gold,
            label_N=label,
            agree_N=agreement_of(t2s, self.student_head(), label, block_elements=30),
            s2t_M=partnered(teacher_sample, sample),
        )

    def run(self, *, block_elements=WHOLE, divisors=None, **changes):
        objective = self.objective(**changes)
        t2s, s2t = self.projected(detach=objective.projectors_alone)
        rows = self.rows(t2s)
        return cma_loss(
            rows,
            t2s_Nd=t2s,
            s2t_MD=s2t,
            teacher_MD=self.teacher,
            student_head=self.student_head(),
            teacher_head=self.teacher_head(),
            objective=objective,
            divisors_T=counts(rows, objective) if divisors is None else divisors,
            block_elements=block_elements,
        )

    def gradients(self, loss):
        found = torch.autograd.grad(loss, list(self.leaves().values()), allow_unused=True)
        return {name: g for name, g in zip(INPUTS, found, strict=True)}

    def floats(self):
        plain = {
            name: x.detach().double().tolist() if isinstance(x, torch.Tensor) else x for name, x in vars(self).items()
        }
        head = {"weight": plain["weight"], "bias": plain["bias"], "scale": 1.3, "softcap": self.softcap}
        teacher_head = {"weight": plain["teacher_weight"], "bias": None, "scale": 1.0, "softcap": None}
        more = {
            "head": head,
            "teacher_head": teacher_head,
            "ids": 9,
            "teacher_ids": 11,
            "distance": self.settings["divergence"],
            "temperature": self.settings["temperature"],
            "agreement_mask": self.settings["agreement_mask"],
        }
        return plain | more

    def live(self):
        return {name: getattr(self, name).detach().double().tolist() for name in INPUTS}


@pytest.fixture
def make(oracle):
    """Build a Case; gold ids are set so that about half of the attending rows agree."""

    def build(seed=0, dtype=torch.float64, rows=9, sample=SAMPLE, teacher_sample=TEACHER_SAMPLE, **changes):
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape, by=1.0):
            return (by * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(dtype)

        d, D, N, M = 4, 5, len(sample), len(teacher_sample)
        case = Case(
            student=draw(rows, d),
            weight=draw(11, d),
            bias=draw(11),
            query=draw(2 * d, 2 * D),
            t2s=draw(D, d),
            s2t=draw(d, D, by=0.5),
            student_pairs=draw(N, 2 * d),
            teacher_pairs=draw(M, 2 * D, by=3.0),
            teacher=draw(M, D, by=2.0),
            argmax_embeddings=draw(M, D, by=0.1),
            teacher_weight=draw(12, D),
            gold=torch.randint(9, (rows,), generator=generator).tolist(),
            sample=list(sample),
            teacher_sample=list(teacher_sample),
            settings={
                "divergence": "forward_kl",
                "temperature": 2.0,
                "kd_ratio": 0.4,
                "spaces": "both",
                "agreement_mask": True,
            }
            | changes,
        )
        floats = case.floats()
        in_student, _ = oracle.attended(floats, floats["query"], floats["t2s"], floats["s2t"], floats["student"])
        for n in range(0, N, 2):
            case.gold[n] = oracle.argmax(oracle.logits(in_student[n], floats["head"])[:9])
        for name in INPUTS:
            setattr(case, name, getattr(case, name).detach().requires_grad_())
        return case

    return build


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_the_rows_equal_the_floats(oracle, make, dtype, tolerance):
    case = make(seed=1, dtype=dtype)
    floats = case.floats()
    expected = oracle.attended(floats, *(floats[name] for name in ("query", "t2s", "s2t", "student")))
    for got, wanted in zip(case.projected(), expected, strict=True):
        torch.testing.assert_close(
            got.double(), torch.tensor(wanted, dtype=torch.float64), rtol=tolerance, atol=tolerance
        )
    assert torch.equal(case.projected()[0][ALONE], torch.zeros(2, 4, dtype=dtype))
    assert torch.equal(case.projected()[1][TEACHER_ALONE], torch.zeros(2, 5, dtype=dtype))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"divergence": "js", "temperature": 1.0},
        {"agreement_mask": False},
        {"spaces": "student"},
        {"spaces": "teacher"},
        {"kd_ratio": 1.0},
    ],
)
def test_loss_and_gradients_equal_the_floats(oracle, make, settings):
    case = make(seed=2, **settings)
    divisors = dict(zip(TERMS, [9, 4, 5, 7, 3, 3, 0], strict=True))
    loss, sums = case.run(block_elements=40, divisors=torch.tensor(list(divisors.values())))
    floats, live = case.floats(), case.live()
    r, spaces = case.settings["kd_ratio"], case.settings["spaces"]
    shares = {"ce": 1 - r}
    shares |= {} if spaces == "teacher" else {"t2s_kd": r, "t2s_ce": r}
    shares |= {} if spaces == "student" else {"s2t_kd": r}
    expected = oracle.attention_terms(floats, live)
    for name in (*(name for name in shares if shares[name]), *(["t2s_agreement"] if "t2s_kd" in shares else [])):
        assert [x.item() for x in sums[name]] == pytest.approx(expected[name], rel=1e-9), name
    assert 0 < expected["t2s_agreement"][0] < expected["t2s_agreement"][1]

    def whole(live):
        return oracle.attention_loss(floats, live, shares, divisors)

    assert loss.item() == pytest.approx(whole(live), rel=1e-9)
    for name, got in case.gradients(loss).items():
        assert got is not None, f"{name} is not attached"
        wanted = torch.tensor(oracle.gradient(whole, live, name), dtype=torch.float64)
        torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-8, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("term", DSKD_TERMS)
def test_who_gets_gradients(make, term):
    case = make(seed=3, agreement_mask=False)
    divisors = torch.tensor([float(name == term) for name in TERMS])
    loss, _ = case.run(divisors=divisors)
    assert {name for name, g in case.gradients(loss).items() if g.abs().max() > 0} == REACHED[term]


def test_teacher_and_embeddings_get_no_gradient(make):
    case = make(seed=3)
    frozen = ("teacher", "teacher_weight", "student_pairs", "teacher_pairs", "argmax_embeddings")
    for name in frozen:
        getattr(case, name).requires_grad_()
    loss, _ = case.run()
    found = torch.autograd.grad(loss, [getattr(case, name) for name in frozen], allow_unused=True)
    assert found == (None,) * 5


def test_counts_are_those_of_the_sums(make):
    for mask in (True, False):
        case = make(seed=2, agreement_mask=mask)
        t2s, _ = case.projected()
        found = counts(case.rows(t2s), case.objective())
        _, sums = case.run()
        assert found.tolist() == [int(sums[term][1]) for term in TERMS]
        assert found.tolist()[0] == 9
        assert found.tolist()[2:4] == [5, 4]
    assert [int(sums[name][1]) for name in RATES] == [5, 4, 0, 0]


def test_size_of_the_blocks_does_not_matter(make):
    case = make(seed=4)
    loss, sums = case.run()
    whole = case.gradients(loss)
    for block_elements in (1, 2 * 12, 3 * 12 + 5, 5 * 12, 7 * 12, 9 * 12):
        other, other_sums = case.run(block_elements=block_elements)
        torch.testing.assert_close(other, loss, rtol=1e-12, atol=0)
        torch.testing.assert_close(other_sums, sums, rtol=1e-12, atol=0)
        torch.testing.assert_close(case.gradients(other), whole, rtol=1e-12, atol=1e-14)


def slice_case(case, response, teacher_rows):
    """A micro-batch: attending rows first, in the given order."""
    order = [r for r in response if r < len(case.sample)] + [r for r in response if r >= len(case.sample)]
    attending = [r for r in order if r < len(case.sample)]
    return dataclasses.replace(
        case,
        student=case.student[order],
        gold=[case.gold[r] for r in order],
        sample=[case.sample[r] for r in attending],
        student_pairs=case.student_pairs[attending],
        teacher=case.teacher[teacher_rows],
        teacher_pairs=case.teacher_pairs[teacher_rows],
        argmax_embeddings=case.argmax_embeddings[teacher_rows],
        teacher_sample=[case.teacher_sample[m] for m in teacher_rows],
    )


@pytest.mark.parametrize(
    "parts",
    [
        [([0, 4, 8], [1, 3]), ([1, 2, 5, 3, 7], [0, 2, 4, 5]), ([6], [])],
        [([8, 7, 6, 5, 4, 3, 2, 1, 0], [5, 4, 3, 2, 1, 0])],
    ],
    ids=["split", "reordered"],
)
def test_many_micro_batches_equal_one(make, parts):
    """Also: no row attends to a sample that is only its neighbour in the batch, and order means nothing."""
    case = make(seed=5)
    loss, sums = case.run()
    expected = case.gradients(loss)
    batches = [slice_case(case, *part) for part in parts]
    divisors = torch.stack([sums[term][1] for term in TERMS])
    total = sum(batch.run(divisors=divisors, block_elements=24)[0] for batch in batches)
    torch.testing.assert_close(total, loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(case.gradients(total), expected, rtol=1e-11, atol=1e-13)


def test_rows_with_nan_that_attend_to_nothing(make):
    case = make(seed=6)
    clean, _ = case.run(block_elements=24)
    expected = case.gradients(clean)
    for name, rows in (
        ("student_pairs", ALONE),
        ("teacher_pairs", TEACHER_ALONE),
        ("teacher", TEACHER_ALONE),
        ("argmax_embeddings", TEACHER_ALONE),
    ):
        with torch.no_grad():
            getattr(case, name)[rows] = math.nan
    dirty, _ = case.run(block_elements=24)
    assert torch.equal(dirty, clean)
    for name, got in case.gradients(dirty).items():
        assert torch.equal(got, expected[name]), name


@pytest.mark.parametrize(
    ("rows", "sample", "teacher_sample"),
    [(0, [], []), (2, [], []), (2, [0, 1], []), (0, [], [0, 0]), (2, [0, 1], [2, -1]), (1, [0], [0]), (1, [-1], [-1])],
)
def test_few_rows_keep_every_projector_attached(make, rows, sample, teacher_sample):
    case = make(seed=7, rows=rows, sample=sample, teacher_sample=teacher_sample)
    loss, sums = case.run()
    found = case.gradients(loss)
    assert all(g is not None and g.isfinite().all() for g in found.values())
    assert int(sums["t2s_ce"][1]) == int(sums["s2t_kd"][1]) == (1 if sample == [0] else 0)
    if not rows:
        assert loss.item() == 0


@pytest.mark.parametrize("spaces", ["student", "teacher"])
def test_one_space_alone_needs_only_its_rows(make, spaces):
    case = make(seed=8, spaces=spaces)
    t2s, s2t = case.projected()
    rows = case.rows(t2s)
    expected, _ = case.run()
    parts = {"t2s_Nd": t2s, "s2t_MD": None} if spaces == "student" else {"t2s_Nd": None, "s2t_MD": s2t}
    loss, sums = cma_loss(
        rows,
        **parts,
        teacher_MD=case.teacher,
        student_head=case.student_head(),
        teacher_head=case.teacher_head(),
        objective=case.objective(),
        divisors_T=counts(rows, case.objective()),
        block_elements=WHOLE,
    )
    assert torch.equal(loss, expected)
    assert all(g is not None for g in case.gradients(loss).values())
    absent = "s2t_kd" if spaces == "student" else "t2s_ce"
    assert [x.item() for x in sums[absent]] == [0, 0]


def test_the_teacher_rows_that_count_must_be_named(make):
    case = make(seed=8)
    t2s, s2t = case.projected()
    with pytest.raises(ValueError, match=r"rows\.s2t_M: expected a bool tensor .* got None"):
        cma_loss(
            dataclasses.replace(case.rows(t2s), s2t_M=None),
            t2s_Nd=t2s,
            s2t_MD=s2t,
            teacher_MD=case.teacher,
            student_head=case.student_head(),
            teacher_head=case.teacher_head(),
            objective=case.objective(),
            divisors_T=torch.ones(7),
            block_elements=WHOLE,
        )


def test_projector_warm_up_leaves_the_student_to_ce(make):
    case = make(seed=9, agreement_mask=False)
    plain, sums = case.run()
    expected = case.gradients(plain)
    loss, warm_sums = case.run(projectors_alone=True)
    found = case.gradients(loss)
    torch.testing.assert_close(warm_sums, sums, rtol=0, atol=0)
    means = {term: sums[term][0] / sums[term][1] for term in DSKD_TERMS}
    torch.testing.assert_close(loss, 0.6 * means["ce"] + 0.4 * (means["t2s_ce"] + means["s2t_kd"]))
    for name in ("query", "t2s", "s2t"):
        torch.testing.assert_close(found[name], expected[name], rtol=1e-12, atol=1e-14)
    of_ce = case.gradients(case.run(divisors=torch.tensor([9, 0, 0, 0, 0, 0, 0]))[0])
    for name in ("student", "weight", "bias"):
        torch.testing.assert_close(found[name], of_ce[name], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_values_alone_without_gradients(make, context):
    case = make(seed=10)
    loss, _ = case.run(block_elements=24)
    with context():
        quiet, _ = case.run(block_elements=24)
    assert not quiet.requires_grad
    assert torch.equal(quiet, loss.detach())


def test_the_agreement_of_projected_rows(oracle, make):
    case = make(seed=2)
    with torch.no_grad():
        case.bias[9:] = 100  # padding would win
    floats = case.floats()
    in_student, _ = oracle.attended(floats, *(floats[name] for name in ("query", "t2s", "s2t", "student")))
    best = [oracle.argmax(oracle.logits(row, floats["head"])[:9]) for row in in_student]
    label = torch.tensor([*case.gold[:6], -1])
    for block_elements in (1, 30, WHOLE):
        got = agreement_of(case.projected()[0], case.student_head(), label, block_elements=block_elements)
        assert got.tolist() == [a == b for a, b in zip(best, label.tolist(), strict=True)]
        assert got.any()
        assert not got.all()
        assert not got.requires_grad


def test_partnered():
    sample, teacher_sample = torch.tensor(SAMPLE), torch.tensor(TEACHER_SAMPLE)
    assert [n for n, found in enumerate(partnered(sample, teacher_sample).tolist()) if not found] == ALONE
    assert [m for m, found in enumerate(partnered(teacher_sample, sample).tolist()) if not found] == TEACHER_ALONE


# --- the module ----------------------------------------------------------------------------------------


def test_constant_rows_are_not_divided_by_zero(make):
    case = make(seed=11, rows=2, sample=[0, 0], teacher_sample=[0])
    with torch.no_grad():
        case.teacher.fill_(2.0)
        case.argmax_embeddings.zero_()
        case.teacher_pairs.zero_()
    t2s, s2t = case.projected()
    torch.testing.assert_close(t2s, (torch.full((2, 5), 2.0).double() @ case.t2s).detach())
    torch.testing.assert_close(s2t, (case.student.mean(0, keepdim=True) @ case.s2t))


def test_scores_are_held_per_sample(make, largest):
    """Sixteen samples of 16 rows a side: never the 256 x 256 of the batch."""
    sample = [n % 16 for n in range(256)]
    case = make(seed=12, rows=256, sample=sample[:1], teacher_sample=sample[:1])
    generator = torch.Generator().manual_seed(0)
    case.sample = case.teacher_sample = sample
    case.student_pairs, case.teacher_pairs = (torch.randn(256, w, generator=generator).double() for w in (8, 10))
    case.teacher, case.argmax_embeddings = (torch.randn(256, 5, generator=generator).double() for _ in range(2))
    with largest() as spy:
        t2s, s2t = case.projected()
        case.gradients(t2s.sum() + s2t.square().sum())
    assert spy.elements <= 256 * 10


def test_the_module_is_built_from_its_weights():
    t2s, s2t = torch.arange(15.0).view(5, 3), torch.arange(15.0).view(3, 5)
    module = cross_model_attention(3, 5, t2s_weight_Dd=t2s, s2t_weight_dD=s2t)
    assert torch.equal(module.t2s(torch.eye(5)), t2s)
    assert torch.equal(module.s2t(torch.eye(3)), s2t)
    assert {name: tuple(x.shape) for name, x in module.state_dict().items()} == {
        "query.weight": (10, 6),
        "t2s.weight": (3, 5),
        "s2t.weight": (5, 3),
    }
    assert all(x.requires_grad for x in module.parameters())


def test_random_weights_come_from_the_generator_alone():
    state = torch.get_rng_state()

    def draw(seed):
        return cross_model_attention(40, 30, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

    one, same, other = (draw(seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(one[name], same[name]) and not torch.equal(one[name], other[name]) for name in one)
    assert torch.equal(torch.get_rng_state(), state)
    for name, weight in one.items():
        bound = 1 / math.sqrt(weight.shape[1])
        assert weight.dtype == torch.float64
        assert 0.9 * bound < weight.abs().max() <= bound, name


@pytest.mark.parametrize("name", ["t2s_weight_Dd", "s2t_weight_dD"])
def test_weights_of_other_models_are_refused(name):
    with pytest.raises(ValueError, match=r"projector weight: .* got \(7, 7\)"):
        cross_model_attention(3, 5, **{name: torch.zeros(7, 7)})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_near_fp64(make, dtype):
    """Maps, states and heads rounded to the dtype; both sides start from the same rounded numbers."""
    case = make(seed=13, dtype=dtype, agreement_mask=False)
    loss, _ = case.run()
    found = case.gradients(loss)
    assert loss.dtype == torch.float32
    exact = dataclasses.replace(
        case,
        **{
            name: x.detach().double().requires_grad_(name in INPUTS)
            for name, x in vars(case).items()
            if isinstance(x, torch.Tensor)
        },
    )
    truth, _ = exact.run()
    # each of three products in a row rounds to the dtype, on scores of order 3 that pass through exp
    tolerance = 16 * torch.finfo(dtype).eps
    assert abs(loss - truth) <= tolerance * truth
    for name, wanted in exact.gradients(truth).items():
        assert found[name].dtype == dtype
        assert (found[name].double() - wanted).norm() <= tolerance * wanted.norm(), name


def test_autocast_does_not_reach_the_attention(make):
    case = make(seed=14, dtype=torch.float32)
    expected = case.projected()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = case.projected()
    assert all(torch.equal(one, other) for one, other in zip(got, expected, strict=True))


def larger(block, rows=600):
    """Loss and backward at 600 rows a side of one sample each 20, vocabularies of 400 and 460."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape, by=1.0):
        return by * torch.randn(*shape, generator=generator)

    student, weight, teacher = draw(rows, 32), draw(400, 32, by=0.2), draw(rows, 48)
    student.requires_grad_(), weight.requires_grad_()
    module = cross_model_attention(32, 48, generator=generator)
    sample = torch.arange(rows) // 20
    shared = module.attention(draw(rows, 64), draw(rows, 96), sample, sample)
    t2s, s2t = module.t2s_rows(shared, teacher, draw(rows, 48)), module.s2t_rows(shared, student)
    gold = torch.randint(400, (rows,), generator=generator)
    objective = Objective(**SETTINGS, divergence=divergence("forward_kl"))
    head, teacher_head = Head(weight, 400), Head(draw(460, 48, by=0.2), 460)
    rows_ = Rows(
        student_RD=student,
        labels_R=gold,
        label_N=gold,
        agree_N=agreement_of(t2s, head, gold, block_elements=block * 460),
        s2t_M=torch.ones(rows, dtype=torch.bool),
    )
    loss, _ = cma_loss(
        rows_,
        t2s_Nd=t2s,
        s2t_MD=s2t,
        teacher_MD=teacher,
        student_head=head,
        teacher_head=teacher_head,
        objective=objective,
        divisors_T=counts(rows_, objective),
        block_elements=block * 460,
    )
    loss.backward()


def test_nothing_of_rows_by_vocabulary_is_made(largest):
    rows, block = 600, 10
    with largest() as spy:
        larger(block, rows)
    assert spy.elements <= max(rows * 96, 460 * 48, block * 460) < rows * 400
