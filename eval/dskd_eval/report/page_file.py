"""report.html: one file with its data, style and script inside."""

from __future__ import annotations

import html
import json
from pathlib import Path

from dskd_eval.report.page import Page

_TEMPLATE = Path(__file__).parent / "page.html"


def as_html(found: Page) -> str:
    """One page with its data, style and script inside; model output is data, never markup."""
    data = json.dumps(found.plain(), ensure_ascii=False, separators=(",", ":"))
    data = data.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
    page = _TEMPLATE.read_text(encoding="utf-8")
    return page.replace("{{title}}", html.escape(found.title), 1).replace("{{data}}", data, 1)
