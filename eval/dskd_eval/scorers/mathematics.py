r"""The scorer `math`: whether the final answer of a text is the same mathematical object as a reference.

What math-verify does not tell apart or does not read is written for it in the form that it reads, or compared here:
the last of several boxes, numbers with a base, ratios, plain mixed numbers, scientific notation, chains of `>`,
inequalities for intervals, and groups of digits.
"""

from __future__ import annotations

import functools
import re
import threading
import unicodedata
from collections.abc import Iterator
from fractions import Fraction

from dskd_eval.scorers.base import Answer, AnswerScorer
from dskd_eval.scorers.digits import plain_groups
from dskd_eval.scorers.metrics import EXACT_MATCH, Judgement, Metric

_BOX = re.compile(r"\\(?:boxed|fbox)\{")
# What may stand between boxes that are one answer together.
_BETWEEN = re.compile(r"[\s$,;]*(?:\\(?:text|mathrm)\{\s*(?:and|or)\s*\}|and|or)?[\s$,;]*")
_SPACE = r"(?:\s|~|\\[ ,;:])"
_MIXED = re.compile(rf"(-?\d+){_SPACE}+(\d+)\s*/\s*(\d+)")
_MIXED_SPACED = re.compile(rf"(?<![\w.}}])(\d+){_SPACE}+(?=\\[dt]?frac\d|\\[dt]?frac\{{\d+\}}\{{\d+\}})")
_SIMPLE_FRACTION = re.compile("[¼-¾⅐-⅞]")
# A full stop, comma or semicolon that ends the sentence, not the number; LaTeX's spaces around it.
_END = re.compile(r"(?<=[\w)\]}!])(?<!\\right)(?:\s|~|\\[ ,;:!])*[.,;](?:\s|~|\\[ ,;:!])*\Z")
_SCIENTIFIC = re.compile(
    r"(?<![\w.\\])(-?(?:\d+(?:\.\d+)?|\.\d+))"
    r"(?:\s*(?:\\(?:mathrm|text)\{)?[eE]\}?\s*([+-]?\d+)|\s*[x×]\s*10\s*(?:\^|\*\*)\s*\{?([+-]?\d+)\}?)(?![\w.]*\d)"
)
_LONG = 4000
_RATIO = re.compile(r"\d+(?:\.\d+)?(?:\s?:\s?\d+(?:\.\d+)?)+")
_GREATER = re.compile(r"(\\geq?(?:slant)?(?![a-zA-Z])|\\gt(?![a-zA-Z])|>=|≥|⩾|>)")
_BASE = re.compile(r"(-?)\(?([0-9A-Za-z]+)\)?_(?:\{?(\d+)\}?|\{?\\(?:text|mathrm)\{\s*([a-z]+)\s*\}\}?)")
_BASES = {"two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9, "ten": 10,
          "eleven": 11, "twelve": 12, "sixteen": 16}  # fmt: skip


def boxed(text: str) -> str | None:
    r"""Content of the last \boxed{...} (or \fbox) with balanced braces; None without one, or when it is cut."""
    boxes = list(_boxes(text))
    starts = [found.start() for found in _BOX.finditer(text)]
    if not boxes or starts[-1] >= boxes[-1][1]:
        return None
    return _inside(text, boxes[-1])


def same(text: str, reference: str) -> bool:
    """Whether the final answer of a text equals a reference (LaTeX or plain)."""
    answer, parsed = _final(text)
    expected = _readable(reference)
    for compare in (_same_long, _same_in_base, _same_ratio):
        decided = compare(answer, expected)
        if decided is not None:
            return decided
    return _verified(parsed, expected)


# --- the final answer -----------------------------------------------------------------------------


