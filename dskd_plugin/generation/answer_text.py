"""The text of an answer between two tokenizers: what ends it, and the teacher's tokens of it."""

import copy
from collections.abc import Iterator
from typing import Any

from dskd_plugin.text.align import Aligner
from dskd_plugin.text.tokens import TokenTable
from dskd_plugin.text.vocabularies import encode

_LONGEST_OPENING = 48  # tokens at the end of a prompt among which an opening marker is looked for


class PlainReader:
    """Tokens of a text as a tokenizer makes them after a prompt, never a control token that the text spells."""

    def __init__(
        self, tokenizer: Any, table: TokenTable, markers: frozenset[bytes] = frozenset(), rows: int | None = None
    ) -> None:
        # A copy: reading special tokens as plain text is a state of the tokenizer.
        self._tokenizer, self._table = copy.deepcopy(tokenizer), table
        named = {token: table.literal[token] or b"" for token in table.special}
        self._markers = {text.decode() for text in named.values() if text in markers}
        self._others = {text.decode(errors="replace") for text in named.values() if text not in markers}
        self._controls = {token for token, text in named.items() if text not in markers} - {table.unknown}
        self._controls |= set(range(table.vocab_size if rows is None else rows, table.vocab_size))

    def ids(self, text: str, prompt_ids: list[int]) -> tuple[list[int], bool]:
        """Tokens of the text, cut before a control token if one comes up, and whether they cover all of it."""
        if not text:
            return [], True
        first: list[int] | None = None
        for ids in self._readings(text, prompt_ids):
            if b"".join(self._table.literal[token] or b"" for token in ids) == text.encode():
                break
            first = ids if first is None else first
        else:  # the tokenizer changes text
            ids = first or []
        plain = next((place for place, token in enumerate(ids) if token in self._controls), len(ids))
        return ids[:plain], plain == len(ids)

    def _readings(self, text: str, prompt_ids: list[int]) -> Iterator[list[int]]:
        """In the context of the prompt, else alone, else after a line break; the first that spells the text counts."""
        table = self._table
        markup = table.added | table.special
        start = max((place + 1 for place, token in enumerate(prompt_ids) if token in markup), default=0)
        context = b"".join(table.literal[token] or b"" for token in prompt_ids[start:]).decode(errors="ignore")
        if context:
            yield from self._after(context, text)
        if table.dummy_prefix and text[0] == " ":
            yield self._encode(text[1:])
        yield self._encode(text)
        yield from self._after("\n", text)

    def _after(self, context: str, text: str) -> Iterator[list[int]]:
        before, ids = self._encode(context), self._encode(context + text)
        if ids[: len(before)] == before:
            yield ids[len(before) :]

    def _encode(self, text: str) -> list[int]:
        marked = any(marker in text for marker in self._markers)
        # With markers, its special tokens are read as such, unless another one would be as well.
        split = not marked or any(other in text for other in self._others if other)
        try:
            return list(self._tokenizer.encode(text, add_special_tokens=False, split_special_tokens=split))
        except (TypeError, ValueError):  # other backends have no such option
            return encode(self._tokenizer, text)


def control_tokens(aligner: Aligner, markers: frozenset[bytes]) -> frozenset[int]:
    """Student tokens that end the text of an answer: special ones, those without a text, and added ones that are
    special to the teacher. Any other added token is text, for a teacher without such a token as well. Markers of
    reasoning end no text."""
    student, teacher = aligner.student, aligner.teacher
    controls = {teacher.literal[token] for token in teacher.special}
    foreign = {token for token in student.added if student.literal[token] in controls}
    blank = {token for token, text in enumerate(student.literal) if text is None}
    unknown = set() if student.unknown is None else {student.unknown}
    reasoning = {token for token in student.added | student.special if student.literal[token] in markers}
    return frozenset((student.special | foreign | blank | unknown) - reasoning)


def open_from(ids: list[int], table: TokenTable, openings: list[bytes]) -> int | None:
    """Where a prompt opens reasoning that nothing follows; None where it opens none, or not at the start of a token."""
    tail = ids[-_LONGEST_OPENING:]
    text, starts = b"", []
    for token in tail:
        starts.append(len(text))
        text += table.literal[token] or b""
    for opening in openings:
        if text.rstrip().endswith(opening):
            begin = len(text.rstrip()) - len(opening)
            return len(ids) - len(tail) + starts.index(begin) if begin in starts else None
    return None


def decoded(text: bytes) -> tuple[str, bool]:
    """The text up to the first bytes that are no UTF-8, and whether that is all of it."""
    try:
        return text.decode(), True
    except UnicodeDecodeError as error:
        return text[: error.start].decode(), False


def leading_white_space(ids: list[int], table: TokenTable) -> bytes:
    """White space at the start of a response."""
    text = b""
    for token in ids:
        literal = table.literal[token]
        if token in table.special or literal is None:
            break
        text += literal
        if text.strip():
            return text[: len(text) - len(text.lstrip())]
    return b""
