"""What the KD terms are multiplied with so that they weigh as much as the cross-entropy."""

from __future__ import annotations

import math
from dataclasses import dataclass

from dskd_plugin.core.fading import KEPT_OF_STEP

# Where student and teacher agree, KD and its gradient go to 0, and what is left of them is noise.
LARGEST = 100.0


@dataclass(frozen=True)
class Balance:
    """The mean cross-entropy and KD of the steps so far: each a sum of values in nats in which older ones count less.

        scale = CE / KD, at most LARGEST;   1 before the first step, and as long as no step had both

    The ratio of two fading sums, not the fading sum of ratios: one step of little KD does not move it.
    Source: L = CE + sg(CE / KD) KD of Common-Support distillation, arXiv 2610.28895, and X-Token, arXiv 2605.21699,
    with the values of earlier steps in place of the running one's, which would be known only after its backward.
    """

    ce: float = 0.0
    kd: float = 0.0

    @property
    def scale(self) -> float:
        if self.kd > 0:
            return min(self.ce / self.kd, LARGEST)
        return LARGEST if self.ce > 0 else 1.0

    def after(self, ce: float, kd: float) -> Balance:
        """With the means of one more step; a value that is not finite is not taken up."""
        if not (math.isfinite(ce) and math.isfinite(kd)):
            return self
        return Balance(KEPT_OF_STEP * self.ce + ce, KEPT_OF_STEP * self.kd + kd)
