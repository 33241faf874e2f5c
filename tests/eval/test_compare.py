"""Joining runs, refusing unlike ones, and the numbers of a comparison."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dskd_eval import comparison, report
from dskd_eval.entries import entries_of, run_labels
from dskd_eval.run_folder import SavedRun
from test_stats import slow_score_edges

PLAN = {
    "task": "quiz", "version": 1.0, "suite": "own", "summary": "", "primary_metric": "exact_match",
    "metrics": ["exact_match"], "scorer": "exact_match", "style": "base", "protocol": "default", "shots": 0,
    "prompt": "{{q}}", "generation": {"until": [], "max_gen_toks": 8}, "seeds": [0], "floor": {}, "data": {},
}  # fmt: skip


def write_run(folder: Path, models: dict[str, list[float]], *, roles: dict[str, str] | None = None,
              skip: int = 0, prompt: str = "Question {n}", metric: dict[str, Any] | None = None,
              **plan: Any) -> Path:  # fmt: skip
    """A run made by hand: one task, one score per document."""
    folder.mkdir(parents=True)
    scores, samples = [], []
    for model, values in models.items():
        found = {"value": 100 * float(np.mean(values)), "low": 0.0, "high": 100.0, "n": len(values) - skip,
                 "interval": "wilson", "unit": "percent", "higher_is_better": True} | (metric or {})  # fmt: skip
        scores.append({"model": model, "task": PLAN | plan, "status": "finished", "n": len(values) - skip,
                       "documents": len(values), "metrics": {"exact_match": found}, "answers": {}})  # fmt: skip
        for n, value in enumerate(values):
            if n < skip:
                continue
            text = prompt.format(n=n)
            samples.append({"model": model, "task": "quiz", "doc_id": n, "doc_hash": f"d{n}", "prompt_hash": f"h{text}",
                            "prompt": text, "references": ["r"], "answers": [f"<b>{model}</b> {value}"],
                            "metrics": {"exact_match": value}, "details": [{}], "generation": []})  # fmt: skip
    results = {"schema_version": 1, "complete": True, "settings": {}, "sandbox": None, "notes": [], "scores": scores,
               "environment": {"python": "3", "platform": "x", "packages": {}}, "suites": [], "comparisons": {},
               "models": [{"name": model, "role": (roles or {}).get(model), "source": "s", "fingerprint": "f" * 32,
                           "chat_template": False} for model in models]}  # fmt: skip
    (folder / "results.json").write_text(json.dumps(results))
    (folder / "samples.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    return folder


def values(seed: int, share: float, n: int = 400) -> list[float]:
    return [float(value) for value in np.random.default_rng(seed).random(n) < share]


def test_known_difference_is_found_and_numbers_agree_with_numpy(tmp_path: Path, invoke: Callable[..., Any]) -> None:
    first = values(0, 0.5)
    second = [1.0 if better else old for old, better in zip(first, values(1, 0.2), strict=True)]
    one, two = write_run(tmp_path / "one", {"a": first}), write_run(tmp_path / "two", {"b": second})
    row = json.loads(invoke("compare", one, two, "--json").output)["pairs"][0]["rows"][0]
    wins = int(sum(b > a for a, b in zip(first, second, strict=True)))
    edges = slow_score_edges(wins, 0, 400)
    assert (row["low"], row["high"]) == pytest.approx((100 * edges[0], 100 * edges[1]), abs=0.11)
    assert row["difference"] == pytest.approx(100 * (np.mean(second) - np.mean(first)))
    assert (row["wins"], row["ties"], row["losses"], row["n"]) == (wins, 400 - wins, 0, 400)
    assert row["p"] == pytest.approx(2 * 0.5**wins) == row["p_holm"]
    assert row["low"] > 0
    shown = invoke("compare", one, two)
    assert shown.exit_code == 0 and "b against a" in shown.output


def test_two_runs_of_one_model_do_not_differ(tmp_path: Path) -> None:
    same = values(3, 0.4)
    runs = [SavedRun(write_run(tmp_path / name, {"m": same})) for name in ("x", "y")]
    group = entries_of(runs)
    assert [entry.label for entry in group] == ["x/m", "y/m"]
    row = comparison.compare(group).pairs[0].rows[0].plain()
    assert (row["difference"], row["p"], row["wins"]) == (0.0, 1.0, 0)
    assert (row["low"], row["high"]) == pytest.approx((-0.951, 0.951), abs=1e-3)  # z^2 / (400 + z^2)


def said(done: Any) -> str:
    """The output on one line."""
    assert "Traceback" not in done.output
    return " ".join(done.output.split())


def test_a_name_in_several_runs_is_refused_with_what_to_write(tmp_path: Path, invoke: Callable[..., Any]) -> None:
    runs = [write_run(tmp_path / name, {"m": values(0, 0.5), name: values(1, 0.5)}) for name in ("x", "y")]
    for option in ("--base", "--baseline", "--teacher"):
        done = invoke("compare", *runs, option, "m")
        assert done.exit_code == 1
        told = f"expected one of x/m, y/m got 'm', which is in several runs do Write for example {option} x/m."
        assert told in said(done)
    assert invoke("compare", *runs, "--baseline", "y/m").exit_code == 0
    assert invoke("compare", *runs, "--baseline", "x").exit_code == 0, "a name of one run alone"


def test_labels_have_as_many_folders_as_tell_them_apart(tmp_path: Path) -> None:
    folders = ["a/p/run", "b/p/run", "c"]
    runs = [SavedRun(write_run(tmp_path / name, {"m": values(0, 0.5)})) for name in folders]
    assert run_labels(runs) == ["a/p/run", "b/p/run", "c"]
    assert [entry.label for entry in entries_of(runs)] == ["a/p/run/m", "b/p/run/m", "c/m"]


def test_one_run_named_twice_is_refused(tmp_path: Path, invoke: Callable[..., Any]) -> None:
    run = write_run(tmp_path / "x", {"m": values(0, 0.5), "n": values(1, 0.5)})
    for first, second in ((run, run), (run, f"{run}:m"), (f"{run}:m", f"{run}:m")):
        done = invoke("compare", first, second)
        assert done.exit_code == 1 and "expected each model of a run once got 'm' twice" in said(done)
    assert invoke("compare", f"{run}:m", f"{run}:n").exit_code == 0


@pytest.mark.parametrize(
    "options",
    [
        ("--base", "a", "--teacher", "a"), ("--base", "a", "--teacher", "b", "--student", "a"),
        ("--base", "a", "--teacher", "b", "--student", "b"),
        ("--base", "a", "--teacher", "b", "--student", "c", "--student", "c"),
    ],
)  # fmt: skip
def test_one_model_in_two_roles_is_refused(
    tmp_path: Path, invoke: Callable[..., Any], options: tuple[str, ...]
) -> None:
    run = write_run(tmp_path / "x", {name: values(0, 0.5) for name in "abc"})
    for done in (invoke("compare", run, *options), invoke("report", run, *options, "--output", tmp_path / "r")):
        assert done.exit_code == 1 and "expected a model of its own for each role" in said(done)


@pytest.mark.parametrize(("other", "refused"), [("f", False), ("e", True)])
def test_recipes_with_two_teachers(tmp_path: Path, invoke: Callable[..., Any], other: str, refused: bool) -> None:
    """Two runs of recipes: their teacher may be one model; of two different ones neither is taken silently."""
    models = {"t": values(0, 0.9), "b": values(1, 0.3), "s": values(2, 0.5)}
    roles = {"t": "teacher", "b": "base", "s": "student"}
    runs = [write_run(tmp_path / name, models, roles=roles) for name in ("x", "y")]
    results = json.loads((runs[1] / "results.json").read_text())
    results["models"][0]["fingerprint"] = other * 32
    (runs[1] / "results.json").write_text(json.dumps(results))
    done = invoke("compare", *runs)
    assert done.exit_code == int(refused)
    assert ("the role teacher expected one model got several: x/t, y/t" in said(done)) == refused
    gaps = report.payload([SavedRun(run) for run in runs]).comparisons
    assert bool(gaps.gaps) != refused
    assert any("several models have the role teacher: x/t, y/t" in note for note in gaps.notes) == refused


@pytest.mark.parametrize(("second", "differs"), [("off", True), ("auto", False)])
def test_runs_that_differ_in_reasoning_say_so(
    tmp_path: Path, invoke: Callable[..., Any], second: str, differs: bool
) -> None:
    runs = [write_run(tmp_path / name, {"m": values(0, 0.5)}) for name in ("x", "y")]
    for run, option in zip(runs, ("auto", second), strict=True):
        results = json.loads((run / "results.json").read_text()) | {"settings": {"reasoning": option}}
        (run / "results.json").write_text(json.dumps(results))
    note = "--reasoning differs, so what counts as the answer differs: x/m: auto; y/m: off"
    assert (note in said(invoke("compare", *runs))) == differs
    invoke("report", *runs, "--output", tmp_path / "r")
    for page in ("report.md", "report.html"):
        assert (note in (tmp_path / "r" / page).read_text(encoding="utf-8")) == differs


def test_an_error_rate_is_compared_as_the_share_without_error(tmp_path: Path) -> None:
    """The first model fails 3 of 10, the second none: the interval is that of the right answers, turned around."""
    failed = {"b": [1.0] * 3 + [0.0] * 7, "s": [0.0] * 10, "t": [0.0] * 10}
    run = write_run(tmp_path / "r", failed, metric={"higher_is_better": False})
    row = comparison.compare(entries_of([SavedRun(run)]), base="b").pairs[0].rows[0].plain()
    low, high = slow_score_edges(3, 0, 10)
    assert (row["low"], row["high"]) == pytest.approx((-100 * high, -100 * low), abs=0.11)
    assert (row["difference"], row["wins"], row["losses"], row["p"]) == (-30.0, 3, 0, 0.25)


def test_graded_scores_get_no_interval_of_proportions(tmp_path: Path) -> None:
    values_of = {"a": [0.0] * 6 + [1.0] * 6, "b": [1.0] * 12}
    run = write_run(tmp_path / "r", values_of, primary_metric="rouge_l")
    text = (run / "results.json").read_text().replace('"metrics": {"exact_match"', '"metrics": {"rouge_l"')
    (run / "results.json").write_text(text)
    rows = (run / "samples.jsonl").read_text().replace('"metrics": {"exact_match"', '"metrics": {"rouge_l"')
    (run / "samples.jsonl").write_text(rows)
    row = comparison.compare(entries_of([SavedRun(run)])).pairs[0].rows[0].plain()
    assert (row["interval"], row["test"]) == ("bootstrap", "sign-flip permutation")


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"style": "chat"}, "quiz: prompt style (chat template) differs: x/m 'base', y/m 'chat'"),
        ({"shots": 5}, "shots differs"),
        ({"version": 2.0}, "version differs"),
        ({"generation": {"until": [], "max_gen_toks": 9}}, "generation settings differs"),
        ({"prompt_text": "Question:  {n}"}, "the prompt of document 0 differs: from character 8"),
    ],
)
def test_unlike_prompts_are_refused_with_their_place(
    tmp_path: Path, invoke: Callable[..., Any], change: dict[str, Any], where: str
) -> None:
    text = change.pop("prompt_text", "Question {n}")
    one = write_run(tmp_path / "x", {"m": values(0, 0.5)})
    two = write_run(tmp_path / "y", {"m": values(1, 0.5)}, prompt=text, **change)
    found = invoke("compare", one, two)
    assert found.exit_code == 1 and where in " ".join(found.output.split())
    assert "Traceback" not in found.output
    skipped = invoke("compare", one, two, "--skip-different")
    assert skipped.exit_code == 0 and "not compared" in skipped.output


def test_seeds_matter_for_sampled_answers_only(tmp_path: Path) -> None:
    """Another --seed draws another subset; greedy answers to the shared documents can be compared."""
    for name, drawn in (("greedy", {}), ("sampled", {"do_sample": True})):
        generation = PLAN["generation"] | drawn
        group = entries_of([
            SavedRun(write_run(tmp_path / name / str(n), {"m": values(n, 0.5)}, seeds=[n], generation=generation))
            for n in (1, 2)
        ])  # fmt: skip
        found = comparison.compare(group, strict=False)
        assert len(found.pairs[0].rows) == (name == "greedy")
        assert bool(found.notes) == (name == "sampled")


def test_only_shared_documents_are_compared(tmp_path: Path) -> None:
    first, second = values(0, 0.5), values(1, 0.6)
    runs = [
        SavedRun(write_run(tmp_path / "x", {"a": first})),
        SavedRun(write_run(tmp_path / "y", {"b": second}, skip=100)),
    ]
    row = comparison.compare(entries_of(runs)).pairs[0].rows[0].plain()
    assert (row["n"], row["of"]) == (300, 400)
    assert row["first"] == pytest.approx(100 * float(np.mean(first[100:])))


def test_a_task_that_one_run_alone_has_is_named(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name, {name: values(0, 0.5)}) for name in ("x", "y")]
    failed = json.loads((runs[1] / "results.json").read_text())
    more = json.loads((runs[0] / "results.json").read_text())
    for results, status in ((more, "finished"), (failed, "failed")):
        results["scores"].append(results["scores"][0] | {"task": PLAN | {"task": "other"}, "status": status})
    for run, results in zip(runs, (more, failed), strict=True):
        (run / "results.json").write_text(json.dumps(results))
    found = comparison.compare(entries_of([SavedRun(run) for run in runs]))
    assert [row.task for row in found.pairs[0].rows] == ["quiz"]
    assert found.notes == ["not compared: other, of which y has no finished result and x has one"]


def test_gap_closed_between_base_and_teacher(tmp_path: Path, invoke: Callable[..., Any]) -> None:
    models = {"t": values(0, 0.9), "b": values(1, 0.3), "s": values(2, 0.6)}
    named = write_run(tmp_path / "roles", models, roles={"t": "teacher", "b": "base", "s": "student"})
    found = json.loads(invoke("compare", named, "--json").output)
    t, b, s = (float(np.mean(models[name])) for name in "tbs")
    row = found["gaps"][0]["rows"][0]
    assert found["baseline"] == "b"
    assert row["closed"] == pytest.approx(100 * (s - b) / (t - b)) and row["low"] < row["closed"] < row["high"]
    plain = write_run(tmp_path / "plain", models)
    options = ["--teacher", "t", "--base", "b", "--student", "s"]
    assert json.loads(invoke("compare", plain, *options, "--json").output)["gaps"] == found["gaps"]
    assert "Gap closed by s" in invoke("compare", plain, *options).output
    for option in ("--teacher", "--student"):
        alone = invoke("compare", plain, option, "t")
        assert alone.exit_code == 1 and "--teacher and --base, the two ends of the gap" in alone.output
    assert "expected  one of t, b, s" in invoke("compare", plain, "--baseline", "x").output


def test_the_base_is_compared_with(tmp_path: Path, invoke: Callable[..., Any]) -> None:
    """--base alone: every difference is to it; with a teacher, every other model's closed gap."""
    models = {"t": values(0, 0.9), "sft": values(1, 0.5), "b": values(2, 0.3), "s": values(3, 0.6)}
    run = write_run(tmp_path / "plain", models)
    mean = {name: 100 * float(np.mean(column)) for name, column in models.items()}

    def found(*options: str) -> tuple[dict[str, Any], dict[tuple[str, str], float], dict[str, float]]:
        got = json.loads(invoke("compare", run, *options, "--json").output)
        pairs = {(pair["model"], pair["against"]): pair["rows"][0]["difference"] for pair in got["pairs"]}
        return got, pairs, {gap["model"]: gap["rows"][0]["closed"] for gap in got["gaps"]}

    got, pairs, gaps = found("--base", "b")
    assert got["baseline"] == "b" and gaps == {}
    assert pairs == pytest.approx({(name, "b"): mean[name] - mean["b"] for name in ("t", "sft", "s")})
    _, pairs, gaps = found("--base", "b", "--teacher", "t")
    assert gaps == pytest.approx(
        {name: 100 * (mean[name] - mean["b"]) / (mean["t"] - mean["b"]) for name in ("sft", "s")}
    )
    _, _, gaps = found("--base", "b", "--teacher", "t", "--student", "s")
    assert set(gaps) == {"s"}
    got, pairs, gaps = found("--base", "b", "--baseline", "sft", "--teacher", "t")
    assert got["baseline"] == "sft" and set(gaps) == {"sft", "s"}
    expected = {(name, "sft"): mean[name] - mean["sft"] for name in ("t", "s")}
    assert pairs == pytest.approx(expected | {("sft", "b"): mean["sft"] - mean["b"]})
    shown = invoke("compare", run, "--base", "b", "--baseline", "sft").output
    assert "sft against b" in shown and "s against sft" in shown


