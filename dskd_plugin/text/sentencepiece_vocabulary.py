"""The tokens of a SentencePiece model as bytes, and what the model's file says of its normalizer."""

import base64
import json
from collections.abc import Iterable
from typing import Any

from dskd_plugin.text.fast_vocabulary import with_spaces
from dskd_plugin.text.tokens import SPACE_MARK, TokenTable, added_tokens, make_table


def byte_piece(processor: Any, piece_id: int) -> bytes | None:
    """Bytes of a SentencePiece piece, None for one that stands for no certain text."""
    piece = processor.id_to_piece(piece_id)
    if processor.is_byte(piece_id):
        return bytes.fromhex(piece[3:5])
    if processor.is_control(piece_id) or processor.is_unknown(piece_id):
        return None
    return with_spaces(piece, SPACE_MARK)


def sentencepiece_table(tokenizer: Any, processor: Any) -> TokenTable:
    """The token table of a SentencePiece tokenizer. processor: its `SentencePieceProcessor`; of a Hugging Face class
    with added tokens the ids are those of the class.
    """
    spec = _normalizer_spec(processor.serialized_model_proto())
    added = added_tokens(tokenizer)
    if added:  # a Hugging Face class, which may have moved the ids
        # The ids of added tokens may leave others out, which have no piece.
        ids = sorted({*range(tokenizer.vocab_size), *added})
        pieces = list(zip(ids, tokenizer.convert_ids_to_tokens(ids), strict=True))
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
        literal[token_id] = with_spaces(piece, SPACE_MARK)
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
    return make_table(
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
