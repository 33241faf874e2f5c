"""The whole student on each process while it answers, whatever the engine has split.

Answers differ in length, so that ranks would wait for each other for ever if every forward put weights together. They
are put together once before the answers and taken apart after them; in between no process hears of another.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from dskd_plugin.models import is_partitioned


@contextlib.contextmanager
def whole(model: nn.Module, engine: Any = None) -> Iterator[None]:
    """Whole weights inside the block, not to be changed; all ranks must enter and leave it.

    model: the student as the trainer holds it. engine: DeepSpeed's, under ZeRO-3.
    """
    if any(is_partitioned(parameter) for parameter in model.parameters()):
        with _gathered(model, engine):
            yield
    elif parts := _sharded(model):
        with _unsharded(model, parts):
            yield
    else:
        yield


def _sharded(model: nn.Module) -> list[Any]:
    from torch.distributed.fsdp import FSDPModule

    return [module for module in model.modules() if isinstance(module, FSDPModule)]


@contextlib.contextmanager
def _unsharded(model: nn.Module, parts: list[Any]) -> Iterator[None]:
    """FSDP2, whose modules otherwise split their weights again after each forward."""
    # The first forward of the root makes it the root; one of an inner model would make that one it.
    with torch.no_grad():
        model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=_device(model)), use_cache=False)
    splits = {part: _splits_after_forward(part) for part in parts}
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.reshard()
            part.set_reshard_after_forward(splits[part], recurse=False)


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _splits_after_forward(part: Any) -> bool:
    """What the module does at present; torch has a setter for it and no getter."""
    state = part._get_fsdp_state()
    # Before torch 2.12 a module had one group, or none.
    groups = getattr(state, "_fsdp_param_groups", None) or [getattr(state, "_fsdp_param_group", None)]
    return any(group is not None and group.post_forward_mesh_info is not None for group in groups)


@contextlib.contextmanager
def _gathered(model: nn.Module, engine: Any) -> Iterator[None]:
    """ZeRO-3, whose hooks otherwise let go of a module's weights after its forward."""
    import deepspeed

    offload = engine.optimizer.parameter_offload
    # Known by these numbers, the order in which weights are fetched in training stays known.
    numbers = {module: module.ds_id for module in offload.module.modules() if hasattr(module, "ds_id")}
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        for hook in (*offload.forward_hooks, *offload.backward_hooks):
            hook.remove()
        offload.forward_hooks, offload.backward_hooks = [], []
        try:
            yield
        finally:
            offload._register_deepspeed_module(offload.module)
            for module, number in numbers.items():
                module.ds_id = number
