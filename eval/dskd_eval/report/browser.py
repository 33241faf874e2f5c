"""The samples of a task for the page: long texts clipped, documents beyond its budget left out."""

from __future__ import annotations

import json
from collections.abc import Sequence

from dskd_eval.entries import Entry
from dskd_eval.report.page import Browser, ShownAnswer, ShownDocument
from dskd_eval.schema import Free, Sample

_CLIP = 6_000
BUDGET = 24_000_000


def browser_of(entries: Sequence[Entry], task: str, share: int) -> Browser:
    """Documents of a task, as many as `share` characters hold."""
    documents: dict[tuple[int, str], tuple[Sample, list[ShownAnswer]]] = {}
    metric, unit = "", "percent"
    for entry in entries:
        score = entry.run.score(entry.model, task)
        if score is None:
            continue
        metric, unit = score.task.primary_metric, score.primary.unit
        for sample in entry.run.samples(entry.model, task):
            _, answers = documents.setdefault((sample.doc_id, sample.doc_hash), (sample, []))
            answers.append(_shown_answer(entry.label, sample, metric))
    kept, used = [], 0
    for key in sorted(documents):
        document = _shown_document(*documents[key])
        used += len(json.dumps(document.plain()))
        if used > share:
            break
        kept.append(document)
    return Browser(metric=metric, unit=unit, total=len(documents), documents=kept)


def _shown_answer(label: str, sample: Sample, metric: str) -> ShownAnswer:
    value = sample.metrics.get(metric)
    if isinstance(value, list):
        value = value[0] / value[1] if value[1] else 0.0
    generation = [info for info in sample.generation if info]
    return ShownAnswer(
        model=label,
        value=value,
        prompt=_clip(sample.prompt),
        texts=[_clip(text) for text in sample.answers[:10]],
        details=[_shown_details(detail) for detail in sample.details[:10]],
        finish=[info.finish for info in sample.generation[:10] if info],
        cut=sum(info.cut_tokens for info in generation),
    )


def _shown_details(detail: dict[str, Free]) -> dict[str, str]:
    return {key: _clip(str(item)) for key, item in detail.items() if item not in (None, "", [])}


def _shown_document(first: Sample, answers: list[ShownAnswer]) -> ShownDocument:
    references = [_clip(text) for text in first.references[:8]]
    prompts = {answer.prompt for answer in answers}
    if len(prompts) > 1:
        return ShownDocument(id=first.doc_id, references=references, answers=answers)
    without = [ShownAnswer.model_validate({k: v for k, v in a.given().items() if k != "prompt"}) for a in answers]
    return ShownDocument(id=first.doc_id, references=references, answers=without, prompt=prompts.pop())


def _clip(text: str) -> str:
    return text if len(text) <= _CLIP else text[: _CLIP // 2] + "\n[…]\n" + text[-_CLIP // 2 :]
