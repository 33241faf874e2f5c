"""What is said of a pair and of the first steps of a run."""

from types import SimpleNamespace

import pytest

from dskd_plugin import pair_advice
from dskd_plugin.host.metrics import greater_is_better
from dskd_plugin.host.watch import Watch
from dskd_plugin.pair import make_pair
from dskd_plugin.settings import parse_settings

TEACHER = {"teacher": {"model": "some/teacher"}}


@pytest.mark.parametrize(
    ("student", "changes", "said"),
    [
        ("qwen", {}, "method: dskd with target: exact (this recipe)"),
        ("qwen", {"target": "projected"}, "(this recipe: method: dskd without an exact target)"),
        ("qwen", {"alignment": "cma"}, "(this recipe: method: dskd with alignment: cma)"),
        ("qwen", {"method": "uld"}, "method: dskd with target: exact (this recipe: method: uld)"),
        ("smollm2", {"method": "kd"}, "one tokenizer (student 49152 ids"),
        ("smollm2", {"method": "kd"}, "method: kd (this recipe)"),
        ("smollm2", {}, "method: kd (this recipe: method: dskd with target: exact)"),
    ],
)
def test_the_pair(zoo, student, changes, said):
    settings = parse_settings(TEACHER | changes)
    pair = make_pair(zoo(student).tokenizer, zoo("smollm2").table, settings)
    line = pair_advice.of_pair(pair, settings, 0.25)
    assert said in line
    assert line.endswith("see docs/method.md#which-method")
    assert pair.identity or "25 % of the student's ids shared (little)" in line


@pytest.mark.parametrize(
    ("base", "teacher", "warned"),
    [
        ("org/one", {"model": "org/one"}, True),
        ("./one", {"model": "{here}/one"}, True),
        ("org/one", {"model": "org/two"}, False),
        ("org/one", {"model": "org/one", "adapter": "tuned"}, False),
        ("org/one", {"model": "org/one", "revision": "v2"}, False),
    ],
)
def test_a_teacher_that_is_the_student(base, teacher, warned, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    teacher = teacher | {"model": teacher["model"].format(here=tmp_path)}
    told = pair_advice.of_one_model(base, parse_settings({"teacher": teacher}))
    assert (told is not None and repr(base) in told) is warned


@pytest.mark.parametrize(
    ("share", "said"), [(1.0, "(much)"), (0.8, "(much;"), (0.6, "(about average;"), (0.1, "(little;")]
)
def test_a_dataset(share, said):
    assert said in pair_advice.of_dataset(share)


def steps(ce, **terms):
    """Ten logged steps; a pair of numbers is the value of the first and of the last five."""
    found = []
    for half in (0, 1):
        values = {"ce": ce, **terms}
        found += [{name: value[half] if isinstance(value, tuple) else value for name, value in values.items()}] * 5
    return found


@pytest.mark.parametrize(
    ("target", "seen", "warned"),
    [
        ("projected", steps(0.4, t2s_kd=4.6), ["11.5 times the cross-entropy"]),
        ("projected", steps((0.3, 0.6), t2s_kd=4.6), ["rises", "target: exact"]),
        # The first form of the defaults on a real pair: Qwen2.5-Coder-0.5B -> SmolLM2-135M, MBPP.
        ("projected", steps((1.2, 1.3), t2s_kd=(4.5, 2.0), t2s_agreement=(0.42, 0.56)), ["2.6 times", "on 49%"]),
        ("projected", steps(1.2, t2s_kd=3.0, t2s_agreement=0.7), []),
        ("projected", steps(2.5, t2s_kd=2.2, t2s_ce=1.0), []),
        ("exact", steps(0.4, t2s_kd=4.6), ["11.5 times", "is good at it"]),
        ("exact", steps((0.3, 0.6), t2s_kd=0.8), ["rises"]),
        # What does not pull, or is scaled to the cross-entropy, spoils nothing.
        ("exact", steps(0.4, t2s_kd=4.6, guarded=0.8), []),
        (None, steps(0.5, kd=3.0, kd_scale=0.17), []),
        (None, steps(0.5, kd=0.3, kd_scale=9.0), ["5.4 times"]),
        ("exact", steps((2.5, 2.0), t2s_kd=3.0, kd=9.0), []),
        (None, steps((2.0, 1.5), kd=9.0), ["5.1 times"]),
        (None, steps((0.02, 0.05)), []),
    ],
)
@pytest.mark.parametrize("every", [1, 10])
def test_the_first_steps(target, seen, warned, every):
    """Whether each of ten steps is logged, or the means of ten steps, twice."""
    watch = Watch(target=target)
    seen = seen if every == 1 else seen[:: len(seen) // 2]
    said = [line for number, means in enumerate(seen, start=1) for line in watch.see(means, number * every)]
    assert len(said) >= bool(warned)
    assert all(any(word in line for line in said) for word in warned)
    assert warned or not said
    # Once, and nothing of later steps.
    later = enumerate(steps((0.1, 9.0), t2s_kd=99.0), start=21)
    assert not any(watch.see(means, number) for number, means in later)


def test_steps_that_do_not_pull_yet_are_not_judged():
    watch = Watch(target="projected", warmup=12)
    seen = [line for step in range(1, 14) for line in watch.see({"ce": 0.4, "t2s_kd": 4.6}, step)]
    assert not seen
    assert any("11.5 times" in line for step in range(14, 26) for line in watch.see({"ce": 0.4, "t2s_kd": 4.6}, step))


def test_the_guard_is_told_once_of_each_teacher():
    watch = Watch(target="exact")
    lines = [{"ce": 1.0, "guarded": on} for on in (0.0, 1.0, 1.0, 0.0, 1.0)]
    said = [line for number, means in enumerate(lines, start=30) for line in watch.see_guard(means, number)]
    assert len(said) == 1 and "since step 31 or" in said[0] and "than the teacher does" in said[0]
    watch = Watch(target="exact")
    lines = [{"ce": 1.0, "guarded": 0.7, "teacher1/guarded": one, "teacher2/guarded": 1.0} for one in (0.0, 0.0, 1.0)]
    said = [watch.see_guard(means, number) for number, means in enumerate(lines, start=30)]
    assert [len(lines) for lines in said] == [1, 0, 1]
    assert "than teacher2 does" in said[0][0] and "than teacher1 does" in said[2][0]


def test_a_resumed_run_is_judged_by_ten_steps_as_well():
    watch = Watch(target="exact")
    assert not [line for step in range(501, 511) for line in watch.see({"ce": 1.0 + (step > 501)}, step)]
    assert "rises" in watch.see({"ce": 9.0}, 511)[0]


@pytest.mark.parametrize(
    ("metric", "asked", "large"),
    [
        ("eval_dskd/ce", None, False),
        ("dskd/t2s_kd", None, False),
        ("eval_dskd/teacher2/kd", None, False),
        ("eval_dskd/t2s_agreement", None, True),
        ("eval_dskd/t2s_inside", None, True),
        ("eval_dskd/teacher1/teacher_lead", None, True),
        ("eval_dskd/align_ratio", None, True),
        ("eval_dskd/ce", True, True),
        ("eval_dskd/t2s_agreement", False, False),
        ("eval_loss", None, "as transformers has it"),
        ("loss", True, True),
        (None, None, "as transformers has it"),
    ],
)
def test_which_checkpoint_is_the_best_by_a_logged_value(metric, asked, large):
    args = SimpleNamespace(metric_for_best_model=metric, greater_is_better="as transformers has it")
    assert greater_is_better(args, asked) == large