def test_lower_is_better_and_numbers_that_are_no_percentages(tmp_path: Path) -> None:
    """An error count: the second model makes fewer, so it wins; the teacher's gap is below the base."""
    rates = {"b": values(0, 0.9), "s": values(1, 0.5), "t": values(2, 0.1)}
    counts = {name: [4.0 * value for value in column] for name, column in rates.items()}
    roles = {"b": "base", "s": "student", "t": "teacher"}
    metric = {"unit": "number", "higher_is_better": False}
    found = comparison.compare(entries_of([SavedRun(write_run(tmp_path / "r", counts, roles=roles, metric=metric))]))
    row = found.pairs[0].rows[0].plain()
    b, s, t = (float(np.mean(counts[name])) for name in "bst")
    assert (row["first"], row["second"], row["difference"]) == pytest.approx((b, s, s - b))
    assert row["low"] < s - b < row["high"] < 0 and row["better"] == "second"
    assert row["wins"] == sum(y < x for x, y in zip(counts["b"], counts["s"], strict=True)) > row["losses"]
    gap = found.gaps[0].rows[0].plain()
    assert gap["closed"] == pytest.approx(100 * (s - b) / (t - b)) and gap["teacher"] == pytest.approx(t)


def test_runs_that_are_no_runs(tmp_path: Path, invoke: Callable[..., Any]) -> None:
    good = write_run(tmp_path / "good", {"a": values(0, 0.5)})
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "results.json").write_text('{"schema_version": 0}')
    for argument, words in (
        (tmp_path / "nothing", "a folder with results.json"),
        (tmp_path / "old", "schema version 1"),
        (f"{good}:b", "one of its models: a"),
    ):
        found = invoke("compare", good, argument)
        assert found.exit_code == 1 and words in found.output and "Traceback" not in found.output
    assert "at least two models" in invoke("compare", good).output
    torn = write_run(tmp_path / "torn", {"b": values(0, 0.5)})
    (torn / "samples.jsonl").write_text((torn / "samples.jsonl").read_text()[:-30])
    for command in (["compare", good, torn], ["report", torn]):
        found = invoke(*command)
        assert found.exit_code == 1 and "samples.jsonl, line 400" in found.output


