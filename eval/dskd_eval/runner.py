"""One task for one model through lm-eval's `simple_evaluate`, and a whole run of them."""

from __future__ import annotations

import ast
import contextlib
import logging
import math
import random
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lm_eval
from lm_eval import evaluator
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks import TaskManager

from dskd_eval import data, stats
from dskd_eval.data import LoadedData, Row, content_hash
from dskd_eval.errors import UserError
from dskd_eval.lm import EvalLM, message_hash
from dskd_eval.sandbox import Outcome, Sandbox
from dskd_eval.schema import (
    AnswerCounts,
    DataRecord,
    GenerationInfo,
    MetricScore,
    MetricValue,
    Sample,
    SeedScore,
    TaskScore,
)
from dskd_eval.scorers import registry, requirements
from dskd_eval.scorers.base import Answer
from dskd_eval.scorers.metrics import Scored, Value, combine, plain
from dskd_eval.scorers.registry import SCORERS
from dskd_eval.scorers.requirements import REQUIREMENTS
from dskd_eval.tasks import planning, render
from dskd_eval.tasks.planning import Plan
from dskd_eval.tasks.spec import TaskSpec


@dataclass(frozen=True)
class TaskData:
    """Rows of a task: those to answer, and those that may serve as shots."""

    test: LoadedData | None
    shots: LoadedData | None

    def record(self) -> dict[str, DataRecord]:
        splits = {"test": self.test, "shots": self.shots}
        return {name: loaded.record() for name, loaded in splits.items() if loaded is not None}


def load_data(spec: TaskSpec, directory: Path | None, num_fewshot: int | None = None) -> TaskData:
    """Rows of a task, checked. A task with lm-eval's own `dataset_path` loads its data itself.

    num_fewshot: as for `planning.plan`; rows for shots are read only where some style uses them.
    """
    shots = any(planning.plan(spec, chat=chat, num_fewshot=num_fewshot).shots for chat in (False, True))
    splits = {split: sources for split, sources in spec.data.items() if split == "test" or shots}
    loaded = {split: data.load(sources, directory) for split, sources in splits.items()}
    return TaskData(loaded.get("test"), loaded.get("shots"))


def choose_documents(total: int, limit: int | None, seed: int) -> list[int]:
    """Sorted ids of a seeded random subset; a larger limit contains a smaller one."""
    if limit is None or limit >= total:
        return list(range(total))
    order = list(range(total))
    random.Random(seed).shuffle(order)
    return sorted(order[:limit])


class _Rows(list[Row]):
    """Rows as lm-eval expects a split: a list with `features`. Ragged rows stay as they are."""

    @property
    def features(self) -> dict[str, None]:
        return {key: None for row in self for key in row}


@contextlib.contextmanager
def _index_of(task: ConfigurableTask) -> Iterator[TaskManager]:
    """An index that knows one task; lm-eval's own tasks, whose search takes seconds, are left out."""
    with tempfile.TemporaryDirectory(prefix="dskd-eval-") as folder:
        (Path(folder) / "task.yaml").write_text(f"task: {task.config.task}\n", encoding="utf-8")
        yield TaskManager(include_path=folder, include_defaults=False)


@dataclass(frozen=True)
class TaskResult:
    """Scores and samples of one task for one model, ready to be written."""

    score: TaskScore
    samples: list[Sample]


def lm_eval_config(plan: Plan, rows: TaskData) -> dict[str, Any]:
    """The lm-eval task configuration of a plan, without metrics and filters."""
    own = ("reference_answer", "shot_target")
    config = {key: value for key, value in plan.config.items() if key not in own}
    config["task"] = plan.spec.name
    config["metadata"] = {"version": plan.spec.version}
    if rows.test is not None:
        splits: dict[str, Any] = {"test": rows.test.rows} | ({"shots": rows.shots.rows} if rows.shots else {})
        if "process_docs" in config:
            import datasets

            ready = {name: datasets.Dataset.from_list(split) for name, split in splits.items()}
        else:
            ready = {name: _Rows(split) for name, split in splits.items()}
        config["custom_dataset"] = lambda **_: ready
        config["test_split"] = "test"
        if rows.shots:
            available = len(rows.shots.rows)
            if plan.shots > available:
                raise UserError(
                    f"task {plan.spec.name}, --num-fewshot",
                    expected=f"at most {available} shots",
                    got=str(plan.shots),
                    fix="Lower it.",
                )
            config["fewshot_split"] = "shots"
            config["fewshot_config"] = {"sampler": "first_n"}
        elif plan.shots:
            raise UserError(
                f"task {plan.spec.name}",
                expected="rows for its shots",
                got="none",
                fix="Add `data: {test: ..., shots: ...}` to the task file, or `shots: 0`.",
            )
    if plan.spec.native and config.get("unsafe_code"):
        raise UserError(
            f"task file {plan.spec.path.name}",
            expected="code to run in the sandbox",
            got="unsafe_code: true with metrics of its own",
            fix="Use `scorer: python` with `code: {tests: ...}` instead.",
        )
    if not plan.spec.native:
        config["doc_to_text"] = _function(plan.config["doc_to_text"])
        config["doc_to_target"] = _text_function(_shot_target(plan))
        config["output_type"] = "generate_until"
        config["unsafe_code"] = plan.spec.executes_code
        config["repeats"] = len(plan.seeds)
    return config


