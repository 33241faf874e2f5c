"""Checks of a task before a model is loaded: what scoring needs, every prompt, reference and test of its rows."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Protocol

from dskd_eval.data import Row
from dskd_eval.errors import UserError
from dskd_eval.lmeval.harness_task import build, documents, lm_eval_config
from dskd_eval.scorers import registry, requirements
from dskd_eval.scorers.base import Answer
from dskd_eval.scorers.registry import SCORERS
from dskd_eval.scorers.requirements import REQUIREMENTS
from dskd_eval.task_notes import RowSigns
from dskd_eval.tasks import render
from dskd_eval.tasks.planning import Plan
from dskd_eval.tasks.right_answers import has_reference, reference_answer, shot_target
from dskd_eval.tasks.rows import TaskData
from dskd_eval.tasks.spec import TaskSpec


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
        return _check_native(build(config, plan), plan)
    scorer = registry.make(plan.spec.scorer)
    notes = RowSigns(plan)
    for number, row in enumerate(documents(plan, rows), 1):
        with _in_row(plan, number):
            notes.see_prompt(row, render.render(plan.config["doc_to_text"], row))
            accepted = render.references(plan.config.get("doc_to_target"), row)
            notes.see_references(accepted)
            right = [reference_answer(plan, row)] if "reference_answer" in plan.config else accepted
            notes.see_stops(number, right)
            scorer.check_row(row, render.code_parts(plan.spec, row) if scorer.executes_code else {})
    if plan.shots and rows.shots:
        target = shot_target(plan)
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


class _NativeTask(Protocol):
    """A task of lm-eval, as far as it is read here."""

    @property
    def eval_docs(self) -> Iterable[Row]: ...

    def doc_to_text(self, doc: Row) -> object: ...


def _check_native(task: _NativeTask, plan: Plan) -> list[str]:
    """What can be seen of a task that lm-eval scores: fields without braces, and prompts that are all equal."""
    notes = RowSigns(plan)
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


def _native_prompt(task: _NativeTask, plan: Plan, row: Row, number: int) -> str:
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
    for number, row in enumerate(documents(plan, rows), 1):
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
