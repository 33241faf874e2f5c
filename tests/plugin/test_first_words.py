"""Whose error a message is, which recipe a command line means, and what a model card may tell."""

import json
import os
import pickle
from pathlib import Path

import pytest

from dskd_plugin import errors, folders, last_words, preflight
from dskd_plugin.host.model_card import public


def raised(act):
    try:
        act()
    except BaseException as error:
        return error
    raise AssertionError("nothing was raised")


def test_an_error_is_ours_by_its_class():
    ours = raised(lambda: folders.check_files("base_model", "/no/such/folder"))
    assert errors.own_message(ours) == str(ours)
    ours = errors.DSKDSetupError("model 'x'", "a head", "none", "Use another.")
    assert errors.own_message(ours) == "model 'x': expected a head, got none. Use another."
    both = errors.Mistakes([ours, errors.SettingError("a", 1, 2, "Do it.")])
    assert errors.own_message(both) == f"{ours}\na: expected 1, got 2. Do it."
    # The same words of somebody else, and a mistake inside our code.
    assert errors.own_message(raised(lambda: int("expected"))) is None
    assert errors.own_message(raised(lambda: folders.check_files("x", None))) is None
    assert errors.own_message(KeyboardInterrupt()) is None


def test_an_error_of_a_worker_process_is_ours():
    import multiprocess

    with multiprocess.get_context("spawn").Pool(1) as pool:
        ours = raised(lambda: pool.apply(folders.check_files, ("base_model", "/no/such/folder")))
        theirs = raised(lambda: pool.apply(int, ("expected",)))
    assert errors.own_message(ours) == str(ours)
    assert errors.own_message(theirs) is None


@pytest.mark.parametrize("kind", [errors.SettingError, errors.DSKDSetupError])
def test_an_error_of_ours_survives_pickling_and_is_the_kind_that_python_knows(kind):
    one = kind("dskd.x", "a number", None, "Write one.")
    again = pickle.loads(pickle.dumps(errors.Mistakes([one, one])))
    assert str(again) == f"{one}\n{one}" and type(again.errors[0]) is kind
    assert again.errors[0].parts == ("dskd.x", "a number", "None", "Write one.")
    assert isinstance(one, ValueError if kind is errors.SettingError else RuntimeError)


@pytest.fixture
def wrong(recipe, tmp_path, monkeypatch):
    """A recipe with a mistake, in the working folder."""
    import yaml

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DSKD_RUN", raising=False)
    wrong = {**recipe, "dskd": {**recipe["dskd"], "kd_ratio": 7}}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(wrong))
    yield "r.yaml"
    for name in (last_words.RUN, last_words.COMMAND):
        os.environ.pop(name, None)


LAUNCHED = "axolotl.cli.train"


def test_the_recipe_is_found_in_every_way_to_start(wrong):
    for module, words, original in (
        (LAUNCHED, ["-m", wrong, "--max-steps=3"], ["python", "-m", LAUNCHED, wrong]),
        (LAUNCHED, ["-m", wrong], ["python", "-u", "-m", LAUNCHED, wrong]),
    ):
        assert "dskd.kd_ratio" in preflight.mistakes_of(module, words, original)


def test_processes_that_only_import_a_command_are_left_alone(wrong):
    assert preflight.mistakes_of(LAUNCHED, ["tool", wrong], ["python", "tool", wrong]) is None
    assert preflight.mistakes_of("axolotl.cli.main", ["pytest", "train", wrong], ["python", "pytest"]) is None
    for words in (["inference", wrong], ["train", wrong, "--help"], ["train", wrong, "--cloud", "c.yaml"], []):
        assert preflight.mistakes_of("axolotl.cli.main", ["/bin/axolotl", *words], []) is None