def _final(text: str) -> tuple[str, list[object]]:
    """The final answer as it is written, and as math-verify reads it: the last box, or what math-verify finds."""
    boxes = _last_boxes(text)
    if boxes:
        contents = [_readable(_inside(text, box)) for box in boxes]
        return contents[-1] if len(contents) == 1 else "", _parsed(" , ".join(f"\\boxed{{{c}}}" for c in contents))
    parsed = _parsed(text)
    written = str(parsed[-1]) if parsed else ""
    longer = _longer(text, written)
    if longer:
        return longer, _parsed(f"${longer}$")
    return _readable(written), parsed


def _boxes(text: str) -> Iterator[tuple[int, int]]:
    """Spans of the outermost boxes whose braces are balanced."""
    place = 0
    while found := _BOX.search(text, place):
        depth, place = 1, found.end()
        while depth and place < len(text):
            depth += {"{": 1, "}": -1}.get(text[place], 0)
            place += 1
        if depth:
            return
        yield found.start(), place


def _inside(text: str, box: tuple[int, int]) -> str:
    content = text[text.index("{", box[0]) + 1 : box[1] - 1]
    within = list(_boxes(content))
    return _inside(content, within[-1]) if within and within[-1] == (0, len(content)) else content


def _last_boxes(text: str) -> list[tuple[int, int]]:
    """The last box, with those before it that are listed with it: `\\boxed{1} and \\boxed{2}`."""
    boxes = list(_boxes(text))
    first = len(boxes) - 1
    while first > 0 and _BETWEEN.fullmatch(text[boxes[first - 1][1] : boxes[first][0]]):
        first -= 1
    return boxes[first:] if boxes else []


def _longer(text: str, written: str) -> str:
    """A ratio, mixed or scientific number of plain text of which math-verify read only the first number; else ''."""
    number = written.strip().rstrip(".")
    found = [match[0] for pattern in (_RATIO, _MIXED, _SCIENTIFIC) for match in pattern.finditer(text)]
    longer = [item for item in found if number and item.startswith(number.split(" ")[0]) and item != written]
    if not longer:
        return ""
    for item in found:
        text = text.replace(item, "")
    alone = re.search(rf"(?<![\w.,]){re.escape(number.split(' ')[0])}(?!\d)", text)
    return "" if alone else _readable(longer[-1])


# --- what math-verify reads -----------------------------------------------------------------------


def _readable(latex: str) -> str:
    """The same object in a form that math-verify reads whole."""
    text = _END.sub("", plain_groups(latex).strip())
    text = (
        re.sub("-\u00a0(?=\\d)", "-", _SIMPLE_FRACTION.sub(_spelled, text))
        .replace("\\colon", ":")
        .replace("\\text{:}", ":")
        .replace("{:}", ":")
    )
    text = re.sub(rf"\s*{_MIXED.pattern}\s*", r"\1\\frac{\2}{\3}", text) if _MIXED.fullmatch(text.strip()) else text
    text = _MIXED_SPACED.sub(r"\1", text)
    text = _SCIENTIFIC.sub(lambda found: f"{found[1]}\\times 10^{{{found[2] or found[3]}}}".replace("{+", "{"), text)
    return _ascending(text)


def _spelled(found: re.Match[str]) -> str:
    """A fraction that is one character, in LaTeX."""
    above, _, below = unicodedata.normalize("NFKC", found[0]).partition("\u2044")
    return f"\\frac{{{above}}}{{{below}}}"


def _ascending(text: str) -> str:
    """A chain of `>` as the chain of `<` from its other end."""
    parts = _GREATER.split(text)
    single = not re.search(r"[,;]|<|\\le|≤|\\text|\b(?:and|or)\b", text)
    if len(parts) < 5 or not single:
        return text
    signs = {">": "<", "\\gt": "<"}
    turned = [signs.get(part, " \\le ") if place % 2 else part for place, part in enumerate(parts)]
    return "".join(reversed(turned))


def _limit() -> int | None:
    # math_verify's own timeouts are signals, which only the main thread may set.
    return 5 if threading.current_thread() is threading.main_thread() else None


