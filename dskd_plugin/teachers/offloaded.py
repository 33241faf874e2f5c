"""Weights that wait on the CPU and are on a device only while they are used."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain

import torch
from torch import Tensor, nn


class Offloaded:
    """The frozen weights of a module, with a copy on the device inside `staying`, from the first `arrive` on.

    Frozen weights do not change: only the way to the device costs a copy, on the way back theirs is thrown away.
    """

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        """module: with all of its weights on the CPU."""
        self.device = device
        self._kept: list[tuple[Tensor, Tensor]] = []
        for tensor in chain(module.parameters(), module.buffers()):
            # Pinned memory is copied to a GPU several times faster.
            tensor.data = tensor.data.pin_memory() if device.type == "cuda" else tensor.data
            self._kept.append((tensor, tensor.data))
        self._users, self.is_there = 0, False

    def arrive(self) -> None:
        """Bring the weights to the device, unless they are there. Only inside `staying`."""
        assert self._users, "nobody would send the weights back"
        if not self.is_there:
            for tensor, on_cpu in self._kept:
                tensor.data = on_cpu.to(self.device, non_blocking=True, copy=True)
            self.is_there = True

    @contextmanager
    def staying(self) -> Iterator[None]:
        """Inside, weights that have arrived stay, so that several uses cost one copy; may be nested."""
        self._users += 1
        try:
            yield
        finally:
            self._users -= 1
            if not self._users and self.is_there:
                self._leave()

    def _leave(self) -> None:
        for tensor, on_cpu in self._kept:
            tensor.data = on_cpu
        self.is_there = False
