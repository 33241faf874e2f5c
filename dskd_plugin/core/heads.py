"""A language model's head: the map from last hidden states to logits.

Shape letters: N rows, V rows of the head (tokenizer ids, then padding), D width of the model.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Head:
    """Everything that a head does: logits = softcap(scale * (h W^T + b)).

    weight_VD: floating point, V >= vocab_size. bias_V: [V] or None.
    vocab_size: number of real tokenizer ids; rows from there on are padding.
    scale: factor on the logits (Cohere, Granite). softcap: c in c tanh(z / c) (Gemma 2), or None.
    Raises ValueError when vocab_size is not in [1, V], a shape does not fit or softcap is not positive.
    """

    weight_VD: Tensor
    vocab_size: int
    bias_V: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

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
        return replace(self, weight_VD=self.weight_VD.detach(), bias_V=bias_V)

    def real(self) -> Head:
        """The head of the tokenizer's ids alone: a view without the padding rows."""
        bias_V = None if self.bias_V is None else self.bias_V[: self.vocab_size]
        return replace(self, weight_VD=self.weight_VD[: self.vocab_size], bias_V=bias_V)


def head_logits(hidden_ND: Tensor, head: Head, *, by_id: bool = False) -> Tensor:
    """Logits of all V rows of the head: softcap(scale * (h W^T + b)).

    hidden_ND: any floating dtype; it is cast to the dtype of the weight, in which the product is taken.
    by_id: in memory the rows of one id stand together, for what adds ids up (events.masses).
    Returns [N, V] in fp32, or wider where the weight is wider.
    """
    weight_VD, hidden_ND = head.weight_VD, hidden_ND.to(head.weight_VD.dtype)
    bias_V = None if head.bias_V is None else head.bias_V.to(weight_VD.dtype)
    if by_id:
        product_VN = weight_VD @ hidden_ND.T
        product_NV = (product_VN if bias_V is None else product_VN + bias_V[:, None]).T
    else:
        product_NV = torch.nn.functional.linear(hidden_ND, weight_VD, bias_V)
    logits_NV = product_NV.to(torch.promote_types(product_NV.dtype, torch.float32))
    if head.scale != 1.0:
        logits_NV = logits_NV * head.scale
    if head.softcap is not None:
        logits_NV = torch.tanh(logits_NV / head.softcap) * head.softcap
    return logits_NV
