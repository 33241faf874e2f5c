"""The kernels as functions of tensors. Triton is imported at the first call, so that this file needs torch alone.

Shape letters as in objective.py; U ids of the other side, K events.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from dskd_plugin.core.divergences import DIVERGENCES, Divergence
from dskd_plugin.core.events import IdsByEvent
from dskd_plugin.core.fused.cover import COVERED
from dskd_plugin.core.heads import Head, capped, head_product
from dskd_plugin.core.row_blocks import wide

# Ids that a program reads at a time, and its warps.
TILE, WARPS = 2048, 8


@dataclass(frozen=True)
class Logits:
    """Logits as their product with a head, which a kernel may write over: logits = softcap(scale * product).

    real: the first so many are ids of a tokenizer. temperature: divides them where they are compared.
    """

    product_NV: Tensor
    real: int
    temperature: float = 1.0
    scale: float = 1.0
    softcap: float | None = None

    @classmethod
    def of(cls, hidden_ND: Tensor, head: Head, temperature: float = 1.0) -> Logits:
        return cls(head_product(hidden_ND, head), head.vocab_size, temperature, head.scale, head.softcap)

    def part(self, start: int, stop: int) -> Logits:
        return replace(self, product_NV=self.product_NV[start:stop])

    def at(self, temperature: float) -> Logits:
        return replace(self, temperature=temperature)

    def of_ids(self, id_N: Tensor) -> Tensor:
        """The logit of one id at each row over the temperature, [N]."""
        chosen_N1 = self.product_NV.gather(1, id_N[:, None])
        return (capped(chosen_N1, self.scale, self.softcap) / self.temperature)[:, 0]

    def argmax(self) -> Tensor:
        """The likeliest real id of each row, [N]: scale and soft-cap keep the order."""
        return self.product_NV[:, : self.real].argmax(-1)

    @property
    def constants(self) -> dict[str, float]:
        return {"SCALE": self.scale, "CAP": self.softcap or 0.0}

    @property
    def wide(self) -> torch.dtype:
        return wide(self.product_NV)


@dataclass(frozen=True)
class Masses:
    """Log-probabilities of events at a temperature, [N, K], and the log of the sum over their ids, [N].

    likeliest_N: the event of the likeliest id, int32.
    """

    log_NK: Tensor
    normaliser_N: Tensor
    likeliest_N: Tensor


@dataclass(frozen=True)
class Other:
    """The other side of a divergence: logits, read at the same ids or at partner_V (PAIRED in row_kernels.compare).

    change_NK, event_V: what is added by event (CHANGED there).
    """

    logits: Logits
    partner_V: Tensor | None = None
    change_NK: Tensor | None = None
    event_V: Tensor | None = None


@dataclass(frozen=True)
class Gold:
    """Cross-entropy beside a divergence: the gold ids, and what each row's weighs in the gradient."""

    id_N: Tensor
    weight_N: Tensor

    def part(self, start: int, stop: int) -> Gold:
        return Gold(self.id_N[start:stop], self.weight_N[start:stop])


@dataclass(frozen=True)
class Handed:
    """What the masses of a row's events hand back to its logits: the gradient slope_NK by the masses."""

    masses: Masses
    slope_NK: Tensor
    event_V: Tensor


def covers(divergence: Divergence) -> bool:
    """Whether the kernels have it, knobs and all."""
    function = getattr(divergence, "func", divergence)
    return _name(divergence) in COVERED and DIVERGENCES[_name(divergence)] is function


def event_masses(logits: Logits, ids: IdsByEvent, count: int) -> Masses:
    """The masses of events at the temperature of the logits; an event without ids has -inf."""
    rows = len(logits.product_NV)
    log_NK = torch.full((rows, count), -torch.inf, dtype=logits.wide, device=logits.product_NV.device)
    normaliser_N = log_NK.new_empty(rows)
    likeliest_N = torch.empty(rows, dtype=torch.int32, device=log_NK.device)
    _launch(
        _kernels("event_kernel").event_masses,
        logits,
        *_row(logits.product_NV),
        ids.ids_P,
        ids.event_P,
        len(ids.ids_P),
        *_row(log_NK),
        normaliser_N,
        likeliest_N,
        TEMPERATURE=logits.temperature,
    )
    return Masses(log_NK.sub_(normaliser_N[:, None]), normaliser_N, likeliest_N)


