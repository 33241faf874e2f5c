"""What the real command says when something is wrong, when it is stopped, and what such a run leaves behind."""

import json
import re
import shutil
import signal
import time
from functools import partial
from pathlib import Path

import pytest

from benchmarks.tiny import wordpiece_copy

pytestmark = pytest.mark.e2e

LAUNCHERS = ("accelerate", "torchrun", "python")
AT_ONCE = 5.0  # seconds later than `axolotl --help`


@pytest.fixture(scope="module")
def run_axolotl(run_axolotl):
    """What a command says from its first import on needs an interpreter of its own."""
    return partial(run_axolotl, fresh=True)


@pytest.fixture(scope="module")
def seconds_of_help(tmp_path_factory, run_axolotl):
    start = time.monotonic()
    run = run_axolotl({"output_dir": str(tmp_path_factory.mktemp("help") / "out")}, help_only=True)
    assert run.code == 0 and "Usage: axolotl" in run.output
    return time.monotonic() - start


def block(**changes):
    return lambda recipe: {"dskd": {**recipe["dskd"], **changes}}


def fixed(**changes):
    return lambda recipe: changes


MISTAKES = {
    "out of bounds": (block(kd_ratio=1.5), "dskd.kd_ratio: expected less than or equal to 1, got 1.5. "),
    "unknown key": (block(temprature=2.0), "dskd.temprature: expected one of "),
    "misspelt block": (fixed(dskd=None, dksd={}), "dksd: expected the key 'dskd'"),
    "plugin not listed": (fixed(plugins=[]), "plugins: expected 'dskd' in the list"),
    "two tokenizers": (
        lambda recipe: {"dskd": {"teacher": recipe["dskd"]["teacher"], "method": "kd"}},
        "dskd.method: expected 'kd' only for one tokenizer, got a student with 357 tokens and a teacher with 4",
    ),
    "template": (
        lambda recipe: {"dskd": {"teacher": {**recipe["dskd"]["teacher"], "chat_template": "chatmll"}}},
        "dskd.teacher.chat_template: expected 'tokenizer_default'",
    ),
    "positions": (
        lambda recipe: {"dskd": {"teacher": {**recipe["dskd"]["teacher"], "sequence_len": 513}}},
        "dskd.teacher.sequence_len: expected at most the 512 positions",
    ),
    "no teacher folder": (
        block(teacher={"model": "./no-teacher"}),
        "dskd.teacher.model: expected a model folder or a hub id, got './no-teacher'",
    ),
    "no student folder": (fixed(base_model="/no/student"), "base_model: expected a model folder or a hub id"),
    "no data": (
        fixed(datasets=[{"path": "data/rows.jsonl", "ds_type": "json", "type": "chat_template"}]),
        "datasets[0].path: expected a file, a folder or a hub id, got 'data/rows.jsonl'",
    ),
    "no engine file": (fixed(deepspeed="zero9.json"), "deepspeed: expected a JSON file, got 'zero9.json'"),
    "no checkpoint": (fixed(resume_from_checkpoint="out/checkpoint-7"), "resume_from_checkpoint: expected the folder"),
    "setting that does not mix": (fixed(rl="dpo"), "rl: expected it unset beside a `dskd:` block, got 'dpo'. "),
    "hub id without network": (
        block(teacher={"model": "some-org/some-teacher"}),
        "dskd.teacher.model: expected a model of this machine, because HF_HUB_OFFLINE is set, "
        "got the hub id 'some-org/some-teacher'",
    ),
}


@pytest.mark.parametrize("number", range(len(MISTAKES)), ids=list(MISTAKES))
def test_a_mistake_is_told_at_once_and_alone(run_axolotl, recipe, seconds_of_help, number):
    make, says = list(MISTAKES.values())[number]
    wrong = {key: value for key, value in {**recipe, **make(recipe)}.items() if value is not None}
    start = time.monotonic()
    run = run_axolotl(wrong, launcher=LAUNCHERS[number % len(LAUNCHERS)])
    assert time.monotonic() - start < seconds_of_help + AT_ONCE
    assert run.code == 1
    (line,) = run.output.strip().splitlines()
    assert line.startswith(says)
    assert not run.out.exists() and not Path(recipe["dataset_prepared_path"]).exists()
    if "HF_HUB_OFFLINE" in says:
        assert "--local-dir <folder>" in line and "dskd.teacher.model: <folder>" in line


