"""Regions that two texts share where their white space differs, or where one has tokens of unknown text."""

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from dskd_plugin.text.response_text import EMPTY_BLOCKS, Common, Region, Text


def white_alone(a: Text, b: Text) -> Common:
    """White space alone: all but a space that a tokenizer put before it has to be the same."""
    for side, (longer, shorter) in enumerate(((a, b), (b, a))):
        if 0 in longer.dummies and longer.text[1:] == shorter.text:
            start = (1, 0) if side == 0 else (0, 1)
            return common_of(a, b, [Region(*start, len(shorter.text))])
    return Common([], (frozenset(), frozenset()))


def begins_of(text: Text) -> list[int]:
    """Where an answer may begin in the ink: at the start, or after the empty blocks that a template writes."""
    found = EMPTY_BLOCKS.match(text.ink)
    return sorted({0, found.end() if found else 0})


def shared_length(a: bytes, b: bytes) -> int:
    """How many bytes two texts begin with alike."""
    size = min(len(a), len(b))
    if a[:size] == b[:size]:
        return size
    return next(k for k in range(size) if a[k] != b[k])


def common_of(a: Text, b: Text, regions: list[Region]) -> Common:
    """The regions, and a single space before the first of them: a dummy prefix or the template's."""
    starts = regions[0][:2] if regions else (0, 0)
    padding = [
        frozenset({0}) if start == 1 and side.text[:1] == b" " else frozenset[int]()
        for side, start in zip((a, b), starts, strict=True)
    ]
    return Common(regions, (padding[0], padding[1]))


def follow_stretches(a: Text, b: Text, stretches: list[Region]) -> Common:
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
    at_start = common_of(a, b, found.regions).padding
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
        return shared_length(*self.texts)

    @property
    def suffix(self) -> int:
        ours, theirs = self.texts
        return shared_length(ours[::-1], theirs[::-1])

    def without_dummies(self, dropped: tuple[set[int], set[int]]) -> tuple[list[int], list[int]] | None:
        """The places on both sides of the same white space, without dummy spaces, which join ``dropped``."""
        mine = {at for at in self.first if at in self.a.dummies}
        yours = {at for at in self.second if at in self.b.dummies}
        none: set[int] = set()
        # As few as will do: a space that both texts have is text.
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


def around_cuts(a: Text, b: Text) -> list[Region] | None:
    """Regions whose place is certain although one text lacks, at its cuts, bytes of unknown number."""
    if a.cuts and b.cuts:
        return _ends_only(a, b)
    if b.cuts:
        found = around_cuts(b, a)
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
    # A piece between two cuts has a certain place where the first one that fits is also the last.
    middle = pieces[1:-1]
    earliest, latest, at = [], [], low
    for _, piece in middle:
        at = b.text.find(piece, at + 1, high)  # at each cut one byte at least is missing
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
