"""The decoding attention against plain loops and against the general kernel."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest_models import make_tokenizer
from dskd_eval.backends import cpu_attention


def loops(q: Any, k: Any, v: Any, allowed: Any, scale: float) -> list[Any]:
    """softmax(scale q k) v in Python floats, one row and head at a time."""
    rows, heads, _, width = q.shape
    output = []
    for b in range(rows):
        for h in range(heads):
            g = h // (heads // k.shape[1])
            seen = [j for j in range(k.shape[2]) if allowed[b][j]]
            scores = [scale * sum(float(q[b, h, 0, d]) * float(k[b, g, j, d]) for d in range(width)) for j in seen]
            weights = [math.exp(s - max(scores)) for s in scores]
            total = sum(weights)
            output.append(
                [sum(w * float(v[b, g, j, d]) for w, j in zip(weights, seen, strict=True)) / total
                 for d in range(width)]
            )  # fmt: skip
    return output


@pytest.mark.parametrize("scaling", [None, 0.3])
@pytest.mark.parametrize("kind", ["bool", "added", "none"])
def test_equals_loops(kind: str, scaling: float | None) -> None:
    torch.manual_seed(0)
    q = torch.randn(2, 6, 1, 4, dtype=torch.float64)
    k, v = torch.randn(2, 2, 5, 4, dtype=torch.float64), torch.randn(2, 2, 5, 4, dtype=torch.float64)
    allowed = torch.tensor([[True] * 5, [False, False, True, True, True]])
    masks = {"bool": allowed[:, None, None], "none": None}
    masks["added"] = torch.zeros(2, 1, 1, 5).masked_fill(~allowed[:, None, None], torch.finfo(torch.float32).min)
    if kind == "none":
        allowed = torch.ones_like(allowed)
    found, _ = cpu_attention.decode_attention(None, q, k, v, masks[kind], scaling=scaling)
    expected = torch.tensor(loops(q, k, v, allowed.tolist(), scaling or 0.5), dtype=torch.float64)
    assert found.shape == (2, 1, 6, 4)
    torch.testing.assert_close(found.reshape(12, 4), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2_window"])
def test_generates_what_the_general_kernel_generates(family: str, tmp_path: Path) -> None:
    """Padded batches, shared heads, learned positions and sliding windows, in fp32."""
    from transformers import (
        GPT2Config,
        GPT2LMHeadModel,
        LlamaConfig,
        LlamaForCausalLM,
        Qwen2Config,
        Qwen2ForCausalLM,
    )

    size = len(make_tokenizer(tmp_path))
    llama = {"vocab_size": size, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip
    torch.manual_seed(1)
    model: Any = {
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**llama)),
        "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=size, n_embd=32, n_layer=2, n_head=4, n_positions=128)),
        "qwen2_window": lambda: Qwen2ForCausalLM(
            Qwen2Config(**llama, use_sliding_window=True, sliding_window=6, max_window_layers=0)
        ),
    }[family]()
    model = model.eval()
    ids = torch.randint(0, 200, (3, 9))
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    scores = []
    for switch in (False, True):
        if switch:
            cpu_attention.use_for(model)
            assert model.config._attn_implementation == cpu_attention.NAME
        found = model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=20, do_sample=False, eos_token_id=None,
            pad_token_id=0, output_scores=True, return_dict_in_generate=True,
        )  # fmt: skip
        scores.append(torch.stack(found.scores))
    torch.testing.assert_close(scores[1], scores[0], rtol=1e-4, atol=1e-5)


def test_models_with_their_own_kernel_stay(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4
    )
    config._attn_implementation = "eager"
    model = LlamaForCausalLM(config)
    cpu_attention.use_for(model)
    assert model.config._attn_implementation == "eager"
