"""A model run without memory: torch's fake tensors have a shape, a dtype and a device, and no content.

Each tensor is followed from where it is made to where it is let go, through forward and backward, so the bytes that
live at once are those of the real run of this architecture, whatever it is. No weights are read.

Shapes: B rows of a micro-batch, S tokens of a row, H heads.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dskd_plugin.models import decoder

ATTENTION = "dskd_plan"
REPEATING = "dskd_plan_repeating"


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors made inside the block and still alive. live, peak: now, and at most so far.

    weights_of: the model whose parameters and buffers do not count; operations return views of them.
    """

    def __init__(self, weights_of: nn.Module) -> None:
        super().__init__()
        self.live: int = 0
        self.peak: int = 0
        self._weights = [tensor.untyped_storage() for tensor in (*weights_of.parameters(), *weights_of.buffers())]
        self._not_counted = {storage._cdata for storage in self._weights}
        self._known: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(made):
            if isinstance(leaf, Tensor):
                self._follow(leaf.untyped_storage())
        return made

    def _follow(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._known or key in self._not_counted:
            return
        size = storage.nbytes()

        def gone(_: Any) -> None:
            del self._known[key]
            self.live -= size

        self._known[key] = weakref.ref(storage, gone)
        self.live += size
        self.peak = max(self.peak, self.live)

    def forget(self) -> None:
        """Start the peak anew from what lives now."""
        self.peak = self.live


class _FusedAttention(torch.autograd.Function):
    """What FlashAttention and its relatives keep: inputs, output, and one number per query."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = torch.empty_like(query)
        normaliser_BHS = torch.empty(query.shape[:-1], dtype=torch.float32, device=query.device)
        ctx.save_for_backward(query, key, value, out, normaliser_BHS)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        query, key, value, *_ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _fused(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **_: Any
) -> tuple[Tensor, None]:
    apply: Callable[..., Tensor] = _FusedAttention.apply
    return apply(query, key, value).transpose(1, 2).contiguous(), None


def _fused_repeating(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **_: Any
) -> tuple[Tensor, None]:
    """As transformers calls torch's own attention where rows are padded: keys and values copied for each query head."""
    times = query.shape[1] // key.shape[1]
    return _fused(module, query, key.repeat_interleave(times, 1), value.repeat_interleave(times, 1), mask)


def empty_model(config: Any, dtype: torch.dtype, *, repeating: bool, trust_remote_code: bool = False) -> Any:
    """The model of a configuration on the meta device, where weights have no memory.

    repeating: keys and values are copied for each query head, see `_fused_repeating`.
    """
    from transformers import AttentionInterface, AutoModelForCausalLM

    AttentionInterface.register(ATTENTION, _fused)
    AttentionInterface.register(REPEATING, _fused_repeating)
    made: Any = AutoModelForCausalLM
    with torch.device("meta"):
        return made.from_config(
            config,
            dtype=dtype,
            attn_implementation=REPEATING if repeating else ATTENTION,
            trust_remote_code=trust_remote_code,
        )


def _make_fake(model: nn.Module) -> None:
    """Give the model fake weights of a CPU: the meta device knows no mixed precision. Tied weights stay tied."""
    made: dict[int, Tensor] = {}
    for module in model.modules():
        for name, weight in list(module._parameters.items()):
            if weight is not None and id(weight) not in made:
                empty = torch.empty(weight.shape, dtype=weight.dtype)
                made[id(weight)] = nn.Parameter(empty, requires_grad=weight.requires_grad)
            module._parameters[name] = None if weight is None else cast(nn.Parameter, made[id(weight)])
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else torch.empty(buffer.shape, dtype=buffer.dtype)


@dataclass(frozen=True)
class Lived:
    """Bytes beyond weights. kept: from forward to backward; forward, backward: at most, with what is kept."""

    kept: int
    forward: int
    backward: int


def training_bytes(model: Any, rows: int, tokens: int, *, checkpointing: bool, autocast: torch.dtype | None) -> Lived:
    """Forward and backward of the decoder of an empty model, [B, S] tokens.

    Gradients of weights are not counted: an engine may split them, or keep them over micro-batches.
    checkpointing: each layer is computed again in the backward. autocast: dtype of mixed precision.
    """
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})

    def let_go(parameter: Tensor) -> None:
        parameter.grad = None

    with FakeTensorMode():
        _make_fake(model)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(let_go)
        with LiveBytes(model) as counted, torch.autocast("cpu", autocast, enabled=autocast is not None):
            hidden = decoder(model)(input_ids=_ids(rows, tokens), use_cache=False).last_hidden_state
            kept, forward = counted.live, counted.peak
            counted.forget()
            if hidden.requires_grad:
                hidden.backward(torch.empty_like(hidden))
            return Lived(kept, forward, counted.peak)


@torch.no_grad()
def reading_bytes(model: Any, rows: int, tokens: int) -> int:
    """At most alive in a forward of the decoder of an empty model without gradients, [B, S] tokens."""
    model.eval()
    with FakeTensorMode():
        _make_fake(model)
        with LiveBytes(model) as counted:
            decoder(model)(input_ids=_ids(rows, tokens), use_cache=False)
            return counted.peak


def _ids(rows: int, tokens: int) -> Tensor:
    return torch.zeros(rows, tokens, dtype=torch.long)