@functools.lru_cache(maxsize=4096)
def _parsed(text: str) -> list[object]:
    from math_verify import parse

    found: list[object] = parse(text, parsing_timeout=_limit())
    return found


def _verified(parsed: list[object], expected: str) -> bool:
    from math_verify import verify
    from sympy import Interval, Union

    gold = _parsed(f"${expected}$")
    # An inequality is as good an answer as the interval that it describes.
    interval = bool(gold) and isinstance(gold[0], (Interval, Union))
    return bool(verify(gold, parsed, allow_set_relation_comp=interval, timeout_seconds=_limit()))


# --- compared here --------------------------------------------------------------------------------


def _whole(text: str) -> str | None:
    """A whole number without zeros before it and with no sign but a minus; None for anything else."""
    found = re.fullmatch(r"([+-]?)0*(\d+)", text.strip().strip("$").strip())
    return None if found is None else ("-" if found[1] == "-" and found[2] != "0" else "") + found[2]


def _same_long(answer: str, expected: str) -> bool | None:
    """Digit by digit, where a whole number has more of them than Python turns into an int; else None."""
    first, second = _whole(answer), _whole(expected)
    if max(len(first or ""), len(second or "")) < _LONG:
        return None
    return first == second if first is not None and second is not None else None


def _based(text: str) -> int | None:
    """The value of a number with a base, `-101_2`; None for anything else."""
    found = _BASE.fullmatch(text.strip().strip("$").replace(" ", ""))
    if found is None or not re.search(r"\d", found[2]):
        return None
    base = int(found[3]) if found[3] else _BASES.get(found[4], 0)
    try:
        return int(found[1] + found[2], base) if base >= 2 else None
    except ValueError:
        return None


def _same_in_base(answer: str, expected: str) -> bool | None:
    """By value, where the answer has a base and the reference has one or is a whole number; else None."""
    value, gold = _based(answer), _based(expected)
    if value is None:
        return None
    if gold is None:
        plain = _whole(expected)
        return True if plain is not None and len(plain) < _LONG and int(plain) == value else None
    return value == gold


def _ratio(text: str) -> list[Fraction] | None:
    stripped = text.strip().strip("$")
    if not _RATIO.fullmatch(stripped) or len(stripped) >= _LONG:
        return None
    return [Fraction(part.strip()) for part in stripped.split(":")]


def _same_ratio(answer: str, expected: str) -> bool | None:
    """By proportion; None where math-verify's quotient is the same, that is for a ratio of two and a number."""
    first, second = _ratio(answer), _ratio(expected)
    if first is None or second is None:
        several = [parts for parts in (first, second) if parts is not None and (len(parts) > 2 or 0 in parts)]
        return False if several else None
    if len(first) != len(second):
        return False
    if 0 in first or 0 in second:
        return first == second
    return all(one * second[0] == two * first[0] for one, two in zip(first, second, strict=True))


class Math(AnswerScorer):
    """Answers compared as mathematics, by math-verify."""

    name = "math"
    metrics = {
        "math_verify": Metric("math-verify", "answer and reference are the same mathematical object"),
        # The text in the box, not the whole answer; described as `exact_match` is everywhere.
        "exact_match": EXACT_MATCH,
        "boxed": Metric("boxed", "share of answers with a \\boxed{} part"),
    }
    modules = ("math_verify",)
    most_checked = 500  # A comparison takes milliseconds, sometimes seconds.

    def score_one(self, answer: Answer) -> Judgement:
        inside = boxed(answer.text)
        exact = inside is not None and any(
            "".join(inside.split()) == "".join(reference.split()) for reference in answer.references
        )
        verified = any(same(answer.text, reference) for reference in answer.references)
        return Judgement(
            {"math_verify": float(verified), "exact_match": float(exact), "boxed": float(inside is not None)},
            {"extracted": inside},
        )