def test_kernels_that_no_device_here_can_run_are_refused_where_the_student_trains(wrong, recipe):
    import torch
    import yaml

    if torch.cuda.is_available():
        pytest.skip("needs a machine without CUDA")
    Path(wrong).write_text(yaml.safe_dump({**recipe, "dskd": {**recipe["dskd"], "impl": "fused"}}))

    def said(command):
        return preflight.mistakes_of("axolotl.cli.main", ["axolotl", command, wrong], [])

    assert "dskd.impl: expected 'blocks' or 'auto' without a CUDA device" in said("train")
    assert said("preprocess") is None


def _said(recipe_text, folder):
    (folder / "r.yaml").write_text(recipe_text, encoding="utf-8")
    return preflight.mistakes_of("axolotl.cli.main", ["axolotl", "train", "r.yaml"], [])


@pytest.mark.parametrize(
    ("started", "goes_on"),
    [
        (None, "train r.yaml --resume-from-checkpoint out/checkpoint-3"),
        (["train", "a b.yaml"], "train 'a b.yaml' --resume-from-checkpoint out/checkpoint-3"),
        (
            ["train", "r.yaml", "--learning-rate=1e-4", "--resume_from_checkpoint", "out/checkpoint-1", "--seed", "2"],
            "train r.yaml --learning-rate=1e-4 --seed 2 --resume-from-checkpoint out/checkpoint-3",
        ),
        (
            ["train", "r.yaml", "--auto-resume-from-checkpoints", "--resume-from-checkpoint=x", "--", "--nproc=2"],
            "train r.yaml --resume-from-checkpoint out/checkpoint-3 -- --nproc=2",
        ),
    ],
)
def test_a_stopped_run_goes_on_with_the_options_it_was_started_with(monkeypatch, started, goes_on):
    monkeypatch.delenv(last_words.COMMAND, raising=False)
    if started is not None:
        monkeypatch.setenv(last_words.COMMAND, json.dumps(started))
    assert last_words.command("r.yaml", "--resume-from-checkpoint", "out/checkpoint-3") == f"axolotl {goes_on}"


def test_what_is_no_recipe_is_told_with_its_line(wrong, tmp_path):
    good = "plugins: [dskd]\ndskd:\n  teacher:\n    model: x\n"
    assert "r.yaml: expected an Axolotl recipe in YAML, got line 5, column 1" in _said(
        good + "\tmethod: kd\n", tmp_path
    )
    assert "r.yaml: expected one `dskd:` block, got several" in _said(good + "dskd:\n  method: kd\n", tmp_path)


def test_a_value_of_another_shape_is_told(recipe, wrong, tmp_path):
    import yaml

    def said(**changed):
        return _said(yaml.safe_dump({**recipe, **changed}), tmp_path)

    assert "plugins: expected 'dskd' in the list" in said(plugins="dskd")
    assert "got the text 'dskd'" in said(plugins="dskd")
    assert "Add dskd to that list" in said(plugins=["axolotl.integrations.liger.LigerPlugin"])
    assert "plugins: expected 'dskd', got 'dskd_plugin.DSKD'" in said(plugins=["dskd_plugin.DSKD"])
    assert said(plugins=["dskd_plugin.DSKDPlugin"]) is None
    assert "datasets: expected a list of entries, got 'gold.jsonl'" in said(datasets="gold.jsonl")
    assert "datasets: expected a list of entries" in said(datasets={"path": "gold.jsonl"})
    # Axolotl takes a number in quotes.
    assert said(sequence_len="512", micro_batch_size="2", context_parallel_size="1", tiled_mlp=True) is None
    assert "context_parallel_size: expected 1 beside a `dskd:` block, got 2" in said(context_parallel_size="2")
    assert "sequence_len: expected a whole number, got '2k'" in said(sequence_len="2k", tiled_mlp=True)
    (tmp_path / "bad.json").write_text("{bad")
    assert "deepspeed: expected a JSON file, got 'bad.json' (" in said(deepspeed="bad.json")
    for step in (4, 12):
        (tmp_path / "out" / f"checkpoint-{step}").mkdir(parents=True)
        os.utime(tmp_path / "out" / f"checkpoint-{step}", (step, step))
    assert "got out, the output_dir of a run. Give the checkpoint inside it: out/checkpoint-12." in said(
        resume_from_checkpoint="out"
    )


