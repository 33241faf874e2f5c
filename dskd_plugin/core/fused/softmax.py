"""What the kernels share: logits from their product with a head, and the log of a sum of exp, tile by tile.

One program reads one row of a product, tile by tile. Names in capitals are constants of a run, compiled in: the
temperature TEMPERATURE (tau), SCALE and CAP of a head (CAP 0: none), TILE ids at a time, WIDE the dtype of all
arithmetic.
"""

import triton
import triton.language as tl

# Below every logit, and finite: a tile without ids leaves a row's running peak there.
LOWEST = tl.constexpr(-1e30)


@triton.jit
def logits(product, SCALE: tl.constexpr, CAP: tl.constexpr):
    """scale x, or cap tanh(scale x / cap)."""
    z = product * SCALE
    if CAP > 0:
        shrunk = tl.exp(-2 * tl.abs(z / CAP))
        height = CAP * (1 - shrunk) / (1 + shrunk)
        z = tl.where(z < 0, -height, height)
    return z


@triton.jit
def to_product(gradient, z, SCALE: tl.constexpr, CAP: tl.constexpr):
    """The gradient by the product from that by the logits z."""
    if CAP > 0:
        gradient = gradient * (1 - (z / CAP) * (z / CAP))
    return gradient * SCALE


@triton.jit
def joined(peak, total, z):
    """Peak and sum of exp(z - peak), in each lane of the tiles so far; -inf adds nothing."""
    higher = tl.maximum(peak, z)
    return higher, total * tl.exp(peak - higher) + tl.exp(z - higher)


@triton.jit
def log_sum(peak, total):
    """Log of the sum of exp over all lanes."""
    highest = tl.max(peak, 0)
    return highest + tl.log(tl.sum(total * tl.exp(peak - highest), 0))


@triton.jit
def log_normaliser(row, size, SCALE: tl.constexpr, CAP: tl.constexpr, TILE: tl.constexpr, WIDE: tl.constexpr):
    """log sum exp(z) over a row."""
    lanes = tl.arange(0, TILE)
    peak = tl.full((TILE,), LOWEST, WIDE)
    total = tl.zeros((TILE,), WIDE)
    for start in range(0, size, TILE):
        there = start + lanes < size
        z = logits(tl.load(row + start + lanes, there, 0.0).to(WIDE), SCALE, CAP)
        peak, total = joined(peak, total, tl.where(there, z, float("-inf")))
    return log_sum(peak, total)
