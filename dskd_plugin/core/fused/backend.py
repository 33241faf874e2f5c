"""The backend of kernels, behind the interface of core/backend.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from dskd_plugin.core.backend import TorchBlocks
from dskd_plugin.core.fused.walk import FusedWalk
from dskd_plugin.core.walk import Walk


@dataclass(frozen=True)
class FusedBlocks(TorchBlocks):
    """Triton kernels in place of autograd where they have what is compared, the reference's code for all else.

    block_elements: rows x vocabulary entries at a time. At the peak two logits of this size live in the dtype of the
    heads, and with events up to five fp32 tensors of rows x events.
    """

    @property
    def engine(self) -> Callable[..., Walk]:
        return FusedWalk
