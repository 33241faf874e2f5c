"""The benchmark of few gold answers: its table, its page, and one whole command on tiny models."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from benchmarks.scarce import records, report, students, table
from benchmarks.scarce.__main__ import parse
from dskd_plugin.methods import names as method_names
from dskd_plugin.settings import parse_settings

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "recipes" / "quickstart"
NOUNS = [(noun, owner) for noun in ("apple", "wagon", "lantern") for owner in ("Ann", "Tom", "Zoe", "Kim")]


# -- the table ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", table.RECIPES)
def test_every_step_is_a_block_that_the_plugin_takes(name):
    for step in table.RECIPES[name].steps:
        assert step.rows in table.ROWS
        if step.dskd is not None:
            parse_settings({"teacher": {"model": "t"}, **step.dskd})


def test_every_method_for_two_tokenizers_is_there_and_the_defaults_are_the_quickstarts():
    steps = [step for recipe in table.RECIPES.values() for step in recipe.steps]
    used = {(step.dskd or {"method": "sft"}).get("method", "dskd") for step in steps}
    assert used == set(method_names()) - {"kd"}  # for one tokenizer
    for name, key in (("dskd", "dskd"), ("seqkd", table.SEQKD)):
        recipe = yaml.safe_load((RECIPES / f"{name}.yaml").read_text(encoding="utf-8"))
        (step,) = table.RECIPES[key].steps
        assert (step.rate, step.micro_batch) == (float(recipe["learning_rate"]), recipe["micro_batch_size"])
        assert list(table.ROWS[step.rows]) == [entry["path"] for entry in recipe["datasets"]]
        block = dict(recipe.get("dskd", {}))
        block.pop("teacher", None)
        assert (step.dskd or {}) == block


def test_words_that_are_no_stage_are_refused(capsys):
    assert parse(["runs", "--seeds", "2"]).seeds == [2]
    with pytest.raises(SystemExit):
        parse(["rnus"])
    assert "got rnus" in capsys.readouterr().err


# -- the page ----------------------------------------------------------------------------------------------------------


def answered(bits: list[float], right: list[int]) -> dict:
    return {"bits": bits, "bytes": [10] * len(bits), "right": right}


def made(recipe: str, seed: int, bits: list[float], right: list[int], cost: float) -> dict:
    facts = {
        "cpu_seconds": [cost],
        "date": "2026-01-02",
        "environment": {"commit": "a" * 40, "packages": {"dskd": "1"}},
    }
    return {"kind": "run", "student": "own", "recipe": recipe, "seed": seed, **answered(bits, right), **facts}


@pytest.fixture
def found() -> list[dict]:
    rows = {"gold": 2, "gold_all": 12, "prompts": 9, "validation": 3, "heldout": 8}
    level = {1: 6.0, 2: 8.0}
    all_records = []
    for seed, bits in level.items():
        others = {name: answered([bits] * 8, [0] * 8) for name in records.OTHERS}
        shares = {"shared_ids": 0.6 + seed / 10, "align_ratio": 0.5}
        all_records.append({"kind": "quickstart", "student": "own", "seed": seed, "rows": rows, **shares, **others})
        all_records.append(made("seqkd", seed, [bits - 1 - 0.1 * k for k in range(8)], [0] * 8, 10.0))
        all_records.append(made("bpm", seed, [bits - 2 - 0.1 * k for k in range(8)], [1, 0] * 4, 20.0 * seed))
    return all_records


def cells(page: str, title: str) -> list[str]:
    (line,) = [line for line in page.splitlines() if line.startswith(f"| {title} |")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_table_holds_each_seed_and_the_differences_over_all_questions(found):
    page = report.page(found)
    _, seeds, bits, to_sft, p_sft, to_seqkd, p, to_dskd, exact, cost = cells(page, "`bpm`")
    assert (seeds, exact, cost) == ("1 2", "50.0 %", "30")
    # Means over questions: 6 - 2 - 0.35 and 8 - 2 - 0.35 bits of 10 bytes.
    assert bits == "0.365, 0.565"
    assert to_sft.startswith("-0.235 [") and to_seqkd == "-0.100" and to_dskd == ""
    # Of one seed, whose bits are those of SeqKD: paired in that seed alone.
    twin = [one | {"recipe": "dskd"} for one in found if one.get("recipe") == "seqkd" and one["seed"] == 1]
    assert cells(report.page([*found, *twin]), "`bpm`")[7].startswith("-0.100")
    assert float(p) < 0.05 and float(p_sft) < 0.05
    assert cells(page, table.RECIPES["seqkd"].title)[5:7] == ["", ""]
    assert cells(page, "the teacher")[2] == "0.600, 0.800"
    assert "2 gold answers" in page and "Not run: `dskd`, `kd_ratio: 0.9`;" in page
    assert "has 75 % of the student's ids. 50 % of the answers' tokens begin" in page


def test_each_student_has_a_table_of_its_own(found):
    other = [one | {"student": "coarse"} for one in found if one.get("recipe") != "bpm"]
    page = report.page([*found, *other])
    own, coarse = page.split(f"## {students.STUDENTS['coarse'].title}")
    assert cells(own, "`bpm`") and "| `bpm` |" not in coarse
    with_bpm, without = (cells(page, table.RECIPES["seqkd"].title) for page in (own, coarse))
    assert float(with_bpm.pop(4)) > float(without.pop(4))  # Holm: of two recipes, and of one
    assert with_bpm == without


@pytest.mark.parametrize("name", students.STUDENTS)
def test_a_student_cuts_text_as_its_title_says(name):
    """Coarse tokens hold spaces inside, fine ones are short; all of them keep the text and its bytes."""
    texts = [f"the {noun} of {owner} weighs {k} pounds and is {k} feet long" for k, (noun, owner) in enumerate(NOUNS)]
    tokenizer = students.STUDENTS[name].tokenizer_of(texts * 20)
    ids = tokenizer.encode(texts[3], add_special_tokens=False)
    assert tokenizer.decode(ids) == texts[3]
    pieces = [tokenizer.decode([number]) for number in ids]
    assert any(" " in piece.strip() for piece in pieces) is (name == "coarse")
    assert max(len(piece) for piece in pieces) <= 24


def test_newer_records_take_the_place_of_older_ones_and_others_stay(found):
    newer = made("bpm", 2, [1.0] * 8, [1] * 8, 5.0)
    kept = records.merged(found, [newer])
    assert len(kept) == len(found) and newer in kept
    assert [one for one in kept if one["seed"] == 1] == [one for one in found if one["seed"] == 1]


# -- the whole command -------------------------------------------------------------------------------------------------


@pytest.mark.more
@pytest.mark.axolotl
def test_the_whole_command_on_tiny_models(tiny, tmp_path):
    """What a quickstart leaves, over tiny models: two recipes, one of two steps, and the page."""
    folder = tmp_path / "out" / "own-1"
    (folder / "data").mkdir(parents=True)
    (folder / "answers").mkdir()
    for name, place in (("student", "student"), ("teacher", "teacher"), ("teacher", "teacher-tuned")):
        (folder / place).symlink_to(tiny[name], target_is_directory=True)
    for name in ("dskd", "seqkd"):
        (folder / f"{name}.yaml").write_bytes((RECIPES / f"{name}.yaml").read_bytes())
    rows = [json.loads(line) for line in Path(tiny["data"]).read_text(encoding="utf-8").splitlines()]
    rows = [{"messages": row["messages"][:2], "kind": "made"} for row in rows]
    parts = {"data/gold": rows[:4], "answers/rows": rows[4:10], "data/heldout": rows[10:15]}
    for name, part in parts.items():
        text = "".join(json.dumps(row) + "\n" for row in part)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    answers = [{"bits": 5.0, "bytes": 10, "right": False}] * 5
    counts = {"gold": 4, "gold_all": 9, "prompts": 6, "validation": 1, "heldout": 5}
    results = {"rows": counts, "models": {name: {"answers": answers} for name in records.OTHERS}}
    results["dskd"] = {"align_ratio": 0.5}
    (folder / "results.json").write_text(json.dumps(results))
    kept, page = tmp_path / "records.jsonl", tmp_path / "page.md"
    command = [sys.executable, "-m", "benchmarks.scarce", "--out", str(tmp_path / "out")]
    command += [
        "--students",
        "own",
        "--seeds",
        "1",
        "--recipes",
        "seqkd",
        "two_stage_sft",
        "--records",
        str(kept),
        "--page",
        str(page),
    ]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "eval")])}
    for _ in range(2):
        done = subprocess.run(command, capture_output=True, text=True, timeout=900, env=environment, cwd=tmp_path)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert "two_stage_sft-1" not in done.stdout, "a finished run was made again"
    lines = [json.loads(line) for line in kept.read_text().splitlines()]
    runs = {one["recipe"]: one for one in lines if one["kind"] == "run"}
    assert set(runs) == {"seqkd", "two_stage_sft"} and len(runs["two_stage_sft"]["cpu_seconds"]) == 2
    for one in runs.values():
        assert len(one["bits"]) == len(one["bytes"]) == len(one["right"]) == 5
        assert all(math.isfinite(bits) and bits > 0 for bits in one["bits"])
    assert runs["seqkd"]["bits"] != runs["two_stage_sft"]["bits"]
    assert cells(page.read_text(), table.RECIPES["two_stage_sft"].title)[1] == "1"
    assert not list((folder / "scarce").iterdir()), "models were left"
