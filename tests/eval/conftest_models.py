"""Tiny random models and tokenizers, made in the test."""

from __future__ import annotations

from pathlib import Path
from typing import Any

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tokenizer(folder: Path, *, chat: bool = True, end: bool = True) -> Any:
    """A byte-level tokenizer: every text can be encoded, no training text is needed."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<|im_start|>", "<|im_end|>"] if end else ["<|im_start|>"]
    inner = Tokenizer(models.BPE({token: place for place, token in enumerate(alphabet)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    names = {"eos_token": "<|im_end|>", "pad_token": "<|im_end|>"} if end else {}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, **names)
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    if chat:
        tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder)
    return tokenizer


def make_model(folder: Path, *, seed: int = 0, context: int = 4096, chat: bool = True, end: bool = True) -> Path:
    """A random two-layer Llama in a folder."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = make_tokenizer(folder, chat=chat, end=end)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=context,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def make_reciter(folder: Path, text: str, question: str, template: str, special: tuple[str, ...] = ()) -> Path:
    """A GPT-2 that says `text` after one question: its positions alone choose the next token.

    special: texts that the tokenizer has as special tokens.
    """
    tokenizer = make_tokenizer(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>", *special]})
    tokenizer.chat_template = template
    messages = [{"role": "user", "content": question}]
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    script = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    return make_recital(folder, tokenizer, len(tokenizer(prompt)["input_ids"]) - 1, script)


def make_recital(folder: Path, tokenizer: Any, begin: int, script: list[int]) -> Path:
    """A GPT-2 that says the script's tokens after place `begin`, whatever stands there."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    tokenizer.save_pretrained(folder)
    size = begin + len(script)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=1024, n_embd=size, n_layer=1, n_head=1, tie_word_embeddings=False,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    for name, weight in model.named_parameters():
        if "ln_" not in name:
            torch.nn.init.zeros_(weight)
    with torch.no_grad():
        model.transformer.wpe.weight[:size] = torch.eye(size)
        for place, token in enumerate(script):
            model.lm_head.weight[token, begin + place] = 1.0
    model.save_pretrained(folder)
    return folder
