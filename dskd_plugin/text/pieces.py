"""The first piece that a tokenizer cuts from a text which continues another one, and the events that follow from it."""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from dskd_plugin.core.events import Events, events_of, events_of_pairs
from dskd_plugin.core.overlap import Overlap
from dskd_plugin.errors import SettingError
from dskd_plugin.text.canonical import load_normalizer, normal_form
from dskd_plugin.text.fast_vocabulary import splits_at_spaces, steps_of
from dskd_plugin.text.sentencepiece_vocabulary import byte_piece
from dskd_plugin.text.tokens import SPACE_MARK, TokenTable, added_tokens
from dskd_plugin.text.vocabularies import backend, encode

FirstPieces = Callable[[list[str]], list[bytes | None]]
# SentencePiece's NormalizerSpec: add_dummy_prefix and remove_extra_whitespaces off. Appended to a serialised model it
# is merged into the specification that stands there.
_NO_DUMMY_PREFIX = b"\x1a\x04\x18\x00\x20\x00"
# In a tokenizer.json: a run of white space becomes a space, and a text is cut before each space.
_COLLAPSE = {"type": "Replace", "pattern": {"Regex": r"\s+"}, "content": " "}
_CUT_AT_SPACES = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithNext", "invert": False}
_AT_THE_ENDS = ("Prepend", "Strip")  # what the normalizers of a tokenizer.json do to the ends of a text
_MOST_ROUNDS = 64  # a piece gets shorter in every round; tokenizers that change text might go round in a circle

Key = bytes | tuple[str, int]


def vocabulary_events(
    student: tuple[Any, TokenTable],
    teacher: tuple[Any, TokenTable],
    roles: Iterable[tuple[int, int]],
    *,
    ids: tuple[int, int],
) -> Events:
    """Events of two tokenizers, each given with its table: tokens that open the same text, as both would cut it.

    The key of a token is found by cutting its text with one tokenizer, keeping the first piece, cutting that with the
    other, until nothing changes. Bytes that are no text by themselves are known by the first of them.
    roles: (student id, teacher id) that mean the same whatever their bytes; other special tokens belong to the rest.
    ids: how many real ids each head has.
    """
    sides = (student, teacher)
    texts = {text for _, table in sides for text in table.bytes if text}
    key_of = opening_pieces(texts, [first_pieces(*side) for side in sides])
    keys: list[list[Key | None]] = []
    for (_, table), size in zip(sides, ids, strict=True):
        keys.append([key_of[text] if text else None for text in table.bytes[:size]])
    for number, group in enumerate(_connected(roles)):
        for side, members in enumerate(group):
            for token_id in members:
                if token_id < ids[side]:
                    keys[side][token_id] = ("role", number)
    if not {key for key in keys[0] if key is not None} & set(keys[1]):
        raise SettingError(
            "dskd.teacher.model",
            "a tokenizer that can say some of what the student's says",
            "one without a text in common",
            "Choose another.",
        )
    return events_of(*keys)


def shared_id_events(overlap: Overlap, ids: tuple[int, int]) -> Events:
    """Each shared id is an event of its own. ids: how many real ids each head has."""
    pairs = zip(overlap.student_ids_O.tolist(), overlap.teacher_ids_O.tolist(), strict=True)
    return events_of_pairs([(s, t) for s, t in pairs if s < ids[0] and t < ids[1]], *ids)


def opening_pieces(texts: Iterable[bytes], cutters: Sequence[FirstPieces]) -> dict[bytes, bytes]:
    """The piece that each text opens with once all the tokenizers agree on it."""
    opening = {text: text for text in texts}
    known: list[dict[str, bytes | None]] = [{} for _ in cutters]
    for _ in range(_MOST_ROUNDS):
        before = dict(opening)
        for cut, pieces in zip(cutters, known, strict=True):
            whole = {piece: characters(piece) for piece in set(opening.values())}
            new = sorted({text for text in whole.values() if text and text not in pieces})
            pieces.update(zip(new, cut(new), strict=True))
            shorter = {piece: pieces.get(text) or piece[:1] for piece, text in whole.items()}
            opening = {text: shorter[piece] for text, piece in opening.items()}
        if opening == before:
            return opening
    return {text: piece if before[text] == piece else piece[:1] for text, piece in opening.items()}


def characters(piece: bytes) -> str:
    """The whole characters that a piece begins with; a token may end, or begin, inside one."""
    try:
        return piece.decode()
    except UnicodeDecodeError as error:
        return piece[: error.start].decode()


def first_pieces(tokenizer: Any, table: TokenTable) -> FirstPieces:
    """A function of texts that continue another one: the bytes of the first token of each.

    None for no known token, and for one that neither the text nor what the tokenizer makes of it begins with. The space
    that some tokenizers put before a text is left out, and white space that they take from its ends is not. Any
    tokenizer that has a table will do.
    """
    cut, form = _cutter(tokenizer, table), normal_form(table)

    def opening(text: str, piece: bytes | None) -> bytes | None:
        begins = piece is not None and (text.encode().startswith(piece) or form(text).encode().startswith(piece))
        return piece if begins else None

    return lambda texts: list(map(opening, texts, cut(texts)))


def _cutter(tokenizer: Any, table: TokenTable) -> FirstPieces:
    found = backend(tokenizer)
    if found.fast is not None:
        return _fast(found.fast, table)
    if found.processor is not None and table.kind == "sentencepiece":
        return _sentencepiece(tokenizer, found.processor, table)

    def cut(texts: list[str]) -> list[bytes | None]:
        return [table.bytes[ids[0]] if (ids := encode(tokenizer, text)) else None for text in texts]

    return cut


