"""Axolotl's options beside the plugin, each in a training of its own: does the student still learn what it should?"""

import importlib.util

import pytest

from tests.options import BASES, NEAR, OPTIONS, SAME, STEPS, UNHEEDED, with_verdict, written

pytestmark = pytest.mark.e2e

ON_CPU = "benchmarks.on_cpu.OnCpu"
SHORT = {"max_steps": 2, "save_steps": 2}
EXACT = 2e-5
# `make test-more` trains with these.
APART = (
    "Cross-entropy made cheaper",
    "Memory",
    "Optimizers",
    "Rows",
    "Weights of few bits",
    "What is trained",
)


def cases():
    apart = [option for group in APART for option in OPTIONS[group]]
    for option in with_verdict(SAME, STEPS, NEAR, UNHEEDED):
        marks = [pytest.mark.more] if option in apart else []
        yield pytest.param(option, marks=marks, id=f"{option.base}: {option.name}")


@pytest.fixture(scope="module")
def tiny(tiny, build, tmp_path_factory):
    """Models whose every matrix has a multiple of 32 rows, as bitsandbytes wants it of 4 bits on some CPUs."""
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("wider")
    student, teacher = (AutoTokenizer.from_pretrained(tiny[side]) for side in ("student", "teacher"))
    return {
        **tiny,
        "student": build.save_model(folder / "student", student, width=64),
        "teacher": build.save_model(folder / "teacher", teacher, "qwen3", width=128, seed=1),
    }


@pytest.fixture(scope="module")
def curves():
    """The curves of the runs that options are compared with, each trained once."""
    return {}


@pytest.fixture
def trained(run_axolotl, recipe, tmp_path):
    def run(name, changes):
        changed = written(recipe, {**SHORT, **changes, "output_dir": str(tmp_path / name)})
        result = run_axolotl({**changed, "plugins": [*changed["plugins"], ON_CPU]})
        assert result.code == 0, result.output[-4000:]
        return result

    return run


@pytest.mark.parametrize("option", cases())
def test_a_training_with_the_option(trained, curves, option):
    if option.package and importlib.util.find_spec(option.package) is None:
        pytest.skip(f"{option.package} is not installed")
    if option.base not in curves:
        curves[option.base] = trained(f"base-{option.base}", BASES[option.base]).curve()
    without, run = curves[option.base], trained("with", option.changes)
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
