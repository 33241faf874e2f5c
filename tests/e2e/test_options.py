"""Axolotl's options beside the plugin, each in a training of its own: does the student still learn what it should?"""

import importlib.util

import pytest

from tests.options import BASES, NEAR, SAME, STEPS, UNHEEDED, with_verdict

pytestmark = pytest.mark.e2e

ON_CPU = "tests.e2e.on_cpu.OnCpu"
SHORT = {"max_steps": 2, "save_steps": 2}
EXACT = 2e-5
TRAINED = with_verdict(SAME, STEPS, NEAR, UNHEEDED)


@pytest.fixture(scope="module")
def curves():
    """The curves of the runs that options are compared with, each trained once."""
    return {}


def trained(train, name, changes):
    changes = dict(changes)
    plugins = [*changes.pop("plugins", ["dskd"]), ON_CPU]
    return train(name, plugins=plugins, **SHORT, **changes)


@pytest.mark.parametrize("option", TRAINED, ids=lambda option: f"{option.base}: {option.name}")
def test_a_training_with_the_option(train, curves, option):
    if option.package and importlib.util.find_spec(option.package) is None:
        pytest.skip(f"{option.package} is not installed")
    if option.base not in curves:
        curves[option.base] = trained(train, f"base-{option.base}", BASES[option.base]).curve()
    without, run = curves[option.base], trained(train, "with", option.changes)
    found = run.curve()
    assert len(found) == len(without) == 2
    for _, gradient, _, _ in found:
        assert 0 < gradient < float("inf")
    if option.verdict in (SAME, UNHEEDED):
        assert found == [pytest.approx(step, rel=EXACT) for step in without]
    else:
        loss, _, ce, kd = found[0]
        expected, _, expected_ce, expected_kd = without[0]
        assert (loss, ce, kd) == pytest.approx((expected, expected_ce, expected_kd), rel=option.within)
        if option.verdict == NEAR:
            assert found != [pytest.approx(step, rel=EXACT) for step in without]  # it does something
    said = [key for key in option.recipe if f"{key} has no effect" in run.output]
    assert bool(said) == (option.verdict == UNHEEDED)
