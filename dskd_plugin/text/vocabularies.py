"""The token table of any tokenizer, whatever library stands behind it; tokens are never decoded one by one."""

import json
from dataclasses import dataclass
from typing import Any

from dskd_plugin.text.canonical import canonical, units
from dskd_plugin.text.fast_vocabulary import fast_table
from dskd_plugin.text.sentencepiece_vocabulary import sentencepiece_table
from dskd_plugin.text.tokens import TokenTable, added_tokens, make_table, not_readable

_PROBE = "It's 12 o'clock (noon).\n\n  if a_b != 3:\n\treturn x - 1 # Yes, OK!  End"


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
        table = fast_table(tokenizer, json.loads(found.fast.to_str()))
    elif hasattr(found.inner, "id_to_byte_piece"):
        table = _tekken_table(found.inner)
    elif found.processor is not None:
        table = sentencepiece_table(tokenizer, found.processor)
    elif found.encoding is not None:
        table = _tiktoken_table(tokenizer, found.encoding)
    else:
        raise not_readable(tokenizer, "its vocabulary is none of those", "a class without a known backend")
    _check_spelling(tokenizer, table)
    return table


def encode(tokenizer: Any, text: str) -> list[int]:
    """Ids of a text without the tokens that the tokenizer puts around a whole sequence."""
    if hasattr(tokenizer, "n_words"):
        return list(tokenizer.encode(text, bos=False, eos=False))
    if not hasattr(tokenizer, "added_tokens_decoder") and not _is_fast(tokenizer):
        return list(tokenizer.encode(text))
    ids = tokenizer.encode(text, add_special_tokens=False)
    return list(getattr(ids, "ids", ids))


def _is_fast(candidate: Any) -> bool:
    return hasattr(candidate, "to_str") and hasattr(candidate, "pre_tokenizer")


def _attribute(owner: Any, path: str) -> Any:
    for name in path.split("."):
        owner = getattr(owner, name, None)
    return owner


def _parts(owner: Any) -> list[Any]:
    return [owner, *getattr(owner, "__dict__", {}).values()]


def _tekken_table(inner: Any) -> TokenTable:
    special = {token["rank"]: token["token_str"].encode() for token in inner._all_special_tokens}
    ranks = {i: inner.id_to_byte_piece(i) for i in range(inner.num_special_tokens, inner.n_words)}
    return make_table(special | ranks, special=special, added=special, eos=inner.eos_id, kind="tekken")


def _tiktoken_table(tokenizer: Any, encoding: Any) -> TokenTable:
    literal = {token_id: text for text, token_id in encoding._mergeable_ranks.items()}
    special = {token_id: text.encode() for text, token_id in encoding._special_tokens.items()}
    added = added_tokens(tokenizer)
    literal |= special | {token_id: token.content.encode() for token_id, token in added.items()}
    special_ids = set(special) | {i for i, token in added.items() if token.special}

    def seen(probe: str) -> str:
        return b"".join(literal[i] for i in encode(tokenizer, probe)).decode(errors="replace")

    steps = ["NFKC"] if seen("\ufb01") == "fi" else ["NFC"] if seen("e\u0301") == "\u00e9" else []
    steps += ["Lowercase"] if seen("A") == "a" else []
    return make_table(
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

    def changed(text: str) -> str:
        return "".join(change(unit) for unit in units().findall(text)).strip()

    spelled = b"".join(table.literal[i] or b"" for i in ids).decode(errors="replace")
    got, wanted = changed(spelled), changed(_PROBE)
    if got != wanted:
        raise not_readable(tokenizer, f"its tokens spell {got!r} for {wanted!r}", table.kind)
