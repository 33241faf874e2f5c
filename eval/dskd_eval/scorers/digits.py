r"""Numbers as LaTeX and typography write them: groups of digits, minus signs, currencies.

Only what can be nothing else is changed: `1\,000` is one number, `1, 000` and `12 400` are two; `= - 5` is negative,
`x - 5` and a list's `- 5` are not.
"""

from __future__ import annotations

import re

_BOX = r"\\(?:text|mathrm|mbox)\s?\{"
_TIGHT = r"\\!|\\negthinspace(?![a-zA-Z])\s?"
_THIN = r"\\,|\\thinspace(?![a-zA-Z])\s?|[\u2009\u200a\u202f]"
_SPACE = rf"(?:{_TIGHT}|{_THIN}|\\[:;> ]|~|[\u00a0\u2002-\u2008\u205f])"
# A comma that LaTeX is told not to treat as one of a list.
_COMMA = (
    rf"(?:{_TIGHT})*"
    rf"(?:\{{(?:{_TIGHT})*,(?:{_TIGHT})*\}}|{_BOX},\}}|(?<=\\!),|,(?=\\!|\\negthinspace))"
    rf"(?:{_TIGHT})*"
)
_GROUP = rf"(?:{_COMMA}|\{{?{_SPACE}+\}}?|['\u2019\u02bc\u066c])"
_ENDS = rf"(?!{_GROUP}?\d)"
_GROUPED = re.compile(rf"(?:(?<![\d.])\d{{1,3}}|(?<=\d)\.\d{{3}})(?:{_GROUP}\d{{3}})+{_ENDS}")
_INDIAN = re.compile(rf"(?<![\d.])\d{{1,2}}(?:{_COMMA}\d{{2}})+{_COMMA}\d{{3}}{_ENDS}")
_DOTTED = re.compile(r"(?<![\d.])(\d{1,3}(?:\.\d{3}){2,})(?!\d|\.\d)(?:,(\d+)(?![\d.,]\d))?")
# Plain commas, which elsewhere part a list: not where a bracket opens one.
_ALONE = r"(?<![\d.(\[])(?<!(?<!\\),)(?<!\\\{)"
_PLAIN_INDIAN = re.compile(rf"{_ALONE}\d{{1,2}}(?:,\d{{2}})+,\d{{3}}(?!,?\d)")
_PLAIN_THIN = re.compile(rf"{_ALONE}\d{{1,3}}(?:,(?:{_THIN})\d{{3}})+{_ENDS}(?!,)")

_INVISIBLE = re.compile("[\u00ad\u200b-\u200f\u2060\u2066-\u2069\ufeff]")
_WIDE = {ord("０") + digit: str(digit) for digit in range(10)} | {ord("＄"): "$"}
_WIDE_MARK = re.compile("(?<=[0-9])[，．\u066b](?=[0-9])")
_CURRENCY = re.compile(r"\\\$|[€£¥₹]")
# Hyphens, the figure and the en dash, the minus sign and its small, wide and raised forms.
_DASH = "[\u2010-\u2013\u2212\ufe63\uff0d]"
_NUMBER_AHEAD = rf"(?=(?:{_SPACE}|\s)*(?:\\?[$€£¥₹])?\.?\d)"
_MINUS = re.compile(
    rf"(?:\{{\s*(?:-|{_DASH})\s*\}}|{_BOX}\s*(?:-|{_DASH})\s*\}}|\\textminus(?![a-zA-Z])\s?|\u207b){_NUMBER_AHEAD}"
    rf"|{_DASH}"
)

_APART = re.compile(rf"(?<!-)-((?:[ \t]|{_SPACE})+)(?=\$?\.?\d)")
_BLANK_BEFORE = re.compile(rf"(?:[^\S\n]|{_SPACE})+\Z")
# After these a minus is a sign, whatever space follows it.
_SIGN_AFTER = re.compile(
    r"(?:[=≈≠<≤≥(\[{:,;|#]|[^\n]>|(?<![a-zA-Z])(?:is|are|be|equals|to|or|and)"
    r"|\\(?:approx|neq?|leq?|geq?|lt|gt|equiv|sim|in|to|times|cdot|left\())\Z"
)
_SIGN_BESIDE = re.compile(r"[$*^/]\Z")
# After these it subtracts: a number, a variable of one letter, what closes something.
_TERM = re.compile(r"(?:[\d)\]}%$!|]|(?<![a-zA-Z])[a-zA-Z])\Z")
_LOOK_BACK = 24


def plain_numbers(text: str) -> str:
    """The text with its numbers as a program writes them: '-' for a minus, nothing between groups of digits."""
    plain = plain_groups(_CURRENCY.sub("$", text))
    for grouped in (_PLAIN_INDIAN, _PLAIN_THIN):
        plain = grouped.sub(_digits_alone, plain)
    return _APART.sub(_beside, plain)


def plain_groups(text: str) -> str:
    """The same without a change to currencies, to spaces after a minus, and to plain commas, which part lists."""
    plain = _WIDE_MARK.sub(_ascii_mark, _INVISIBLE.sub("", text).translate(_WIDE))
    plain = _MINUS.sub("-", plain)
    for grouped in (_INDIAN, _GROUPED):
        plain = grouped.sub(_digits_alone, plain)
    return _DOTTED.sub(_without_dots, plain)


def _digits_alone(found: re.Match[str]) -> str:
    return re.sub(r"[^\d.]", "", found[0])


def _ascii_mark(found: re.Match[str]) -> str:
    return "," if found[0] == "，" else "."


def _without_dots(found: re.Match[str]) -> str:
    """Several groups with dots; a comma after them begins the decimals."""
    return found[1].replace(".", "") + (f".{found[2]}" if found[2] else "")


def _beside(found: re.Match[str]) -> str:
    """A minus that is a sign, beside its number."""
    start = found.start()
    around = found.string[max(0, start - _LOOK_BACK) : start]
    before = _BLANK_BEFORE.sub("", around)
    sign: object = _SIGN_AFTER.search(before) or (before == around and _SIGN_BESIDE.search(before))
    if not {" ", "\t"} & set(found[1]):
        sign = sign or not _TERM.search(before)
    elif not found.string[:start].strip():
        # A text of nothing else is a number; a line of several is an entry of a list.
        sign = sign or re.fullmatch(r"[\d.,$]+\s*", found.string[found.end() :])
    return "-" if sign else found[0]
