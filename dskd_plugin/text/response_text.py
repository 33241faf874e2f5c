"""The text of a response as its tokens spell it, and stretches that two such texts have in common."""

import re
from bisect import bisect_left
from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dskd_plugin.text.canonical import Canonical, units

# What str.strip strips, and with it the templates' `trim`, in UTF-8.
_WHITE = re.compile(
    rb"[ \t\n\r\x0b\f\x1c-\x1f]|\xc2[\x85\xa0]|\xe1\x9a\x80|\xe2\x80[\x80-\x8a\xa8\xa9\xaf]|\xe2\x81\x9f|\xe3\x80\x80"
)
EMPTY_BLOCKS = re.compile(rb"(?:<([^<>\s/]+)></\1>)*")  # what templates put before an answer, without white space


class Region(NamedTuple):
    """A stretch that two texts share: where it begins in each, and its size in bytes.

    lead, trail: so many bytes at its ends are white space that the other text has more of: which of it is missing is
    not known, so that a token of such white space alone has no certain place.
    """

    first: int
    second: int
    size: int
    lead: int = 0
    trail: int = 0


class Common(NamedTuple):
    """What two texts share, in order, and for each text where a space stands that does not belong to it."""

    regions: list[Region]
    padding: tuple[frozenset[int], frozenset[int]]


class Text:
    """Text of an answer as bytes, with the span of each token.

    cuts: offsets where unknown text is missing. dummies: offsets of spaces that the tokenizer may have put there.
    short: the text was cut at its end.
    """

    def __init__(
        self,
        text: bytes,
        starts: NDArray[np.int64],
        ends: NDArray[np.int64],
        cuts: list[int],
        dummies: Sequence[int] = (),
        short: bool = False,
    ) -> None:
        self.text, self.starts, self.ends, self.cuts = text, starts, ends, cuts
        self.dummies, self.short = frozenset(dummies), short

    def canonical(self, changes: Sequence[Canonical]) -> "Text":
        """The text as both tokenizers change it; tokens that end inside a changed unit lose their span."""
        collapses = any(change.collapses_space for change in changes)
        to = [-1] * (len(self.text) + 1)
        parts: list[bytes] = []
        removed: list[int] = []
        size = at = 0
        for start, stop in zip([0, *self.cuts], [*self.cuts, len(self.text)], strict=True):
            spaced = False
            for unit in units().findall(self.text[start:stop].decode(errors="surrogateescape")):
                new = unit
                for change in changes:
                    new = change(new)
                joins = collapses and new.isspace() and spaced
                spaced = new.isspace()
                old_bytes, new_bytes = (part.encode(errors="surrogateescape") for part in (unit, new))
                if joins:
                    at += len(old_bytes)
                    continue
                if new == unit:
                    to[at : at + len(old_bytes)] = range(size, size + len(old_bytes))
                else:
                    to[at] = size
                    if not new_bytes:
                        removed.append(at)
                parts.append(new_bytes)
                size += len(new_bytes)
                at += len(old_bytes)
        to[at] = size
        moved, gone = np.array(to), np.array(removed, dtype=np.int64)
        starts, ends = moved[self.starts], moved[self.ends]
        known = (starts >= 0) & (ends >= 0) & (gone.searchsorted(self.starts) == gone.searchsorted(self.ends))
        starts, ends = starts * known, ends * known
        text = b"".join(parts)
        dummies = [to[at] for at in self.dummies if to[at] >= 0 and text[to[at] : to[at] + 1] == b" "]
        return Text(text, starts, ends, [to[cut] for cut in self.cuts], dummies, self.short)

    @cached_property
    def ink(self) -> bytes:
        """The text without its white space."""
        return _WHITE.sub(b"", self.text)

    @cached_property
    def ink_at(self) -> list[int]:
        """Where each byte of ``ink`` stands in the text."""
        ink = np.ones(len(self.text), bool)
        for found in _WHITE.finditer(self.text):
            ink[found.start() : found.end()] = False
        return np.flatnonzero(ink).tolist()

    @cached_property
    def inked(self) -> "Text":
        """The text without its white space, as a text of its own."""
        none = np.zeros(0, dtype=np.int64)
        return Text(self.ink, none, none, [bisect_left(self.ink_at, cut) for cut in self.cuts], short=self.short)

    def run_before(self, k: int) -> range:
        """Places of the white space before the k-th byte of ``ink``, as far as the text is known."""
        stop = self.ink_at[k]
        start = self.ink_at[k - 1] + 1 if k else 0
        return range(max([start, *(cut for cut in self.cuts if cut <= stop)]), stop)

    def run_behind(self, k: int) -> range:
        """The same of the white space behind it."""
        start = self.ink_at[k] + 1
        stop = self.ink_at[k + 1] if k + 1 < len(self.ink_at) else len(self.text)
        return range(start, min([stop, *(cut for cut in self.cuts if cut >= start)]))