def _shot_target(plan: Plan) -> Any:
    """What stands as the answer of a shot."""
    if "shot_target" in plan.config:
        return plan.config["shot_target"]
    if "doc_to_target" in plan.config:
        return _answer_template(plan)
    if plan.shots:
        raise UserError(
            f"task {plan.spec.name}",
            expected="answers for its shots",
            got="neither `reference` nor `shot_target`",
            fix="Add one of them to the task file, or `shots: 0`.",
        )
    return lambda row: ""


def _function(template: Any) -> Callable[[Row], str]:
    return lambda row: render.render(template, row)


def _text_function(template: Any) -> Callable[[Row], str]:
    return lambda row: render.render_text(template, row)


def _answer_template(plan: Plan) -> Callable[[Row], str]:
    return lambda row: render.references(plan.config["doc_to_target"], row)[0]


def has_reference(plan: Plan) -> bool:
    """Whether the rows hold answers that must score 100."""
    known = "reference_answer" in plan.config or "doc_to_target" in plan.config
    return known and plan.spec.scorer is not None and SCORERS[plan.spec.scorer].references_are_right


def reference_answer(plan: Plan, row: Row) -> str:
    """An answer that must score 100: the row's own solution in the form that the prompt asks for."""
    template = plan.config.get("reference_answer")
    return render.render_text(template if template is not None else _answer_template(plan), row)


def native_answer(plan: Plan, rows: TaskData) -> Callable[[Row], str] | None:
    """The references of a task that lm-eval scores, as answers to it; None where it has none or ranks choices."""
    task = _build(lm_eval_config(plan, rows), plan)
    if task.OUTPUT_TYPE != "generate_until" or plan.config.get("doc_to_target") in (None, ""):
        return None

    def answer(row: Row) -> str:
        target = task.doc_to_target(row)
        return str(target[0] if isinstance(target, (list, tuple)) and target else target)

    return answer


def check_needs(spec: TaskSpec, directory: Path | None) -> None:
    """Modules and files that scoring needs, checked before anything is generated. Raises UserError."""
    if spec.scorer is not None:
        requirements.check_modules(spec.name, SCORERS[spec.scorer].modules)
    for need in spec.needs:
        REQUIREMENTS[need].check(spec.name, directory)


def check_task(plan: Plan, rows: TaskData) -> list[str]:
    """Make every prompt, reference and test of a user's task once, before a model is loaded.

    Returns what looks wrong and may be meant. Raises UserError.
    """
    config = lm_eval_config(plan, rows)
    if plan.spec.scorer is None:
        return _check_native(_build(config, plan), plan)
    scorer = registry.make(plan.spec.scorer)
    notes = _Looks(plan)
    for number, row in enumerate(_documents(plan, rows), 1):
        with _in_row(plan, number):
            notes.see_prompt(row, render.render(plan.config["doc_to_text"], row))
            accepted = render.references(plan.config.get("doc_to_target"), row)
            notes.see_references(accepted)
            right = [reference_answer(plan, row)] if "reference_answer" in plan.config else accepted
            notes.see_stops(number, right)
            scorer.check_row(row, render.code_parts(plan.spec, row) if scorer.executes_code else {})
    if plan.shots and rows.shots:
        target = _shot_target(plan)
        for number, row in enumerate(rows.shots.rows[: plan.shots], 1):
            with _in_row(plan, number, "shot"):
                render.render(plan.config["doc_to_text"], row)
                render.render_text(target, row)
    return notes.texts()