def test_what_the_command_line_replaces_is_not_judged(recipe, tmp_path, monkeypatch):
    import yaml

    monkeypatch.chdir(tmp_path)
    changed = {**recipe, "base_model": "/no/student", "deepspeed": "no.json"}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(changed))
    command = ["python", "-m", LAUNCHED]
    assert "base_model" in preflight.mistakes_of(LAUNCHED, ["-m", "r.yaml", "--deepspeed", "z.json"], command)
    words = ["-m", "r.yaml", f"--base-model={recipe['base_model']}", "--deepspeed", "z.json"]
    assert preflight.mistakes_of(LAUNCHED, words, command) is None


def test_a_checkpoint_of_the_command_line_is_looked_at(recipe, tmp_path, monkeypatch):
    import yaml

    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
    for words in (["--resume-from-checkpoint", "no/checkpoint-7"], ["--resume_from_checkpoint=no/checkpoint-7"]):
        said = preflight.mistakes_of(LAUNCHED, ["-m", "r.yaml", *words], ["python", "-m", LAUNCHED])
        assert "resume_from_checkpoint: expected the folder of a checkpoint, got 'no/checkpoint-7'" in said


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"lora_model_dir": "./none"},
            "lora_model_dir: expected the folder of a PEFT adapter, .*, which does not exist",
        ),
        ({"lora_model_dir": "empty"}, "lora_model_dir: .*got 'empty' without one. Check the path"),
        ({"output_dir": "r.txt"}, "output_dir: expected a folder.*got 'r.txt': there is r.txt, which is a file"),
        ({"output_dir": "r.txt/out"}, "output_dir: .*got 'r.txt/out': there is .*r.txt, which is a file"),
        ({"dataset_prepared_path": "r.txt"}, "dataset_prepared_path: expected a folder.*which is a file"),
    ],
)
def test_places_of_a_run_that_cannot_be_used_are_told_at_once(recipe, tmp_path, monkeypatch, changes, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "r.txt").touch()
    preflight.check_started({**recipe, "lora_model_dir": "some-org/adapter", "output_dir": "new/out"}, {})
    with pytest.raises(ValueError, match=words):
        preflight.check_started({**recipe, **changes}, {})


def test_a_cached_hub_model_is_enough_without_network(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match="HF_HUB_OFFLINE is set, got the hub id 'org/model'"):
        folders.check_files("base_model", "org/model")
    (tmp_path / "models--org--model").mkdir()
    folders.check_files("base_model", "org/model")
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    folders.check_files("base_model", "org/another")


def test_a_card_keeps_what_is_no_path_of_the_machine():
    recipe = {
        "base_model": "/home/me/models/student",
        "datasets": [{"path": "/data/rows/train.jsonl", "data_files": ["~/rows/a.jsonl"]}],
        "chat_template_jinja": "{{ '[/INST]' }}\n/a/b",
        "dskd": {"teacher": {"model": "org/teacher"}},
        "output_dir": "./outputs/run",
        "deepspeed": "file:///etc/zero/z2.json",
        "prompt": "/think",
        "seed": 1,
    }
    assert public(recipe) == {
        **recipe,
        "base_model": "student",
        "datasets": [{"path": "train.jsonl", "data_files": ["a.jsonl"]}],
        "deepspeed": "z2.json",
    }


def test_the_summary_names_every_value_of_all_teachers_together():
    from dskd_plugin.host.summary import changes

    first = {"loss": 2.0, "dskd/ce": 1.5, "dskd/teacher_lead": 0.5, "dskd/teacher1/kd": 1.0, "dskd/rollout_cut": 1.0}
    last = {**first, "loss": 1.0, "dskd/teacher_lead": -0.5}
    shown = changes([{"eval_loss": 3.0}, first, last, {"train_runtime": 9.0}])
    assert shown == {"loss": (2.0, 1.0), "ce": (1.5, 1.5), "teacher_lead": (0.5, -0.5)}
