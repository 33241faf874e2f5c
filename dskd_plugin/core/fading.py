"""A mean that forgets: what the last steps of a training have shown."""

from __future__ import annotations

import torch
from torch import Tensor

# Share of what earlier steps have shown that counts beside the last: about twenty steps are remembered.
KEPT_OF_STEP = 0.95
FEWEST_ROWS = 32


class Fading:
    """Sum and number of rows over the steps so far, [2] fp64 on the CPU.

    It changes between steps alone, so that a step does not depend on how its batch was split.
    """

    def __init__(self) -> None:
        self.kept = torch.zeros(2, dtype=torch.float64)

    def take_in(self, step: Tensor) -> None:
        """The sum and the rows of one more step, over all ranks, [2]; not of one that overflowed."""
        if bool(step.isfinite().all()):
            self.kept = KEPT_OF_STEP * self.kept + step

    @property
    def mean(self) -> float | None:
        """Of the rows of the last steps; None while they are too few to say."""
        total, rows = self.kept.tolist()
        return total / rows if rows >= FEWEST_ROWS else None
