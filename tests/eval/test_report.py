"""report.md and report.html of one run and of several: whose facts they show, roles, and how numbers are rounded."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from dskd_eval import number_text, report
from dskd_eval.entries import Roles
from dskd_eval.run_folder import SavedRun
from test_compare import PLAN, values, write_run


def change(folder: Path, **facts: Any) -> Path:
    """The run with other facts in its results.json; a function is applied to what stands there."""
    results = json.loads((folder / "results.json").read_text())
    for key, value in facts.items():
        results[key] = value(results[key]) if callable(value) else value
    (folder / "results.json").write_text(json.dumps(results))
    return folder


def page_data(page: Path) -> dict[str, Any]:
    found = re.search(r'id="data">(.*?)</script>', page.read_text(encoding="utf-8"), re.DOTALL)
    assert found
    data: dict[str, Any] = json.loads(found[1])
    return data


@pytest.fixture
def unlike_runs(tmp_path: Path) -> tuple[Path, Path]:
    """Two runs that differ in everything that a report tells of a run."""
    one = write_run(tmp_path / "one", {"m": values(0, 0.5), "left": values(1, 0.5)})
    two = write_run(tmp_path / "two", {"m": values(2, 0.5)}, style="chat", shots=5)
    versions = {"python": "3.12", "platform": "y", "packages": {"torch": "9.9"}}
    change(one, settings={"seed": 1, "unsafe_code": False}, sandbox={"backend": "bubblewrap", "version": "0.8"})
    change(one, notes=["m: empty answers: quiz 30/400", "left: empty answers: quiz 31/400", "a subset of 400"])
    change(two, settings={"seed": 2, "unsafe_code": True}, sandbox=None, environment=versions)
    change(two, notes=["m: answers that ran into their token limit: quiz 99/400"])
    return one, two


def test_a_joint_report_shows_the_facts_of_every_run(
    unlike_runs: tuple[Path, Path], tmp_path: Path, invoke: Callable[..., Any]
) -> None:
    one, two = unlike_runs
    done = invoke("report", f"{one}:m", two, "--output", tmp_path / "both")
    assert done.exit_code == 0, done.output
    text = (tmp_path / "both" / "report.md").read_text(encoding="utf-8")
    for words in ("- one: Settings: seed 1.", "- two: Settings: seed 2, unsafe_code True.",
                  "- one: Sandbox: bubblewrap (0.8).", "- two: Sandbox: not needed.",
                  "- one: Python 3;", "- two: Python 3.12; torch 9.9."):  # fmt: skip
        assert words in text, (words, text)
    assert re.search(r"^\| quiz \| 1 \| base \| default \| 0 \|.*\| one/m \|$", text, re.MULTILINE)
    assert re.search(r"^\| quiz \| 1 \| chat \| default \| 5 \|.*\| two/m \|$", text, re.MULTILINE)
    data = page_data(tmp_path / "both" / "report.html")
    assert [(run["label"], run["settings"]["seed"], run["sandbox"]) for run in data["runs"]] == [
        ("one", 1, {"backend": "bubblewrap", "version": "0.8"}), ("two", 2, None),
    ]  # fmt: skip
    assert [(entry["task"]["style"], entry["models"]) for entry in data["measured"]] == [
        ("base", ["one/m"]), ("chat", ["two/m"]),
    ]  # fmt: skip


def test_notes_of_a_joint_report_are_about_the_models_shown(
    unlike_runs: tuple[Path, Path], tmp_path: Path, invoke: Callable[..., Any]
) -> None:
    """Under the labels of the report; a note of one run names it; a model that was left out has none."""
    one, two = unlike_runs
    invoke("report", f"{one}:m", two, "--output", tmp_path / "both")
    notes = page_data(tmp_path / "both" / "report.html")["notes"]
    assert "one/m: empty answers: quiz 30/400" in notes
    assert "two/m: answers that ran into their token limit: quiz 99/400" in notes
    assert "one: a subset of 400" in notes
    assert not any("left" in note or "31/400" in note for note in notes)
    assert any(note.startswith("not compared: quiz: prompt style") for note in notes)


def test_both_pages_tell_the_same_of_the_answers(tmp_path: Path, invoke: Callable[..., Any]) -> None:
    run = write_run(tmp_path / "x", {"m": [1.0, 0.0, 1.0], "n": [0.0, 0.0, 0.0]})

    def counted(scores: list[dict[str, Any]]) -> list[dict[str, Any]]:
        scores[0]["answers"] = {"count": 3, "with_reasoning": 2, "unfinished_reasoning": 1, "mean_new_tokens": 6.25}
        scores[1]["answers"] = {"count": 3}
        return scores

    change(run, scores=counted)
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    for sample, dropped in zip(samples[:3], (["a block"], [], ["an end", "a call"]), strict=True):
        sample["details"] = [{"program": "x", "dropped": dropped}]
    (run / "samples.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    assert invoke("report", run, "--output", tmp_path / "r").exit_code == 0
    expected = {
        "answers with a reasoning trace": "2 of 3", "unfinished reasoning traces": "1 of 3",
        "answers of which code or text was left out": "2 of 3", "mean new tokens": "6.3",
    }  # fmt: skip
    assert page_data(tmp_path / "r" / "report.html")["answers"] == [{"task": "quiz", "model": "m", "facts": expected}]
    text = (tmp_path / "r" / "report.md").read_text(encoding="utf-8").split("## Answers")[1].splitlines()
    assert text[2] == "| " + " | ".join(["task", "model", *expected]) + " |"
    assert text[4] == "| " + " | ".join(["quiz", "m", *expected.values()]) + " |"


def test_what_cannot_be_compared_leaves_no_empty_table(
    unlike_runs: tuple[Path, Path], tmp_path: Path, invoke: Callable[..., Any]
) -> None:
    one, two = unlike_runs
    invoke("report", f"{one}:m", two, "--output", tmp_path / "both")
    text = (tmp_path / "both" / "report.md").read_text(encoding="utf-8")
    assert "Nothing could be compared; the notes say why." in text
    assert "| difference |" not in text and "## Against" not in text


def test_one_model_of_a_run_brings_no_comparison_with_the_others(tmp_path: Path, invoke: Callable[..., Any]) -> None:
    run = write_run(tmp_path / "r", {"a": values(0, 0.5), "b": values(1, 0.5)})
    change(run, comparisons={"baseline": "a", "pairs": [{"model": "b", "rows": []}], "gaps": []})
    invoke("report", f"{run}:b", "--output", tmp_path / "o")
    data = page_data(tmp_path / "o" / "report.html")
    assert data["comparisons"] == {} and [model["label"] for model in data["models"]] == ["b"]


def test_roles_bring_the_closed_gap_into_the_report(tmp_path: Path, invoke: Callable[..., Any]) -> None:
    models = {"t": values(0, 0.9), "b": values(1, 0.3), "s": values(2, 0.6), "sft": values(3, 0.5)}
    one = write_run(tmp_path / "one", {name: models[name] for name in ("t", "b")})
    two = write_run(tmp_path / "two", {name: models[name] for name in ("s", "sft")})
    roles = ["--teacher", "t", "--base", "b", "--student", "s", "--baseline", "sft"]
    done = invoke("report", one, two, *roles, "--output", tmp_path / "both")
    assert done.exit_code == 0, done.output
    mean = {name: sum(column) / len(column) for name, column in models.items()}
    closed = 100 * (mean["s"] - mean["b"]) / (mean["t"] - mean["b"])
    text = (tmp_path / "both" / "report.md").read_text(encoding="utf-8")
    assert "## Gap closed by s" in text and f"| {closed:.0f} |" in text
    assert "## Against sft" in text and "### sft against b" in text
    data = page_data(tmp_path / "both" / "report.html")
    assert data["comparisons"]["gaps"][0]["rows"][0]["closed"] == pytest.approx(closed)
    assert {model["label"]: model["role"] for model in data["models"]} == {
        "t": "teacher", "b": "base", "s": "student", "sft": None,
    }  # fmt: skip
    alone = invoke("report", one, "--teacher", "t", "--base", "b")
    assert alone.exit_code == 0 and page_data(one / "report.html")["comparisons"]["baseline"] == "b"
    wrong = invoke("report", one, "--teacher", "x", "--base", "b")
    assert wrong.exit_code == 1 and "expected  one of t, b" in wrong.output


class TablesOfPage(HTMLParser):
    """The cells of every table, row by row, as a reader without JavaScript has them; `text` is all that is shown."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.tables: list[list[list[str]]] = []
        self.text, self._cell, self._skipped = "", False, False
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("th", "td"):
            self.tables[-1][-1].append("")
        self._cell = tag in ("th", "td") or (self._cell and tag in ("small", "wbr"))
        self._skipped = tag in ("script", "style")

    def handle_endtag(self, tag: str) -> None:
        self._cell = self._cell and tag not in ("th", "td")
        self._skipped = self._skipped and tag not in ("script", "style")

    def handle_data(self, data: str) -> None:
        if not self._skipped:
            self.text += data
        if self._cell:
            self.tables[-1][-1][-1] += data


