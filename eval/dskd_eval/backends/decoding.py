"""From the tokens of an answer to its text, with every byte and all white space that the model wrote."""

from __future__ import annotations

import re
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from dskd_eval.reasoning import Pair

_BYTE_PIECE = re.compile("<0x([0-9A-F]{2})>")


def decode(
    tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int], markers: Sequence[Pair] = (), before: Sequence[int] = ()
) -> str:
    """The text of an answer without special tokens, but for those that are or make up reasoning markers.

    before: the token that the text follows.
    """
    special = {place: str(token) for place, token in tokenizer.added_tokens_decoder.items() if token.special}
    kept = {
        place: text for place, text in special.items() if any(text in marker for pair in markers for marker in pair)
    }
    before = [token for token in before if token not in special]
    texts, begin = [], 0
    for end in [*(place for place, token in enumerate(tokens) if token in kept), len(tokens)]:
        part = [token for token in tokens[begin:end] if token not in special]
        texts.append(_text_after(tokenizer, before, part))
        texts += [kept[tokens[end]]] if end < len(tokens) else []
        before = list(tokens[end : end + 1])
        begin = end + 1
    return "".join(texts)


def _text_after(tokenizer: PreTrainedTokenizerBase, before: Sequence[int], tokens: Sequence[int]) -> str:
    """The text of tokens behind others: SentencePiece takes the first space from what it decodes."""
    if hasattr(tokenizer, "sp_model"):
        return _spelled(tokenizer, before, tokens)

    def text_of(ids: Sequence[int], skip: bool) -> str:
        text = tokenizer.decode(list(ids), skip_special_tokens=skip, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)  # of one text, not of several
        return text

    start = text_of(before, False) if before else ""
    whole = text_of([*before, *tokens], False) if before else ""
    return whole[len(start) :] if before and whole.startswith(start) else text_of(tokens, True)


def _spelled(tokenizer: PreTrainedTokenizerBase, before: Sequence[int], tokens: Sequence[int]) -> str:
    """The text of tokens of a SentencePiece model that transformers has not converted.

    Its own decoding strips white space and writes a byte as `<0x0A>`.
    """
    added = set(tokenizer.get_added_vocab().values())
    parts, begins = [], not before or before[-1] in added
    for token, piece in zip(tokens, tokenizer.convert_ids_to_tokens(list(tokens)), strict=True):
        byte = _BYTE_PIECE.fullmatch(piece)
        text = bytes([int(byte[1], 16)]) if byte else piece.replace("▁", " ").encode()
        # Where a text begins, the model has put a space before it.
        parts.append(text.removeprefix(b" ") if begins and token not in added else text)
        begins = token in added
    return b"".join(parts).decode("utf-8", "replace")
