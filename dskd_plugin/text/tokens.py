"""The bytes of every token of a tokenizer, read from its vocabulary and never by decoding single tokens."""

import base64
import builtins
import functools
import hashlib
import json
import re
import sys
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dskd_plugin.core.overlap import Overlap, shared_vocabulary
from dskd_plugin.errors import SettingError

SPACE_MARK = "\u2581"
WHITE = b" \t\n\r\x0b\f"
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_WORD_MODELS = {
    "WordPiece": "marks word pieces and drops the white space",
    "WordLevel": "keeps whole words only",
}
_DROPPING = {"Whitespace", "BertPreTokenizer", "CharDelimiterSplit", "UnicodeScripts"}
_PROBE = "It's 12 o'clock (noon).\n\n  if a_b != 3:\n\treturn x - 1 # Yes, OK!  End"


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

    @property
    def prefix_after_added(self) -> bool:
        """Whether a space is put behind some added token."""
        return bool(self.prefixing)


@dataclass(frozen=True)
class Backend:
    """What is behind a tokenizer: one of the three kinds, or mistral-common's own as ``inner``."""

    inner: Any
    fast: Any
    processor: Any
    encoding: Any


def backend(tokenizer: Any) -> Backend:
    """The library's object that does a tokenizer's work."""
    inner = _attribute(tokenizer, "tokenizer.instruct_tokenizer.tokenizer") or tokenizer
    return Backend(
        inner,
        fast=next((each for each in (tokenizer, _attribute(tokenizer, "backend_tokenizer")) if _is_fast(each)), None),
        processor=next((each for each in _parts(inner) if hasattr(each, "serialized_model_proto")), None),
        encoding=next((each for each in _parts(inner) if hasattr(each, "_mergeable_ranks")), None),
    )


def token_table(tokenizer: Any) -> TokenTable:
    """Token bytes of a Hugging Face tokenizer (fast, SentencePiece, tiktoken or mistral-common behind it).

    The bare objects of tokenizers, sentencepiece, tiktoken and mistral-common work as well. ValueError for
    WordPiece and word-level tokenizers and wherever tokens do not spell the text: their bytes are not known.
    """
    found = backend(tokenizer)
    if found.fast is not None:
        table = _fast_table(tokenizer, json.loads(found.fast.to_str()))
    elif hasattr(found.inner, "id_to_byte_piece"):
        table = _tekken_table(tokenizer, found.inner)
    elif found.processor is not None:
        table = _sentencepiece_table(tokenizer, found.processor)
    elif found.encoding is not None:
        table = _tiktoken_table(tokenizer, found.encoding)
    else:
        raise _refusal(tokenizer, "its vocabulary is none of those", "a class without a known backend")
    _check_spelling(tokenizer, table)
    return table


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
    top_vocab: int | None = None,
) -> Overlap:
    """Shared vocabulary of two tables; see `shared_vocabulary`."""
    return shared_vocabulary(
        student.bytes,
        teacher.bytes,
        role_pairs,
        top_vocab,
        student_byte_tokens=student.byte_tokens,
        teacher_byte_tokens=teacher.byte_tokens,
    )


def encode(tokenizer: Any, text: str) -> list[int]:
    """Ids of a text without the tokens that the tokenizer puts around a whole sequence."""
    if hasattr(tokenizer, "n_words"):
        return list(tokenizer.encode(text, bos=False, eos=False))
    if not hasattr(tokenizer, "added_tokens_decoder") and not _is_fast(tokenizer):
        return list(tokenizer.encode(text))
    ids = tokenizer.encode(text, add_special_tokens=False)
    return list(getattr(ids, "ids", ids))


def canonical(table: TokenTable) -> "Canonical | None":
    """What the tokenizer makes of a unit of text; None where it changes nothing."""
    if table.normalizer is None and table.space_mark is None and not table.collapses_space:
        return None
    return _canonical(table.normalizer, table.space_mark, table.collapses_space)


class Canonical:
    """A tokenizer's changes to one unit of text (see `units`), with spaces written as spaces.

    collapses_space: neighbouring units that become white space become a single space.
    """

    def __init__(self, normalizer: str | None, space_mark: str | None, collapses_space: bool) -> None:
        self.collapses_space = collapses_space
        self._mark = space_mark
        self._normalize = _load_normalizer(normalizer)
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
    marks: list[str] = []
    start = None
    for code in range(0x300, sys.maxunicode + 2):
        char = chr(min(code, sys.maxunicode))
        joins = code <= sys.maxunicode and (
            unicodedata.category(char)[0] == "M"
            or 0x1160 <= code <= 0x11FF
            or 0xD7B0 <= code <= 0xD7FF
            or code in (0xFF9E, 0xFF9F)
        )
        if joins and start is None:
            start = code
        elif not joins and start is not None:
            marks.append(f"{re.escape(chr(start))}-{re.escape(chr(code - 1))}")
            start = None
    return re.compile(rf"\s+|\S[{''.join(marks)}]*")


