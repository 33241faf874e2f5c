"""Which checkpoints are resumed, which are refused, and what the refusal tells to write."""

import json
import os
import signal
import textwrap
from pathlib import Path

import pytest
import torch
import yaml

from dskd_plugin import kept_settings, preflight, state
from dskd_plugin.host import partial
from dskd_plugin.settings import parse_settings

PAIR = {
    "teacher": "org/teacher",
    "teacher_revision": None,
    "student_tokenizer": "aa",
    "widths": [32, 48],
    "method": "dskd",
    "alignment": "auto",
    "spaces": "student",
    "target": "exact",
    "shared": "events",
    "kd_weight": "fixed",
    "projector_init": "ideal",
}


BLOCK = {"teacher": {"model": "./teacher"}}
FILES = ["rng_state.pth", "optimizer.pt", "scheduler.pt"]


@pytest.fixture
def checkpoint(tmp_path):
    """``checkpoint(**changes)``: one of a run with these settings; None takes a key out of its file."""

    def make(weights=True, whole=True, **changes):
        state.save(tmp_path, {"t2s.linear.weight": torch.ones(2, 3)} if weights else {}, {**PAIR, **changes})
        if whole:
            (tmp_path / "trainer_state.json").write_text('{"global_step": 2}')
        for file in FILES:
            (tmp_path / file).touch()
        return tmp_path

    return make


def without(folder, *keys):
    file = folder / kept_settings.STATE
    file.write_text(json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k not in keys}))


def lines_of(error):
    return yaml.safe_load(str(error.value).split("The lines of that run's recipe:\n")[1])


def test_the_same_settings_are_resumed(checkpoint):
    state.check(checkpoint(), PAIR)


def test_a_run_without_projectors_needs_no_file(checkpoint):
    folder = checkpoint()
    assert (folder / state.WEIGHTS).is_file()
    folder = checkpoint(weights=False)
    assert not (folder / state.WEIGHTS).exists()  # that of the earlier run is gone as well
    state.check(folder, PAIR)


def test_a_lost_projector_file_is_noticed(checkpoint):
    folder = checkpoint()
    (folder / state.WEIGHTS).unlink()
    with pytest.raises(ValueError, match=f"without {state.WEIGHTS}"):
        state.check(folder, PAIR)
    without(folder, "projectors")  # before the names were kept, every run wrote the file
    with pytest.raises(ValueError, match=f"without {state.WEIGHTS}"):
        state.check(folder, PAIR)


def test_a_checkpoint_of_the_old_defaults_is_refused_with_the_lines_to_add(checkpoint):
    folder = checkpoint()
    without(folder, "target", "shared", "projector_init")
    with pytest.raises(ValueError, match="target 'projected' instead of 'exact', shared 'ids' instead of") as error:
        state.check(folder, PAIR)
    lines = lines_of(error)["dskd"]
    assert lines == {"target": "projected"}
    state.check(folder, {**PAIR, "target": "projected", "shared": "ids"})


def test_the_lines_that_a_refusal_names_are_accepted(checkpoint):
    """A recipe of two keys before a block was kept."""
    recipe = {"teacher": {"model": "./teacher"}}
    widths = {"widths": PAIR["widths"], "student_tokenizer": "a", "teacher_tokenizer": "b"}
    today = {**kept_settings.of(parse_settings(recipe)), **widths}
    folder = checkpoint(**{**today, "spaces": "both"})
    without(folder, "target", "shared", "kd_weight", "projector_init", "teachers", "settings")
    with pytest.raises(ValueError, match="target 'projected' instead of 'exact'") as error:
        state.check(folder, today)
    lines = lines_of(error)["dskd"]
    assert lines == {"spaces": "both", "target": "projected", "unpaired": "share"}
    then = kept_settings.of(parse_settings({**recipe, **lines}))
    state.check(folder, {**then, **widths})


def test_a_checkpoint_of_the_first_release_is_refused_with_the_lines_of_the_changelog(checkpoint, caplog):
    """Its file to the letter; after these lines nothing is said to have changed."""
    recipe = {"teacher": {"model": "./teacher"}}
    sides = {"widths": [32, 48], "student_tokenizer": "today's", "teacher_tokenizer": "today's"}
    today = {**kept_settings.of(parse_settings(recipe)), **sides}
    folder = checkpoint()
    first = {"dskd": "0.1.0", "teacher": "./teacher", "student_tokenizer": "a", "teacher_tokenizer": "b"}
    (folder / kept_settings.STATE).write_text(json.dumps({**first, "widths": [32, 48], "spaces": "both"}))
    with pytest.raises(ValueError, match="target 'projected' instead of 'exact'") as error:
        state.check(folder, today)
    changelog = (Path(__file__).parents[2] / "CHANGELOG.md").read_text(encoding="utf-8")
    told = textwrap.dedent(changelog.split("```yaml\n")[1].split("```")[0])
    assert lines_of(error) == yaml.safe_load(told)
    then = {**kept_settings.of(parse_settings({**recipe, **lines_of(error)["dskd"]})), **sides}
    state.check(folder, then)
    assert not caplog.records
    (folder / kept_settings.STATE).write_text(json.dumps({**first, "widths": [32, 64], "spaces": "both"}))
    with pytest.raises(ValueError, match="widths"):
        state.check(folder, then)


