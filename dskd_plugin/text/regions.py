"""Where the texts of two answers are the same: bytes at one place of both, whatever white space is around them."""

import re
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import pairwise, product
from typing import NamedTuple

import numpy as np

from dskd_plugin.text.tokens import Canonical, units

# What str.strip strips, and with it the templates' `trim`, in UTF-8.
_WHITE = re.compile(
    rb"[ \t\n\r\x0b\f\x1c-\x1f]|\xc2[\x85\xa0]|\xe1\x9a\x80|\xe2\x80[\x80-\x8a\xa8\xa9\xaf]|\xe2\x81\x9f|\xe3\x80\x80"
)
_SURE = 24  # so many bytes of a text that was cut short are found at one place of the other text only by being there
_EMPTY_BLOCKS = re.compile(rb"(?:<([^<>\s/]+)></\1>)*")  # what templates put before an answer, without white space


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
        starts: list[int],
        ends: list[int],
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
        starts, ends = [], []
        for start, end in zip(self.starts, self.ends, strict=True):
            known = to[start] >= 0 and to[end] >= 0 and bisect_left(removed, start) == bisect_left(removed, end)
            starts.append(to[start] if known else 0)
            ends.append(to[end] if known else 0)
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
        return Text(self.ink, [], [], [bisect_left(self.ink_at, cut) for cut in self.cuts], short=self.short)

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


def same(a: Text, b: Text) -> Common | None:
    """What they share where they differ only by white space at the ends and by unknown text."""
    if a.cuts or b.cuts:
        found = _around_cuts(a, b)
        return None if found is None else _common(a, b, found)
    if a.text == b.text:
        return Common([Region(0, 0, len(a.text))], (frozenset(), frozenset()))
    core = a.text.strip()
    if core != b.text.strip():
        return None
    if not core:
        return _white(a, b)
    if (a.dummies | b.dummies) - {0}:
        return _follow(a, b, [Region(0, 0, len(a.ink))])
    leads = [len(side.text) - len(side.text.lstrip()) for side in (a, b)]
    left = _shared(a.text[: leads[0]][::-1], b.text[: leads[1]][::-1])
    right = _shared(a.text[leads[0] + len(core) :], b.text[leads[1] + len(core) :])
    return _common(a, b, [Region(leads[0] - left, leads[1] - left, left + len(core) + right)])


def same_ink(a: Text, b: Text) -> Common | None:
    """What they share where they differ only by white space, wherever it stands, and by unknown text."""
    if a.cuts or b.cuts:
        found = _around_cuts(a.inked, b.inked)
        # A text that lacks bytes on both sides may share no ink at all.
        return None if found is None else _follow(a, b, [region for region in found if region.size])
    return _follow(a, b, [Region(0, 0, len(a.ink))]) if a.ink == b.ink != b"" else None


def beginning(a: Text, b: Text) -> Common | None:
    """What they share where one was cut short and the other, but for empty blocks of a template, begins with it.

    None where it could begin at two places.
    """
    if a.cuts or b.cuts or not (a.short or b.short):
        return None
    found: dict[int, Region] = {}
    for first, second in product(_begins(a), _begins(b)):
        left = len(a.ink) - first, len(b.ink) - second
        size = min(left)
        ends_short = (a.short and left[0] == size) or (b.short and left[1] == size)
        if size and ends_short and a.ink[first : first + size] == b.ink[second : second + size]:
            found.setdefault(first - second, Region(first, second, size))
    return _follow(a, b, list(found.values())) if len(found) == 1 else None


def contained(a: Text, b: Text) -> Common | None:
    """What they share where one lies within the other, at its end or at no other place."""
    if a.cuts or b.cuts:
        return None
    if len(a.ink) > len(b.ink):
        found = contained(b, a)
        if found is None:
            return None
        return Common([Region(r.second, r.first, *r[2:]) for r in found.regions], found.padding[::-1])
    # What was cut short may lack the very place.
    if b.short or not a.ink or (a.short and len(a.ink) < _SURE):
        return None
    lead = len(a.text) - len(a.text.lstrip())
    core = a.text[lead:] if a.short else a.text.strip()
    at = _only_place(core, b.text, a.short)
    if at is not None and not _splits_word(b.text, at, at if a.short else at + len(core)):
        left = _shared(a.text[:lead][::-1], b.text[:at][::-1])
        right = _shared(a.text[lead + len(core) :], b.text[at + len(core) :])
        return _common(a, b, [Region(lead - left, at - left, left + len(core) + right)])
    at = _only_place(a.ink, b.ink, a.short)
    if at is None:
        return None
    last = b.ink_at[at + len(a.ink) - 1] + 1
    if _splits_word(b.text, b.ink_at[at], b.ink_at[at] if a.short else last):
        return None
    return _follow(a, b, [Region(0, at, len(a.ink))])