@pytest.fixture
def wordpiece(recipe, tmp_path):
    """A mistake that only the libraries see: the teacher's tokenizer does not tell what its tokens spell."""
    folder = wordpiece_copy(recipe["dskd"]["teacher"]["model"], tmp_path / "wordpiece-teacher")
    return {**recipe, "dskd": {"teacher": {"model": folder}}}


def assert_ours_is_last(run):
    assert run.code == 1
    last = run.output.rstrip().rsplit("\n\n", 1)[-1]
    assert last.startswith("tokenizer of dskd.teacher.model: ") and "WordPiece" in last and "\n" not in last


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_later_error_of_ours_stands_last_without_a_traceback(run_axolotl, wordpiece, launcher):
    run = run_axolotl(wordpiece, launcher=launcher)
    assert_ours_is_last(run)
    assert "Traceback" not in run.output and "CalledProcessError" not in run.output


def test_the_traceback_is_there_for_who_asks(run_axolotl, wordpiece):
    run = run_axolotl(wordpiece, "preprocess", extra_env={"DSKD_TRACEBACK": "1"})
    assert_ours_is_last(run)
    assert "Traceback" in run.output and "in read_table" in run.output


def by_signal(*, ctrl_c, sigterm):
    """Under which launcher each signal comes."""
    rows = [
        pytest.param(ctrl_c, signal.SIGINT, "Ctrl-C (SIGINT)", id="Ctrl-C"),
        pytest.param(sigterm, signal.SIGTERM, "SIGTERM", id="SIGTERM", marks=pytest.mark.more),
    ]
    return pytest.mark.parametrize(("launcher", "number", "by"), rows)


@by_signal(ctrl_c="accelerate", sigterm="python")
def test_stopped_before_the_training_it_says_so_and_nothing_else(run_axolotl, recipe, launcher, number, by):
    log = f"{recipe['output_dir']}/debug.log"  # the first that Axolotl writes, before it reads rows
    run = run_axolotl(recipe, launcher=launcher, interrupt=(number, log))
    assert run.code != 0 and "Traceback" not in run.output and "CalledProcessError" not in run.output
    last = run.output.rstrip().splitlines()[-1]
    start = f"dskd: stopped by {by} before the training began. Start again: axolotl train {run.out}.yaml"
    assert last == f"{start} --launcher {launcher}"
    assert not (run.out / "model.safetensors").exists()


@by_signal(ctrl_c="python", sigterm="torchrun")
def test_stopped_while_the_projector_is_fitted_there_is_no_student(run_axolotl, recipe, launcher, number, by):
    fitted = {**recipe, "dskd": {**recipe["dskd"], "projector": {"init": "fitted"}}}
    run = run_axolotl(fitted, launcher=launcher, interrupt=(number, "said: Fitting the projector"))
    assert run.code != 0 and "CalledProcessError" not in run.output and "dskd: projector fitted" not in run.output
    assert not (run.out / "model.safetensors").exists() and (run.out / "PARTIAL.txt").exists()
    first, second = run.output.rstrip().splitlines()[-2:]
    assert first.startswith(f"dskd: stopped by {by} before the first step. {run.out} holds no finished student")
    assert second.startswith("There is no checkpoint yet. Start anew: axolotl train ")


@pytest.mark.more
def test_killed_while_the_projector_is_fitted_and_started_again(run_axolotl, recipe):
    fitted = {**recipe, "dskd": {**recipe["dskd"], "projector": {"init": "fitted"}}}
    killed = run_axolotl(fitted, kill_after="said: Fitting the projector")
    assert killed.code != 0 and "dskd: projector fitted" not in killed.output
    assert (killed.out / "PARTIAL.txt").exists()
    assert not (killed.out / "model.safetensors").exists()
    again = run_axolotl(fitted)
    assert again.code == 0 and "dskd: projector fitted on" in again.output
    assert (again.out / "model.safetensors").exists() and not (again.out / "PARTIAL.txt").exists()


def test_a_hub_that_cannot_be_reached_is_named(run_axolotl, recipe):
    """Without HF_HUB_OFFLINE: the library waits for the network, and the error says how to do without."""
    absent = {**recipe, "dskd": {"teacher": {"model": "someone/no-such-model"}}}
    unreachable = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"}
    run = run_axolotl(absent, "preprocess", extra_env=unreachable)
    assert run.code == 1 and "Traceback" not in run.output
    last = run.output.rstrip().rsplit("\n\n", 1)[-1]
    assert last.startswith("dskd.teacher.model: expected a model folder or a hub id, got 'someone/no-such-model'")
    assert "copy the model here" in last


