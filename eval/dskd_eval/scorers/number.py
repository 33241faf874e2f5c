"""The scorer `number`: the last number of an answer, or the one after '####', equals that of the reference."""

from __future__ import annotations

import re
from decimal import Decimal, InvalidOperation

from dskd_eval.scorers.base import Answer, AnswerScorer
from dskd_eval.scorers.digits import plain_numbers
from dskd_eval.scorers.metrics import Judgement, Metric

_UNSIGNED = r"(?:\d+(?:,\d{3}(?!\d))*(?:\.\d+)?|\.\d+)"
_NUMBER = re.compile(rf"(?<![\d.])-?\$?{_UNSIGNED}")
_MARKED = re.compile(rf"####\s*(-?\s*\$?{_UNSIGNED})")


def _decimal(text: str) -> Decimal | None:
    try:
        return Decimal(text.replace(",", "").replace("$", ""))
    except InvalidOperation:
        return None


def last_number(text: str) -> Decimal | None:
    r"""The last number of a text; '1,200' and '1{,}200' are one number, '5-3' ends with 3."""
    found = _NUMBER.findall(plain_numbers(text))
    return _decimal(found[-1]) if found else None


def marked_number(text: str) -> Decimal | None:
    """The number after the first '####' (the format of GSM8K's own solutions)."""
    found = _MARKED.search(plain_numbers(text))
    return _decimal("".join(found[1].split())) if found else None


class Number(AnswerScorer):
    """Numbers compared by value."""

    name = "number"
    metrics = {
        "flexible": Metric("last number", "last number of the answer equals the reference"),
        "strict": Metric("#### number", "the number after '####' equals the reference: also measures the format"),
    }

    def score_one(self, answer: Answer) -> Judgement:
        golds = [marked_number(reference) for reference in answer.references]
        golds = [
            last_number(reference) if gold is None else gold
            for gold, reference in zip(golds, answer.references, strict=True)
        ]
        strict, flexible = marked_number(answer.text), last_number(answer.text)
        return Judgement(
            {
                "flexible": float(flexible is not None and flexible in golds),
                "strict": float(strict is not None and strict in golds),
            },
            {"extracted": None if flexible is None else str(flexible)},
        )
