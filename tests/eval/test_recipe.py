"""Models of a recipe: who is teacher, base, sft and student."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from dskd_eval import recipe
from dskd_eval.errors import UserError


@pytest.fixture
def pair(tmp_path: Path, tiny_model: Path) -> Path:
    """A folder with a distillation recipe, an SFT recipe beside it, and all their models."""
    for name in ("base", "teacher", "out/dskd", "out/sft"):
        shutil.copytree(tiny_model, tmp_path / name)
    (tmp_path / "dskd.yaml").write_text(
        "base_model: ./base\noutput_dir: out/dskd\nplugins: [dskd]\ndskd:\n  teacher: {model: teacher, revision: v1}\n"
    )
    (tmp_path / "sft.yaml").write_text("base_model: ./base\noutput_dir: out/sft\n")
    return tmp_path / "dskd.yaml"


def test_roles_and_folders(pair: Path) -> None:
    refs = recipe.models_of(pair)
    assert [(ref.role, Path(ref.source).name) for ref in refs] == [
        ("teacher", "teacher"), ("base", "base"), ("sft", "sft"), ("student", "dskd"),
    ]  # fmt: skip
    assert refs[0].revision == "v1"
    assert all(Path(ref.source).is_absolute() for ref in refs)


def test_recipe_run_compares_with_the_base_and_states_the_gap(
    pair: Path, own_task: Callable[..., Path], tmp_path: Path, invoke: Callable[..., Any]
) -> None:
    """Four copies of one model: no difference, and no gap that could be closed."""
    done = invoke("--recipe", pair, "--task-file", own_task(), "--limit", 4, "--output", tmp_path / "run")
    assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / "run" / "results.json").read_text())["comparisons"]
    assert found["baseline"] == "base base"
    assert [pair["model"] for pair in found["pairs"]] == ["teacher teacher", "sft sft", "student dskd"]
    assert all(row["difference"] == 0.0 and row["p"] == 1.0 for pair in found["pairs"] for row in pair["rows"])
    assert [gap["rows"][0]["closed"] for gap in found["gaps"]] == [None, None]
    assert "teacher not above base" in done.output


def test_without_an_sft_output_there_is_none(pair: Path) -> None:
    shutil.rmtree(pair.parent / "out" / "sft")
    assert [ref.role for ref in recipe.models_of(pair)] == ["teacher", "base", "student"]


@pytest.mark.parametrize("state", ["begun", "stopped"])
def test_a_training_that_has_not_ended_is_no_model(pair: Path, state: str) -> None:
    """Axolotl saves the settings before the first step; a stopped training says so in a file beside its weights."""
    for name in ("sft", "dskd"):
        folder = pair.parent / "out" / name
        if state == "begun":
            (folder / "model.safetensors").unlink()
        else:
            (folder / "PARTIAL.txt").write_text("Not the finished student.")
        if name == "sft":
            assert [ref.role for ref in recipe.models_of(pair)] == ["teacher", "base", "student"]
    with pytest.raises(UserError, match=r"expected the folder of a trained student"):
        recipe.models_of(pair)


def test_recipe_without_a_teacher_compares_base_and_output(pair: Path) -> None:
    assert [ref.role for ref in recipe.models_of(pair.parent / "sft.yaml")] == ["base", "student"]


def test_hub_ids_stay(pair: Path) -> None:
    pair.write_text(pair.read_text().replace("model: teacher", "model: org/big"))
    assert recipe.models_of(pair)[0].source == "org/big"


def test_several_teachers_are_all_there_and_one_is_to_be_named_for_the_gap(
    pair: Path, own_task: Callable[..., Path], tmp_path: Path, invoke: Callable[..., Any]
) -> None:
    """One of the two weighs other than the first, so that no gap is closed before one of them is named."""
    other = pair.parent / "more" / "teacher"
    shutil.copytree(pair.parent / "teacher", other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    entries = "teachers: [{model: teacher, weight: 2.0, revision: v1}, {model: more/teacher, chat_template: chatml}]"
    pair.write_text(pair.read_text().replace("teacher: {model: teacher, revision: v1}", entries))
    refs = recipe.models_of(pair)
    assert [ref.name for ref in refs[:3]] == ["teacher teacher", "teacher teacher (2)", "base base"]
    assert [ref.source for ref in refs[:2]] == [str(pair.parent / "teacher"), str(other)]
    assert [(ref.role, ref.revision, ref.chat_template) for ref in refs[:2]] == [
        ("teacher", "v1", "tokenizer_default"), ("teacher", None, "chatml"),
    ]  # fmt: skip

    run = ["--recipe", pair, "--task-file", own_task(), "--limit", 4]
    done = invoke(*run, "--output", tmp_path / "run")
    assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / "run" / "results.json").read_text())["comparisons"]
    assert "teacher teacher (2)" in [made["model"] for made in found["pairs"]]
    assert found["gaps"] == [] and "several models have the role teacher" in done.output
    named = invoke("compare", tmp_path / "run", "--teacher", "teacher teacher (2)")
    assert named.exit_code == 0 and "teacher not above base" in named.output, named.output


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("base_model: ./base\n", "", r"expected base_model"),
        ("out/dskd", "out/none", r"output_dir: expected the folder of a trained student.*axolotl train"),
        ("{model: teacher, revision: v1}", "{modell: teacher}", r"dskd.teacher.model"),
        ("teacher: {model: teacher, revision: v1}", "teachers: org/big", r"dskd.teachers: expected a list"),
        ("teacher: {model: teacher, revision: v1}", "teachers: [org/a, {}]", r"dskd.teachers\[1\].model"),
        ("plugins: [dskd]", "plugins: [", r"readable YAML recipe"),
    ],
)
def test_bad_recipes(pair: Path, old: str, new: str, problem: str) -> None:
    pair.write_text(pair.read_text().replace(old, new))
    with pytest.raises(UserError, match=problem):
        recipe.models_of(pair)


THINKS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if think %}(thinking)\n{% endif %}{% endif %}"
)


def prompts(path: Path, own_task: Callable[..., Path], invoke: Callable[..., Any], *more: object) -> dict[str, str]:
    """What each model of a recipe is shown, by its name, from a dry run."""
    done = invoke("--recipe", path, "--task-file", own_task(), "--limit", 1, "--dry-run", *more)
    assert done.exit_code == 0, done.output
    assert "Traceback" not in done.output
    models = [ref.name for ref in recipe.models_of(path)]
    parts = [done.output.split(f" {name} ", 1)[1] for name in models]
    return {name: part.split("─ reference", 1)[0] for name, part in zip(models, parts, strict=True)}


@pytest.mark.parametrize("choice", ["alpaca", "own.jinja", "tokenizer_default"])
def test_the_teacher_reads_in_the_template_of_the_recipe(
    choice: str, pair: Path, own_task: Callable[..., Path], invoke: Callable[..., Any]
) -> None:
    pytest.importorskip("axolotl")
    (pair.parent / "own.jinja").write_text("{% for m in messages %}<<{{ m.content }}>>{% endfor %}")
    pair.write_text(pair.read_text().replace("revision: v1", f"chat_template: {choice}"))
    shown = prompts(pair, own_task, invoke)
    expected = {"alpaca": "### Instruction:", "own.jinja": "<<", "tokenizer_default": "<|im_start|>user"}[choice]
    assert expected in shown["teacher teacher"]
    assert all("<|im_start|>user" in text for name, text in shown.items() if name != "teacher teacher")


@pytest.mark.parametrize("teachers", [None, {}, {"think": True}, {"think": False}])
@pytest.mark.parametrize("recipes", [None, {"think": True}])
def test_template_variables_of_the_teacher_and_of_the_recipe(
    recipes: Any, teachers: Any, pair: Path, own_task: Callable[..., Path], invoke: Callable[..., Any]
) -> None:
    """The recipe's hold for all of its models; the teacher's own, where there are any, for the teacher instead."""
    for folder in ("base", "teacher", "out/dskd", "out/sft"):
        (pair.parent / folder / "chat_template.jinja").write_text(THINKS)
    more = "" if teachers is None else f", chat_template_kwargs: {json.dumps(teachers)}"
    text = pair.read_text().replace(", revision: v1", more)
    pair.write_text(text + ("" if recipes is None else f"chat_template_kwargs: {json.dumps(recipes)}\n"))
    shown = prompts(pair, own_task, invoke)
    thinking = {name for name, prompt in shown.items() if "(thinking)" in prompt}
    expected = {"base base", "student dskd"} if recipes else set()
    expected |= {"teacher teacher"} if (recipes if teachers is None else teachers.get("think")) else set()
    assert thinking == expected


def test_a_dry_run_without_a_default_template_ends_with_a_message(
    pair: Path, own_task: Callable[..., Path], invoke: Callable[..., Any]
) -> None:
    file = pair.parent / "teacher" / "tokenizer_config.json"
    (pair.parent / "teacher" / "chat_template.jinja").unlink()
    listed = [{"name": name, "template": THINKS} for name in ("rag", "tool_use")]
    file.write_text(json.dumps({**json.loads(file.read_text()), "chat_template": listed}))
    done = invoke("--recipe", pair, "--task-file", own_task(), "--limit", 1, "--dry-run")
    assert done.exit_code == 1 and "Traceback" not in done.output
    assert "expected a chat template named 'default' got several, named rag, tool_use" in " ".join(done.output.split())
    done = invoke("--recipe", pair, "--task-file", own_task(), "--limit", 1, "--dry-run", "--chat-template", "off")
    assert done.exit_code == 0, done.output