def first_difference(a: Text, b: Text) -> tuple[int, int]:
    """Where the two texts part, white space apart."""
    k = _shared(a.ink, b.ink)
    return tuple(side.ink_at[k] if k < len(side.ink) else len(side.text) for side in (a, b))  # type: ignore[return-value]


def _white(a: Text, b: Text) -> Common:
    """White space alone: all but a space that a tokenizer put before it has to be the same."""
    for side, (longer, shorter) in enumerate(((a, b), (b, a))):
        if 0 in longer.dummies and longer.text[1:] == shorter.text:
            start = (1, 0) if side == 0 else (0, 1)
            return _common(a, b, [Region(*start, len(shorter.text))])
    return Common([], (frozenset(), frozenset()))


def _begins(text: Text) -> list[int]:
    """Where an answer may begin in the ink: at the start, or after the empty blocks that a template writes."""
    found = _EMPTY_BLOCKS.match(text.ink)
    return sorted({0, found.end() if found else 0})


def _only_place(part: bytes, whole: bytes, short: bool) -> int | None:
    """The place of a part: at the end, unless it was cut short, or the only one."""
    at = whole.rfind(part)
    if at < 0 or (not (not short and whole.rstrip().endswith(part)) and whole.find(part) != at):
        return None
    return at


def _splits_word(text: bytes, *places: int) -> bool:
    return any(_within_word(text, at) for at in places)


def _within_word(text: bytes, at: int) -> bool:
    if not 0 < at < len(text):
        return False
    if text[at] & 0xC0 == 0x80:  # inside a character
        return True
    left = text[max(0, at - 4) : at].decode("utf-8", "ignore")[-1:]
    right = text[at : at + 4].decode("utf-8", "ignore")[:1]
    return left.isalnum() and right.isalnum()


def _shared(a: bytes, b: bytes) -> int:
    """How many bytes two texts begin with alike."""
    size = min(len(a), len(b))
    if a[:size] == b[:size]:
        return size
    return next(k for k in range(size) if a[k] != b[k])


def _common(a: Text, b: Text, regions: list[Region]) -> Common:
    """The regions, and a single space before the first of them: a dummy prefix or the template's."""
    starts = regions[0][:2] if regions else (0, 0)
    padding = [
        frozenset({0}) if start == 1 and side.text[:1] == b" " else frozenset[int]()
        for side, start in zip((a, b), starts, strict=True)
    ]
    return Common(regions, (padding[0], padding[1]))


def _follow(a: Text, b: Text, stretches: list[Region]) -> Common:
    """What texts share that have these stretches of ink in common: parted where their white space differs.

    A space that a tokenizer may have put after an added token is left out where that makes the white space equal.
    """
    found = _Regions()
    dropped: tuple[set[int], set[int]] = (set(), set())
    for first, second, size, *_ in stretches:
        outside = _Run.before(a, b, first, second)
        found.add(outside.first.stop - outside.suffix, outside.second.stop - outside.suffix, outside.suffix)
        lead = 0
        for k, stop in pairwise([0, *_parted(a, b, first, second, size), size]):
            run = _Run.before(a, b, first + k, second + k)
            if k and (even := run.without_dummies(dropped)) is not None:
                found.add_each(*even)
                lead = 0
            elif k:
                lead = run.suffix
                found.widen(min(run.prefix, run.shorter - lead))
            length = a.ink_at[first + stop - 1] + 1 - a.ink_at[first + k]
            found.add(a.ink_at[first + k] - lead, b.ink_at[second + k] - lead, length + lead, lead)
        outside = _Run.behind(a, b, first + size - 1, second + size - 1)
        even = outside.without_dummies(dropped)
        if even is None:
            found.add(outside.first.start, outside.second.start, outside.prefix)
        else:
            found.add_each(*even)
    at_start = _common(a, b, found.regions).padding
    return Common(found.regions, (at_start[0] | dropped[0], at_start[1] | dropped[1]))


class _Regions:
    """Regions in the making: what goes on in both texts goes on in one region."""

    def __init__(self) -> None:
        self.regions: list[Region] = []

    def add(self, first: int, second: int, size: int, lead: int = 0) -> None:
        last = self.regions[-1] if self.regions else None
        if not size:
            return
        if last and not lead and (last.first + last.size, last.second + last.size) == (first, second):
            self.regions[-1] = last._replace(size=last.size + size)
        else:
            self.regions.append(Region(first, second, size, lead))

    def add_each(self, first: list[int], second: list[int]) -> None:
        for place, other in zip(first, second, strict=True):
            self.add(place, other, 1)

    def widen(self, trail: int) -> None:
        """White space behind the last region that both texts have, the other one more of it."""
        last = self.regions[-1]
        self.regions[-1] = last._replace(size=last.size + trail, trail=trail)


