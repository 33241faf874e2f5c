"""Signs in the rows of a task that a template does not say what was meant: notes, not errors."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Sequence

from dskd_eval.data import Row
from dskd_eval.tasks import render
from dskd_eval.tasks.planning import Plan


class RowSigns:
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