@contextlib.contextmanager
def _in_row(plan: Plan, number: int, kind: str = "row") -> Iterator[None]:
    """Names the row in a UserError."""
    try:
        yield
    except UserError as error:
        where = f"task file {plan.spec.path.name}, {kind} {number}" + (f", {error.where}" if error.where else "")
        raise UserError(where, expected=error.expected, got=error.got, fix=error.fix) from error


def _documents(plan: Plan, rows: TaskData) -> Sequence[Row]:
    config = lm_eval_config(plan, rows)
    if rows.test is not None and "process_docs" not in config:
        return rows.test.rows
    documents: Sequence[Row] = _build(config | _scoring(plan, _score_none), plan).eval_docs
    return documents


def _check_native(task: ConfigurableTask, plan: Plan) -> list[str]:
    """What can be seen of a task that lm-eval scores: fields without braces, and prompts that are all equal."""
    notes = _Looks(plan)
    for number, row in enumerate(task.eval_docs, 1):
        for key in ("doc_to_text", "doc_to_target") if number == 1 else ():
            template = plan.config.get(key)
            if isinstance(template, str) and template and not template.isdigit() and template not in row:
                with _in_row(plan, number):
                    render.check_literal(template, row)
        prompt = _native_prompt(task, plan, row, number)
        if printed := render.printed_object(prompt, row):
            raise UserError(
                f"task file {plan.spec.path.name}, row {number}, `doc_to_text`",
                expected="texts or numbers",
                got=f"{printed[:80]!r}: the prompt prints a method or another object of Python",
                fix=f"{render.METHOD_NAMES}.",
            )
        notes.see_prompt(row, prompt)
    return notes.texts()


def _native_prompt(task: ConfigurableTask, plan: Plan, row: Row, number: int) -> str:
    """lm-eval's prompt of a row. Raises UserError when it cannot be made."""
    try:
        return str(task.doc_to_text(row))
    except Exception as error:
        raise UserError(
            f"task file {plan.spec.path.name}, row {number}, `doc_to_text`",
            expected="a prompt for every row",
            got=f"{type(error).__name__}: {str(error)[:200]}",
            fix="Correct the template or the data file.",
        ) from error


