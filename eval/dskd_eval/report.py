"""report.md and report.html: scores with intervals, comparisons and every sample; no network needed."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dskd_eval import comparison, records, scorers
from dskd_eval.records import Run

_PAGE = Path(__file__).parent / "report.html"
_CLIP = 6_000
_BUDGET = 24_000_000


def write(runs: Sequence[Run], folder: Path) -> tuple[Path, Path]:
    """Write report.md and report.html of one or several runs into a folder; returns their paths."""
    found = payload(runs)
    markdown, page = folder / "report.md", folder / "report.html"
    records.replace_text(markdown, as_markdown(found))
    records.replace_text(page, as_html(found))
    return markdown, page


def payload(runs: Sequence[Run]) -> dict[str, Any]:
    """Everything both reports show."""
    entries = comparison.entries(runs)
    tasks: dict[str, dict[str, Any]] = {}
    scores: list[dict[str, Any]] = []
    for entry in entries:
        for score in entry.run.results["scores"]:
            if score["model"] != entry.model:
                continue
            tasks.setdefault(score["task"]["task"], score["task"])
            scores.append({**score, "model": entry.label})
    results = runs[0].results
    if len(runs) == 1:
        comparisons = results.get("comparisons") or {}
    elif len(entries) > 1:
        comparisons = comparison.compare(entries, strict=False)
    else:
        comparisons = {}
    labels = {(id(entry.run), entry.model): entry.label for entry in entries}
    suites = [
        {**suite, "model": labels[id(run), suite["model"]]}
        for run in runs
        for suite in run.results["suites"]
        if (id(run), suite["model"]) in labels
    ]
    notes = list(dict.fromkeys([note for run in runs for note in run.results["notes"]]))
    notes += [note for note in comparisons.get("notes", []) if note not in notes]
    return {
        "title": "dskd-eval: " + ", ".join(entry.label for entry in entries),
        "complete": all(run.results["complete"] for run in runs),
        "models": [{**model, "label": labels[id(run), model["name"]]} for run in runs for model in run.models],
        "tasks": list(tasks.values()),
        "metrics": {
            name: vars(scorers.metric_info(name))
            for name in sorted({name for score in scores for name in score.get("metrics", {})})
        },
        "scores": scores,
        "suites": suites,
        "comparisons": comparisons,
        "notes": notes,
        "settings": results["settings"],
        "environment": results["environment"],
        "sandbox": results["sandbox"],
        "samples": _samples(entries, list(tasks)),
    }


def _samples(entries: Sequence[comparison.Entry], tasks: Sequence[str]) -> dict[str, Any]:
    """Samples by task and document; long texts are clipped, documents beyond the page's budget left out."""
    browsers: dict[str, Any] = {}
    share = _BUDGET // max(1, len(tasks))
    for task in tasks:
        documents: dict[tuple[int, str], dict[str, Any]] = {}
        metric, unit = "", "percent"
        for entry in entries:
            score = entry.run.score(entry.model, task)
            if score is None:
                continue
            metric = score["task"]["primary_metric"]
            unit = score["metrics"][metric]["unit"]
            for sample in entry.run.samples(entry.model, task):
                document = documents.setdefault(
                    (sample["doc_id"], sample["doc_hash"]),
                    {"id": sample["doc_id"], "references": [_clip(text) for text in sample["references"][:8]],
                     "answers": []},
                )  # fmt: skip
                value = sample["metrics"].get(metric)
                if isinstance(value, list):
                    value = value[0] / value[1] if value[1] else 0.0
                document["answers"].append(
                    {
                        "model": entry.label,
                        "value": value,
                        "prompt": _clip(sample["prompt"]),
                        "texts": [_clip(text) for text in sample["answers"][:10]],
                        "details": [
                            {key: _clip(str(item)) for key, item in detail.items() if item not in (None, "", [])}
                            for detail in sample["details"][:10]
                        ],
                        "finish": [info["finish"] for info in sample["generation"][:10] if info],
                        "cut": sum(info["cut_tokens"] for info in sample["generation"] if info),
                    }
                )
        kept, used = [], 0
        for key in sorted(documents):
            document = documents[key]
            prompts = {answer["prompt"] for answer in document["answers"]}
            if len(prompts) == 1:
                document["prompt"] = prompts.pop()
                for answer in document["answers"]:
                    del answer["prompt"]
            used += len(json.dumps(document))
            if used > share:
                break
            kept.append(document)
        browsers[task] = {"metric": metric, "unit": unit, "total": len(documents), "documents": kept}
    return browsers


