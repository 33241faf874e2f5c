"""The responses in a row of tokens: where each runs, what ends it, in which ways its tokens may be read."""

from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dskd_plugin.errors import SettingError
from dskd_plugin.text.canonical import Canonical
from dskd_plugin.text.response_text import Text
from dskd_plugin.text.tokens import BEGINS, ENDS, TokenTable

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
            and not any(ids[k] in table.special or _is_text(ids[k], table) for k in between)
        ):
            found.extend(between)
    return found


def answers(ids: Sequence[int], response: Sequence[bool], table: TokenTable, end_id: int | None) -> list[bool]:
    """Which tokens belong to an answer, from its first token to its end of turn and what closes it, see `_closes`."""
    inside = list(response)
    for k in gaps(ids, response, table, end_id):
        inside[k] = True
    for one, other in pairwise(list(runs_of(inside))):
        if _closes(one, other, ids, table, end_id):
            inside[one.stop : other.start] = [True] * (other.start - one.stop)
    return inside


def _closes(one: range, other: range, ids: Sequence[int], table: TokenTable, end_id: int | None) -> bool:
    """Whether a run is the end of sequence that a template puts behind the end of turn of the run before it.

    Axolotl marks such an answer and its end of sequence as two responses, as in Phi-3's last turn,
    `content + '<|end|>' + line break + eos_token`, with the end of turn among the answer's tokens or in neither.
    """
    between = ids[one.stop : other.start]
    return (
        len(between) <= _LONGEST_GAP
        and table.eos != end_id
        and all(ids[k] == table.eos for k in other)
        and end_id in (ids[one.stop - 1], *between)
        # Among the special tokens is the unknown one, which a line break is where a vocabulary has none.
        and not any(_is_text(token, table) for token in between if token != end_id and token not in table.special)
    )


def _is_mark(token: int, table: TokenTable) -> bool:
    """Whether it is a special token, and not one that stands for text without a token."""
    return token in table.special and (token != table.unknown or token == table.eos)


def _is_text(token: int, table: TokenTable) -> bool:
    """Whether it shows more than white space and marks."""
    return not _is_mark(token, table) and bool((table.literal[token] or b"x").strip())


def all_but(left_out: list[int], length: int) -> Sequence[int]:
    dropped = set(left_out)
    return [k for k in range(length) if k not in dropped] if dropped else range(length)


def runs_of(response: Sequence[bool]) -> Iterator[range]:
    flags = bytes(map(bool, response))
    start = flags.find(1)
    while start >= 0:
        stop = flags.find(0, start)
        stop = len(flags) if stop < 0 else stop
        yield range(start, stop)
        start = flags.find(1, stop)


def responses_of(
    ids: Sequence[int], response: Sequence[bool], table: TokenTable, end_id: int | None, *, whole: bool = False
) -> list["Response"]:
    """The runs of response tokens, without those that close another. whole: the row was not cut."""
    found: list[Response] = []
    before = range(0)
    for run in runs_of(response):
        if found and _closes(before, run, ids, table, end_id):
            found[-1].closing = run
        else:
            found.append(Response(ids, run, table, end_id, whole))
        before = run
    return found


class Response:
    """One run of response tokens: its text and its end-of-turn token. closing: where the run behind it is, if any."""

    closing = range(0)

    def __init__(
        self, ids: Sequence[int], run: range, table: TokenTable, end_id: int | None, whole: bool = False
    ) -> None:
        self.ids = list(ids[run.start : run.stop])
        if self.ids and not 0 <= min(self.ids) <= max(self.ids) < table.vocab_size:
            raise SettingError(
                "response token ids",
                f"ids below {table.vocab_size}",
                f"{min(self.ids)} to {max(self.ids)}",
                "Tokenize with the tokenizer of this table.",
            )
        self.run, self.table, self.is_last, self.whole = run, table, run.stop == len(ids), whole
        self.before = (table.literal[ids[run.start - 1]] if run.start else None) or b""
        self.end = self._find_end(end_id)
        self.known: dict[tuple[object, ...], Text] = {}

    def _find_end(self, end_id: int | None) -> int | None:
        table, last = self.table, None
        for index in range(len(self.ids) - 1, -1, -1):
            token_id = self.ids[index]
            if token_id == end_id:
                return index
            if _is_mark(token_id, table):
                last = index if last is None else last
            elif _is_text(token_id, table):
                break
        return last

    def literal(self, index: int) -> bytes:
        return self.table.literal[self.ids[index]] or b""

    @cached_property
    def tokens(self) -> NDArray[np.int64]:
        return np.array(self.ids, dtype=np.int64)

    @cached_property
    def spaces(self) -> NDArray[np.uint8]:
        """Of each token: 0 without a space before its word, 1 where only the token before ends with one, else 2."""
        own = self.table.spaces[self.tokens]
        behind = np.empty(len(own), dtype=bool)
        behind[:1] = self.before[-1:] == b" "
        behind[1:] = own[:-1] & ENDS
        return np.where(own & BEGINS, 2, behind).astype(np.uint8)

    @cached_property
    def readings(self) -> list["_Reading"]:
        """Likeliest first. A row that ends with text that spells the end of turn has no end, cut or by its template.

        An answer that is this one token is an end without text.
        """
        text_ids = self.ids[: self.end]
        endless = _Reading(None, short=self.is_last and not self.whole)
        ended = endless if self.end is None else _Reading(self.end, short=False)
        likely = [ended, endless] if self.end and self.is_last else [ended]
        cut = not self.table.vague.isdisjoint(text_ids) or None in map(self.table.literal.__getitem__, text_ids)
        return [*likely, ended._replace(cut=True)] if cut else likely

    def read(self, reading: "_Reading", changes: tuple[Canonical, ...]) -> Text:
        key = (reading, changes)
        if key not in self.known:
            if changes:
                self.known[key] = self.read(reading, ()).canonical(changes)
            else:
                self.known[key] = self._spell(reading)
        return self.known[key]

    def _spell(self, reading: "_Reading") -> Text:
        table, ids = self.table, self.ids[: reading.end]
        sizes = table.sizes[self.tokens[: reading.end]]
        parts = [table.literal[token_id] or b"" for token_id in ids]
        unknown = [k for k, i in enumerate(ids) if table.literal[i] is None or i in table.vague] if reading.cut else []
        for k in unknown:
            parts[k] = b""
        sizes[unknown] = 0
        ends = sizes.cumsum()
        starts = ends - sizes
        prefixed = [k + 1 for k, i in enumerate(ids[:-1]) if i in table.prefixing] if table.prefixing else []
        prefixed += [0] if table.dummy_prefix and ids else []
        dummies = [int(starts[k]) for k in prefixed if parts[k][:1] == b" "]
        return Text(b"".join(parts), starts, ends, starts[unknown].tolist(), dummies, reading.short)


class _Reading(NamedTuple):
    """How a response is read: which token ends it, None where its text goes on to its last token.

    short: the text is cut at its end. cut: unknown text is missing.
    """

    end: int | None
    short: bool
    cut: bool = False
