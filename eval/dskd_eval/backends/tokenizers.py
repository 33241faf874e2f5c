"""Tokenizers: finding and loading one, prompts as tokens, conversations as text, and the tokens that end an answer."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import transformers
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from dskd_eval import templates
from dskd_eval.errors import UserError
from dskd_eval.models import ModelFolder

Variables = Mapping[str, Any]  # of a chat template: as keywords they need a type that fits any of them

# Ends of turn of models that show none: with a template, such a token may stand inside an answer.
_TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<|end|>", "<end_of_turn>")
_DOCUMENT_ENDS = ("<|endoftext|>", "<|end_of_text|>", "</s>")


def load_tokenizer(folder: ModelFolder, chat_template: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a model; `chat_template` (text) replaces the template that the model or its recipe names.

    The template is one text. It stays a table of several only where none of them is the default.
    """
    tokenizer = _tokenizer(folder.tokenizer)
    if folder.adapter is not None and folder.tokenizer == folder.weights:
        tokenizer.chat_template = templates.in_folder(folder.adapter) or tokenizer.chat_template
    elif folder.adapter is not None and not tokenizer.chat_template:
        with contextlib.suppress(UserError):  # the weights need no tokenizer of their own
            tokenizer.chat_template = _tokenizer(folder.weights).chat_template
    if chat_template is None:
        found = templates.chosen(folder.ref.chat_template, tokenizer.chat_template, f"chat template of {folder.name}")
        chat_template = templates.one(found) or found  # type: ignore[assignment]
    tokenizer.chat_template = chat_template
    return tokenizer


def _tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        if type(tokenizer).__name__ == "MistralCommonBackend":
            # It hides its vocabulary and takes no template; the same file reads as an ordinary tokenizer.
            tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(
                folder,
                local_files_only=True,
                bos_token="<s>",
                eos_token="</s>",
                unk_token="<unk>",
                add_bos_token=True,
            )
        return tokenizer
    except Exception as error:
        raise UserError(
            f"model {folder}",
            expected="a tokenizer that transformers can load",
            got=first_line(error),
            fix="Save the tokenizer into the folder.",
        ) from error


def context_length(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> int:
    """Tokens that prompt and answer may have together: the smallest limit that config and tokenizer name."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    names = ("max_position_embeddings", "n_positions", "n_ctx", "max_sequence_length", "max_seq_len", "seq_length")
    limits = [getattr(text, name, None) for name in names]
    limits.append(getattr(tokenizer, "model_max_length", None))
    known = [int(limit) for limit in limits if isinstance(limit, (int, float)) and 0 < limit < 10_000_000]
    return min(known) if known else 2048


def encode(tokenizer: PreTrainedTokenizerBase, text: str, *, special_tokens: bool) -> list[int]:
    """Ids of a prompt: with the start token that a tokenizer adds, without the end token that some add."""
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    if special_tokens:
        whole: list[int] = tokenizer(text, add_special_tokens=True, verbose=False)["input_ids"]
        ended = len(whole) > len(ids) and whole[-1] == tokenizer.eos_token_id and whole[-1:] != ids[-1:]
        ids = whole[:-1] if ended else whole
    if not ids and tokenizer.bos_token_id is not None:
        return [tokenizer.bos_token_id]
    return ids


def end_tokens(folder: ModelFolder, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids that end an answer: the tokenizer's, those of generation_config.json, the end of turn of the chat template.

    A token that ends a document counts wherever the tokenizer has it; a known end of turn where no template shows one.
    """
    try:
        listed = transformers.GenerationConfig.from_pretrained(folder.ends, local_files_only=True).eos_token_id
    except OSError:
        listed = None
    inner = folder.config.get("text_config")
    settings = inner if isinstance(inner, dict) and inner else folder.config
    listed = settings.get("eos_token_id") if listed is None else listed
    ids: set[int] = set()
    for value in (tokenizer.eos_token_id, listed, _turn_end(tokenizer, dict(folder.ref.template_options))):
        ids |= {value} if isinstance(value, int) else set(value) if isinstance(value, list) else set()
    added = tokenizer.get_added_vocab()
    known: tuple[str, ...] = _DOCUMENT_ENDS if has_chat_template(tokenizer) else _DOCUMENT_ENDS + _TURN_ENDS
    # Where a turn has channels, <|end|> ends the reasoning alone.
    known = tuple(token for token in known if not (token == "<|end|>" and "<|channel|>" in added))
    return sorted(ids | {added[token] for token in known if token in added})


def _turn_end(tokenizer: PreTrainedTokenizerBase, options: Variables) -> int | None:
    """The first special, else added, token that the chat template writes after an answer."""
    if not isinstance(tokenizer.chat_template, str):
        return None
    answer = "Quebec"
    turns = [{"role": "user", "content": "Zulu?"}, {"role": "assistant", "content": answer}]
    try:
        text = str(tokenizer.apply_chat_template(turns, tokenize=False, **options))
    except Exception:  # whatever a template raises: told where a prompt is rendered
        return None
    _, found, after = text.rpartition(answer)
    if not found:
        return None
    ids = tokenizer(after, add_special_tokens=False)["input_ids"]
    if str(tokenizer.unk_token) not in after:
        ids = [token for token in ids if token != tokenizer.unk_token_id]  # a line break may have no token of its own
    special = set(tokenizer.all_special_ids)
    added = set(tokenizer.get_added_vocab().values())
    following = [*(token for token in ids if token in special), *(token for token in ids if token in added)]
    return int(following[0]) if following else None


def has_chat_template(tokenizer: PreTrainedTokenizerBase) -> bool:
    return bool(getattr(tokenizer, "chat_template", None))


def render_chat(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict[str, str]],
    add_generation_prompt: bool,
    options: Variables,
) -> str:
    """A conversation as text. Templates without a system role get the system text in the first user turn.

    options: variables of the template.
    """
    import jinja2

    def apply(turns: list[dict[str, str]]) -> str:
        text = tokenizer.apply_chat_template(
            turns,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
            **options,
        )
        assert isinstance(text, str)  # not tokens
        return text

    try:
        return apply(messages)
    except jinja2.TemplateError as error:
        if messages and messages[0]["role"] == "system" and len(messages) > 1:
            first = {"role": "user", "content": f"{messages[0]['content']}\n\n{messages[1]['content']}"}
            return apply([first, *messages[2:]])
        raise UserError(
            "chat template",
            expected="a template that renders user and assistant turns",
            got=first_line(error),
            fix="Give --chat-template FILE, or --chat-template off.",
        ) from error


def first_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:240]}"


class RendersChats:
    """A backend whose tokenizer is one of transformers: conversations as text, in its template."""

    tokenizer: PreTrainedTokenizerBase
    template_options: Variables

    def template(self) -> str | None:
        found: str | None = self.tokenizer.chat_template if has_chat_template(self.tokenizer) else None
        return found

    def render(self, messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
        return render_chat(self.tokenizer, messages, add_generation_prompt, self.template_options)