def tables_of_markdown(text: str) -> list[list[list[str]]]:
    found: list[list[list[str]]] = [[]]
    for line in text.splitlines():
        if line.startswith("|"):
            found[-1].append([cell.strip() for cell in line.strip("| ").split(" | ")])
        elif found[-1]:
            found.append([])
    return [[row for row in rows if "---" not in row[0]] for rows in found if rows]


def test_the_page_has_scores_and_comparisons_of_the_markdown_without_its_script(tmp_path: Path) -> None:
    models = {"t": values(0, 0.9), "b": values(1, 0.3), "<i>s</i>": values(2, 0.6)}
    run = write_run(tmp_path / "x", models, roles={"t": "teacher", "b": "base"})
    change(run, notes=["a <note>"])
    report.write([SavedRun(run)], run, Roles(baseline="b", teacher="t", base="b"))
    page = TablesOfPage(run / "report.html")
    written = tables_of_markdown((run / "report.md").read_text(encoding="utf-8").replace("&lt;", "<"))
    compared = [rows for rows in written if rows[0][1] in ("difference", "base")]
    assert len(compared) == 3
    for rows in compared:
        assert rows in page.tables
    for cell in written[0][1][3:]:
        value, ends = cell.rstrip(")").split(" (")
        assert value + ends.replace(" to ", " – ") in page.text, cell
    assert "a <note>" in page.text and "Task quiz" in page.text and "Model <i>s</i>" in page.text


