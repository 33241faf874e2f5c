"""Numbers as LaTeX and typography write them: groups of digits, minus signs, currencies."""

from __future__ import annotations

import re

# Between three digits and three: LaTeX's spaces and protected commas, the spaces and apostrophes of typography.
_LATEX_GROUP = r"\{?,\}?\\!|\{\\?[,:; ]\}|\\[,:;> ]|\{?~\}?|\\thinspace\s?"
_GROUP = rf"(?:{_LATEX_GROUP}|[\u00a0\u2002-\u200a\u202f'\u2019\u066c])"
_GROUPED = re.compile(rf"(?:(?<![\d.])\d{{1,3}}|(?<=\d)\.\d{{3}})(?:{_GROUP}\d{{3}})+(?!\d)")
# Hyphens, the figure and the en dash, the minus sign and its small and wide forms; LaTeX's minus without space.
_MINUS = re.compile("[\u2010-\u2013\u2212\ufe63\uff0d]|\\{-\\}")
_CURRENCY = re.compile(r"\\\$|[€£¥₹]")


def plain_numbers(text: str) -> str:
    """The text with its numbers as a program writes them: '-' for a minus, nothing between groups of digits."""
    return plain_groups(_CURRENCY.sub("$", text))


def plain_groups(text: str) -> str:
    """The same without a change to currencies."""
    return _GROUPED.sub(lambda found: re.sub(_GROUP, "", found[0]), _MINUS.sub("-", text))
