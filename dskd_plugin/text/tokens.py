"""The tokens of a tokenizer as bytes: one table for every kind of vocabulary, and texts spelled with it."""

import builtins
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dskd_plugin.core.overlap import Overlap, preferred, shared_vocabulary
from dskd_plugin.errors import SettingError

SPACE_MARK = "\u2581"
BEGINS, ENDS = 1, 2  # bits of `TokenTable.spaces`
WHITE = b" \t\n\r\x0b\f"


@dataclass(frozen=True, eq=False, repr=False)
class TokenTable:
    """What a tokenizer's ids stand for.

    bytes: bytes by id; None for special tokens, for the unknown token and for ids that do not exist.
    literal: bytes by id of the text the token shows, special tokens included; None where there is none.
    special: ids of special tokens. added: ids matched as a whole before the model runs, special or not.
    byte_tokens: ids of byte-fallback tokens. vague: ids that can cover text other than their literal bytes
    (the unknown token where a character has no token, added tokens that swallow neighbouring white space).
    unknown: id of the unknown token, if it can occur. eos: end-of-sequence id.
    kind: 'byte-level', 'sentencepiece', 'tiktoken', 'tekken' or 'characters'.
    normalization: what the tokenizer does to text before it splits it, 'none' where nothing.
    dummy_prefix: a space is put before the text. prefixing: added tokens behind which it is put as well.
    space_mark: character that stands for a space. collapses_space: a run of white space becomes one space.
    normalizer: the text-changing part as JSON of the tokenizers library, None where there is none.
    sizes, spaces: of ``literal`` by id, so that rows are read without a loop over tokens: its length in bytes, 0 where
    there is none, and whether it BEGINS and ENDS with a space.
    Tables are equal, and hash, by `digest` over all of that.
    """

    bytes: list[builtins.bytes | None]
    literal: list[builtins.bytes | None]
    special: frozenset[int]
    added: frozenset[int]
    kind: str
    byte_tokens: frozenset[int] = frozenset()
    vague: frozenset[int] = frozenset()
    unknown: int | None = None
    eos: int | None = None
    dummy_prefix: bool = False
    prefixing: frozenset[int] = frozenset()
    space_mark: str | None = None
    collapses_space: bool = False
    normalizer: str | None = None
    normalization: str = "none"
    digest: str = field(init=False)
    sizes: NDArray[np.int64] = field(init=False)
    spaces: NDArray[np.uint8] = field(init=False)

    def __post_init__(self) -> None:
        content = hashlib.sha256()
        for text in self.literal:
            content.update(b"\xff" if text is None else len(text).to_bytes(4, "little") + text)
        rest = (self.special, self.added, self.byte_tokens, self.vague, self.prefixing)
        content.update(repr([sorted(ids) for ids in rest]).encode())
        content.update(repr([self.bytes.count(None), self.kind, self.unknown, self.eos, self.dummy_prefix]).encode())
        content.update(repr([self.space_mark, self.collapses_space]).encode())
        content.update((self.normalizer or "").encode())
        object.__setattr__(self, "digest", content.hexdigest())
        texts = [text or b"" for text in self.literal]
        spaces = bytes(text.startswith(b" ") * BEGINS + text.endswith(b" ") * ENDS for text in texts)
        object.__setattr__(self, "sizes", np.fromiter(map(len, texts), np.int64, len(texts)))
        object.__setattr__(self, "spaces", np.frombuffer(spaces, np.uint8))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TokenTable) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def __repr__(self) -> str:
        return f"TokenTable({self.kind}, {self.vocab_size} ids, normalization: {self.normalization})"

    @property
    def vocab_size(self) -> int:
        """Number of ids, added tokens and unused ids included."""
        return len(self.bytes)


def same_tokenizer(a: TokenTable, b: TokenTable) -> bool:
    """True where both give every id the same meaning; one may have more added tokens at its end."""
    if len(a.literal) > len(b.literal):
        a, b = b, a
    size = len(a.literal)
    return (
        a.literal == b.literal[:size]
        and a.bytes == b.bytes[:size]
        and all(b.literal[i] is None or i in b.added for i in range(size, len(b.literal)))
        and (a.normalizer, a.space_mark, a.collapses_space) == (b.normalizer, b.space_mark, b.collapses_space)
    )


