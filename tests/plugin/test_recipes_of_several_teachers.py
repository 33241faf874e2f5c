"""A recipe with several teachers, read by Axolotl and by our commands: rows for each, and which of them is meant."""

import json
import shutil

import pytest
import yaml
from click.testing import CliRunner

from benchmarks.tiny import wordpiece_copy
from dskd_plugin.cli import main
from dskd_plugin.columns import COLUMNS, numbered
from dskd_plugin.plan import make
from dskd_plugin.preflight import check_started

pytestmark = pytest.mark.usefixtures("fresh_plugin_manager")


@pytest.fixture
def of(recipe):
    """of(models, **block): the recipe with these teachers, in the form that suits their number."""

    def change(models, items=None, **block):
        named = [{"model": model, "dtype": "float32", **(items or {})} for model in models]
        teachers = {"teachers": named} if len(named) > 1 else {"teacher": named[0]}
        return {**recipe, "dskd": {"method": "overlap_kd", **teachers, **block}}

    return change


@pytest.fixture
def load(tmp_path, plugins_forgotten):
    def load(recipe):
        from axolotl.cli.config import load_cfg

        file = tmp_path / "recipe.yaml"
        file.write_text(yaml.safe_dump(recipe))
        with plugins_forgotten():
            return load_cfg(str(file))

    return load


@pytest.fixture
def prepare(tmp_path, plugins_forgotten):
    """The rows of a recipe after Axolotl's pipeline."""

    def prepare(recipe):
        from axolotl.cli.args import TrainerCliArgs
        from axolotl.cli.config import load_cfg
        from axolotl.common.datasets import load_datasets

        file = tmp_path / "recipe.yaml"
        file.write_text(yaml.safe_dump(recipe))
        with plugins_forgotten():
            data = load_datasets(cfg=load_cfg(str(file)), cli_args=TrainerCliArgs()).train_dataset
        return sorted(data, key=lambda row: row["input_ids"])

    return prepare


@pytest.mark.parametrize("kind", ["chat_template", "alpaca", "completion"])
def test_the_rows_are_those_of_each_teacher_alone(prepare, of, tiny, third, kind):
    models = tiny["teacher"], third
    settings = {"span_weight": 1.0}
    entries = {"datasets": [{"path": tiny["data"], "ds_type": "json", "type": kind}]}
    entries |= {"sequence_len": 64} if kind == "completion" else {}
    both = prepare({**of(models, **settings), **entries})
    for number, model in enumerate(models, start=1):
        alone = prepare({**of([model], **settings), **entries})
        assert len(alone) == len(both) >= 40
        for row, expected in zip(both, alone, strict=True):
            assert row["input_ids"] == expected["input_ids"] and row["labels"] == expected["labels"]
            for column in COLUMNS:
                assert row.get(numbered(column, number)) == expected.get(column), column
        assert sum(len(row["aligned_student"]) for row in alone) > 0
    assert not [name for name in both[0] if name.startswith("dskd_") or "unmatched" in name]


@pytest.mark.parametrize("strategy", ["drop", "truncate"])
def test_a_row_too_long_for_one_teacher_is_too_long(prepare, of, tiny, third, strategy):
    both = of((tiny["teacher"], third))
    both["dskd"]["teachers"][1]["sequence_len"] = 60
    rows = prepare({**both, "excess_length_strategy": strategy})
    assert all(len(row["teacher_input_ids_2"]) <= 60 for row in rows)
    assert 0 < len(rows) <= 48 and (len(rows) == 48) == (strategy == "truncate")
    if strategy == "truncate":
        assert all(max(row["aligned_teacher_2"], default=0) < 60 for row in rows)
        assert any(max(row["aligned_teacher"], default=0) >= 60 for row in rows)


def test_the_prepared_folder_is_that_of_the_teachers_and_their_order(load, of, tiny, third):
    def folder(*models, **items):
        return load(of(models, items))["dataset_prepared_path"]

    both = folder(tiny["teacher"], third)
    assert both == folder(tiny["teacher"], third, weight=4)
    others = [folder(third, tiny["teacher"]), folder(tiny["teacher"], tiny["sibling"]), folder(tiny["teacher"])]
    assert len({both, *others}) == 4


def wrong(name, tiny, third, folder):
    """A second teacher, changes of the block, and what is told of it."""
    if name == "no tokenizer that can be read":
        return wordpiece_copy(tiny["teacher"], folder / "wordpiece"), {}, "tokenizer of dskd.teachers[1].model"
    if name == "no tokenizer":
        shutil.copytree(third, folder / "bare", ignore=shutil.ignore_patterns("*token*"))
        return str(folder / "bare"), {}, "dskd.teachers[1].model: expected a tokenizer beside the model"
    if name == "no template":
        shutil.copytree(third, folder / "base")
        (folder / "base" / "chat_template.jinja").unlink()
        return str(folder / "base"), {}, "Name a template or a jinja file: dskd.teachers[1].chat_template"
    if name == "no folder":
        return "/no/such/folder", {}, "dskd.teachers[1].model: expected"
    return (
        tiny["teacher"],
        {"method": "kd"},
        "dskd.method beside dskd.teachers[1]: expected 'kd' only for one tokenizer",
    )


