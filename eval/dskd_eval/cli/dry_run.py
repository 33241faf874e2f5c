"""--dry-run: plans, one prompt per task and its reference; weights are not loaded."""

from __future__ import annotations

from rich.markup import escape
from rich.panel import Panel

from dskd_eval.backends import tokenizers
from dskd_eval.backends.tokenizer_only import TokenizerOnly
from dskd_eval.cli.console import OUT
from dskd_eval.lmeval.eval_lm import EvalLM
from dskd_eval.lmeval.preview import preview
from dskd_eval.prepare import Prepared
from dskd_eval.scorers import registry
from dskd_eval.tasks.rows import choose_documents


def dry_run(prepared: Prepared) -> None:
    """Plans, one prompt per task and reference; weights are not loaded."""

    for folder in prepared.folders:
        tokenizer = tokenizers.load_tokenizer(folder, prepared.templates[folder.name])
        lm = EvalLM(TokenizerOnly(folder.name, tokenizer, dict(folder.ref.template_options)))
        OUT.rule(f"[bold]{escape(folder.name)}[/]")
        for start, end in prepared.markers[folder.name]:
            OUT.print(escape(f"reasoning from {start} to {end} is not scored"), soft_wrap=True)
        for plan in prepared.plans[folder.name]:
            rows = prepared.data[plan.spec.name]
            total = len(rows.test.rows) if rows.test else 0
            chosen = choose_documents(total, prepared.settings.limit, prepared.settings.seed) if total else [0]
            shown = preview(lm, plan, rows, chosen[0])
            stop = ", ".join(repr(text) for text in plan.generation["until"]) or "the end token"
            drawn = f"{len(plan.seeds)} samples, seeds {plan.seeds}" if plan.generation.get("do_sample") else "greedy"
            facts = [
                f"{plan.spec.suite}/{plan.spec.name} v{plan.spec.version:g}: {plan.spec.summary}",
                f"documents {len(chosen)} of {total or '?'}   shots {plan.shots}   style {plan.style}   "
                f"protocol {plan.protocol}",
                f"primary metric {plan.primary}: {registry.metric_info(plan.primary).description}",
                f"answers: {drawn}, at most {plan.generation['max_gen_toks']} tokens, until {stop}",
                f"data {rows.test.source}   digest {rows.test.digest}" if rows.test else "data loaded by lm-eval",
            ]
            OUT.print("\n" + escape("\n".join(facts)), soft_wrap=True)
            title = f"prompt of document {chosen[0]}" + (f", {shown.tokens} tokens" if shown.tokens is not None else "")
            OUT.print(Panel(escape(shown.prompt), title=title, title_align="left"))
            if shown.reference:
                OUT.print(Panel(escape(shown.reference), title="reference (scores 100)", title_align="left"))
            if shown.extracted:
                what = "program that is run for it" if plan.spec.executes_code else "extracted from it"
                OUT.print(Panel(escape(shown.extracted), title=what, title_align="left"))
    for note in prepared.notes:
        OUT.print(f"[yellow]note[/] {escape(note)}", soft_wrap=True)
    OUT.print("\nNothing was generated (--dry-run).")
