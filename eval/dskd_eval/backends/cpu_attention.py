"""Attention for generating on a CPU: one new token per row against the keys it has so far.

The general kernel first repeats the shared key and value heads for every query head and is slow in bfloat16; at a
thousand tokens most of a step is spent there. One new token needs two small matrix products per shared head.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "dskd_cpu_decode"


def decode_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **options: Any,  # what transformers hands to any attention: it differs by model
) -> tuple[torch.Tensor, None]:
    """softmax(scaling q K^T + mask) V for queries [B, H, 1, D] and keys, values [B, K, L, D], H a multiple of K.

    Returns [B, 1, H, D]. Prompts (more than one query) and options this form does not know go to the general
    kernel.
    """
    rows, heads, queries, width = query.shape
    shared = key.shape[1]
    plain = all(options.get(name) is None for name in ("s_aux", "softcap", "position_bias"))
    if queries != 1 or not plain or heads % shared or (attention_mask is not None and attention_mask.shape[1] != 1):
        general = sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **options)
        output: torch.Tensor = general[0]
        return output, None
    scale = width**-0.5 if scaling is None else scaling
    grouped = query.reshape(rows, shared, heads // shared, width) * scale
    scores = (grouped @ key.transpose(-1, -2)).float()
    if attention_mask is not None:
        mask = attention_mask[..., : key.shape[2]]
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    output = scores.softmax(dim=-1).to(value.dtype) @ value
    return output.reshape(rows, 1, heads, value.shape[-1]), None


def use_for(model: PreTrainedModel) -> None:
    """Switch a model on a CPU from the general kernel to this one; others stay as they are."""
    if getattr(model.config, "_attn_implementation", None) != "sdpa":
        return
    AttentionInterface.register(NAME, decode_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)
