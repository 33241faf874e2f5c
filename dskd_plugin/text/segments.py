"""The responses in a row of tokens: where each runs, what ends it, in which ways its tokens may be read."""

from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

from dskd_plugin.errors import SettingError
from dskd_plugin.text.canonical import Canonical
from dskd_plugin.text.texts import Text
from dskd_plugin.text.tokens import TokenTable

_LONGEST_GAP = 3  # where Axolotl still finds an end of turn after its answer


def gaps(ids: Sequence[int], response: Sequence[bool], table: TokenTable, end_id: int | None) -> list[int]:
    """Positions of the white space that a template puts between an answer and its end of turn.

    Axolotl marks such an answer and its end as two responses, as in Llama 2's `' ' + content + ' ' + eos_token`.
    """
    runs = list(runs_of(response))
    found: list[int] = []
    for one, other in pairwise(runs):
        between = range(one.stop, other.start)
        if (
            len(between) <= _LONGEST_GAP
            and ids[other.start] == end_id
            and (ids[one.stop - 1] != end_id or len(one) > 1)  # an answer may end with text that spells the end of turn
            and not any(ids[k] in table.special or (table.literal[ids[k]] or b"x").strip() for k in between)
        ):
            found.extend(between)
    return found


def answers(ids: Sequence[int], response: Sequence[bool], table: TokenTable, end_id: int | None) -> list[bool]:
    """Which tokens belong to an answer, from its first token to its end of turn."""
    inside = list(response)
    for k in gaps(ids, response, table, end_id):
        inside[k] = True
    return inside


def all_but(left_out: list[int], length: int) -> Sequence[int]:
    dropped = set(left_out)
    return [k for k in range(length) if k not in dropped] if dropped else range(length)


def runs_of(response: Sequence[bool]) -> Iterator[range]:
    start = None
    for position, inside in enumerate(response):
        if inside and start is None:
            start = position
        elif not inside and start is not None:
            yield range(start, position)
            start = None
    if start is not None:
        yield range(start, len(response))


class Segment:
    """One run of response tokens: its text and its end-of-turn token."""

    def __init__(self, ids: Sequence[int], run: range, table: TokenTable, end_id: int | None) -> None:
        self.ids = list(ids[run.start : run.stop])
        if self.ids and not 0 <= min(self.ids) <= max(self.ids) < table.vocab_size:
            raise SettingError(
                "response token ids",
                f"ids below {table.vocab_size}",
                f"{min(self.ids)} to {max(self.ids)}",
                "Tokenize with the tokenizer of this table.",
            )
        self.run, self.table, self.length = run, table, len(ids)
        self.before = (table.literal[ids[run.start - 1]] if run.start else None) or b""
        self.end = self._find_end(end_id)
        self.known: dict[tuple[object, ...], Text] = {}

    def _find_end(self, end_id: int | None) -> int | None:
        table, last = self.table, None
        for index in range(len(self.ids) - 1, -1, -1):
            token_id = self.ids[index]
            if token_id == end_id:
                return index
            if token_id in table.special and (token_id != table.unknown or token_id == table.eos):
                last = index if last is None else last
            elif (table.literal[token_id] or b"x").strip():
                break
        return last

    def literal(self, index: int) -> bytes:
        return self.table.literal[self.ids[index]] or b""

    def spaces(self, index: int) -> tuple[bool, bool]:
        """Whether a token begins with a space, and whether it does or the one before it ends with one."""
        before = self.literal(index - 1) if index else self.before
        inside = self.literal(index)[:1] == b" "
        return inside, inside or before[-1:] == b" "

    @cached_property
    def readings(self) -> list["_Reading"]:
        """Likeliest first. A row that is cut right after text that spells the end of turn has no end.

        An answer that is this one token is an end without text.
        """
        last = self.run.stop == self.length
        text_ids = self.ids[: self.end]
        ended = _Reading(self.end, short=self.end is None and last)
        whole = [ended] if not self.end or not last else [ended, _Reading(None, short=True)]
        cut = not self.table.vague.isdisjoint(text_ids) or any(self.table.literal[i] is None for i in text_ids)
        return [*whole, ended._replace(cut=True)] if cut else whole

    def read(self, reading: "_Reading", changes: tuple[Canonical, ...]) -> Text:
        key = (reading, changes)
        if key not in self.known:
            if changes:
                self.known[key] = self.read(reading, ()).canonical(changes)
            else:
                self.known[key] = self._spell(reading)
        return self.known[key]

    def _spell(self, reading: "_Reading") -> Text:
        table = self.table
        parts: list[bytes] = []
        starts, ends, cuts, dummies = [], [], [], []
        size = 0
        prefixed = table.dummy_prefix
        for token_id in self.ids[: reading.end]:
            text = table.literal[token_id]
            if reading.cut and (text is None or token_id in table.vague):
                cuts.append(size)
                text = b""
            text = text or b""
            if prefixed and text[:1] == b" ":
                dummies.append(size)
            prefixed = token_id in table.prefixing
            parts.append(text)
            starts.append(size)
            size += len(text)
            ends.append(size)
        return Text(b"".join(parts), starts, ends, cuts, dummies, reading.short)


class _Reading(NamedTuple):
    """How a segment is read: which token ends it, None where its text goes on to its last token.

    short: the text is cut at its end. cut: unknown text is missing.
    """

    end: int | None
    short: bool
    cut: bool = False