class _Looks:
    """What is seen of the rows of a task: signs that a template does not say what was meant."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.prompts: Counter[str] = Counter()
        self.answers: Counter[tuple[str, ...]] = Counter()
        self.signs: Counter[str] = Counter()
        self.examples: dict[str, str] = {}
        self.rows = 0

    def see_prompt(self, row: Row, prompt: str) -> None:
        self.rows += 1
        template = self.plan.config.get("doc_to_text")
        if self.rows == 1 or len(self.prompts) == 1:
            self.prompts[prompt] += 1
        value = None if self.plan.spec.native else render.printed_value(template, row)
        if value is not None:
            self._sign("prompts hold a value as Python prints it", str(value))
        braces = render.single_braces(template, row) if isinstance(template, str) else None
        if braces:
            self._sign("prompts hold single braces around a field, which are not filled in", braces)

    def see_references(self, references: Sequence[str]) -> None:
        self.answers[tuple(references)] += 1
        for text in references:
            if not text.strip():
                self._sign("references are empty", text)
            elif _looks_printed(text):
                self._sign("references look like a list or None that Python printed", text)

    def see_stops(self, number: int, answers: Sequence[str]) -> None:
        """Answers that a model could not write whole, because it stops within them."""
        for text in answers:
            for stop in self.plan.generation["until"]:
                if stop in text and text.split(stop)[0].strip() != text.strip():
                    self._sign(
                        f"references hold the stop string {stop!r}, where an answer ends", f"row {number}: {text}"
                    )

    def _sign(self, kind: str, example: str) -> None:
        self.signs[kind] += 1
        self.examples.setdefault(kind, example)

    def texts(self) -> list[str]:
        name = self.plan.spec.name
        found = [
            f"{name}: {count} of {self.rows} {kind}: {self.examples[kind][:80]!r}" for kind, count in self.signs.items()
        ]
        if self.rows > 1 and len(self.prompts) == 1:
            found.insert(0, f"{name}: all {self.rows} prompts are equal: {next(iter(self.prompts))[:80]!r}")
        if self.rows > 1 and len(self.answers) == 1 and any(self.answers):
            found.append(f"{name}: all {self.rows} references are equal: {next(iter(self.answers))[0][:80]!r}")
        return found


def _looks_printed(text: str) -> bool:
    """Whether a text is a list, a mapping or None as Python prints them."""
    if text.strip() in ("None", "nan", "[]", "{}"):
        return True
    if text[:1] not in "[{(" or not any(quote in text for quote in "'\""):
        return False
    try:
        return isinstance(ast.literal_eval(text), (list, tuple, dict, set))
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return False


def check_references(plan: Plan, rows: TaskData) -> None:
    """Score the references of a user's task, before a model is loaded. Raises UserError for one below 100.

    Programs are left to `doctor --oracle`, which has a sandbox. Of mathematics, whose comparison is slow, the first
    500 different references are scored. IFEval has no references: there, one answer is scored for every row.
    """
    if plan.spec.scorer is None:
        return
    scorer = registry.make(plan.spec.scorer)
    if not scorer.checked_before_run or not (scorer.probe or has_reference(plan)):
        return
    seen: set[tuple[str, ...]] = set()
    for number, row in enumerate(_documents(plan, rows), 1):
        with _in_row(plan, number):
            if scorer.probe is not None:
                scorer.check_reference(Answer(row, scorer.probe, []))
                continue
            accepted = render.references(plan.config.get("doc_to_target"), row)
            texts = [reference_answer(plan, row)] if "reference_answer" in plan.config else accepted
            for text in texts:
                full = scorer.most_checked is not None and len(seen) >= scorer.most_checked
                if (text, *accepted) not in seen and not full:
                    seen.add((text, *accepted))
                    scorer.check_reference(Answer(row, text, accepted, plan.style))


def _score_none(answers: Sequence[Answer]) -> list[Scored]:
    return []


def evaluate_task(
    lm: EvalLM,
    plan: Plan,
    rows: TaskData,
    *,
    limit: int | None = None,
    seed: int = 0,
    sandbox: Sandbox | None = None,
    on_scoring: Callable[[int, int], None] | None = None,
) -> TaskResult:
    """Generate and score the answers of one task.

    limit: number of documents, drawn with `seed`. sandbox: needed by tasks that execute code.
    """
    config = lm_eval_config(plan, rows)
    if plan.spec.scorer is not None:
        scorer = registry.make(plan.spec.scorer, _program_runner(plan, sandbox, on_scoring))
        config |= _scoring(plan, scorer.score)
    task = _build(config, plan)
    trace = lm.begin(plan.seeds)
    total = len(task.eval_docs)
    chosen = choose_documents(total, limit, seed)
    with _quiet(), _index_of(task) as index:
        output = lm_eval.simple_evaluate(
            model=lm,
            tasks=[task],
            task_manager=index,
            samples={plan.spec.name: chosen},
            apply_chat_template=plan.style == "chat",
            fewshot_as_multiturn=True,
            bootstrap_iters=0,
            log_samples=True,
            confirm_run_unsafe_code=True,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
        )
    logged = output["samples"][plan.spec.name]
    if plan.spec.native:
        samples = _native_samples(logged, plan, trace.messages)
    else:
        samples = _own_samples(logged, plan, trace.messages, trace.infos, chosen)
    metrics = {}
    for name in _scored_metrics(samples, plan):
        column = [sample.metrics[name] for sample in samples]
        metrics[name] = _metric(name, column, seed, _higher_is_better(plan, name))
    answers = _answer_facts(trace.infos, samples)
    score = TaskScore(status="finished", n=len(samples), documents=total, metrics=metrics, answers=answers)
    if len(plan.seeds) > 1 and not plan.spec.executes_code:
        score = score.model_copy(update={"per_seed": _per_seed(samples, plan)})
    return TaskResult(score, samples)


def _build(config: dict[str, Any], plan: Plan) -> ConfigurableTask:
    """lm-eval's task. Raises UserError when lm-eval cannot build it or load its data."""
    try:
        with _quiet():
            return ConfigurableTask(config=config)
    except UserError:
        raise
    except Exception as error:
        lines = str(error).splitlines()
        raise UserError(
            f"task file {plan.spec.path.name}",
            expected="a task that lm-eval can build",
            got=f"{type(error).__name__}: {lines[0][:200] if lines else ''}",
            fix="Check metric_list (metric, aggregation, higher_is_better), filter_list, output_type and dataset_path.",
        ) from error


