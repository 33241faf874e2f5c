"""Numbers of a task from its samples, of a suite from its tasks, and what a reader must know before trusting them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence

from dskd_eval import stats
from dskd_eval.errors import UserError
from dskd_eval.schema import (
    AnswerCounts,
    GenerationInfo,
    MetricScore,
    MetricValue,
    Sample,
    ScoreRow,
    SeedScore,
    SuiteScore,
    TaskScore,
)
from dskd_eval.scorers import registry
from dskd_eval.tasks import selection
from dskd_eval.tasks.planning import Plan
from dskd_eval.tasks.yaml_file import listed


def task_score(
    samples: list[Sample], plan: Plan, infos: Mapping[tuple[int, int], GenerationInfo], *, documents: int, seed: int
) -> TaskScore:
    """Every metric with its interval, and counts of the answers. documents: of how many the samples were drawn."""
    metrics = {}
    for name in _scored_metrics(samples, plan):
        column = [sample.metrics[name] for sample in samples]
        metrics[name] = _metric(name, column, seed, _higher_is_better(plan, name))
    answers = _answer_facts(infos, samples)
    score = TaskScore(status="finished", n=len(samples), documents=documents, metrics=metrics, answers=answers)
    if len(plan.seeds) > 1 and not plan.spec.executes_code:
        return score.model_copy(update={"per_seed": _per_seed(samples, plan)})
    return score


def _scored_metrics(samples: list[Sample], plan: Plan) -> list[str]:
    found = list(dict.fromkeys(name for sample in samples for name in sample.metrics))
    if plan.primary not in found:
        raise UserError(
            f"task {plan.spec.name}, `metrics`",
            expected="a metric with one number per document: " + (", ".join(found) or "none"),
            got=repr(plan.primary),
            fix="Name one of them in `metrics:`.",
        )
    return [plan.primary, *(name for name in found if name != plan.primary)]


def _higher_is_better(plan: Plan, name: str) -> bool:
    entries = listed(plan.config.get("metric_list")) if plan.spec.native else []
    said = [
        entry["higher_is_better"]
        for entry in entries
        if isinstance(entry, dict) and entry.get("metric") == name and "higher_is_better" in entry
    ]
    return bool(said[0]) if said else registry.metric_info(name).higher_is_better


def _metric(name: str, values: list[MetricValue], seed: int, higher_is_better: bool) -> MetricScore:
    unit = registry.unit_of(name, values)
    scale = 100.0 if unit == "percent" else 1.0
    found = stats.interval(values, seed=seed, proportion=registry.is_proportion(name, unit))
    return MetricScore(
        value=round(scale * found.value, 6),
        low=None if found.low is None else round(scale * found.low, 6),
        high=None if found.high is None else round(scale * found.high, 6),
        n=found.n,
        interval=found.method,
        unit=unit,
        higher_is_better=higher_is_better,
    )


def _per_seed(samples: list[Sample], plan: Plan) -> list[SeedScore]:
    scale = 100.0 if registry.unit_of(plan.primary, []) == "percent" else 1.0
    scores = []
    for place, seed in enumerate(plan.seeds):
        column = [sample.answer_metrics[place][plan.primary] for sample in samples]
        scores.append(SeedScore(seed=seed, value=scale * stats.mean(column)))
    return scores


def _answer_facts(infos: Mapping[tuple[int, int], GenerationInfo], samples: list[Sample]) -> AnswerCounts:
    """Counts that tell how far a score may be trusted: cut prompts, shortened, unfinished and empty
    answers, reasoning before them.
    """
    answers = [text for sample in samples for text in sample.answers]
    details = [detail for sample in samples for detail in sample.details]
    if not infos:
        return AnswerCounts(count=len(answers))
    traced = list(infos.values())
    finish = Counter(info.finish for info in traced)
    traces = Counter(info.trace for info in traced)
    return AnswerCounts(
        count=len(traced),
        empty=sum(1 for text in answers if not text.strip()),
        unfinished=finish["length"],
        clamped=sum(1 for info in traced if info.clamped),
        smallest_limit=min(info.max_new_tokens for info in traced),
        prompts_cut=sum(1 for info in traced if info.cut_tokens),
        prompt_tokens_cut=sum(info.cut_tokens for info in traced),
        longest_prompt=max(info.prompt_tokens for info in traced),
        with_reasoning=traces["closed"] + traces["unclosed"],
        unfinished_reasoning=traces["unclosed"],
        unread_reasoning=traces["unread"],
        references_unseen=sum("unseen_by_rouge_l" in detail for detail in details),
        mean_new_tokens=round(sum(info.new_tokens for info in traced) / len(traced), 2),
    )


def suite_scores(
    scores: list[ScoreRow], samples_of: Callable[[str, str], Sequence[Sample]], seed: int
) -> list[SuiteScore]:
    """Unweighted mean of the primary metrics of a suite, for models that finished all tasks of the suite."""
    known = selection.builtin_tasks().values()
    groups: dict[tuple[str, str], list[ScoreRow]] = {}
    for score in scores:
        groups.setdefault((score.model, score.task.suite), []).append(score)
    suites = []
    for (model, suite), members in groups.items():
        percent = all(score.finished and score.primary.unit == "percent" for score in members)
        whole = {spec.name for spec in known if spec.suite == suite}
        if not whole or whole != {score.task.task for score in members} or not percent:
            continue
        names = [score.task.primary_metric for score in members]
        columns = []
        for score in members:
            samples = samples_of(model, score.task.task)
            columns.append([sample.metrics[score.task.primary_metric] for sample in samples])
        right_or_wrong = [registry.is_proportion(name, "percent") for name in names]
        found = stats.macro_interval(columns, proportions=right_or_wrong, seed=seed)
        suites.append(
            SuiteScore(
                model=model,
                suite=suite,
                tasks=[score.task.task for score in members],
                value=round(100 * found.value, 6),
                low=None if found.low is None else round(100 * found.low, 6),
                high=None if found.high is None else round(100 * found.high, 6),
                n=found.n,
            )
        )
    return suites


def warnings(scores: list[ScoreRow]) -> list[str]:
    """What a reader must know before trusting a number."""
    notes = []
    subset = [score.n for score in scores if score.finished and score.n < score.documents]
    if subset:
        notes.append(f"seeded random subset of at most {max(subset)} documents per task: numbers are rough")
    kinds: dict[tuple[str, str], list[str]] = {}
    for score in scores:
        for text, number in _doubts(score):
            told = f"{score.task.task} {number}/{score.answers.count}"
            kinds.setdefault((score.model, text), []).append(told)
    return notes + [f"{model}: {text}: {', '.join(tasks)}" for (model, text), tasks in kinds.items()]


def _doubts(score: ScoreRow) -> Iterator[tuple[str, int]]:
    """What may be wrong with the answers to a task, each with the number of such answers."""
    facts, task, count = score.answers, score.task, score.answers.count
    if facts.clamped:
        yield "answers limited to fewer tokens than the task asks, because the context is short", facts.clamped
    if facts.prompts_cut and task.protocol == "default":
        yield "prompts longer than the context, cut at their beginning", facts.prompts_cut
    if count and facts.unfinished > count / 10:
        yield "answers that ran into their token limit", facts.unfinished
    if count and facts.empty > count / 20:
        yield "empty answers", facts.empty
    if count and facts.references_unseen > count / 20 and task.primary_metric == "rouge_l":
        yield "references with letters that rouge_l does not see (rouge_l_unicode does)", facts.references_unseen
    if facts.unfinished_reasoning:
        yield "answers whose reasoning did not end count as empty (--max-new-tokens)", facts.unfinished_reasoning
    if facts.unread_reasoning:
        yield "answers begin with reasoning that is scored with them (--reasoning START,END)", facts.unread_reasoning