@functools.lru_cache(maxsize=16)
def _canonical(normalizer: str | None, space_mark: str | None, collapses_space: bool) -> Canonical:
    return Canonical(normalizer, space_mark, collapses_space)


def _load_normalizer(normalizer: str | None) -> Callable[[str], str]:
    if normalizer is None:
        return lambda unit: unit
    from tokenizers import Tokenizer

    model = {"type": "BPE", "vocab": {}, "merges": []}
    loaded = Tokenizer.from_str(json.dumps({"version": "1.0", "normalizer": json.loads(normalizer), "model": model}))
    return loaded.normalizer.normalize_str


def _is_fast(candidate: Any) -> bool:
    return hasattr(candidate, "to_str") and hasattr(candidate, "pre_tokenizer")


def _attribute(owner: Any, path: str) -> Any:
    for name in path.split("."):
        owner = getattr(owner, name, None)
    return owner


def _parts(owner: Any) -> list[Any]:
    return [owner, *getattr(owner, "__dict__", {}).values()]


def _refusal(tokenizer: Any, came: str, what: str) -> SettingError:
    name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
    return SettingError(
        f"tokenizer {name}",
        "a vocabulary whose token bytes are known (byte-level BPE, SentencePiece, tiktoken)",
        f"{what}: {came}",
        "Use a model with such a tokenizer.",
    )


