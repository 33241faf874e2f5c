"""A language model's head: the map from last hidden states to logits.

Shape letters: N rows, V rows of the head (tokenizer ids, then padding), D width of the model, K ids of a row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Head:
    """Everything that a head does: logits = softcap(scale * (h W^T + b)).

    weight_VD: floating point, V >= vocab_size. bias_V: [V] or None.
    vocab_size: number of real tokenizer ids; rows from there on are padding.
    scale: factor on the logits (Cohere, Granite). softcap: c in c tanh(z / c) (Gemma 2), or None.
    gradient_VD: where a backward pass adds the gradient of the weight, in place of handing it on; None for the ordinary
        way, which makes a tensor as large as the weight each time.
    Raises ValueError when vocab_size is not in [1, V], a shape does not fit or softcap is not positive.
    """

    weight_VD: Tensor
    vocab_size: int
    bias_V: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
    gradient_VD: Tensor | None = None

    def __post_init__(self) -> None:
        rows = self.weight_VD.shape[0]
        if self.weight_VD.ndim != 2 or not 1 <= self.vocab_size <= rows:
            raise ValueError(
                f"head: expected a [V, D] weight with at least one row per tokenizer id, got shape "
                f"{tuple(self.weight_VD.shape)} for {self.vocab_size} ids. Resize the model's embeddings "
                "to its tokenizer."
            )
        if self.bias_V is not None and self.bias_V.shape != (rows,):
            raise ValueError(
                f"head: expected a bias of shape ({rows},), got {tuple(self.bias_V.shape)}. "
                "Pass the bias that belongs to this weight."
            )
        if self.softcap is not None and self.softcap <= 0:
            raise ValueError(f"head: expected a positive softcap or None, got {self.softcap}. Use None for none.")

    def detach(self) -> Head:
        """The same head as a constant."""
        bias_V = None if self.bias_V is None else self.bias_V.detach()
        return replace(self, weight_VD=self.weight_VD.detach(), bias_V=bias_V, gradient_VD=None)

    def to(self, device: torch.device) -> Head:
        """The same head on a device."""
        bias_V = None if self.bias_V is None else self.bias_V.to(device)
        return replace(self, weight_VD=self.weight_VD.to(device), bias_V=bias_V)

    def real(self) -> Head:
        """The head of the tokenizer's ids alone: a view without the padding rows."""
        bias_V = None if self.bias_V is None else self.bias_V[: self.vocab_size]
        assert self.gradient_VD is None
        return replace(self, weight_VD=self.weight_VD[: self.vocab_size], bias_V=bias_V)


def head_logits(hidden_ND: Tensor, head: Head, *, by_id: bool = False) -> Tensor:
    """Logits of all V rows of the head: softcap(scale * (h W^T + b)).

    hidden_ND: any floating dtype; it is cast to the dtype of the weight, in which the product is taken.
    by_id: in memory the rows of one id stand together, for what adds ids up (events.masses).
    Returns [N, V] in fp32, or wider where the weight is wider.
    """
    if not by_id or head.gradient_VD is not None:
        return capped(head_product(hidden_ND, head), head.scale, head.softcap)
    weight_VD, hidden_ND = head.weight_VD, hidden_ND.to(head.weight_VD.dtype)
    product_VN = weight_VD @ hidden_ND.T
    if head.bias_V is not None:
        product_VN = product_VN + head.bias_V.to(weight_VD.dtype)[:, None]
    return capped(product_VN.T, head.scale, head.softcap)


def head_product(hidden_ND: Tensor, head: Head) -> Tensor:
    """h W^T + b in the dtype of the weight: logits before scale and soft-cap. Returns [N, V]."""
    weight_VD, hidden_ND = head.weight_VD, hidden_ND.to(head.weight_VD.dtype)
    bias_V = None if head.bias_V is None else head.bias_V.to(weight_VD.dtype)
    if head.gradient_VD is None:
        return torch.nn.functional.linear(hidden_ND, weight_VD, bias_V)
    apply: Callable[..., Tensor] = _AddingLinear.apply
    return apply(hidden_ND, weight_VD, bias_V, head.gradient_VD)


def logits_at(hidden_ND: Tensor, head: Head, ids_NK: Tensor, *, elements: int) -> Tensor:
    """Logits of some ids of each row: those of head_logits, without a product with the whole head.

    ids_NK: rows of the head. elements: of the head's rows that are gathered at a time.
    Returns [N, K] as head_logits does. No gradient.
    """
    weight_VD, hidden_ND = head.weight_VD.detach(), hidden_ND.detach().to(head.weight_VD.dtype)
    product_NK = hidden_ND.new_empty(ids_NK.shape)
    step = max(1, elements // max(1, ids_NK.shape[1] * weight_VD.shape[1]))
    for start in range(0, len(ids_NK), step):
        ids_BK = ids_NK[start : start + step]
        rows_BKD = weight_VD.index_select(0, ids_BK.flatten()).view(*ids_BK.shape, -1)
        product_NK[start : start + step] = torch.bmm(rows_BKD, hidden_ND[start : start + step, :, None])[..., 0]
    if head.bias_V is not None:
        product_NK += head.bias_V.detach().to(weight_VD.dtype)[ids_NK]
    return capped(product_NK, head.scale, head.softcap)


def capped(product_NV: Tensor, scale: float, softcap: float | None) -> Tensor:
    """What a head does after its product, in fp32 or wider."""
    logits_NV = product_NV.to(torch.promote_types(product_NV.dtype, torch.float32))
    if scale != 1.0:
        logits_NV = logits_NV * scale
    if softcap is not None:
        logits_NV = torch.tanh(logits_NV / softcap) * softcap
    return logits_NV


def add_weight_gradient(gradient_VD: Tensor, gradient_NV: Tensor, hidden_ND: Tensor) -> None:
    """Add the gradient of the weight in h W^T, from that of the product."""
    if gradient_VD.dtype == hidden_ND.dtype:
        gradient_VD.addmm_(gradient_NV.T, hidden_ND)
    else:  # products in low precision are added up in a wide one
        gradient_VD.add_(gradient_NV.T @ hidden_ND)


class _AddingLinear(torch.autograd.Function):
    """h W^T + b, whose backward pass adds the gradient of W where it is collected."""

    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, gradient_VD: Tensor) -> Tensor:
        ctx.save_for_backward(hidden_ND, weight_VD)
        ctx.gradient_VD = gradient_VD
        return torch.nn.functional.linear(hidden_ND, weight_VD, bias_V)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient_NV: Tensor) -> tuple[Tensor | None, None, Tensor | None, None]:
        hidden_ND, weight_VD = ctx.saved_tensors
        to_hidden_ND = gradient_NV @ weight_VD if ctx.needs_input_grad[0] else None
        add_weight_gradient(ctx.gradient_VD, gradient_NV, hidden_ND)
        return to_hidden_ND, None, gradient_NV.sum(0) if ctx.needs_input_grad[2] else None, None