def _clip(text: str) -> str:
    return text if len(text) <= _CLIP else text[: _CLIP // 2] + "\n[…]\n" + text[-_CLIP // 2 :]


def as_html(found: dict[str, Any]) -> str:
    """One page with its data, style and script inside; model output is data, never markup."""
    data = json.dumps(found, ensure_ascii=False, separators=(",", ":"))
    data = data.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
    page = _PAGE.read_text(encoding="utf-8")
    return page.replace("{{title}}", html.escape(found["title"]), 1).replace("{{data}}", data, 1)


def as_markdown(found: dict[str, Any]) -> str:
    """Tables for a repository or an issue."""
    lines = [f"# {_cell(found['title'])}", ""]
    if not found["complete"]:
        lines += ["**Not complete: some tasks failed or are waiting.**", ""]
    labels = [model["label"] for model in found["models"]]
    lines += ["Scores with 95 % intervals. Higher is better.", ""]
    lines += [_line(["task", "metric", "n", *labels]), _line(["---", "---", "--:", *["--:"] * len(labels)])]
    by_place = {(score["task"]["task"], score["model"]): score for score in found["scores"]}
    for task in found["tasks"]:
        rows = [by_place.get((task["task"], label)) for label in labels]
        counts = sorted({row["n"] for row in rows if row and row["status"] == "finished"})
        cells = [_score_cell(row) for row in rows]
        lines.append(_line([task["task"], task["primary_metric"], "/".join(map(str, counts)), *cells]))
    for suite in dict.fromkeys(item["suite"] for item in found["suites"]):
        values = {item["model"]: item for item in found["suites"] if item["suite"] == suite}
        cells = [_interval_cell(values[label]) if label in values else "" for label in labels]
        lines.append(_line([f"**{suite}** (mean)", "", "", *cells]))
    lines.append("")
    lines += _comparison_lines(found["comparisons"])
    if found["notes"]:
        lines += ["## Notes", "", *[f"- {_cell(note)}" for note in found["notes"]], ""]
    lines += ["## Tasks", ""]
    lines += [_line(["task", "version", "style", "protocol", "shots", "answers end at", "data", "sha256"])]
    lines += [_line(["---"] * 8)]
    for task in found["tasks"]:
        stop = ", ".join(repr(text) for text in task["generation"].get("until", [])) or "end token"
        stop += f"; {task['generation'].get('max_gen_toks')} tokens"
        data = task["data"].get("test") or {}
        cells = [task["task"], f"{task['version']:g}", task["style"], task["protocol"], str(task["shots"])]
        lines.append(_line([*cells, stop, str(data.get("source", "")), str(data.get("sha256") or "")[:12]]))
    lines += ["", "## Models", ""]
    lines += [_line(["model", "role", "source", "dtype", "device", "context", "chat template", "fingerprint"])]
    lines += [_line(["---"] * 8)]
    for model in found["models"]:
        facts = [model["label"], model.get("role") or "", model["source"], model.get("dtype") or "",
                 model.get("device") or "", str(model.get("context_length") or ""),
                 "yes" if model["chat_template"] else "no", model["fingerprint"][:12]]  # fmt: skip
        lines.append(_line(facts))
    box = found["sandbox"]
    lines += ["", f"Sandbox: {box['backend']} ({box['version']})." if box else "Sandbox: not needed."]
    versions = ", ".join(f"{name} {version}" for name, version in found["environment"]["packages"].items())
    lines += ["", f"Python {found['environment']['python']}; {versions}.", ""]
    return "\n".join(lines)


def _comparison_lines(found: dict[str, Any]) -> list[str]:
    lines: list[str] = []
    if found.get("pairs"):
        lines += [f"## Against {_cell(found['baseline'])}", ""]
        for pair in found["pairs"]:
            lines += [f"### {_cell(pair['model'])}", ""]
            lines += [_line(["task", "difference", "95 % interval", "p", "p (Holm)", "wins/ties/losses", "n"])]
            lines += [_line(["---", *["--:"] * 6])]
            for row in pair["rows"]:
                span = f"{row['low']:+.1f} to {row['high']:+.1f}"
                tally = f"{row['wins']}/{row['ties']}/{row['losses']}"
                cells = [
                    row["task"],
                    f"{row['difference']:+.1f}",
                    span,
                    f"{row['p']:.2g}",
                    f"{row['p_holm']:.2g}",
                ]
                lines.append(_line([*cells, tally, str(row["n"])]))
            lines.append("")
    for gap in found.get("gaps") or []:
        lines += [f"## Gap closed by {_cell(gap['model'])}", ""]
        lines += [_line(["task", "base", "student", "teacher", "closed %", "95 % interval", "n"])]
        lines += [_line(["---", *["--:"] * 6])]
        for row in gap["rows"]:
            closed = "teacher not above base" if row["closed"] is None else f"{row['closed']:.0f}"
            span = f"{row['low']:.0f} to {row['high']:.0f}" if row["low"] is not None else "open"
            numbers = [f"{row[key]:.1f}" for key in ("base", "student", "teacher")]
            lines.append(_line([row["task"], *numbers, closed, span, str(row["n"])]))
        lines.append("")
    return lines


def _score_cell(score: dict[str, Any] | None) -> str:
    if score is None:
        return ""
    if score["status"] != "finished":
        return str(score["status"])
    return _interval_cell(score["metrics"][score["task"]["primary_metric"]])


def _interval_cell(item: dict[str, Any]) -> str:
    return f"{item['value']:.1f} ({item['low']:.1f} to {item['high']:.1f})"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(_cell(cell) for cell in cells) + " |"


def _cell(text: str) -> str:
    return " ".join(str(text).split()).replace("|", "\\|").replace("<", "&lt;")
