"""A backend that renders and counts, for dry runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NoReturn

from transformers import PreTrainedTokenizerBase

from dskd_eval.backends.base import Generation, GenerationSettings, Prompt, Told, tell_nobody
from dskd_eval.backends.tokenizers import RendersChats, encode


class TokenizerOnly(RendersChats):
    """The tokenizer of a model, without its weights."""

    kind = "none"
    pads = True
    told: Told = staticmethod(tell_nobody)
    default_batch_size = 1
    max_length = 1 << 30

    def __init__(self, name: str, tokenizer: PreTrainedTokenizerBase, template_options: Mapping[str, object]) -> None:
        self.name, self.tokenizer, self.template_options = name, tokenizer, template_options
        self.identity: Mapping[str, object] = {"fingerprint": ""}

    def encode(self, text: str, *, special_tokens: bool) -> list[int]:
        return encode(self.tokenizer, text, special_tokens=special_tokens)

    def generate(self, prompts: Sequence[Prompt], settings: GenerationSettings) -> list[Generation]:
        raise NotImplementedError("a dry run generates nothing")

    def likelihood_model(self, batch_size: int) -> NoReturn:
        raise NotImplementedError("a dry run generates nothing")