class _Run(NamedTuple):
    """White space of two texts at one place of their ink."""

    a: Text
    b: Text
    first: range
    second: range

    @classmethod
    def before(cls, a: Text, b: Text, k: int, other: int) -> "_Run":
        return cls(a, b, a.run_before(k), b.run_before(other))

    @classmethod
    def behind(cls, a: Text, b: Text, k: int, other: int) -> "_Run":
        return cls(a, b, a.run_behind(k), b.run_behind(other))

    @property
    def texts(self) -> tuple[bytes, bytes]:
        return self.a.text[self.first.start : self.first.stop], self.b.text[self.second.start : self.second.stop]

    @property
    def shorter(self) -> int:
        return min(len(self.first), len(self.second))

    @property
    def prefix(self) -> int:
        return _shared(*self.texts)

    @property
    def suffix(self) -> int:
        ours, theirs = self.texts
        return _shared(ours[::-1], theirs[::-1])

    def without_dummies(self, dropped: tuple[set[int], set[int]]) -> tuple[list[int], list[int]] | None:
        """The places on both sides of the same white space, without dummy spaces, which join ``dropped``."""
        mine = {at for at in self.first if at in self.a.dummies}
        yours = {at for at in self.second if at in self.b.dummies}
        none: set[int] = set()
        for ours, theirs in ((none, none), (mine, none), (none, yours), (mine, yours)):
            kept = [at for at in self.first if at not in ours], [at for at in self.second if at not in theirs]
            if [self.a.text[at] for at in kept[0]] == [self.b.text[at] for at in kept[1]]:
                dropped[0].update(ours)
                dropped[1].update(theirs)
                return kept
        return None


def _parted(a: Text, b: Text, first: int, second: int, size: int) -> Iterator[int]:
    """Which bytes of a common stretch of ink have other white space before them in the two texts."""
    gaps = [np.diff(side.ink_at[at : at + size]) for side, at in ((a, first), (b, second))]
    for k in (np.flatnonzero((gaps[0] > 1) | (gaps[1] > 1)) + 1).tolist():
        ours, theirs = (
            side.text[side.ink_at[at + k - 1] + 1 : side.ink_at[at + k]] for side, at in ((a, first), (b, second))
        )
        if ours != theirs:
            yield k


def _around_cuts(a: Text, b: Text) -> list[Region] | None:
    """Regions whose place is certain although one text lacks, at its cuts, bytes of unknown number."""
    if a.cuts and b.cuts:
        return _ends_only(a, b)
    if b.cuts:
        found = _around_cuts(b, a)
        return found and [Region(second, first, size) for first, second, size, *_ in found]
    bounds = [0, *a.cuts, len(a.text)]
    pieces = [(start, a.text[start:end]) for start, end in pairwise(bounds)]
    head, tail = pieces[0][1], pieces[-1][1]
    low, high = 0, len(b.text)
    regions: list[Region] = []
    if head.strip():
        low = len(b.text) - len(b.text.lstrip())
        lead = len(head) - len(head.lstrip())
        if not b.text.startswith(head[lead:], low):
            return None
        regions.append(Region(lead, low, len(head) - lead))
        low += len(head) - lead
    if tail.strip():
        size = len(tail.rstrip())
        high = len(b.text.rstrip()) - size
        if high < low or b.text[high : high + size] != tail[:size]:
            return None
        regions.append(Region(pieces[-1][0], high, size))
    middle = pieces[1:-1]
    earliest, latest, at = [], [], low
    for _, piece in middle:
        at = b.text.find(piece, at + 1, high)
        if at < 0:
            return None
        earliest.append(at)
        at += len(piece)
    if at >= high:
        return None
    at = high
    for _, piece in reversed(middle):
        at = b.text.rfind(piece, low, at - 1)
        latest.append(at)
    for (start, piece), first, last in zip(middle, earliest, reversed(latest), strict=True):
        if first == last:
            regions.append(Region(start, first, len(piece)))
    return sorted(regions)


def _ends_only(a: Text, b: Text) -> list[Region] | None:
    """Where both texts lack bytes, only what is before the first or after the last cut is certain."""
    regions: list[Region] = []
    heads = [side.text[: side.cuts[0]] for side in (a, b)]
    leads = [len(head) - len(head.lstrip()) for head in heads]
    size = min(len(head) - lead for head, lead in zip(heads, leads, strict=True))
    if heads[0][leads[0] : leads[0] + size] != heads[1][leads[1] : leads[1] + size]:
        return None
    regions.append(Region(leads[0], leads[1], size))
    tails = [side.text[side.cuts[-1] :].rstrip() for side in (a, b)]
    size = min(map(len, tails))
    stops = [side.cuts[-1] + len(tail) for side, tail in zip((a, b), tails, strict=True)]
    if size and tails[0][-size:] != tails[1][-size:]:
        return None
    regions.append(Region(stops[0] - size, stops[1] - size, size))
    return regions
