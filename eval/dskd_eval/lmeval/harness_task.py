"""A task as lm-eval's own: its configuration, building it, and how our scorers stand in for its metrics."""

from __future__ import annotations

import contextlib
import itertools
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from lm_eval import evaluator
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks import TaskManager

from dskd_eval import stats
from dskd_eval.data import Row
from dskd_eval.errors import UserError
from dskd_eval.scorers import registry
from dskd_eval.scorers.base import Answer
from dskd_eval.scorers.metrics import Judgement, Value, combine
from dskd_eval.tasks import render
from dskd_eval.tasks.planning import Plan
from dskd_eval.tasks.right_answers import answer_to, shot_target
from dskd_eval.tasks.rows import TaskData


class _Rows(list[Row]):
    """Rows as lm-eval expects a split: a list with `features`. Ragged rows stay as they are."""

    @property
    def features(self) -> dict[str, None]:
        return {key: None for row in self for key in row}


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
        config["doc_to_target"] = _text_function(shot_target(plan))
        config["output_type"] = "generate_until"
        config["unsafe_code"] = plan.spec.executes_code
        config["repeats"] = len(plan.seeds)
    return config


def _function(template: Any) -> Callable[[Row], str]:
    return lambda row: render.render(template, row)


def _text_function(template: Any) -> Callable[[Row], str]:
    return lambda row: render.render_text(template, row)


def build(config: dict[str, Any], plan: Plan) -> ConfigurableTask:
    """lm-eval's task. Raises UserError when lm-eval cannot build it or load its data."""
    try:
        with quiet():
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


def scoring(plan: Plan, score: Callable[[Sequence[Answer]], list[Judgement]]) -> dict[str, Any]:
    """Filters and metrics that hand all answers of the task to our scorer at once."""
    names = plan.metrics

    def score_all(responses: Any, rows: Any) -> list[list[Judgement]]:
        answers: list[Answer] = []
        counts: list[int] = []
        for texts, row in zip(responses, rows, strict=True):
            of_row = [answer_to(plan, row, text) for text in texts]
            answers += of_row
            counts.append(len(of_row))
        # All at once, so that programs run side by side; then row by row, as lm-eval keeps them.
        judged = iter(score(answers))
        return [list(itertools.islice(judged, count)) for count in counts]

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


def score_none(answers: Sequence[Answer]) -> list[Judgement]:
    """For tasks that are built to look at their prompts only."""
    return []


def documents(plan: Plan, rows: TaskData) -> Sequence[Row]:
    """Rows as they are asked; lm-eval's `process_docs` may have changed them."""
    config = lm_eval_config(plan, rows)
    if rows.test is not None and "process_docs" not in config:
        return rows.test.rows
    rows_of_lm_eval: Sequence[Row] = build(config | scoring(plan, score_none), plan).eval_docs
    return rows_of_lm_eval


def native_answer(plan: Plan, rows: TaskData) -> Callable[[Row], str] | None:
    """The references of a task that lm-eval scores, as answers to it; None where it has none or ranks choices."""
    task = build(lm_eval_config(plan, rows), plan)
    if task.OUTPUT_TYPE != "generate_until" or plan.config.get("doc_to_target") in (None, ""):
        return None

    def answer(row: Row) -> str:
        target = task.doc_to_target(row)
        return str(target[0] if isinstance(target, (list, tuple)) and target else target)

    return answer


@contextlib.contextmanager
def index_of(task: ConfigurableTask) -> Iterator[TaskManager]:
    """An index that knows one task; lm-eval's own tasks, whose search takes seconds, are left out."""
    with tempfile.TemporaryDirectory(prefix="dskd-eval-") as folder:
        (Path(folder) / "task.yaml").write_text(f"task: {task.config.task}\n", encoding="utf-8")
        yield TaskManager(include_path=folder, include_defaults=False)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """lm-eval, datasets and transformers say nothing while our own progress is shown."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets", "transformers", "absl", "math_verify")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    # simple_evaluate lists the installed packages after every task, for seconds; run_folder.environment
    # does it once.
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
