"""One prompt as it would be sent, for --dry-run."""

from __future__ import annotations

from dataclasses import dataclass

from dskd_eval.lmeval.eval_lm import EvalLM
from dskd_eval.lmeval.harness_task import build, lm_eval_config, quiet, score_none, scoring
from dskd_eval.scorers import registry
from dskd_eval.tasks.planning import Plan
from dskd_eval.tasks.right_answers import answer_to, has_reference, reference_answer
from dskd_eval.tasks.rows import TaskData


@dataclass(frozen=True)
class Preview:
    """A prompt, the answer that must score 100 and what is read of it; tokens: length of the prompt, where known."""

    prompt: str
    reference: str = ""
    extracted: str = ""
    tokens: int | None = None


def preview(lm: EvalLM, plan: Plan, rows: TaskData, doc_id: int) -> Preview:
    """One prompt as it would be sent, with its reference, for --dry-run."""
    if rows.test is None:
        return Preview("(lm-eval loads this data itself)")
    config = lm_eval_config(plan, rows)
    if not plan.spec.native:
        config |= scoring(plan, score_none)
    task = build(config, plan)
    with quiet():
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
        extracted = registry.make(plan.spec.scorer).extracted(answer_to(plan, row, reference))
    special = plan.style != "chat"
    return Preview(text, reference, extracted, len(lm.backend.encode(text, special_tokens=special)))