def _flat(component: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    """The steps of a component of tokenizer.json, sequences opened."""
    if component is None:
        return []
    for key in ("normalizers", "pretokenizers", "decoders"):
        if key in component:
            return [step for part in component[key] for step in _flat(part)]
    return [component]


def _fast_table(tokenizer: Any, spec: Mapping[str, Any]) -> TokenTable:
    model, normalizers = spec["model"], _flat(spec["normalizer"])
    splitters, decoders = _flat(spec["pre_tokenizer"]), _flat(spec["decoder"])
    if model["type"] in _WORD_MODELS:
        raise _refusal(tokenizer, f"it {_WORD_MODELS[model['type']]}", model["type"])
    for key in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise _refusal(
                tokenizer, f"{key} {model[key]!r} hides where the white space was", f"{model['type']} pieces"
            )
    metaspaces = [step for step in splitters if step["type"] == "Metaspace"]
    splits = any(step["type"] == "WhitespaceSplit" for step in splitters)
    dropping = [step["type"] for step in splitters if step["type"] in _DROPPING or step.get("behavior") == "Removed"]
    if splits and not any(step.get("prepend_scheme") == "always" for step in metaspaces):
        dropping.append("WhitespaceSplit")
    if dropping:
        raise _refusal(tokenizer, "it drops white space", f"pre-tokenizer {dropping[0]}")

    levels = [step for step in splitters + normalizers if step["type"] == "ByteLevel"]
    mark = None if levels else _space_mark(metaspaces, normalizers, decoders)
    if not levels and mark is None:
        levels = [step for step in decoders if step["type"] == "ByteLevel"]
    fallback = not levels and (model.get("byte_fallback") or any(step["type"] == "ByteFallback" for step in decoders))
    vocab = model["vocab"]
    entries = vocab.items() if isinstance(vocab, dict) else ((piece, i) for i, (piece, _) in enumerate(vocab))
    literal: dict[int, bytes] = {}
    byte_tokens = set()
    for piece, token_id in entries:
        byte = _BYTE_TOKEN.fullmatch(piece) if fallback else None
        if byte:
            byte_tokens.add(token_id)
            literal[token_id] = bytes.fromhex(byte[1])
        else:
            literal[token_id] = _byte_level(piece) if levels else _spaced(piece, mark)

    whole = {bytes([value]) for value in range(256)} <= set(literal.values()) or len(byte_tokens) == 256
    unknown = model.get("unk_token") if model["type"] == "BPE" else None
    unknown_id = vocab.get(unknown) if unknown is not None else model.get("unk_id")
    schemes = {step.get("prepend_scheme") for step in metaspaces}
    splitter_prefixes = "always" in schemes or any(step.get("add_prefix_space") for step in levels if step in splitters)
    normalizer_prefixes = any(step["type"] == "Prepend" for step in normalizers)
    prefixing = set()
    special, added, vague = set(), set(), set() if whole or unknown_id is None else {unknown_id}
    whole_normalizer = _load_normalizer(json.dumps(spec["normalizer"]) if normalizers else None)
    for token in spec["added_tokens"]:
        added.add(token["id"])
        if token["special"] or levels or token["id"] not in literal:
            # A normalised added token is looked for in the normalised text, with the space marks put there.
            shown = whole_normalizer(token["content"]) if token["normalized"] else token["content"]
            is_mapped = token["normalized"] and any(step["type"] == "ByteLevel" for step in normalizers)
            literal[token["id"]] = (
                _byte_level(shown) if is_mapped else _spaced(shown, mark if token["normalized"] else None)
            )
        if token["special"]:
            special.add(token["id"])
        if token["lstrip"] or token["rstrip"]:
            vague.add(token["id"])
        # A normalised added token is found in text that the normaliser has been through: it puts nothing behind it.
        if splitter_prefixes or (normalizer_prefixes and not token["normalized"]):
            prefixing.add(token["id"])
    special.update(getattr(tokenizer, "all_special_ids", None) or ())

    kept = [step for step in normalizers if step["type"] not in ("Prepend", "Strip", "ByteLevel")]
    folds = any(
        step["type"] == "Replace" and step["content"] in (" ", mark) and "Regex" in step["pattern"] for step in kept
    )
    names = [step["type"] for step in kept if _replaced_space(step) is None]
    if not whole and unknown_id is None:
        names.append("characters without a token are dropped")
    return _table(
        literal,
        special=special,
        added=added,
        byte_tokens=byte_tokens,
        vague=vague,
        unknown=None if whole else unknown_id,
        eos=getattr(tokenizer, "eos_token_id", None),
        kind="byte-level" if levels else "sentencepiece" if mark else "characters",
        dummy_prefix=splitter_prefixes or normalizer_prefixes or "first" in schemes,
        prefixing=frozenset(prefixing),
        space_mark=mark,
        collapses_space=splits or folds,
        normalizer=json.dumps({"type": "Sequence", "normalizers": kept}, sort_keys=True) if kept else None,
        notes=names,
    )


def _table(
    literal: Mapping[int, bytes],
    *,
    special: Iterable[int],
    added: Iterable[int],
    vague: Iterable[int] = (),
    byte_tokens: Iterable[int] = (),
    notes: Iterable[str] = (),
    **rest: Any,
) -> TokenTable:
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


def _replaced_space(step: Mapping[str, Any]) -> str | None:
    is_space = step["type"] == "Replace" and step["pattern"] == {"String": " "}
    return step["content"] if is_space else None


def _space_mark(
    metaspaces: list[Mapping[str, Any]],
    normalizers: list[Mapping[str, Any]],
    decoders: list[Mapping[str, Any]],
) -> str | None:
    marks = [step["replacement"] for step in metaspaces]
    marks += [mark for step in normalizers if (mark := _replaced_space(step))]
    marks += [step["replacement"] for step in decoders if step["type"] == "Metaspace"]
    marks += [step["pattern"].get("String") for step in decoders if step.get("content") == " " and "pattern" in step]
    return next((mark for mark in marks if mark), None)


@functools.cache
def _byte_of_character() -> dict[str, int]:
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(256 + i): byte for i, byte in enumerate(hidden)}


def _byte_level(piece: str) -> bytes:
    byte_of = _byte_of_character()
    try:
        return bytes([byte_of[char] for char in piece])
    except KeyError:
        return piece.encode()


def _spaced(piece: str, mark: str | None) -> bytes:
    return (piece.replace(mark, " ") if mark else piece).encode()


def _added_tokens(tokenizer: Any) -> Mapping[int, Any]:
    tokens = getattr(tokenizer, "added_tokens_decoder", None)
    return tokens if isinstance(tokens, Mapping) else {}


def byte_piece(processor: Any, piece_id: int) -> bytes | None:
    """Bytes of a SentencePiece piece, None for one that stands for no certain text."""
    piece = processor.id_to_piece(piece_id)
    if processor.is_byte(piece_id):
        return bytes.fromhex(piece[3:5])
    if processor.is_control(piece_id) or processor.is_unknown(piece_id):
        return None
    return _spaced(piece, SPACE_MARK)


