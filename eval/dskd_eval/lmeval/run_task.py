"""One task for one model through lm-eval's `simple_evaluate`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import lm_eval

from dskd_eval import summary
from dskd_eval.errors import UserError
from dskd_eval.lmeval.eval_lm import EvalLM
from dskd_eval.lmeval.harness_task import build, index_of, lm_eval_config, quiet, scoring
from dskd_eval.lmeval.samples import native_samples, own_samples
from dskd_eval.sandbox import Outcome, Sandbox
from dskd_eval.schema import Sample, TaskScore
from dskd_eval.scorers import registry
from dskd_eval.tasks.planning import Plan
from dskd_eval.tasks.rows import TaskData, choose_documents


@dataclass(frozen=True)
class TaskResult:
    """Scores and samples of one task for one model, ready to be written."""

    score: TaskScore
    samples: list[Sample]


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
        config |= scoring(plan, scorer.score)
    task = build(config, plan)
    trace = lm.begin(plan.seeds)
    total = len(task.eval_docs)
    chosen = choose_documents(total, limit, seed)
    with quiet(), index_of(task) as index:
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
        samples = native_samples(logged, plan, trace.messages)
    else:
        samples = own_samples(logged, plan, trace.messages, trace.infos, chosen)
    score = summary.task_score(samples, plan, trace.infos, documents=total, seed=seed)
    return TaskResult(score, samples)


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
