"""lm-eval's log of a task as samples of ours."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from dskd_eval.data import content_hash
from dskd_eval.errors import UserError
from dskd_eval.lmeval.eval_lm import message_hash
from dskd_eval.schema import GenerationInfo, Sample
from dskd_eval.scorers.metrics import Judgement, plain
from dskd_eval.tasks import render
from dskd_eval.tasks.planning import Plan


def own_samples(
    logged: list[dict[str, Any]],
    plan: Plan,
    messages: Mapping[str, Any],
    infos: Mapping[tuple[int, int], GenerationInfo],
    chosen: Sequence[int],
) -> list[Sample]:
    """Samples scored by our scorers.

    logged: rows of lm-eval; infos: by (place, repeat); chosen: the document at each place.
    """
    place_of = {doc_id: place for place, doc_id in enumerate(chosen)}
    samples = []
    for row in logged:
        scored: list[Judgement] = row["filtered_resps"][0]
        traced = [infos.get((place_of[row["doc_id"]], repeat)) for repeat in range(len(scored))]
        samples.append(
            Sample(
                **_question(row, plan, messages),
                references=render.references(plan.config.get("doc_to_target"), row["doc"]),
                answers=list(row["resps"][0]),
                metrics=plain({name: row[name] for name in plan.metrics}),
                details=[item.details for item in scored],
                answer_metrics=[plain(item.metrics) for item in scored],
                generation=traced,
            )
        )
    return samples


def native_samples(logged: list[dict[str, Any]], plan: Plan, messages: Mapping[str, Any]) -> list[Sample]:
    """Samples scored by lm-eval's metrics; the rows of several filters become one."""
    by_document: dict[int, Sample] = {}
    first_filter = logged[0]["filter"] if logged else "none"
    for row in logged:
        sample = by_document.get(row["doc_id"])
        if sample is None:
            target = row["target"]
            choices = [str(argument[1]) for argument in row["arguments"]]
            sample = Sample(
                **_question(row, plan, messages),
                references=[str(item) for item in target] if isinstance(target, list) else [str(target)],
                answers=[_readable(response) for group in row["resps"] for response in group],
                metrics={},
                details=[{"choices": choices}] if len(choices) > 1 else [],
                generation=[],
            )
            by_document[row["doc_id"]] = sample
        for name in row["metrics"]:
            value = row[name]
            if isinstance(value, (bool, int, float)) or hasattr(value, "item"):
                if not math.isfinite(float(value)):
                    raise UserError(
                        f"task {plan.spec.name}, metric {name}",
                        expected="a finite number for every document",
                        got=f"{float(value)} for document {row['doc_id']}",
                        fix="Correct the metric of the task file.",
                    )
                label = name if row["filter"] == first_filter else f"{name},{row['filter']}"
                sample.metrics[label] = float(value)
    return list(by_document.values())


def _readable(response: Any) -> str:
    if isinstance(response, (tuple, list)) and len(response) == 2:
        return f"log-likelihood {float(response[0]):.4f}"
    return str(response)


def _question(row: dict[str, Any], plan: Plan, messages: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a sample that tell what was asked."""
    prompts = [argument[0] for argument in row["arguments"]]
    asked = [messages.get(prompt, prompt) for prompt in prompts]
    return {
        "task": plan.spec.name,
        "doc_id": row["doc_id"],
        "doc_hash": content_hash(row["doc"]),
        "prompt_hash": message_hash(plan.style, asked[0] if len(set(prompts)) == 1 else asked),
        "prompt": prompts[0],
    }
