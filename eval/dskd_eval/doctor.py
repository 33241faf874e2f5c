"""What an evaluation needs on this machine, checked one by one."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module, metadata
from pathlib import Path
from typing import TYPE_CHECKING

from dskd_eval import data, sandbox
from dskd_eval.errors import UserError
from dskd_eval.scorers.requirements import REQUIREMENTS
from dskd_eval.tasks import planning
from dskd_eval.tasks.spec import TaskSpec

if TYPE_CHECKING:
    from dskd_eval.lmeval.run_task import TaskResult

_PACKAGES = {
    "lm_eval": "lm_eval",
    "transformers": "transformers",
    "rouge_score": "rouge_score",
    "math_verify": "math-verify",
    "langdetect": "langdetect",
    "immutabledict": "immutabledict",
    "nltk": "nltk",
}


@dataclass(frozen=True)
class Check:
    """state: ok, warn (works without) or bad (a task cannot run)."""

    state: str
    what: str
    text: str


def run(specs: Sequence[TaskSpec], data_dir: str | None) -> Iterator[Check]:
    """All checks for these tasks."""
    yield from _packages()
    yield from _devices()
    yield from _data(specs, data_dir)
    if any(spec.executes_code for spec in specs):
        yield from _sandbox()


def _packages() -> Iterator[Check]:
    for module, package in _PACKAGES.items():
        try:
            import_module(module)
            yield Check("ok", package, metadata.version(package))
        except Exception as error:
            yield Check("bad", package, f"{type(error).__name__}: {error}. Install dskd[eval].")
    for module in ("peft", "vllm"):
        try:
            yield Check("ok", module, metadata.version(module))
        except metadata.PackageNotFoundError:
            use = {"peft": "adapters", "vllm": "--backend vllm"}[module]
            yield Check("warn", module, f"not installed; needed for {use}")


def _devices() -> Iterator[Check]:
    import torch

    if torch.cuda.is_available():
        names = {torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())}
        yield Check("ok", "device", f"{torch.cuda.device_count()} x {', '.join(sorted(names))}")
    else:
        yield Check("warn", "device", f"no GPU, {os.cpu_count()} processors: use --limit, or small models")


def _data(specs: Sequence[TaskSpec], data_dir: str | None) -> Iterator[Check]:
    try:
        directory = data.data_directory(data_dir)
    except UserError as error:
        yield Check("bad", "data directory", str(error))
        return
    if directory is None and _beside_their_files(specs):
        yield from _files(specs, Path())
    elif directory is None:
        switch = data.offline()
        text = "none given (--data-dir, DSKD_DATA): data comes from the hub"
        yield Check(
            "bad" if switch else "warn",
            "data directory",
            text + (f", but {switch} is set" if switch else ""),
        )
    else:
        yield Check("ok", "data directory", str(directory))
        yield from _files(specs, directory)
    for spec in specs:
        for requirement in (REQUIREMENTS[need] for need in spec.needs):
            try:
                requirement.check(spec.name, directory)
                yield Check("ok", requirement.label, "found")
            except UserError as error:
                yield Check("bad", requirement.label, f"{error.got}. {error.fix}")


def _beside_their_files(specs: Sequence[TaskSpec]) -> bool:
    """Tasks of the user's own, with rows that are there: nothing comes from the hub."""
    sources = [source for spec in specs for source in spec.sources()]
    return bool(sources) and all(Path(source.file).is_absolute() for source in sources)


def _files(specs: Sequence[TaskSpec], directory: Path) -> Iterator[Check]:
    seen: set[str] = set()
    for spec in specs:
        for sources in spec.data.values():
            present = [source for source in sources if (directory / source.file).is_file()]
            chosen = present[0] if present else sources[-1]
            if chosen.file in seen:
                continue
            seen.add(chosen.file)
            yield _file(spec.name, chosen, directory)


def _file(task: str, source: data.DataSource, directory: Path) -> Check:
    """Whether a file is there, is the one expected, and can be read."""
    if problem := data.problem_of(source, directory):
        return Check("bad", task, problem)
    try:
        rows = len(data.read_rows(directory / source.file))
    except UserError as error:
        return Check("bad", task, str(error))
    wrong = source.rows is not None and rows != source.rows
    text = f"{source.file}, {rows} rows" + (f", expected {source.rows}" if wrong else "")
    note = f" ({source.note})" if source.note else ""
    return Check("bad" if wrong else "ok", task, text + note)


def _sandbox() -> Iterator[Check]:
    backends: tuple[sandbox.Backend, ...] = ("bubblewrap", "landlock")
    reasons = {backend: sandbox.unavailable(backend) for backend in backends}
    works = [backend for backend, reason in reasons.items() if reason is None]
    for backend, reason in reasons.items():
        state = "ok" if reason is None else "warn" if works else "bad"
        text = "works" if reason is None else reason
        yield Check(state, f"sandbox {backend}", text + (" (will be used)" if works[:1] == [backend] else ""))


def oracle(specs: Sequence[TaskSpec], data_dir: str | None, limit: int | None) -> Iterator[Check]:
    """Reference answers through every task, in both styles: the score must be 100."""
    from dskd_eval.backends.oracle import OracleBackend
    from dskd_eval.lmeval.eval_lm import EvalLM
    from dskd_eval.lmeval.harness_task import native_answer
    from dskd_eval.lmeval.run_task import evaluate_task
    from dskd_eval.task_checks import check_task
    from dskd_eval.tasks.right_answers import has_reference
    from dskd_eval.tasks.rows import load_data

    directory = data.data_directory(data_dir)
    for spec in specs:
        for chat in (False, True):
            plan = planning.plan(spec, chat=chat)
            try:
                rows = load_data(spec, directory)
                answer = native_answer(plan, rows) if spec.native else None
                if answer is None and not has_reference(plan):
                    why = "ranks choices or has no reference answers" if spec.native else "has no reference answers"
                    yield Check("ok", f"oracle {spec.name}", f"{why}, {plan.style} style")
                    continue
                box = sandbox.choose() if spec.executes_code else None
                for note in check_task(plan, rows):
                    yield Check("warn", f"oracle {spec.name}", note)
                lm = EvalLM(OracleBackend(plan, answer=answer))
                result = evaluate_task(lm, plan, rows, limit=limit, sandbox=box)
            except UserError as error:
                yield Check("bad", f"oracle {spec.name}", str(error))
                break
            yield _verdict(plan, result)


def _verdict(plan: planning.Plan, result: TaskResult) -> Check:
    """Whether references score 100; of a metric of lm-eval that is no share of right answers, only the value."""
    metric = result.score.metrics[plan.primary]
    text = f"{metric.value:.1f} on {result.score.n} documents, {plan.style} style"
    if plan.spec.native and not (metric.unit == "percent" and metric.higher_is_better):
        return Check("ok", f"oracle {plan.spec.name}", f"{text}; {plan.primary} is not judged")
    wrong = [sample.doc_id for sample in result.samples if sample.metrics[plan.primary] != 1.0]
    text += f"; wrong: {wrong[:5]}" if wrong else ""
    return Check("bad" if wrong else "ok", f"oracle {plan.spec.name}", text)
