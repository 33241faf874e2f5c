"""report.html: one file with its data, style and script inside; its tables are there without the script."""

from __future__ import annotations

import json
from pathlib import Path

import jinja2

from dskd_eval.report import tables
from dskd_eval.report.bars import Bar, suite_cards
from dskd_eval.report.facts import all_facts
from dskd_eval.report.page import Page, ShownModel
from dskd_eval.report.tables import Estimate

_HERE = Path(__file__).parent


def as_html(found: Page) -> str:
    """One page with its data, style and script inside; model output is data or escaped text, never markup."""
    data = json.dumps(found.plain(), ensure_ascii=False, separators=(",", ":"))
    data = data.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    made.tests["estimate"] = lambda cell: isinstance(cell, Estimate)
    made.tests["bar"] = lambda row: isinstance(row, Bar)
    against = found.comparisons.baseline
    return made.get_template("page.html").render(
        page=found,
        model_facts={model.label: _model_facts(model) for model in found.models},
        suites=suite_cards(found),
        gaps=[(gap.model, tables.gap_table(gap)) for gap in found.comparisons.gaps if gap.rows],
        pairs=[
            (f"{pair.model} against {against if pair.against is None else pair.against}", tables.pair_table(pair))
            for pair in found.comparisons.pairs
            if pair.rows
        ],
        facts=all_facts(found),
        data=data,
        style=(_HERE / "page.css").read_text(encoding="utf-8"),
        script=(_HERE / "page.js").read_text(encoding="utf-8"),
    )


def _model_facts(model: ShownModel) -> list[str]:
    """What stands beside the name of a model."""
    facts = []
    if model.role and not model.label.startswith(model.role):
        facts.append(model.role)
    if model.parameters:
        facts.append(f"{model.parameters / 1e6:.{1 if model.parameters < 1e8 else 0}f} M parameters")
    if model.dtype:
        facts.append(model.dtype)
    return [*facts, "chat template"] if model.chat_template else facts
