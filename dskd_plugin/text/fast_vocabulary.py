"""The tokens of a tokenizer.json, as fast tokenizers have it, as bytes."""

import functools
import json
import re
from collections.abc import Mapping
from typing import Any

from dskd_plugin.text.canonical import load_normalizer
from dskd_plugin.text.tokens import TokenTable, make_table, not_readable

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_WORD_MODELS = {
    "WordPiece": "marks word pieces and drops the white space",
    "WordLevel": "keeps whole words only",
}
_DROPPING = {"Whitespace", "BertPreTokenizer", "CharDelimiterSplit", "UnicodeScripts"}


def steps_of(component: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    """The steps of a component of tokenizer.json, sequences opened."""
    if component is None:
        return []
    for key in ("normalizers", "pretokenizers", "decoders"):
        if key in component:
            return [step for part in component[key] for step in steps_of(part)]
    return [component]


def _check_readable(tokenizer: Any, model: Mapping[str, Any], splitters: list[Mapping[str, Any]]) -> None:
    """Raise an error for a tokenizer whose tokens do not say where the white space was."""
    if model["type"] in _WORD_MODELS:
        raise not_readable(tokenizer, f"it {_WORD_MODELS[model['type']]}", model["type"])
    for key in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise not_readable(
                tokenizer, f"{key} {model[key]!r} hides where the white space was", f"{model['type']} pieces"
            )
    dropping = [step["type"] for step in splitters if step["type"] in _DROPPING or step.get("behavior") == "Removed"]
    marked = any(step["type"] == "Metaspace" and step.get("prepend_scheme") == "always" for step in splitters)
    if splits_at_spaces(splitters) and not marked:
        dropping.append("WhitespaceSplit")
    if dropping:
        raise not_readable(tokenizer, "it drops white space", f"pre-tokenizer {dropping[0]}")


def splits_at_spaces(splitters: list[Mapping[str, Any]]) -> bool:
    return any(step["type"] == "WhitespaceSplit" for step in splitters)


def _pieces(
    model: Mapping[str, Any], *, levels: bool, fallback: bool, mark: str | None
) -> tuple[dict[int, bytes], set[int]]:
    """The bytes of each token of the model, and the tokens that stand for a single byte.

    levels: each character of a piece stands for a byte. fallback: pieces like <0x0A> are single bytes. mark: what
    stands for a space.
    """
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
            literal[token_id] = _byte_level(piece) if levels else with_spaces(piece, mark)
    return literal, byte_tokens


def _unknown_id(model: Mapping[str, Any]) -> int | None:
    name = model.get("unk_token") if model["type"] == "BPE" else None
    found: int | None = model["vocab"].get(name) if name is not None else model.get("unk_id")
    return found


def fast_table(tokenizer: Any, spec: Mapping[str, Any]) -> TokenTable:
    """The token table of a tokenizer.json. spec: its content. Raises an error where tokens do not spell the text."""
    model, normalizers = spec["model"], steps_of(spec["normalizer"])
    splitters, decoders = steps_of(spec["pre_tokenizer"]), steps_of(spec["decoder"])
    _check_readable(tokenizer, model, splitters)
    metaspaces = [step for step in splitters if step["type"] == "Metaspace"]

    levels = [step for step in splitters + normalizers if step["type"] == "ByteLevel"]
    mark = None if levels else _space_mark(metaspaces, normalizers, decoders)
    if not levels and mark is None:
        levels = [step for step in decoders if step["type"] == "ByteLevel"]
    fallback = not levels and (model.get("byte_fallback") or any(step["type"] == "ByteFallback" for step in decoders))
    literal, byte_tokens = _pieces(model, levels=bool(levels), fallback=bool(fallback), mark=mark)

    whole = {bytes([value]) for value in range(256)} <= set(literal.values()) or len(byte_tokens) == 256
    unknown_id = _unknown_id(model)
    schemes = {step.get("prepend_scheme") for step in metaspaces}
    splitter_prefixes = "always" in schemes or any(step.get("add_prefix_space") for step in levels if step in splitters)
    normalizer_prefixes = any(step["type"] == "Prepend" for step in normalizers)
    prefixing = set()
    special, added, vague = set(), set(), set() if whole or unknown_id is None else {unknown_id}
    whole_normalizer = load_normalizer(json.dumps(spec["normalizer"]) if normalizers else None)
    for token in spec["added_tokens"]:
        added.add(token["id"])
        if token["special"] or levels or token["id"] not in literal:
            # A normalised added token is looked for in the normalised text, with the space marks put there.
            shown = whole_normalizer(token["content"]) if token["normalized"] else token["content"]
            is_mapped = token["normalized"] and any(step["type"] == "ByteLevel" for step in normalizers)
            literal[token["id"]] = (
                _byte_level(shown) if is_mapped else with_spaces(shown, mark if token["normalized"] else None)
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
    return make_table(
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
        collapses_space=splits_at_spaces(splitters) or folds,
        normalizer=json.dumps({"type": "Sequence", "normalizers": kept}, sort_keys=True) if kept else None,
        notes=names,
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


def with_spaces(piece: str, mark: str | None) -> bytes:
    return (piece.replace(mark, " ") if mark else piece).encode()