def test_what_unpaired_meant_is_told_where_it_changes(checkpoint, caplog):
    state.check(checkpoint(settings={"unpaired": "auto", "on_policy": None}), {**PAIR, "settings": {"unpaired": "ce"}})
    assert not caplog.records
    state.check(checkpoint(settings={"kd_ratio": 0.5}), {**PAIR, "settings": {"unpaired": "auto"}})
    assert "dskd.unpaired share -> ce" in caplog.text
    caplog.clear()
    plain = {**PAIR, "method": "sft"}
    state.check(checkpoint(**plain, settings={"kd_ratio": 0.5}), {**plain, "settings": {"unpaired": "auto"}})
    assert not caplog.records


def test_a_guard_that_a_run_began_without_is_told(checkpoint, caplog):
    state.check(checkpoint(settings={}), {**PAIR, "settings": {"guard": True}})
    assert "dskd.guard False -> True" in caplog.text
    caplog.clear()
    projected = {**PAIR, "target": "projected", "shared": "ids"}
    state.check(checkpoint(**projected, settings={}), {**projected, "settings": {"guard": True}})
    assert not caplog.records


def test_a_checkpoint_of_fixed_weights_has_no_balance_to_go_on_with(checkpoint):
    folder = checkpoint()
    without(folder, "kd_weight")
    state.check(folder, PAIR)
    with pytest.raises(ValueError, match="kd_weight 'fixed' instead of 'balanced'") as error:
        state.check(folder, {**PAIR, "kd_weight": "balanced"})
    assert lines_of(error) == {"dskd": {"kd_weight": "fixed"}}


def test_a_setting_that_the_method_does_not_have_is_not_asked_for(checkpoint):
    folder = checkpoint(method="uld")
    without(folder, "target", "shared", "projector_init")
    state.check(folder, {**PAIR, "method": "uld", "target": None, "shared": None, "projector_init": None})


def test_a_setting_that_may_change_in_the_middle_of_a_run_is_told(checkpoint, caplog):
    then = {"temperature": 1.0, "kd_ratio": 0.5, "divergence": {"kind": "forward_kl"}, "projector": {"lr": None}}
    folder = checkpoint(settings=then)
    state.check(folder, {**PAIR, "settings": then})
    assert not caplog.records
    now = {**then, "temperature": 2.0, "divergence": {"kind": "js", "beta": 0.5}, "not_there_then": 1}
    state.check(folder, {**PAIR, "settings": now})
    (record,) = caplog.records
    assert "dskd.temperature 1.0 -> 2.0, dskd.divergence.kind forward_kl -> js. " in record.getMessage()
    without(folder, "settings")  # of an earlier release
    caplog.clear()
    state.check(folder, {**PAIR, "settings": now})
    assert not caplog.records


def test_nested_settings_are_written_as_the_recipe_has_them(checkpoint):
    folder = checkpoint(teacher="./other", teacher_revision="v2", projector_init="random", widths=[32, 64])
    with pytest.raises(ValueError, match="widths") as error:
        state.check(folder, PAIR)
    block = {"teacher": {"model": "./other", "revision": "v2"}, "projector": {"init": "random"}}
    assert lines_of(error) == {"dskd": block}


@pytest.mark.parametrize("file", ["trainer_state.json", kept_settings.STATE])
def test_half_a_checkpoint_is_refused(checkpoint, file):
    folder = checkpoint()
    (folder / file).unlink()
    with pytest.raises(ValueError, match=f"expected a finished checkpoint of a dskd run, got .* without {file}"):
        state.check(folder, PAIR)


@pytest.mark.parametrize("left", ["", '{"global_st'])
@pytest.mark.parametrize("file", [kept_settings.STATE, "trainer_state.json"])
def test_a_file_that_was_cut_while_it_was_written_is_refused(checkpoint, file, left):
    folder = checkpoint()
    (folder / file).write_text(left)
    with pytest.raises(ValueError, match=f"expected a finished checkpoint of a dskd run, got .* whose {file} is cut"):
        state.check(folder, PAIR)


