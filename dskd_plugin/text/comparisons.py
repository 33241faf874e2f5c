"""How two texts are compared: as they are, without white space, one as the beginning of the other, or inside it."""

from itertools import product

from dskd_plugin.text.response_text import Common, Region, Text
from dskd_plugin.text.stretches import around_cuts, begins_of, common_of, follow_stretches, shared_length, white_alone

_SURE = 24  # so many bytes of a text that was cut short are found at one place of the other text only by being there


def same(a: Text, b: Text) -> Common | None:
    """What they share where they differ only by white space at the ends and by unknown text."""
    if a.cuts or b.cuts:
        found = around_cuts(a, b)
        return None if found is None else common_of(a, b, found)
    if a.text == b.text:
        return Common([Region(0, 0, len(a.text))], (frozenset(), frozenset()))
    core = a.text.strip()
    if core != b.text.strip():
        return None
    if not core:
        return white_alone(a, b)
    if (a.dummies | b.dummies) - {0}:
        return follow_stretches(a, b, [Region(0, 0, len(a.ink))])
    leads = [len(side.text) - len(side.text.lstrip()) for side in (a, b)]
    left = shared_length(a.text[: leads[0]][::-1], b.text[: leads[1]][::-1])
    right = shared_length(a.text[leads[0] + len(core) :], b.text[leads[1] + len(core) :])
    return common_of(a, b, [Region(leads[0] - left, leads[1] - left, left + len(core) + right)])


def same_ink(a: Text, b: Text) -> Common | None:
    """What they share where they differ only by white space, wherever it stands, and by unknown text."""
    if a.cuts or b.cuts:
        found = around_cuts(a.inked, b.inked)
        # A text that lacks bytes on both sides may share no ink at all.
        return None if found is None else follow_stretches(a, b, [region for region in found if region.size])
    return follow_stretches(a, b, [Region(0, 0, len(a.ink))]) if a.ink == b.ink != b"" else None


def beginning(a: Text, b: Text) -> Common | None:
    """What they share where one was cut short and the other, but for empty blocks of a template, begins with it.

    None where it could begin at two places.
    """
    if a.cuts or b.cuts or not (a.short or b.short):
        return None
    found: dict[int, Region] = {}
    for first, second in product(begins_of(a), begins_of(b)):
        left = len(a.ink) - first, len(b.ink) - second
        size = min(left)
        ends_short = (a.short and left[0] == size) or (b.short and left[1] == size)
        if size and ends_short and a.ink[first : first + size] == b.ink[second : second + size]:
            found.setdefault(first - second, Region(first, second, size))
    return follow_stretches(a, b, list(found.values())) if len(found) == 1 else None


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
        left = shared_length(a.text[:lead][::-1], b.text[:at][::-1])
        right = shared_length(a.text[lead + len(core) :], b.text[at + len(core) :])
        return common_of(a, b, [Region(lead - left, at - left, left + len(core) + right)])
    at = _only_place(a.ink, b.ink, a.short)
    if at is None:
        return None
    last = b.ink_at[at + len(a.ink) - 1] + 1
    if _splits_word(b.text, b.ink_at[at], b.ink_at[at] if a.short else last):
        return None
    return follow_stretches(a, b, [Region(0, at, len(a.ink))])


def first_difference(a: Text, b: Text) -> tuple[int, int]:
    """Where the two texts part, white space apart."""
    k = shared_length(a.ink, b.ink)
    return tuple(side.ink_at[k] if k < len(side.ink) else len(side.text) for side in (a, b))  # type: ignore[return-value]


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