def _fast(fast: Any, table: TokenTable) -> FirstPieces:
    from tokenizers import Tokenizer

    spec = json.loads(fast.to_str())
    collapses, normalizer = splits_at_spaces(steps_of(spec["pre_tokenizer"])), spec["normalizer"]
    for part in ("normalizer", "pre_tokenizer"):
        spec[part] = _continuing(spec[part])
    if collapses:
        spec["normalizer"] = {"type": "Sequence", "normalizers": [*steps_of(spec["normalizer"]), _COLLAPSE]}
    spec["added_tokens"] = _added(spec["added_tokens"], normalizer, spec["normalizer"])
    spec["truncation"] = spec["padding"] = None
    continuing = Tokenizer.from_str(json.dumps(spec))
    # Another content may give an added token, and those behind it, another id.
    moved = {continuing.token_to_id(token["content"]): table.bytes[token["id"]] for token in spec["added_tokens"]}
    bytes_of = dict(enumerate(table.bytes)) | moved

    def cut(texts: list[str]) -> list[bytes | None]:
        encoded = continuing.encode_batch(texts, add_special_tokens=False)
        return [bytes_of[one.ids[0]] if one.ids else None for one in encoded]

    return cut


def _added(tokens: Sequence[Mapping[str, Any]], normalizer: Any, continuing: Any) -> list[Mapping[str, Any]]:
    """The added tokens of a tokenizer.json, found in the same text by another normalizer: that of `_continuing`."""
    ends = [step for step in steps_of(normalizer) if step["type"] in _AT_THE_ENDS]
    before, at_ends, now = (
        load_normalizer(None if part is None else json.dumps(part))
        for part in (normalizer, {"type": "Sequence", "normalizers": ends}, continuing)
    )

    def fitted(token: Mapping[str, Any]) -> Mapping[str, Any]:
        content = at_ends(token["content"])
        if not token["normalized"]:
            return token
        # What a normalizer did to the content alone belongs to it: `Prepend` makes ` <think>` of `<think>`.
        return (
            {**token, "content": content}
            if now(content) == before(token["content"])
            else {**token, "normalized": False}
        )

    return list(map(fitted, tokens))


def _continuing(component: Any) -> Any:
    """A component of tokenizer.json that puts no space before a text and takes none from its ends."""
    if component is None or component["type"] in _AT_THE_ENDS:
        return None
    if component["type"] == "WhitespaceSplit":  # drops the white space, for a dummy space before every word
        return _CUT_AT_SPACES
    changed = dict(component)
    if "prepend_scheme" in changed:
        changed["prepend_scheme"] = "never"
    if "add_prefix_space" in changed:
        changed["add_prefix_space"] = False
    for parts in ("normalizers", "pretokenizers"):
        if parts in changed:
            changed[parts] = [step for part in changed[parts] if (step := _continuing(part)) is not None]
    return changed


def _sentencepiece(tokenizer: Any, processor: Any, table: TokenTable) -> FirstPieces:
    from sentencepiece import SentencePieceProcessor

    continuing = SentencePieceProcessor(model_proto=processor.serialized_model_proto() + _NO_DUMMY_PREFIX)
    head_of = _up_to_added(added_tokens(tokenizer))

    def collapsed(text: str) -> str:
        return re.sub(f"{SPACE_MARK}+", SPACE_MARK, continuing.normalize(text))

    def cut(texts: list[str]) -> list[bytes | None]:
        heads = list(map(head_of, texts))
        # To collapse white space and to take it from the ends is one option of SentencePiece, which is off here.
        read = [collapsed(head) if table.collapses_space else head for head, _ in heads]
        return [
            byte_piece(continuing, ids[0]) if ids else None if added is None else table.bytes[added]
            for ids, (_, added) in zip(continuing.encode(read), heads, strict=True)
        ]

    return cut


def _up_to_added(tokens: Mapping[int, Any]) -> Callable[[str], tuple[str, int | None]]:
    """A function of a text: what stands before the first added token in it, and the id of that, None without one.

    tokens: by id, as a class of Hugging Face has them that is written in Python.
    """
    id_of = {token.content: token_id for token_id, token in tokens.items() if token.content}
    # Of tokens that begin at one place the longest.
    sought = re.compile("|".join(map(re.escape, sorted(id_of, key=len, reverse=True))) or "(?!)")

    def head_of(text: str) -> tuple[str, int | None]:
        for found in sought.finditer(text):
            before, behind = text[: found.start()], text[found.end() :]
            token = tokens[id_of[found[0]]]
            if not token.single_word or (before[-1:] in ("", " ") and behind[:1] in ("", " ")):
                return before.rstrip() if token.lstrip else before, id_of[found[0]]
        return text, None

    return head_of


def _connected(pairs: Iterable[tuple[int, int]]) -> list[tuple[set[int], set[int]]]:
    """Student and teacher ids that hang together: one token of a side may have two roles of the other."""
    groups: list[tuple[set[int], set[int]]] = []
    for student_id, teacher_id in pairs:
        touching = [group for group in groups if student_id in group[0] or teacher_id in group[1]]
        students = {student_id}.union(*(group[0] for group in touching))
        teachers = {teacher_id}.union(*(group[1] for group in touching))
        groups = [group for group in groups if group not in touching] + [(students, teachers)]
    return groups
