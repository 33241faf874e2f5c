"""Fair comparisons in one process: the candidates take turns, and what is reported is their spread."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Spread:
    """Of repeated measurements: the middle one and the two ends."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        return cls(statistics.median(values), min(values), max(values))

    def __str__(self) -> str:
        return f"{self.median:.3g} ({self.low:.3g} to {self.high:.3g})"


def now(device: torch.device) -> float:
    """Seconds: of this process's work on a CPU, which others on the machine do not lengthen much; else of the clock."""
    if device.type != "cuda":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()


def taking_turns(
    candidates: Mapping[str, Callable[[], object]], repeats: int, device: torch.device
) -> dict[str, list[float]]:
    """Seconds of each candidate, `repeats` times; one round over all of them first to warm up, unless repeats is 1."""
    found: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(repeats + (repeats > 1)):
        for name, work in candidates.items():
            start = now(device)
            work()
            if turn or repeats == 1:
                found[name].append(now(device) - start)
    return found


def ratios(values: list[float], baseline: list[float]) -> Spread:
    """Ratios of measurements that were made in the same round."""
    return Spread.of([value / base for value, base in zip(values, baseline, strict=True)])