def test_report_of_several_runs(tmp_path: Path, invoke: Callable[..., Any]) -> None:
    one, two = write_run(tmp_path / "x", {"m": values(0, 0.5)}), write_run(tmp_path / "y", {"m": values(1, 0.5)})
    assert "--output" in invoke("report", one, two).output
    (tmp_path / "both").mkdir()
    done = invoke("report", one, two, "--output", tmp_path / "both")
    assert done.exit_code == 0, done.output
    text = (tmp_path / "both" / "report.md").read_text()
    assert "| quiz | exact_match | 400 |" in text and "## Against x/m" in text


def test_html_is_one_file_and_output_is_never_markup(tmp_path: Path) -> None:
    import re

    evil = "</script><script>alert(1)</script>"
    run = write_run(tmp_path / "x", {evil: values(0, 0.5, 20), "b": values(1, 0.5, 20)})
    report.write([SavedRun(run)], run)
    page = (run / "report.html").read_text(encoding="utf-8")
    assert page.count("<script") == 2 and page.count("</script>") == 2
    assert not re.findall(r"(?:src|href)\s*=|@import|url\(|https?://(?!www\.w3\.org/2000/svg)", page)
    data = json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL).group(1))
    assert len(data["samples"]["quiz"]["documents"]) == 20
    assert data["models"][0]["label"] == evil
