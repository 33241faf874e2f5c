"""The KD part scaled to the size of the cross-entropy."""

import dataclasses
import math

import pytest
import torch

from dskd_plugin.core.balance import LARGEST, Balance
from dskd_plugin.core.blockwise import dskd_loss
from dskd_plugin.core.divergences import divergence
from dskd_plugin.core.objective import TERMS, Objective, means_of_step
from dskd_plugin.core.rows import counts

STEPS = [(3.0, 0.5), (2.5, 0.0), (2.9, 0.7), (0.1, 4.0), (2.0, 1e-3)]


@pytest.mark.parametrize("steps", [STEPS[:n] for n in range(6)] + [[(2.0, 0.0)], [(2.0, 1e-9)], [(0.0, 1.0)], [(0, 0)]])
def test_scale_equals_the_floats(oracle, steps):
    balance = Balance()
    for ce, kd in steps:
        balance = balance.after(ce, kd)
    assert balance.scale == pytest.approx(oracle.kd_scale(steps, LARGEST), rel=1e-12)


def test_after_one_step_kd_weighs_as_much_as_the_cross_entropy():
    assert Balance().scale == 1
    assert 0.25 * Balance().after(3.0, 0.25).scale == 3.0


def test_about_twenty_steps_are_remembered():
    balance = Balance()
    for k in range(400):
        balance = balance.after(2.0, 1.0 if k < 380 else 4.0)
    assert 2 / 4 < balance.scale < 1.0


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_step_that_is_not_finite_is_not_taken_up(value):
    balance = Balance().after(2.0, 1.0)
    assert balance.after(value, 1.0) == balance.after(1.0, value) == balance


def sums(**given):
    return torch.tensor([given.get(term, (0.0, 0)) for term in TERMS], dtype=torch.float64)


def objective(compares="spaces", **changes):
    own = {"temperature": 1.0, "kd_ratio": 0.4, "spaces": "both", "agreement_mask": False, "compares": compares}
    return Objective(**own | {"divergence": divergence("forward_kl")} | changes)


def test_means_of_a_step():
    spaces = sums(ce=(12.0, 4), t2s_kd=(3.0, 2), t2s_ce=(90.0, 3), s2t_kd=(8.0, 4), span_kl=(10.0, 5))
    assert means_of_step(spaces, objective(span_weight=0.5)) == (3.0, 1.5 + 2.0 + 0.5 * 2.0)
    assert means_of_step(spaces, objective()) == (3.0, 1.5 + 2.0)
    assert means_of_step(sums(ce=(6.0, 2), kd=(1.0, 4), ce_unpaired=(4.0, 2)), objective("distributions")) == (3, 0.25)
    assert means_of_step(sums(ce=(6.0, 2), t2s_ce=(1.0, 4)), objective()) is None  # nothing that moves the student
    assert means_of_step(sums(t2s_kd=(6.0, 2)), objective()) is None


@pytest.mark.parametrize("scale", [0.0, 0.3, 7.0])
def test_loss_and_gradients_equal_the_floats(oracle, make_case, scale):
    """t2s_ce, which moves the projector alone, keeps its weight."""
    case = make_case(seed=1)
    divisors = {"ce": 9, "t2s_kd": 4, "t2s_ce": 5, "s2t_kd": 7, "kd": 0, "span_kl": 0, "ce_unpaired": 0}
    parts = case.parts() | {"objective": dataclasses.replace(case.objective(), kd_scale=scale)}
    loss, found = dskd_loss(case.rows(), **parts, divisors_T=torch.tensor(list(divisors.values())), block_elements=24)
    floats, live = case.floats(divisors), case.live()
    assert loss.item() == pytest.approx(oracle.scaled_loss(floats, live, scale), rel=1e-9)
    gradients = torch.autograd.grad(loss, list(case.leaves().values()))
    for name, got in zip(case.leaves(), gradients, strict=True):
        wanted = oracle.gradient(lambda live: oracle.scaled_loss(floats, live, scale), live, name)
        torch.testing.assert_close(got, torch.tensor(wanted, dtype=torch.float64), rtol=1e-6, atol=1e-8)
    _, plain = dskd_loss(
        case.rows(), **case.parts(), divisors_T=counts(case.rows(), case.objective()), block_elements=24
    )
    for name in plain:  # what is logged is not scaled
        assert torch.equal(found[name][0], plain[name][0]), name


@pytest.mark.parametrize(
    ("settings", "shares"),
    [
        ({}, {"ce": 0.6, "t2s_kd": 1.2, "t2s_ce": 0.4, "s2t_kd": 1.2}),
        ({"span_weight": 0.5}, {"ce": 0.6, "t2s_kd": 1.2, "t2s_ce": 0.4, "s2t_kd": 1.2, "span_kl": 0.6}),
        ({"compares": "distributions", "unpaired_ce": True}, {"ce": 0.6, "kd": 1.2, "ce_unpaired": 0.4}),
        ({"projectors_alone": True}, {"ce": 0.6, "t2s_ce": 0.4}),
        ({"compares": "nothing"}, {"ce": 1.0}),
    ],
)
def test_which_terms_are_scaled(settings, shares):
    assert objective(kd_scale=3.0, **settings).shares() == pytest.approx(shares)


@pytest.mark.parametrize("value", [-0.1, math.inf, math.nan])
def test_a_scale_that_is_none_is_refused(value):
    with pytest.raises(ValueError, match="kd_scale: expected a finite number from 0, got"):
        objective(kd_scale=value)
