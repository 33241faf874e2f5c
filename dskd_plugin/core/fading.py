"""A mean that forgets: what the last steps of a training have shown."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# Share of what earlier steps have shown that counts beside the last: about twenty steps are remembered.
_KEPT_OF_STEP = 0.95
FEWEST_ROWS = 32


class Fading:
    """Sum and number of rows over the steps so far, [2] fp64 on the CPU, and of the step that runs.

    It changes between steps alone, so that a step does not depend on how its batch was split.
    """

    def __init__(self, device: torch.device) -> None:
        self.kept = torch.zeros(2, dtype=torch.float64)
        self._seen = torch.zeros(2, dtype=torch.float64, device=device)

    def see(self, sums: tuple[Tensor, Tensor]) -> None:
        """Add the sum and the rows of a micro-batch to the step that runs."""
        self._seen += torch.stack(sums).to(self._seen)

    def after_step(self, reduce: Callable[[Tensor], Tensor]) -> None:
        """Take in the step. reduce: the sum of a tensor over ranks."""
        self.kept = _KEPT_OF_STEP * self.kept + reduce(self._seen).cpu()
        self._seen = torch.zeros_like(self._seen)

    @property
    def mean(self) -> float | None:
        """Of the rows of the last steps; None while they are too few to say."""
        total, rows = self.kept.tolist()
        return total / rows if rows >= FEWEST_ROWS else None
