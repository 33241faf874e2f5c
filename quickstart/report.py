"""results.json: everything that was measured, in one place."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from quickstart import compare, recipes, rows
from quickstart.curves import AGREEMENT
from quickstart.pipeline import Done
from quickstart.recipes import Log


def logs(out: Path, done: Done) -> dict[str, Log]:
    """The training logs that the curves are drawn from."""
    folders = {"sft": done.search[0].folder, "sft_all": "sft_all", "seqkd": "seqkd", "dskd": "dskd"}
    return {name: recipes.log_of(out / folder) for name, folder in folders.items()}


def counts(folder: Path) -> dict[str, int]:
    """How many rows each file of questions has."""
    names = ("gold", "gold_all", "prompts", "validation", "heldout")
    return {name: len(rows.read(folder / f"{name}.jsonl")) for name in names}


def teacher_answers(out: Path) -> dict[str, int]:
    """How many prompts the teacher answered to the end, and how many of these answers are right."""
    key = {}
    for row in rows.read(out / "data" / "prompts_key.jsonl"):
        key[row["messages"][-2]["content"]] = row["messages"][-1]["content"]
    given = [row["messages"] for row in rows.read(out / "answers" / "rows.jsonl")]
    right = sum(turns[-1]["content"].split() == key[turns[-2]["content"]].split() for turns in given)
    return {"written": len(given), "right": right}


def collect(out: Path, done: Done, *, teacher: str, seed: int) -> dict[str, Any]:
    """Scores, differences, costs, search, what the distillation did, and the sentences that say what it means."""
    amount = counts(out / "data")
    titles = {
        "student": ("student before", "student before any answer"),
        "sft": ("SFT", f"SFT, best of {len(done.search)} rates on {amount['gold']} gold answers"),
        "seqkd": ("SeqKD", f"SeqKD: SFT on {amount['gold']} gold + the teacher's answers"),
        "dskd": ("DSKD", f"DSKD on {amount['gold']} gold + the teacher's answers"),
        "sft_all": ("SFT, all gold", f"for comparison: SFT on {amount['gold_all']} gold answers"),
        "teacher": ("teacher", f"teacher, tuned on {amount['gold']} gold answers"),
    }
    cost = {name: found.cpu_seconds for name, found in done.costs.items()}
    spent = {"sft": sum(cost[tried.folder] for tried in done.search), "teacher": cost["teacher-tuned"]}
    spent |= {name: cost[name] for name in ("seqkd", "dskd", "sft_all")}
    models = {}
    for name, (short, title) in titles.items():
        models[name] = {"short": short, "title": title, "cpu_seconds": spent.get(name)}
        models[name] |= compare.score(done.answered[name])
    difference = {}
    for baseline, name in {"best_sft": "sft", "seqkd": "seqkd", "sft_all": "sft_all", "teacher": "teacher"}.items():
        difference[f"dskd_minus_{baseline}"] = compare.difference(done.answered["dskd"], done.answered[name])
    return {
        "teacher": teacher,
        "seed": seed,
        "verdict": compare.sentence(difference, amount),
        "more_labels": compare.more_labels(difference, amount),
        "rows": amount,
        "difference": difference,
        "models": models,
        "search": [asdict(tried) for tried in done.search],
        "teacher_answers": teacher_answers(out),
        "costs": {name: asdict(found) for name, found in done.costs.items()},
        "shared_costs": (
            f"Shared by several models: the student's pretraining {cost['student']:.0f} s, the teacher's answers "
            f"{cost['answers']:.0f} s. SFT includes its search."
        ),
        "dskd": _distillation(recipes.log_of(out / "dskd")),
        "curves": logs(out, done),
    }


def _distillation(log: Log) -> dict[str, float]:
    found = {"align_ratio": recipes.mean_of(log, "dskd/align_ratio")}
    if recipes.series(log, AGREEMENT)[1]:
        found["agreement_start"] = recipes.mean_of(log, AGREEMENT, part=slice(0, 10))
        found["agreement_end"] = recipes.mean_of(log, AGREEMENT, part=slice(-10, None))
    return found
