"""Intervals and paired comparisons of benchmark scores.

Documents are the unit everywhere: several answers to one prompt are averaged first, ratio metrics are
resampled as (numerator, denominator) pairs. Every bootstrap draws
`numpy.random.default_rng(seed).integers(0, n, (resamples, n))` and takes the 2.5th and 97.5th percentile,
so that numbers are reproducible.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
RESAMPLES = 10_000
_Z = 1.959963984540054
_BLOCK = 4_000_000


@dataclass(frozen=True)
class Interval:
    """A score with its 95 % interval. method: wilson, bootstrap or none (one document)."""

    value: float
    low: float
    high: float
    n: int
    method: str


def wilson(successes: float, n: int) -> tuple[float, float]:
    """95 % Wilson score interval of a proportion (Wilson 1927)."""
    share, square = successes / n, _Z * _Z
    centre = (share + square / (2 * n)) / (1 + square / n)
    half = _Z / (1 + square / n) * math.sqrt(share * (1 - share) / n + square / (4 * n * n))
    low, high = centre - half, centre + half
    return (0.0 if successes == 0 else max(0.0, low)), (1.0 if successes == n else min(1.0, high))


def as_pairs(values: Sequence[Any]) -> Floats:
    """Values as an [n, 2] array of numerators and denominators; a plain number has denominator 1."""
    return np.array([value if isinstance(value, (tuple, list)) else (value, 1.0) for value in values], dtype=float)


def mean(values: Sequence[Any]) -> float:
    """Mean of numbers, or ratio of sums of pairs."""
    pairs = as_pairs(values)
    return float(pairs[:, 0].sum() / pairs[:, 1].sum())


def interval(values: Sequence[Any], *, seed: int = 0, resamples: int = RESAMPLES, proportion: bool = True) -> Interval:
    """Score and 95 % interval: Wilson for a proportion whose values are all 0 or 1, else a bootstrap over
    documents.
    """
    pairs = as_pairs(values)
    n, value = len(pairs), mean(values)
    plain = bool(np.all(pairs[:, 1] == 1.0))
    if proportion and plain and bool(np.all((pairs[:, 0] == 0.0) | (pairs[:, 0] == 1.0))):
        low, high = wilson(float(pairs[:, 0].sum()), n)
        return Interval(value, low, high, n, "wilson")
    if n < 2:
        return Interval(value, value, value, n, "none")
    drawn = _resampled(n, seed, resamples, lambda rows: _ratio(pairs[rows]))
    low, high = np.percentile(drawn, [2.5, 97.5])
    return Interval(value, float(low), float(high), n, "bootstrap")


def _ratio(pairs: Floats) -> Floats:
    sums = pairs.sum(axis=1)
    return np.asarray(sums[:, 0] / sums[:, 1])


def _resampled(n: int, seed: int, resamples: int, statistic: Callable[[NDArray[np.int64]], Floats]) -> Floats:
    generator = np.random.default_rng(seed)
    rows = max(1, _BLOCK // n)
    parts = []
    for start in range(0, resamples, rows):
        parts.append(statistic(generator.integers(0, n, size=(min(rows, resamples - start), n))))
    return np.concatenate(parts)


def macro_interval(tasks: Sequence[Sequence[Any]], *, seed: int = 0, resamples: int = 2_000) -> Interval:
    """Unweighted mean of the scores of several tasks; each task varies on its own.

    Right-or-wrong tasks vary as the Jeffreys posterior of their proportion, so that a task without a single
    success still has a width; the documents of graded tasks are resampled.
    """
    value = float(np.mean([mean(values) for values in tasks]))
    n = sum(len(values) for values in tasks)
    if any(len(values) < 2 for values in tasks):
        return Interval(value, value, value, n, "none")
    drawn = []
    for place, values in enumerate(tasks):
        pairs = as_pairs(values)
        wins = pairs[:, 0].sum()
        if bool(np.all(pairs[:, 1] == 1.0)) and bool(np.all((pairs[:, 0] == 0.0) | (pairs[:, 0] == 1.0))):
            generator = np.random.default_rng(seed + place)
            drawn.append(generator.beta(wins + 0.5, len(pairs) - wins + 0.5, size=resamples))
            continue

        def statistic(rows: NDArray[np.int64], pairs: Floats = pairs) -> Floats:
            return _ratio(pairs[rows])

        drawn.append(_resampled(len(pairs), seed + place, resamples, statistic))
    low, high = np.percentile(np.mean(drawn, axis=0), [2.5, 97.5])
    return Interval(value, min(value, float(low)), max(value, float(high)), n, "bootstrap")


@dataclass(frozen=True)
class Paired:
    """Second minus first on the same documents. p: two-sided, by the named test."""

    difference: float
    low: float
    high: float
    wins: int
    ties: int
    losses: int
    p: float
    test: str
    n: int


def compare(first: Sequence[Any], second: Sequence[Any], *, seed: int = 0, resamples: int = RESAMPLES) -> Paired:
    """Paired comparison of two models on one task.

    Interval: bootstrap of the difference over documents. p: exact McNemar test when all values are 0 or 1,
    else a sign-flip permutation test of the mean difference.
    """
    a, b = as_pairs(first), as_pairs(second)
    if len(a) != len(b):
        raise ValueError(f"compare: expected equally many documents; got {len(a)} and {len(b)}. Join them first.")
    n = len(a)
    quotient_a, quotient_b = a[:, 0] / a[:, 1], b[:, 0] / b[:, 1]
    wins, losses = int((quotient_b > quotient_a).sum()), int((quotient_b < quotient_a).sum())
    difference = mean(second) - mean(first)
    low = high = difference
    if n > 1:
        drawn = _resampled(n, seed, resamples, lambda rows: _ratio(b[rows]) - _ratio(a[rows]))
        low, high = (float(edge) for edge in np.percentile(drawn, [2.5, 97.5]))
    both = np.concatenate([quotient_a, quotient_b])
    if bool(np.all((both == 0.0) | (both == 1.0))):
        p, test = mcnemar(wins, losses), "McNemar exact"
    else:
        p, test = sign_flip(quotient_b - quotient_a, seed=seed, resamples=resamples), "sign-flip permutation"
    return Paired(difference, low, high, wins, n - wins - losses, losses, p, test, n)


def mcnemar(wins: int, losses: int) -> float:
    """Two-sided exact McNemar p: binomial(wins + losses, 1/2) on the documents where the models differ."""
    n = wins + losses
    if n == 0:
        return 1.0
    log_half = n * math.log(0.5)
    tail = sum(
        math.exp(math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) + log_half)
        for k in range(min(wins, losses) + 1)
    )
    return min(1.0, 2.0 * tail)


def sign_flip(differences: Floats, *, seed: int = 0, resamples: int = RESAMPLES) -> float:
    """Two-sided permutation p of a mean difference: share of random sign changes at least as extreme.

    (1 + hits) / (1 + resamples), so never 0 (Phipson and Smyth 2010).
    """
    changed = differences[differences != 0.0]
    if len(changed) == 0:
        return 1.0
    generator = np.random.default_rng(seed)
    observed = abs(changed.sum())
    hits, rows = 0, max(1, _BLOCK // len(changed))
    for start in range(0, resamples, rows):
        signs = generator.integers(0, 2, size=(min(rows, resamples - start), len(changed))) * 2 - 1
        hits += int((np.abs(signs @ changed) >= observed - 1e-12).sum())
    return (1 + hits) / (1 + resamples)


def holm(p_values: Sequence[float]) -> list[float]:
    """p values adjusted for several tests (Holm 1979), in the given order."""
    order = sorted(range(len(p_values)), key=lambda place: p_values[place])
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = largest
    return adjusted


@dataclass(frozen=True)
class GapClosed:
    """Share of the distance from base to teacher that the student covers, in percent.

    value None: the teacher is not better than the base. low and high are None when that is not excluded
    within the interval, because the share is then unbounded.
    """

    value: float | None
    low: float | None
    high: float | None
    n: int


def gap_closed(
    base: Sequence[Any],
    student: Sequence[Any],
    teacher: Sequence[Any],
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> GapClosed:
    """100 * (student - base) / (teacher - base), bootstrap over the documents all three answered."""
    b, s, t = as_pairs(base), as_pairs(student), as_pairs(teacher)
    n = len(b)
    if not n == len(s) == len(t):
        raise ValueError(f"gap_closed: expected equally many documents; got {n}, {len(s)}, {len(t)}. Join them first.")
    gap = mean(teacher) - mean(base)
    if gap <= 0:
        return GapClosed(None, None, None, n)
    value = 100 * (mean(student) - mean(base)) / gap

    def statistic(rows: NDArray[np.int64]) -> Floats:
        floor = _ratio(b[rows])
        return np.stack([_ratio(s[rows]) - floor, _ratio(t[rows]) - floor], axis=1)

    drawn = _resampled(n, seed, resamples, statistic)
    if float(np.percentile(drawn[:, 1], 2.5)) <= 0:
        return GapClosed(value, None, None, n)
    usable = drawn[drawn[:, 1] > 0]
    low, high = np.percentile(100 * usable[:, 0] / usable[:, 1], [2.5, 97.5])
    return GapClosed(value, float(low), float(high), n)