def assert_stopped(run, by):
    """Nothing in the folder looks finished, and the last lines say how to go on; returns the checkpoint they name."""
    assert not (run.out / "model.safetensors").exists()
    assert "not the finished student" in (run.out / "PARTIAL.txt").read_text()
    first, second, third = run.output.rstrip().splitlines()[-3:]
    assert re.match(rf"dskd: stopped by {re.escape(by)} after step \d+ of 100000\. .* holds no finished student", first)
    command = rf"axolotl train {run.out}\.yaml( --launcher \w+)?"  # as it was started
    assert re.match(rf"Go on:      {command} --resume-from-checkpoint {run.out}/checkpoint-", second)
    assert re.fullmatch(rf"Start anew: {command}, with another output_dir", third)
    checkpoint = Path(second.rsplit(" ", 1)[1])
    assert (checkpoint / "trainer_state.json").is_file()
    return checkpoint


def test_ctrl_c_leaves_a_checkpoint_to_go_on_from(run_axolotl, recipe, tiny):
    """Without projectors: their file is neither written nor asked for. The best checkpoint is the first one."""
    method = {"teacher": recipe["dskd"]["teacher"], "method": "overlap_kd"}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True}
    evaluated = {"val_set_size": 0.2, "eval_steps": 2, "save_total_limit": 1, **best}
    long = {**recipe, "dskd": method, "max_steps": 100_000, **evaluated}
    first = f"{recipe['output_dir']}/checkpoint-2/trainer_state.json"
    run = run_axolotl(long, launcher="accelerate", interrupt=(signal.SIGINT, first))
    assert run.code != 0 and "CalledProcessError" not in run.output
    checkpoint = assert_stopped(run, "Ctrl-C (SIGINT)")
    step = int(checkpoint.name.rsplit("-", 1)[1])
    # The checkpoint of the interruption, not the last of the schedule and not the best.
    assert step == json.loads((checkpoint / "trainer_state.json").read_text())["global_step"]
    assert f"after step {step} of" in run.output

    whole = {**recipe, "dskd": method, "max_steps": step + 1}
    again = run_axolotl(whole, command_options=["--resume-from-checkpoint", str(checkpoint)])
    assert again.code == 0, again.output[-3000:]
    assert [entry["step"] for entry in again.log if "loss" in entry] == list(range(1, step + 2))
    assert (again.out / "model.safetensors").is_file() and not (again.out / "PARTIAL.txt").exists()
    assert f"\ndskd: finished {step + 1} steps, 1 of them since it went on in " in again.output
    assert not list(again.out.rglob("dskd/projectors.safetensors"))


def test_sigterm_to_the_command_reaches_the_training(run_axolotl, recipe):
    first = f"{recipe['output_dir']}/checkpoint-2/trainer_state.json"
    long = {**recipe, "max_steps": 100_000}
    run = run_axolotl(long, launcher="torchrun", interrupt=(signal.SIGTERM, first))
    assert run.code != 0
    assert_stopped(run, "SIGTERM")


def test_an_error_in_training_keeps_its_traceback_and_says_how_to_go_on(run_axolotl, recipe):
    blocked = Path(recipe["output_dir"]) / "checkpoint-4"
    blocked.parent.mkdir(parents=True)
    blocked.write_text("a file where the second checkpoint belongs")
    run = run_axolotl({**recipe, "max_steps": 100_000})
    assert run.code == 1
    assert "Traceback" in run.output and "checkpoint-4" in run.output
    assert assert_stopped(run, "an error").name == "checkpoint-2"


def test_a_template_without_an_end_of_turn_is_named_with_its_side(run_axolotl, recipe, tmp_path):
    """A student and a teacher whose templates end a turn by another token than their tokenizers."""
    folders = {}
    for side, folder in (("student", recipe["base_model"]), ("teacher", recipe["dskd"]["teacher"]["model"])):
        folders[side] = tmp_path / side
        shutil.copytree(folder, folders[side])
        template = folders[side] / "chat_template.jinja"
        template.write_text(
            "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
            "{% if add_generation_prompt %}assistant: {% endif %}"
        )
    changes = {"base_model": str(folders["student"]), "dskd": {"teacher": {"model": str(folders["teacher"])}}}
    run = run_axolotl({**recipe, **changes}, "preprocess")
    assert run.code == 0, run.output[-3000:]
    assert "the student's chat template does not contain '<|im_end|>'" in run.output
    assert "Write in the recipe eot_tokens: [" in run.output
    assert "the teacher's chat template does not contain '</s>'" in run.output
    assert "dskd.teacher.chat_template: <name or jinja file>" in run.output
    assert "not found in chat_template" not in run.output
