"""Paired differences between two methods that ran with the same seeds and answered the same documents.

Seeds and documents are both samples, so both are drawn with replacement, independently of each other (a crossed
bootstrap). The statistic is a ratio of sums: bits over bytes, or hits over documents.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
DRAWS = 10_000


@dataclass(frozen=True)
class Difference:
    """value: mean difference; low, high: 95 % percentile interval; p: two-sided, of no difference."""

    value: float
    low: float
    high: float
    p: float


def score(values_SN: Floats, sizes_N: Floats) -> float:
    """Sum over seeds and documents / (seeds x sum of sizes)."""
    return float(values_SN.sum() / (len(values_SN) * sizes_N.sum()))


def paired(one_SN: Floats, other_SN: Floats, sizes_N: Floats, *, seed: int = 0, draws: int = DRAWS) -> Difference:
    """score(one) - score(other), rows are the same seeds and columns the same documents in both.

    sizes_N: bytes of each document for bits per byte, ones for a mean. Draws of seeds and documents are shared by
    both sides. p = 2 min(share of draws <= 0, share >= 0), counted with the observed value, at most 1.
    ValueError when the shapes differ.
    """
    if one_SN.shape != other_SN.shape or one_SN.shape[1:] != sizes_N.shape:
        raise ValueError(
            f"paired difference: expected one shape [seeds, documents] for both sides, got {one_SN.shape}, "
            f"{other_SN.shape} and {sizes_N.shape}. Compare runs of the same seeds and split."
        )
    # A document of no size, an empty answer, has no part in a ratio.
    gap_SN, sizes_N = (one_SN - other_SN)[:, sizes_N > 0], sizes_N[sizes_N > 0]
    seeds, documents = gap_SN.shape
    generator = np.random.default_rng(seed)
    drawn = []
    for at in range(0, draws, 1000):
        count = min(1000, draws - at)
        seed_BS = generator.multinomial(seeds, np.full(seeds, 1 / seeds), size=count)
        document_BN = generator.multinomial(documents, np.full(documents, 1 / documents), size=count)
        top_B = np.einsum("bs,sn,bn->b", seed_BS, gap_SN, document_BN, optimize=True)
        drawn.append(top_B / (seeds * (document_BN @ sizes_N)))
    sample_B = np.concatenate(drawn)
    low, high = np.percentile(sample_B, [2.5, 97.5])
    below, above = int((sample_B <= 0).sum()), int((sample_B >= 0).sum())
    p = min(1.0, 2 * (min(below, above) + 1) / (len(sample_B) + 1))
    return Difference(score(gap_SN, sizes_N), float(low), float(high), p)
