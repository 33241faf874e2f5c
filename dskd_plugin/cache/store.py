"""Finds samples in the shards of a cache, and picks rows of them.

Shapes: S samples of a shard, n rows of it, N rows that are asked for, E teacher width.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from dskd_plugin.cache.needs import KEY_BYTES
from dskd_plugin.cache.shards import File


@dataclass(frozen=True)
class Shard:
    """An open shard. states_nE lies in the file, mapped into memory: a row is read when it is picked."""

    starts: np.ndarray
    positions_n: np.ndarray
    states_nE: Tensor


@dataclass(frozen=True)
class Found:
    """Rows of a sample: the shard and their numbers in it."""

    shard: int
    rows_N: np.ndarray


class Store:
    """The samples of a cache by their keys."""

    def __init__(self, folder: Path, files: Iterable[File]) -> None:
        self.shards: list[Shard] = []
        keys, shard_of, sample_of = [np.zeros((0, KEY_BYTES), np.uint8)], [], []
        for number, info in enumerate(files):
            opened: Any = safe_open(folder / info.file, "pt")
            keys.append(opened.get_tensor("keys").numpy())
            self.shards.append(
                Shard(
                    opened.get_tensor("starts").numpy(),
                    opened.get_tensor("positions").numpy(),
                    opened.get_tensor("states"),
                )
            )
            shard_of.append(np.full(len(keys[-1]), number))
            sample_of.append(np.arange(len(keys[-1])))
        halves_S2 = np.ascontiguousarray(np.concatenate(keys)).view(">u8").astype(np.uint64).reshape(-1, 2)
        order = np.lexsort((halves_S2[:, 1], halves_S2[:, 0]))
        self._high, self._low = halves_S2[order].T
        none = [np.zeros(0, int)]
        self._shard_of, self._sample_of = (
            np.concatenate(shard_of or none)[order],
            np.concatenate(sample_of or none)[order],
        )

    def __len__(self) -> int:
        return len(self._high)

    def find(self, key: bytes, positions: np.ndarray) -> Found | None:
        """Where the rows of a sample are; None unless all of them are in one shard. positions: in any order."""
        high, low = np.frombuffer(key, ">u8").astype(np.uint64)
        place = int(np.searchsorted(self._high, high))
        while place < len(self._high) and self._high[place] == high:
            if self._low[place] == low:
                found = self._rows(int(self._shard_of[place]), int(self._sample_of[place]), positions)
                if found is not None:
                    return found
            place += 1
        return None

    def _rows(self, number: int, sample: int, positions: np.ndarray) -> Found | None:
        shard = self.shards[number]
        start, stop = int(shard.starts[sample]), int(shard.starts[sample + 1])
        there = shard.positions_n[start:stop]
        at = np.searchsorted(there, positions)
        if len(at) and (at.max() >= len(there) or (there[at] != positions).any()):
            return None
        return Found(number, start + at)

    def pick(self, found: list[Found], into_NE: Tensor) -> None:
        """Copy rows one after the other, sample by sample, into a tensor on the CPU."""
        at = 0
        for one in found:
            count = len(one.rows_N)
            torch.index_select(
                self.shards[one.shard].states_nE, 0, torch.from_numpy(one.rows_N), out=into_NE[at : at + count]
            )
            at += count

    def read(self, found: list[Found]) -> None:
        """Read rows and forget them: the system keeps their pages in memory, where `pick` finds them."""
        for one in found:
            self.shards[one.shard].states_nE[torch.from_numpy(one.rows_N)]
