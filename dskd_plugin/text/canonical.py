"""What a tokenizer makes of text before it cuts it: the form in which two texts are compared."""

import functools
import json
import re
import sys
import unicodedata
from collections.abc import Callable

from dskd_plugin.text.tokens import TokenTable

_FIRST_MARK, _MARKS = 0x300, {"Mn", "Mc", "Me"}
# Letters that join the one before them: of Hangul, and the half-width marks of Katakana.
_JOINING = (range(0x1160, 0x1200), range(0xD7B0, 0xD800), (0xFF9E, 0xFF9F))


def canonical(table: TokenTable) -> "Canonical | None":
    """What the tokenizer makes of a unit of text; None where it changes nothing."""
    if table.normalizer is None and table.space_mark is None and not table.collapses_space:
        return None
    return _canonical(table.normalizer, table.space_mark, table.collapses_space)


def normal_form(table: TokenTable) -> Callable[[str], str]:
    """What the tokenizer makes of a whole text before it cuts it, with spaces written as spaces."""
    normalize, mark = load_normalizer(table.normalizer), table.space_mark

    def form(text: str) -> str:
        new = normalize(text)
        new = new.replace(mark, " ") if mark else new
        return re.sub(r"\s+", " ", new) if table.collapses_space else new

    return form


class Canonical:
    """A tokenizer's changes to one unit of text (see `units`), with spaces written as spaces.

    collapses_space: neighbouring units that become white space become a single space.
    """

    def __init__(self, normalizer: str | None, space_mark: str | None, collapses_space: bool) -> None:
        self.collapses_space = collapses_space
        self._mark = space_mark
        self._normalize = load_normalizer(normalizer)
        self._known: dict[str, str] = {}

    def __call__(self, unit: str) -> str:
        new = self._known.get(unit)
        if new is None:
            try:
                new = self._normalize(unit)
            except (UnicodeEncodeError, TypeError):  # bytes that are no text stay as they are
                new = unit
            new = new.replace(self._mark, " ") if self._mark else new
            new = " " if self.collapses_space and new.isspace() else new
            if len(self._known) < 200_000:
                self._known[unit] = new
        return new


@functools.cache
def units() -> re.Pattern[str]:
    """Pieces of text that are normalised on their own: white space, or a character and the marks after it."""
    kinds = map(unicodedata.category, map(chr, range(_FIRST_MARK, sys.maxunicode + 1)))
    joining = {code for code, kind in enumerate(kinds, _FIRST_MARK) if kind in _MARKS}.union(*_JOINING)
    starts = sorted(code for code in joining if code - 1 not in joining)
    stops = sorted(code for code in joining if code + 1 not in joining)
    pairs = zip(starts, stops, strict=True)
    marks = "".join(f"{re.escape(chr(start))}-{re.escape(chr(stop))}" for start, stop in pairs)
    return re.compile(rf"\s+|\S[{marks}]*")


@functools.lru_cache(maxsize=16)
def _canonical(normalizer: str | None, space_mark: str | None, collapses_space: bool) -> Canonical:
    return Canonical(normalizer, space_mark, collapses_space)


def load_normalizer(normalizer: str | None) -> Callable[[str], str]:
    if normalizer is None:
        return lambda unit: unit
    from tokenizers import Tokenizer

    model = {"type": "BPE", "vocab": {}, "merges": []}
    loaded = Tokenizer.from_str(json.dumps({"version": "1.0", "normalizer": json.loads(normalizer), "model": model}))
    return loaded.normalizer.normalize_str