def test_weights_alone_are_refused(checkpoint):
    folder = checkpoint()
    for file in FILES:
        (folder / file).unlink()
    with pytest.raises(ValueError, match="save_only_model: true"):
        state.check(folder, PAIR)


@pytest.mark.parametrize("file", FILES)
def test_a_part_of_the_optimizers_state_that_was_removed_is_missed(file, checkpoint):
    """transformers skips optimizer and schedule where one of the two is gone, without a word."""
    folder = checkpoint()
    (folder / file).unlink()
    with pytest.raises(ValueError, match=r"expected a checkpoint with the optimizer's state, got .*were removed"):
        state.check(folder, PAIR)
    with pytest.raises(ValueError, match="expected a checkpoint with the optimizer's state"):
        preflight.check_checkpoint({"resume_from_checkpoint": str(folder)}, parse_settings(BLOCK))


def test_other_settings_are_told_before_anything_loads(checkpoint):
    now = parse_settings(BLOCK)
    folder = checkpoint(**kept_settings.of(now))
    recipe = {"resume_from_checkpoint": str(folder)}
    preflight.check_checkpoint(recipe, now)
    preflight.check_checkpoint(recipe, parse_settings(BLOCK | {"temperature": 2.0}))
    with pytest.raises(ValueError, match="method 'dskd' instead of 'uld'") as error:
        preflight.check_checkpoint(recipe, parse_settings(BLOCK | {"method": "uld"}))
    assert lines_of(error)["dskd"]["method"] == "dskd"
    with pytest.raises(ValueError, match=r"teacher '\./teacher' instead of '\./other'"):
        preflight.check_checkpoint(recipe, parse_settings({"teacher": {"model": "./other"}}))
    (folder / kept_settings.STATE).write_text('{"meth')
    preflight.check_checkpoint(recipe, parse_settings(BLOCK | {"method": "uld"}))  # told later, as half a file


@pytest.mark.parametrize(
    "files",
    [
        ["rng_state_0.pth", "rng_state_1.pth", "global_step4/mp_rank_00_model_states.pt"],
        ["rng_state_0.pth", "optimizer.bin", "scheduler.pt"],
        ["rng_state_0.pth", "optimizer_0/__0_0.distcp", "scheduler.pt"],
    ],
    ids=["DeepSpeed", "FSDP, whole", "FSDP, sharded"],
)
def test_the_state_of_every_engine_is_known(files, checkpoint):
    folder = checkpoint()
    for file in FILES:
        (folder / file).unlink()
    for file in files:
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).touch()
    state.check(folder, PAIR)


def test_a_student_lies_alone_among_the_weights_of_its_folder(checkpoint):
    """vLLM and others read every safetensors file of a model's folder."""
    folder = checkpoint()
    assert not list(folder.glob("*.safetensors")) and (folder / state.WEIGHTS).is_file()


def test_projectors_under_their_earlier_name_are_resumed_from(checkpoint, tmp_path):
    class Loss(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.t2s = torch.nn.ModuleDict({"linear": torch.nn.Linear(3, 2, bias=False)})

        def memory(self):
            return {}

        def remember(self, saved):
            pass

    folder, loss = checkpoint(), Loss()
    (folder / state.WEIGHTS).rename(folder / state.EARLIER_WEIGHTS)
    state.check(folder, PAIR)
    state.load(folder, loss)
    assert torch.equal(loss.t2s["linear"].weight, torch.ones(2, 3))
    state.save(folder, {}, PAIR)
    assert not (folder / state.EARLIER_WEIGHTS).exists()


def test_the_newest_checkpoint_is_of_this_run_and_no_copy_that_the_user_made(tmp_path):
    (tmp_path / "checkpoint-98").mkdir()
    (tmp_path / "checkpoint-98" / "trainer_state.json").write_text('{"global_step": 98}')
    os.utime(tmp_path / "checkpoint-98" / "trainer_state.json", ns=(0, 0))
    (tmp_path / partial.MARK).touch()
    assert partial.newest_checkpoint(tmp_path) is None
    for name in ("checkpoint-9", "checkpoint-10", "checkpoint-10-backup", "checkpoint-best", "checkpoint-11"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "trainer_state.json").write_text("{}" if name == "checkpoint-11" else '{"global_step": 1}')
    assert partial.newest_checkpoint(tmp_path) == tmp_path / "checkpoint-10"


def test_a_signal_while_the_student_is_saved_says_how_to_go_on():
    said = []
    interruption = partial.Interruption(several=False, words=lambda: said.append(True))
    interruption.on_train_begin(None, None, None)
    interruption.on_train_end(None, None, None)
    interruption.trained = True
    with pytest.raises(SystemExit):
        interruption.on_signal(signal.SIGTERM, None)
    assert said == [True] and interruption.signal == signal.SIGTERM
