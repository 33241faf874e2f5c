"""What is right for a row: its references, an answer that must score 100, the answer of a shot."""

from __future__ import annotations

from collections.abc import Callable

from dskd_eval.data import Row
from dskd_eval.errors import UserError
from dskd_eval.scorers.base import Answer
from dskd_eval.scorers.registry import SCORERS
from dskd_eval.tasks import render
from dskd_eval.tasks.planning import Plan


def has_reference(plan: Plan) -> bool:
    """Whether the rows hold answers that must score 100."""
    known = "reference_answer" in plan.config or "doc_to_target" in plan.config
    return known and plan.spec.scorer is not None and SCORERS[plan.spec.scorer].references_are_right


def reference_answer(plan: Plan, row: Row) -> str:
    """An answer that must score 100: the row's own solution in the form that the prompt asks for."""
    template = plan.config.get("reference_answer")
    return render.render_text(template if template is not None else _answer_template(plan), row)


def _answer_template(plan: Plan) -> Callable[[Row], str]:
    return lambda row: render.references(plan.config["doc_to_target"], row)[0]


def shot_target(plan: Plan) -> object:
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


def answer_to(plan: Plan, row: Row, text: str) -> Answer:
    """An answer with what the row has to judge it by."""
    accepted = render.references(plan.config.get("doc_to_target"), row)
    parts = render.code_parts(plan.spec, row) if plan.spec.executes_code else {}
    return Answer(row, text, accepted, plan.style, parts)