def overlap(
    student: TokenTable,
    teacher: TokenTable,
    role_pairs: Iterable[tuple[int, int]] = (),
    head_rows: tuple[int | None, int | None] = (None, None),
) -> Overlap:
    """Shared vocabulary of two tables, see `shared_vocabulary`. head_rows: of their heads, which may be shorter."""
    own, theirs = student.bytes[: head_rows[0]], teacher.bytes[: head_rows[1]]
    return shared_vocabulary(
        own,
        theirs,
        [(s, t) for s, t in role_pairs if s < len(own) and t < len(theirs)],
        student_byte_tokens=student.byte_tokens,
        teacher_byte_tokens=teacher.byte_tokens,
        student_added=student.added,
        teacher_added=teacher.added,
    )


def ids_of_bytes(table: TokenTable, ids: int | None = None) -> dict[bytes, int]:
    """The id that stands for each byte string, of the first ``ids`` or all; see `preferred`."""
    return preferred(table.bytes[:ids], table.byte_tokens, table.added)[0]


def not_readable(tokenizer: Any, came: str, what: str) -> SettingError:
    name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
    return SettingError(
        f"tokenizer {name}",
        "a vocabulary whose token bytes are known (byte-level BPE, SentencePiece, tiktoken)",
        f"{what}: {came}",
        "Use a model with such a tokenizer.",
    )


def make_table(
    literal: Mapping[int, bytes],
    *,
    special: Iterable[int],
    added: Iterable[int],
    vague: Iterable[int] = (),
    byte_tokens: Iterable[int] = (),
    notes: Iterable[str] = (),
    **rest: Any,
) -> TokenTable:
    """A table from what each id spells.

    vague: ids whose bytes are not certain in a text; rest: fields of `TokenTable`.
    """
    size = max(literal, default=-1) + 1
    special, vague = frozenset(special), frozenset(vague)
    spelled = [literal.get(token_id) for token_id in range(size)]
    hidden = special | vague
    return TokenTable(
        bytes=[None if i in hidden or not text else text for i, text in enumerate(spelled)],
        literal=spelled,
        special=special,
        added=frozenset(added),
        byte_tokens=frozenset(byte_tokens),
        vague=vague,
        normalization=", ".join(notes) or "none",
        **rest,
    )


def added_tokens(tokenizer: Any) -> Mapping[int, Any]:
    tokens = getattr(tokenizer, "added_tokens_decoder", None)
    return tokens if isinstance(tokens, Mapping) else {}


def spell(ids: Sequence[int], table: TokenTable) -> bytes:
    """Bytes of the text; the dummy space that some tokenizers put after an added token is none of it."""
    parts, prefixed = [], False
    for token in ids:
        text = table.literal[token] or b""
        parts.append(text.removeprefix(b" ") if prefixed else text)
        prefixed = token in table.prefixing
    return b"".join(parts)


def places(ids: Sequence[int], table: TokenTable, text: bytes) -> list[int] | None:
    """Where in a text its tokens end, dummy spaces and white space that added tokens swallow being known from the text.

    A special token that the text does not have there, such as the start of a sequence, takes no place. None where the
    tokens do not spell the text.
    """
    spelled = [table.literal[token] or b"" for token in ids]
    ends: list[int] = []
    at, prefixed, swallows = 0, table.dummy_prefix, False
    for k, (token, piece) in enumerate(zip(ids, spelled, strict=True)):
        if token in table.special and not text.startswith(piece, at):
            ends.append(at)
            continue
        if swallows:
            white, left = _leading([text[at:]], WHITE), _leading(spelled[k:], WHITE)
            left = left.removeprefix(b" ") if prefixed and left != white else left
            at += max(0, len(white) - len(left))
        if prefixed and piece[:1] == b" " and len(_leading(spelled[k:], b" ")) > len(_leading([text[at:]], b" ")):
            piece = piece[1:]
        if not text.startswith(piece, at) and token in table.vague:
            at += len(_leading([text[at:]], WHITE))
        if not text.startswith(piece, at):
            return None
        at += len(piece)
        ends.append(at)
        prefixed, swallows = token in table.prefixing, token in table.vague and token in table.added
    return ends


def _leading(pieces: Sequence[bytes], characters: bytes) -> bytes:
    """What of these characters they begin with."""
    found = b""
    for piece in pieces:
        found += piece[: len(piece) - len(piece.lstrip(characters))]
        if piece.strip(characters):
            break
    return found
