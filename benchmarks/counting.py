"""What a step does with vocabularies: products with a head, and the largest tensor with one entry per row and id."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_PRODUCTS = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.addmm_.default}
_PRODUCTS |= {torch.ops.aten.mm.out, torch.ops.aten.addmm.out}


@dataclass
class Products:
    """Rows that went through products with one head [V, D].

    logits: hidden states times the weight. back: gradients of logits times the weight. weight: gradients of the weight
    itself. calls: products of the first kind.
    """

    logits: int = 0
    back: int = 0
    weight: int = 0
    calls: int = 0


class VocabularyWork(TorchDispatchMode):
    """Counts what happens inside the block, also within autograd's own steps.

    heads: name -> weight [V, D]. A product counts for the head whose memory it reads, or whose shape it makes.
    largest: elements of the largest tensor made that is as wide as a head has rows, and is not a head itself.
    """

    def __init__(self, heads: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.products = {name: Products() for name in heads}
        self.largest = 0
        self._memory = {weight.untyped_storage().data_ptr(): name for name, weight in heads.items()}
        self._widths = {name: weight.shape[1] for name, weight in heads.items()}
        self._shapes = {tuple(weight.shape): name for name, weight in heads.items()}
        self._rows = {weight.shape[0] for weight in heads.values()}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in _PRODUCTS:
            self._count([x for x in args if isinstance(x, Tensor)][-2:], out)
        for x in out if isinstance(out, tuple | list) else [out]:
            if isinstance(x, Tensor) and x.ndim == 2 and x.shape[1] in self._rows and not self._head_of(x):
                self.largest = max(self.largest, x.numel())
        return out

    def _head_of(self, x: Tensor) -> str | None:
        """The head whose memory a tensor is a view of."""
        return self._memory.get(x.untyped_storage().data_ptr())

    def _count(self, factors: list[Tensor], out: Tensor) -> None:
        name = next(filter(None, map(self._head_of, factors)), None)
        if name is None:
            made = self._shapes.get(tuple(out.shape)) or self._shapes.get(tuple(out.shape[::-1]))
            if made:
                self.products[made].weight += factors[0].shape[1] if tuple(out.shape) in self._shapes else 0
        elif out.shape[1] == self._widths[name]:
            self.products[name].back += out.shape[0]
        else:
            # Logits are made row by row, or id by id where the head comes first.
            self.products[name].logits += out.shape[1 if self._head_of(factors[0]) else 0]
            self.products[name].calls += 1
