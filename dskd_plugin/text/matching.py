"""Which responses of two rows are one text, and where the tokens of both lie in it."""

from itertools import product
from typing import NamedTuple

import numpy as np

from dskd_plugin.text.canonical import canonical
from dskd_plugin.text.comparisons import beginning, contained, same, same_ink
from dskd_plugin.text.response_text import Common, Text
from dskd_plugin.text.responses import Response
from dskd_plugin.text.turn_ends import Ends


def partners_of(ours: list[Response], theirs: list[Response]) -> list[tuple[Response, Response]]:
    """The k-th with the k-th; of unequal numbers, the longest chain of responses with the same text."""
    if len(ours) == len(theirs):
        return list(zip(ours, theirs, strict=True))
    # Most of them are the same from either end; the table, which grows with the product, is for those between.
    before = 0
    while before < min(len(ours), len(theirs)) and match_texts(ours[before], theirs[before], whole=True) is not None:
        before += 1
    behind = 0
    left = min(len(ours), len(theirs)) - before
    while behind < left and match_texts(ours[-1 - behind], theirs[-1 - behind], whole=True) is not None:
        behind += 1
    middle = _chain(ours[before : len(ours) - behind], theirs[before : len(theirs) - behind])
    tails = (ours[len(ours) - behind :], theirs[len(theirs) - behind :])
    return [*zip(ours[:before], theirs[:before], strict=True), *middle, *zip(*tails, strict=True)]


def _chain(ours: list[Response], theirs: list[Response]) -> list[tuple[Response, Response]]:
    """The longest chain of responses with the same text."""
    longest = [[0] * (len(theirs) + 1) for _ in range(len(ours) + 1)]
    same = [[match_texts(one, other, whole=True) is not None for other in theirs] for one in ours]
    for i in range(len(ours) - 1, -1, -1):
        for j in range(len(theirs) - 1, -1, -1):
            longest[i][j] = max(longest[i + 1][j], longest[i][j + 1], longest[i + 1][j + 1] + 1 if same[i][j] else 0)
    chain, i, j = [], 0, 0
    while i < len(ours) and j < len(theirs):
        if same[i][j] and longest[i][j] == longest[i + 1][j + 1] + 1:
            chain.append((ours[i], theirs[j]))
            i, j = i + 1, j + 1
        elif longest[i + 1][j] >= longest[i][j + 1]:
            i += 1
        else:
            j += 1
    return chain


class Overlay(NamedTuple):
    """Where the tokens of two responses lie in one text.

    offsets: starts and ends of the student's tokens, then of the teacher's; a token of uncertain place has an empty
    span. padded: on each side the indices of tokens that spell a space before the text beside what they cover.
    ends: indices of the two ends of turn, None where there is none.
    """

    offsets: tuple[list[int], list[int], list[int], list[int]]
    padded: tuple[frozenset[int], frozenset[int]]
    ends: Ends


# Whether a reading is cut, as where an added token swallows white space, and how it is compared; likeliest first. What
# such a token shows is text as long as white space alone tells the texts apart.
_WHOLE = tuple(product((False, True), (same, same_ink)))
_PARTS = tuple(product((False, True), (beginning, contained)))


def match_texts(one: Response, other: Response, whole: bool = False) -> Overlay | None:
    """Overlay of the tokens of two responses, None where their texts differ; whole: a part of a text will not do."""
    changes = tuple(dict.fromkeys(change for side in (one, other) if (change := canonical(side.table)) is not None))
    for is_cut, locate in _WHOLE if whole else _WHOLE + _PARTS:
        for steps in ((), changes) if changes else ((),):
            for mine, yours in product(one.readings, other.readings):
                doubtful = locate is contained or is_cut
                if (mine.cut or yours.cut) != is_cut:
                    continue
                if doubtful and (mine.end, yours.end) != (one.end, other.end):
                    continue
                a, b = one.read(mine, steps), other.read(yours, steps)
                common = locate(a, b)
                if common is not None:
                    ours, theirs = _spans_in(a, common, 0), _spans_in(b, common, 1)
                    return Overlay((*ours[0], *theirs[0]), (ours[1], theirs[1]), (mine.end, yours.end))
    return None


def _spans_in(text: Text, common: Common, side: int) -> tuple[tuple[list[int], list[int]], frozenset[int]]:
    """Where the tokens lie in the first text, and which of them are padded. side: of ``text``, 0 for the first."""
    starts, ends = text.starts, text.ends
    padded: list[int] = []
    if common.padding[side]:
        begins = np.isin(starts, list(common.padding[side])) & (starts < ends)
        starts, padded = starts + begins, np.flatnonzero(begins).tolist()
    if not common.regions:
        nowhere = [0] * len(starts)
        return (nowhere, nowhere), frozenset(padded)
    first, size, lead, trail = (np.array([region[k] for region in common.regions]) for k in (0, 2, 3, 4))
    place = np.array([region[side] for region in common.regions])
    # The region of a token is the first that ends with or behind it; one that lies behind them all has none.
    at = np.maximum.accumulate((place + size).searchsorted(ends))
    inside = at < len(place)
    at = at * inside
    lies = inside & (place[at] <= starts) & (starts < ends)
    certain = (ends > (place + lead)[at]) & (starts < (place + size - trail)[at])
    by = (first - place)[at]
    known = lies & certain
    return (((starts + by) * known).tolist(), ((ends + by) * known).tolist()), frozenset(padded)