def _program_runner(
    plan: Plan, sandbox: Sandbox | None, on_scoring: Callable[[int, int], None] | None
) -> Callable[[Sequence[tuple[str, str]]], list[Outcome]] | None:
    """What executes programs, for a task that has some. Raises UserError when it has and there is no sandbox."""
    if sandbox is None and plan.spec.executes_code:
        raise UserError(
            f"task {plan.spec.name}",
            expected="a sandbox",
            got="none",
            fix="Install bubblewrap (`dskd-eval doctor`).",
        )
    if sandbox is None:
        return None

    def run(jobs: Sequence[tuple[str, str]]) -> list[Outcome]:
        return sandbox.run_all(jobs, on_done=lambda done: on_scoring(done, len(jobs)) if on_scoring else None)

    return run


def _scoring(plan: Plan, score: Callable[[Sequence[Answer]], list[Scored]]) -> dict[str, Any]:
    """Filters and metrics that hand all answers of the task to our scorer at once."""
    names = plan.metrics

    def score_all(responses: Any, rows: Any) -> list[list[Scored]]:
        grouped = [(row, list(texts)) for texts, row in zip(responses, rows, strict=True)]
        answers = [_answer(plan, row, text) for row, texts in grouped for text in texts]
        scored = iter(score(answers))
        return [[next(scored) for _ in texts] for _, texts in grouped]

    def process(row: Row, results: Any) -> dict[str, Value]:
        return combine(results[0], names)

    return {
        "filter_list": [{"name": "scored", "filter": [{"function": "custom", "filter_fn": score_all}]}],
        "process_results": process,
        "metric_list": [
            {
                "metric": name,
                "aggregation": stats.mean,
                "higher_is_better": registry.metric_info(name).higher_is_better,
            }
            for name in names
        ],
    }


def _own_samples(
    logged: list[dict[str, Any]],
    plan: Plan,
    messages: Mapping[str, Any],
    infos: Mapping[tuple[int, int], GenerationInfo],
    chosen: Sequence[int],
) -> list[Sample]:
    place_of = {doc_id: place for place, doc_id in enumerate(chosen)}
    samples = []
    for row in logged:
        scored: list[Scored] = row["filtered_resps"][0]
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


def _native_samples(logged: list[dict[str, Any]], plan: Plan, messages: Mapping[str, Any]) -> list[Sample]:
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
    listed = (plan.config.get("metric_list") or []) if plan.spec.native else []
    said = [
        entry["higher_is_better"] for entry in listed if entry.get("metric") == name and "higher_is_better" in entry
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


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """lm-eval, datasets and transformers say nothing while our own progress is shown."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets", "transformers", "absl", "math_verify")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    # simple_evaluate lists the installed packages after every task, for seconds; records.environment does
    # it once.
    collect, evaluator.add_env_info = evaluator.add_env_info, lambda storage: None
    commit, evaluator.get_git_commit_hash = evaluator.get_git_commit_hash, lambda: None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        evaluator.add_env_info, evaluator.get_git_commit_hash = collect, commit
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _answer(plan: Plan, row: Row, text: str) -> Answer:
    """An answer with what the row has to judge it by."""
    accepted = render.references(plan.config.get("doc_to_target"), row)
    parts = render.code_parts(plan.spec, row) if plan.spec.executes_code else {}
    return Answer(row, text, accepted, plan.style, parts)


def preview(lm: EvalLM, plan: Plan, rows: TaskData, doc_id: int) -> dict[str, Any]:
    """One prompt as it would be sent, with its reference, for --dry-run."""
    if rows.test is None:
        return {"prompt": "(lm-eval loads this data itself)", "reference": ""}
    config = lm_eval_config(plan, rows)
    if not plan.spec.native:
        config |= _scoring(plan, _score_none)
    task = _build(config, plan)
    with _quiet():
        task.set_fewshot_seed(0)
        row = rows.test.rows[doc_id]
        prompt = task.fewshot_context(
            row,
            num_fewshot=plan.shots,
            apply_chat_template=plan.style == "chat",
            fewshot_as_multiturn=True,
            chat_template=lm.apply_chat_template if plan.style == "chat" else None,
            gen_prefix=task.doc_to_prefix(row),
        )
    text = prompt[0] if isinstance(prompt, list) else str(prompt)
    reference, extracted = "", ""
    if plan.spec.scorer is not None and has_reference(plan):
        reference = reference_answer(plan, row)
        extracted = registry.make(plan.spec.scorer).extracted(_answer(plan, row, reference))
    special = plan.style != "chat"
    return {
        "prompt": text,
        "reference": reference,
        "extracted": extracted,
        "tokens": len(lm.backend.encode(text, special_tokens=special)),
    }
