"""Rows cut into blocks, so that only the logits of a block are held, and the dtype of their products."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from dskd_plugin.core.heads import Head


def rows_of_block(block_elements: int, *heads: Head) -> int:
    return max(1, block_elements // max(head.weight_VD.shape[0] for head in heads))


def blocks(rows: int, block_rows: int, first: int = 0) -> Iterator[slice]:
    for start in range(first, rows, block_rows):
        yield slice(start, min(start + block_rows, rows))


def wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def for_compute(head: Head) -> Head:
    """The head in the dtype of its products: autocast's for an fp32 weight where that is on, else its own."""
    device = head.weight_VD.device.type
    if head.weight_VD.dtype != torch.float32 or not torch.is_autocast_enabled(device):
        return head
    return replace(head, weight_VD=head.weight_VD.to(torch.get_autocast_dtype(device)))


def no_autocast(device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, enabled=False)
