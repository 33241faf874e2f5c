"""Real ``axolotl train`` with several teachers: numbers of each alone, engines, resumption, caches and answers."""

import json
import math

import pytest

# On one worker: the tests share what one of them has made.
pytestmark = [pytest.mark.e2e, pytest.mark.xdist_group("several teachers")]

EVALUATED = {"val_set_size": 0.25, "eval_steps": 2}
TERMS = ("kd", "t2s_kd", "t2s_ce", "s2t_kd", "t2s_agreement", "s2t_agreement", "align_ratio")


@pytest.fixture
def teachers(tiny, third):
    """teachers(weights, **more): the list of both, in place of the recipe's one."""

    def listed(weights=(0.7, 0.3), models=(tiny["teacher"], third), **more):
        items = [
            {"model": model, "dtype": "float32", "weight": weight, **more}
            for model, weight in zip(models, weights, strict=True)
        ]
        return {"teacher": None, "teachers": items}

    return listed


def steps(run):
    return [entry for entry in run.log if "loss" in entry]


def evaluations(run):
    return [entry for entry in run.log if "eval_loss" in entry]


def test_two_teachers_give_the_weighted_sum_of_each_alone(train, run_axolotl, teachers, tiny, third, recipe):
    both = train("both", dskd=teachers((7, 3)), **EVALUATED)
    alone = [
        train(name, dskd={"teacher": {"model": model, "dtype": "float32"}}, max_steps=2, **EVALUATED)
        for name, model in (("first", tiny["teacher"]), ("second", third))
    ]
    # Before the first step of the optimizer all students are the same.
    start, (one, other) = steps(both)[0], [steps(run)[0] for run in alone]
    assert start["dskd/ce"] == pytest.approx(one["dskd/ce"], rel=1e-6) == pytest.approx(other["dskd/ce"], rel=1e-6)
    of_each = [entry["dskd/kd"] + entry["dskd/ce_unpaired"] for entry in (one, other)]
    expected = 0.5 * one["dskd/ce"] + 0.5 * (0.7 * of_each[0] + 0.3 * of_each[1])
    assert start["loss"] == pytest.approx(expected, rel=1e-5)
    assert one["dskd/kd"] != pytest.approx(other["dskd/kd"], rel=0.01)
    for name in TERMS:
        assert start[f"dskd/teacher1/{name}"] == pytest.approx(one[f"dskd/{name}"], rel=1e-5, abs=2e-6)
        assert start[f"dskd/teacher2/{name}"] == pytest.approx(other[f"dskd/{name}"], rel=1e-5, abs=2e-6)
    for prefix, entries in (("", steps(both)), ("eval_", evaluations(both))):
        assert len(entries) >= 2
        for entry in entries:
            ce, kd = entry[f"{prefix}dskd/ce"], entry[f"{prefix}dskd/kd"]
            held = [both.kd_of(entry, f"{prefix}dskd/teacher{number}/") for number in (1, 2)]
            assert entry[f"{prefix}loss"] == pytest.approx(0.5 * ce + 0.5 * (0.7 * held[0] + 0.3 * held[1]), abs=1e-5)
            parts = [entry[f"{prefix}dskd/teacher{number}/kd"] for number in (1, 2)]
            assert kd == pytest.approx(0.7 * parts[0] + 0.3 * parts[1], abs=2e-6)
            assert f"{prefix}dskd/teacher1/ce" not in entry

    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    shapes = {name: list(x.shape) for name, x in load_file(both.out / "dskd/projectors.safetensors").items()}
    assert shapes["teacher1.t2s.linear.weight"] == [32, 48] and shapes["teacher2.t2s.linear.weight"] == [32, 40]
    _, info = AutoModelForCausalLM.from_pretrained(both.out, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    card = (both.out / "README.md").read_text()
    assert "distilled from `teacher` and `teacher` with dskd" in card and "weight 0.7; `teacher`" in card
    assert f"  teachers: {tiny['teacher']} (weight 0.7), {third} (weight 0.3)" in both.output
    assert "(teacher 1, " in both.output and "(teacher 2, " in both.output

    # Resumed, the run goes on bit for bit; with the teachers in another order, or with one of them, it is refused.
    checkpoint = str(both.out / "checkpoint-2")
    again = train("again", dskd=teachers((7, 3)), resume_from_checkpoint=checkpoint, **EVALUATED)
    names = "loss", "dskd/teacher1/kd", "dskd/teacher2/kd"
    assert again.curve(*names)[2:] == both.curve(*names)[2:]
    other_weights = train("other", dskd=teachers((1, 1)), resume_from_checkpoint=checkpoint, **EVALUATED)
    assert "dskd.teachers.weight [0.7, 0.3] -> [0.5, 0.5]" in other_weights.output
    for block in (teachers(models=(third, tiny["teacher"])), {}):
        refused = {**recipe, **EVALUATED, "dskd": {**recipe["dskd"], **block}, "output_dir": f"{both.out}-refused"}
        run = run_axolotl({**refused, "resume_from_checkpoint": checkpoint})
        assert run.code != 0
        assert "dskd_state.json: expected the projectors of this pair, got those of another: " in run.output
        assert f"{{'model': '{third}'}}" in run.output and f"'{tiny['teacher']}'" in run.output


def test_a_list_of_one_and_two_copies_are_one_teacher(train, teachers, tiny):
    expected = train("simple", save_steps=4)
    listed = train("listed", dskd=teachers((3,), (tiny["teacher"],)), save_steps=4)
    assert listed.curve() == expected.curve()  # bit for bit
    twice = train("twice", dskd=teachers((0.5, 0.5), (tiny["teacher"], tiny["teacher"])), save_steps=4)
    names = "loss", "dskd/ce", "dskd/kd", "dskd/align_ratio"
    assert twice.curve(*names) == [pytest.approx(step, rel=1e-4) for step in expected.curve(*names)]


@pytest.fixture(scope="module")
def one_process():
    """The curve of one process, computed once."""
    return {}


@pytest.mark.parametrize(
    "engine", [pytest.param("ddp", marks=pytest.mark.more), "zero3", pytest.param("fsdp2", marks=pytest.mark.more)]
)
def test_two_ranks_train_as_one_process(train, teachers, tmp_path, engine, options, one_process):
    names = "loss", "grad_norm", "dskd/teacher1/kd", "dskd/teacher2/kd", "dskd/kd_scale"
    block = teachers() | {"kd_weight": "balanced"}
    if not one_process:
        one_process["curve"] = train("alone", dskd=block, micro_batch_size=2, gradient_accumulation_steps=2).curve(
            *names
        )
    run = train(engine, ranks=2, dskd=block, gradient_accumulation_steps=1, **options(engine, tmp_path))
    assert run.curve(*names) == [pytest.approx(step, rel=2e-5) for step in one_process["curve"]]


@pytest.mark.parametrize("method", ["dskd", "overlap_kd"])
def test_answers_of_the_student_are_read_by_all_teachers(train, recipe, teachers, method, lora):
    """On-policy, packed, with LoRA."""
    block = teachers() | {"on_policy": {"fraction": 1, "max_new_tokens": 12, "log_samples": 1}, "method": method}
    if method != "dskd":
        block |= dict.fromkeys(("projector", "spaces", "agreement_mask"))
    block = {key: value for key, value in {**recipe["dskd"], **block}.items() if value is not None}
    recipe["dskd"].clear()
    packing = {"sample_packing": True, "sequence_len": 128, "micro_batch_size": 1}
    run = train("answers", dskd=block, **packing, **lora)
    for entry in steps(run):
        assert entry["dskd/rollout_answers"] > 0
        assert all(math.isfinite(entry[f"dskd/teacher{number}/kd"]) for number in (1, 2))
        kd = 0.7 * entry["dskd/teacher1/kd"] + 0.3 * entry["dskd/teacher2/kd"]
        assert entry["loss"] == pytest.approx(0.5 * entry["dskd/ce"] + 0.5 * kd, rel=1e-4)
    assert any(
        entry["dskd/teacher1/align_ratio"] > 0 and entry["dskd/teacher2/align_ratio"] > 0 for entry in steps(run)
    )


def test_each_teacher_has_a_cache(train, teachers):
    live = train("live", dskd=teachers())
    cached = train("cached", dskd=teachers(cache="auto"))
    names = "loss", "dskd/teacher1/kd", "dskd/teacher2/kd"
    # The states are kept in bfloat16.
    assert cached.curve(*names) == [pytest.approx(step, rel=2e-2) for step in live.curve(*names)]
    assert cached.output.count("the teacher's states come from ") == 2


def test_a_prepared_folder_holds_every_teachers_rows(train, teachers):
    """The rows of a long text for one teacher are dropped for all; a second run finds them prepared."""
    prepared = train("prepare", command="preprocess", dskd=teachers(sequence_len=100))
    assert "over-long teacher rows (drop)" in prepared.output
    run = train("trained", dskd=teachers(sequence_len=100))
    assert "responses without a counterpart" not in run.output
    assert json.loads((run.out / "dskd_state.json").read_text())["widths"] == [32, 48, 40]