def test_scores_stand_suite_by_suite_above_their_mean(tmp_path: Path, invoke: Callable[..., Any]) -> None:
    run = write_run(tmp_path / "r", {"a": values(0, 0.5)})
    results = json.loads((run / "results.json").read_text())
    order = [("sums", "maths"), ("quiz", "own"), ("algebra", "maths"), ("essay", "own")]
    scores = [results["scores"][0] | {"task": PLAN | {"task": task, "suite": suite}} for task, suite in order]
    mean = {"model": "a", "suite": "maths", "tasks": ["sums", "algebra"], "value": 41.25, "low": 40, "high": 43, "n": 9}
    change(run, scores=scores, suites=[mean])
    report.write([SavedRun(run)], run)
    rows = tables_of_markdown((run / "report.md").read_text(encoding="utf-8"))[0]
    assert [row[0] for row in rows] == ["task", "sums", "algebra", "**maths**", "quiz", "essay"]
    assert rows[3][1:] == ["mean of the suite", "", "41.3 (40.0 to 43.0)"]
    shown_page = TablesOfPage(run / "report.html").text
    places = [shown_page.index(text) for text in ("maths", "41.3", "sums", "algebra", "quiz", "essay")]
    assert places == sorted(places)


@pytest.mark.parametrize("output", ["found.json", "found.md", "folder"])
def test_compare_writes_what_it_shows(tmp_path: Path, invoke: Callable[..., Any], output: str) -> None:
    run = write_run(tmp_path / "r", {"a": values(0, 0.5), "b": values(1, 0.6)})
    done = invoke("compare", run, "--output", tmp_path / output)
    assert done.exit_code == 0 and "b against a" in done.output
    place = tmp_path / output
    files = sorted(place.iterdir()) if output == "folder" else [place]
    assert [file.name for file in files] == (
        ["comparison.json", "comparison.md"] if output == "folder" else [output]
    )  # fmt: skip
    said = json.loads(invoke("compare", run, "--json").output)
    for file in files:
        if file.suffix == ".json":
            assert json.loads(file.read_text()) == said
        else:
            assert number_text.signed(said["pairs"][0]["rows"][0]["difference"]) in file.read_text()


@pytest.mark.parametrize(
    ("value", "text"),
    [(6.25, "6.3"), (6.35, "6.3"), (0.25, "0.3"), (12.75, "12.8"), (-6.25, "-6.3"), (50.0, "50.0"), (0.05, "0.1")],
)
def test_ties_are_rounded_as_a_browser_rounds_them(value: float, text: str) -> None:
    """Expected texts: (value).toFixed(1) of JavaScript. 6.35 is stored as 6.3499..., 0.05 as 0.05000...3."""
    assert number_text.fixed(value) == text


def test_markdown_and_terminal_show_the_rounding_of_the_page(tmp_path: Path, invoke: Callable[..., Any]) -> None:
    """1 of 16 right: 6.25. The page is rendered in test_browser."""
    run = write_run(tmp_path / "r", {"a": [0.0] * 16, "b": [1.0] + [0.0] * 15})
    report.write([SavedRun(run)], run)
    assert "| quiz | exact_match | 16 | 0.0 (0.0 to 100.0) | 6.3 (0.0 to 100.0) |" in (run / "report.md").read_text()
    assert "+6.3" in invoke("compare", run).output


def test_unknown_intervals_are_dashes(tmp_path: Path, invoke: Callable[..., Any]) -> None:
    metric = {"low": None, "high": None, "interval": "none"}
    run = write_run(tmp_path / "r", {"a": [0.5] * 4, "b": [0.5] * 4}, metric=metric)
    report.write([SavedRun(run)], run)
    text = (run / "report.md").read_text(encoding="utf-8")
    assert "| 50.0 (–) | 50.0 (–) |" in text
    invoke("report", f"{run}:a", f"{run}:b", "--output", tmp_path / "o")
    assert "| ±0.0 | – | 1.000 | 1.000 | 0/4/0 | 4 |" in (tmp_path / "o" / "report.md").read_text(encoding="utf-8")
    assert "–" in invoke("compare", run).output


def test_plans_of_the_helper_are_those_of_a_run() -> None:
    """The runs made by hand above have the keys of a real plan."""
    from dskd_eval.tasks import planning, selection

    plan = planning.plan(selection.builtin_tasks()["vicuna"], chat=False)
    assert plan.record().plain().keys() | {"data"} == PLAN.keys()
