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


def test_recipe_without_a_teacher_compares_base_and_output(pair: Path) -> None:
    assert [ref.role for ref in recipe.models_of(pair.parent / "sft.yaml")] == ["base", "student"]


def test_hub_ids_stay(pair: Path) -> None:
    pair.write_text(pair.read_text().replace("model: teacher", "model: org/big"))
    assert recipe.models_of(pair)[0].source == "org/big"


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("base_model: ./base\n", "", r"expected base_model"),
        ("out/dskd", "out/none", r"output_dir: expected the folder of a trained student.*axolotl train"),
        ("{model: teacher, revision: v1}", "{modell: teacher}", r"dskd.teacher.model"),
        ("plugins: [dskd]", "plugins: [", r"readable YAML recipe"),
    ],
)
def test_bad_recipes(pair: Path, old: str, new: str, problem: str) -> None:
    pair.write_text(pair.read_text().replace(old, new))
    with pytest.raises(UserError, match=problem):
        recipe.models_of(pair)