def _sentencepiece_table(tokenizer: Any, processor: Any) -> TokenTable:
    spec = _normalizer_spec(processor.serialized_model_proto())
    added = _added_tokens(tokenizer)
    if added:  # a Hugging Face class, which may have moved the ids
        pieces = list(enumerate(tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))))
    else:
        pieces = [(i, processor.id_to_piece(i)) for i in range(processor.get_piece_size())]
    literal: dict[int, bytes] = {}
    special, byte_tokens, unknown = set(), set(), set()
    for token_id, piece in pieces:
        source = processor.piece_to_id(piece)
        known = processor.id_to_piece(source) == piece
        if known and processor.is_byte(source):
            byte_tokens.add(token_id)
            literal[token_id] = bytes.fromhex(piece[3:5])
            continue
        literal[token_id] = _spaced(piece, SPACE_MARK)
        if known and (processor.is_control(source) or processor.is_unknown(source)):
            special.add(token_id)
            literal[token_id] = piece.encode()
            if processor.is_unknown(source):
                unknown.add(token_id)
    for token_id, token in added.items():
        literal[token_id] = token.content.encode() if token.special else literal.get(token_id, token.content.encode())
        special.update({token_id} if token.special else ())
    stripping = {i for i, token in added.items() if token.lstrip or token.rstrip}
    charsmap, prefix, collapses = spec
    normalizer = {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(charsmap).decode()}
    notes = (["Precompiled"] if charsmap else []) + (["white space collapsed"] if collapses else [])
    return _table(
        literal,
        special=special | set(getattr(tokenizer, "all_special_ids", None) or ()),
        added=added,
        byte_tokens=byte_tokens,
        vague=stripping | (unknown if len(byte_tokens) < 256 else set()),
        unknown=None if len(byte_tokens) == 256 else next(iter(unknown), None),
        eos=getattr(tokenizer, "eos_token_id", None),
        kind="sentencepiece",
        dummy_prefix=prefix,
        prefixing=frozenset(added) if prefix else frozenset(),
        space_mark=SPACE_MARK,
        collapses_space=collapses,
        normalizer=json.dumps(normalizer) if charsmap else None,
        notes=notes,
    )


def _normalizer_spec(model_proto: bytes) -> tuple[bytes, bool, bool]:
    """Character map, dummy prefix and white-space collapsing of a serialised SentencePiece model."""
    spec = dict(_fields(next((value for key, value in _fields(model_proto) if key == 3), b"")))
    return spec.get(2, b""), bool(spec.get(3, 1)), bool(spec.get(4, 1))


def _fields(message: bytes) -> Iterable[tuple[int, Any]]:
    """Numbers and values of the fields of a protobuf message (wire format)."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while at < len(message):
        tag = varint()
        wire = tag & 7
        if wire == 0:
            yield tag >> 3, varint()
            continue
        length = varint() if wire == 2 else {1: 8, 5: 4}[wire]
        yield tag >> 3, message[at : at + length]
        at += length


def _tekken_table(tokenizer: Any, inner: Any) -> TokenTable:
    special = {token["rank"]: token["token_str"].encode() for token in inner._all_special_tokens}
    ranks = {i: inner.id_to_byte_piece(i) for i in range(inner.num_special_tokens, inner.n_words)}
    return _table(special | ranks, special=special, added=special, eos=inner.eos_id, kind="tekken")


def _tiktoken_table(tokenizer: Any, encoding: Any) -> TokenTable:
    literal = {token_id: text for text, token_id in encoding._mergeable_ranks.items()}
    special = {token_id: text.encode() for text, token_id in encoding._special_tokens.items()}
    added = _added_tokens(tokenizer)
    literal |= special | {token_id: token.content.encode() for token_id, token in added.items()}
    special_ids = set(special) | {i for i, token in added.items() if token.special}
    seen = {
        probe: b"".join(literal[i] for i in encode(tokenizer, probe)).decode(errors="replace")
        for probe in ("e\u0301", "\ufb01", "A")
    }
    steps = ["NFKC"] if seen["\ufb01"] == "fi" else ["NFC"] if seen["e\u0301"] == "\u00e9" else []
    steps += ["Lowercase"] if seen["A"] == "a" else []
    return _table(
        literal,
        special=special_ids,
        added=special_ids | set(added),
        eos=getattr(tokenizer, "eos_token_id", None),
        kind="tiktoken",
        normalizer=json.dumps({"type": "Sequence", "normalizers": [{"type": s} for s in steps]}) if steps else None,
        notes=steps,
    )


def _check_spelling(tokenizer: Any, table: TokenTable) -> None:
    """Refuse a tokenizer whose tokens do not spell an ordinary text."""
    if "dropped" in table.normalization:
        return
    ids = encode(tokenizer, _PROBE)
    if table.vague.intersection(ids):
        return
    change = canonical(table) or (lambda unit: unit)
    spelled = b"".join(table.literal[i] or b"" for i in ids).decode(errors="replace")
    got, wanted = ("".join(change(unit) for unit in units().findall(text)).strip() for text in (spelled, _PROBE))
    if got != wanted:
        raise _refusal(tokenizer, f"its tokens spell {got!r} for {wanted!r}", table.kind)


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