@pytest.mark.parametrize(
    "name",
    [
        "no tokenizer that can be read",
        "no tokenizer",
        "no template",
        "no folder",
        "another tokenizer where one is asked",
    ],
)
def test_what_is_wrong_with_the_second_teacher_is_told_of_the_second(load, of, tiny, third, tmp_path, name):
    model, block, told = wrong(name, tiny, third, tmp_path)
    recipe = of((tiny["sibling"], model), **block)
    with pytest.raises(ValueError) as error:
        load(recipe)
    assert told in str(error.value)
    if name == "no tokenizer that can be read":
        return  # needs a model library
    with pytest.raises(ValueError) as error:
        check_started(recipe, {})
    assert told in str(error.value)


def test_a_cache_that_is_not_there_is_told_before_anything_is_loaded(of, tiny, third):
    recipe = of((tiny["teacher"], third))
    recipe["dskd"]["teachers"][1]["cache"] = "no/states"
    with pytest.raises(ValueError, match=r"dskd.teachers\[1\].cache: expected the folder of a teacher cache"):
        check_started(recipe, {}, "recipe.yaml")


@pytest.fixture
def run(tmp_path):
    def run(recipe, command, *options):
        file = tmp_path / "recipe.yaml"
        file.write_text(yaml.safe_dump(recipe))
        return CliRunner().invoke(main, [*command.split(), str(file), *options])

    return run


def test_one_of_the_teachers_answers(run, of, tiny, third, tmp_path):
    recipe, out = of((tiny["teacher"], third)), tmp_path / "answers.jsonl"
    options = ["--out", str(out), "--max-new-tokens", "4", "--limit", "2", "--device", "cpu", "--keep-unfinished"]
    for number in ([], ["--teacher", "3"]):
        done = run(recipe, "generate", *options, *number)
        assert done.exit_code != 0 and "--teacher: expected which of the recipe's teachers" in done.output
        assert f"1: '{tiny['teacher']}', 2: '{third}'" in done.output
    done = run(recipe, "generate", *options, "--teacher", "2")
    assert done.exit_code == 0, done.output
    assert json.loads(out.with_suffix(".manifest.json").read_text())["teacher"]["model"] == third


def test_every_teacher_gets_a_cache(run, of, tiny, third, tmp_path):
    recipe = of((tiny["teacher"], third))
    refused = run(recipe, "cache build", "--out", str(tmp_path / "states"), "--device", "cpu")
    assert refused.exit_code != 0 and "--out: expected it left out beside dskd.teachers" in refused.output
    recipe["dskd"]["teachers"][0]["cache"] = str(tmp_path / "first")
    done = run(recipe, "cache build", "--device", "cpu")
    assert done.exit_code == 0, done.output
    models = {json.loads(file.read_text())["teacher"]["model"] for file in tmp_path.rglob("manifest.json")}
    assert models == {tiny["teacher"], third} and (tmp_path / "first" / "manifest.json").is_file()
    assert f"- model: {third}\n      cache: " in done.output


def test_a_plan_counts_every_teacher(of, tiny, third):
    def plan(*models, **block):
        recipe = of(models, **block)
        return make({**recipe, "sequence_len": 64}, ranks=1, on_gpu=False)

    models = tiny["teacher"], third
    both, (first, second) = plan(*models, method="dskd"), [plan(model, method="dskd") for model in models]
    stays = both.memory.stays
    for part in ("output head", "decoder"):
        sizes = [one.memory.stays[f"teacher's {part}"] for one in (first, second)]
        assert stays[f"teachers' {part}s"] == sum(sizes)
    assert stays["projector"] == sum(one.memory.stays["projector"] for one in (first, second))
    # States of each are kept, of the step before and of this one; their forwards come one after the other.
    facts = both.facts
    held = 2 * facts.accumulation - 1
    states = [held * facts.rows * 64 * one.teachers[0].counts.width * 4 for one in (first, second)]
    forwards = [one.memory.moments["teacher's forward"] for one in (first, second)]
    alone = [forward - own for forward, own in zip(forwards, states, strict=True)]
    assert both.memory.moments["teacher's forward"] == max(alone) + sum(states)
    assert both.work.flops["teacher"] == sum(one.work.flops["teacher"] for one in (first, second))
    weights = [one.as_json()["weights"]["teacher"] for one in (first, second)]
    assert both.as_json()["weights"]["teachers"] == weights
    need = 0.9 * both.memory.peak / 2**30
    small = make({**of(models, method="dskd"), "sequence_len": 64}, ranks=1, on_gpu=False, gpu_memory=need)
    assert any(one.change.lines.startswith("each of dskd.teachers: cache: FOLDER") for one in small.helpful)