def cross_entropy_of(
    logits: Logits,
    gold: Gold | None,
    *,
    handed: Handed | None = None,
    write: bool,
    out_NV: Tensor | None = None,
) -> Tensor:
    """-log softmax(z)[gold] over all ids, [N]; zeros without gold.

    write: the gradient of the weighted sum, and of what is handed back, goes to out_NV, else over the product.
    """
    nothing = product_NV = logits.product_NV
    nll_N = torch.zeros(len(product_NV), dtype=logits.wide, device=product_NV.device)
    _launch(
        _kernels("row_kernels").cross_entropy,
        logits,
        *_row(product_NV),
        *_row(product_NV if out_NV is None else out_NV),
        product_NV.shape[1],
        logits.real,
        nothing if gold is None else gold.id_N,
        nll_N,
        nothing if gold is None else gold.weight_N,
        *_row(nothing if handed is None else handed.masses.log_NK),
        *_row(nothing if handed is None else handed.slope_NK),
        nothing if handed is None else handed.event_V,
        nothing if handed is None else handed.masses.normaliser_N,
        CE=gold is not None,
        EVENTS=handed is not None,
        WRITE=write,
        TEMPERATURE=logits.temperature,
    )
    return nll_N


def compare(
    logits: Logits,
    other: Other,
    divergence: Divergence,
    weight_N: Tensor,
    *,
    gold: Gold | None = None,
    write: bool,
    out_NV: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The divergence of each row over its real ids, or the paired ones, [N], and the cross-entropy as above.

    weight_N, write: the gradient of the weighted sum of both goes to out_NV, else over the product.
    """
    nothing = product_NV = logits.product_NV
    theirs = other.logits
    distance_N = torch.zeros(len(product_NV), dtype=logits.wide, device=product_NV.device)
    nll_N = torch.zeros_like(distance_N)
    name = _name(divergence)
    knob = COVERED[name]
    _launch(
        _kernels("row_kernels").compare,
        logits,
        *_row(product_NV),
        *_row(product_NV if out_NV is None else out_NV),
        product_NV.shape[1],
        logits.real if other.partner_V is None else len(other.partner_V),
        nothing if gold is None else gold.id_N,
        nll_N,
        nothing if gold is None else gold.weight_N,
        *_row(theirs.product_NV),
        nothing if other.partner_V is None else other.partner_V,
        *_row(nothing if other.change_NK is None else other.change_NK),
        nothing if other.event_V is None else other.event_V,
        distance_N,
        weight_N,
        CE=gold is not None,
        PAIRED=other.partner_V is not None,
        CHANGED=other.change_NK is not None,
        WRITE=write,
        DIVERGENCE=getattr(_kernels("pointwise"), name),
        KNOB=None if knob is None else _knobs(divergence)[knob],
        TEMPERATURE=logits.temperature,
        OTHER_TEMPERATURE=theirs.temperature,
        OTHER_SCALE=theirs.scale,
        OTHER_CAP=theirs.softcap or 0.0,
    )
    return distance_N, nll_N


def _launch(kernel: Any, logits: Logits, *arguments: Any, **constants: Any) -> None:
    rows = len(logits.product_NV)
    if not rows:
        return
    import triton.language as tl

    wide = tl.float64 if logits.wide == torch.float64 else tl.float32
    device = logits.product_NV.device
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        kernel[(rows,)](*arguments, **constants, **logits.constants, TILE=TILE, WIDE=wide, num_warps=WARPS)


def _kernels(name: str) -> ModuleType:
    return importlib.import_module(f"dskd_plugin.core.fused.{name}")


def _row(x_NV: Tensor) -> tuple[Tensor, int]:
    """A tensor whose rows a kernel reads, and their stride."""
    assert x_NV.stride(1) == 1
    return x_NV, x_NV.stride(0)


def _name(divergence: Divergence) -> str:
    function: Callable[..., Tensor] = getattr(divergence, "func", divergence)
    return getattr(function, "__name__", "")


def _knobs(divergence: Divergence) -> dict[str, float]:
    """Knobs as they are set, and defaults for the others."""
    parameters = inspect.signature(divergence).parameters.values()
    return {each.name: each.default for each in parameters if each.default is not each.empty}
