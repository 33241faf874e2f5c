"""Intervals and paired comparisons of benchmark scores.

Documents are the unit everywhere: several answers to one prompt are averaged first, ratio metrics are
resampled as (numerator, denominator) pairs. Every bootstrap draws
`numpy.random.default_rng(seed).integers(0, n, (resamples, n))` and takes the 2.5th and 97.5th percentile,
so that numbers are reproducible. Where all draws agree, or documents are too few to draw from, the interval is
unknown: low and high are None.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Value = float | Sequence[float]  # a number, or the numerator and denominator of a ratio
RESAMPLES = 10_000
# With fewer pairs no two-sided sign-flip p can fall below 0.05, so a bootstrap would claim more than the test.
FEWEST_PAIRS = 6
_Z = 1.959963984540054
BLOCK = 4_000_000


@dataclass(frozen=True)
class Interval:
    """A score with its 95 % interval. method: wilson, bootstrap or none (unknown: low and high are None)."""

    value: float
    low: float | None
    high: float | None
    n: int
    method: str


def wilson(successes: float, n: int) -> tuple[float, float]:
    """95 % Wilson score interval of a proportion (Wilson 1927)."""
    share, square = successes / n, _Z * _Z
    centre = (share + square / (2 * n)) / (1 + square / n)
    half = _Z / (1 + square / n) * math.sqrt(share * (1 - share) / n + square / (4 * n * n))
    low, high = centre - half, centre + half
    return (0.0 if successes == 0 else max(0.0, low)), (1.0 if successes == n else min(1.0, high))


def as_pairs(values: Sequence[Value]) -> Floats:
    """Values as an [n, 2] array of numerators and denominators; a plain number has denominator 1."""
    return np.array([value if isinstance(value, (tuple, list)) else (value, 1.0) for value in values], dtype=float)


def mean(values: Sequence[Value]) -> float:
    """Mean of numbers, or ratio of sums of pairs."""
    pairs = as_pairs(values)
    return float(pairs[:, 0].sum() / pairs[:, 1].sum())


def interval(
    values: Sequence[Value], *, seed: int = 0, resamples: int = RESAMPLES, proportion: bool = True
) -> Interval:
    """Score and 95 % interval: Wilson for a proportion whose values are all 0 or 1, else a bootstrap over
    documents.

    proportion: whether a document is right or wrong; a graded score that happens to be 0 or 1 is none.
    """
    pairs = as_pairs(values)
    n, value = len(pairs), mean(values)
    if proportion and _right_or_wrong(pairs):
        low, high = wilson(float(pairs[:, 0].sum()), n)
        return Interval(value, low, high, n, "wilson")
    edges = _percentiles(_resampled(n, seed, resamples, lambda rows: _ratio(pairs[rows])))
    if edges is None:
        return Interval(value, None, None, n, "none")
    return Interval(value, *edges, n, "bootstrap")


def _right_or_wrong(pairs: Floats) -> bool:
    """Whether every document counts once and is 0 or 1."""
    return bool(np.all(pairs[:, 1] == 1.0) and np.all((pairs[:, 0] == 0.0) | (pairs[:, 0] == 1.0)))


def _percentiles(drawn: Floats) -> tuple[float, float] | None:
    """2.5th and 97.5th percentile of bootstrap draws; None where they have no width beyond rounding."""
    low, high = (float(edge) for edge in np.percentile(drawn, [2.5, 97.5]))
    rounding = 1e-12 * max(1.0, abs(low), abs(high))
    return None if float(np.ptp(drawn)) <= rounding or high - low <= rounding else (low, high)


def _ratio(pairs: Floats) -> Floats:
    sums = pairs.sum(axis=1)
    return np.asarray(sums[:, 0] / sums[:, 1])


def _resampled(n: int, seed: int, resamples: int, statistic: Callable[[NDArray[np.int64]], Floats]) -> Floats:
    generator = np.random.default_rng(seed)
    rows = max(1, BLOCK // n)
    parts = []
    for start in range(0, resamples, rows):
        parts.append(statistic(generator.integers(0, n, size=(min(rows, resamples - start), n))))
    return np.concatenate(parts)


def macro_interval(
    tasks: Sequence[Sequence[Value]],
    *,
    proportions: Sequence[bool] | None = None,
    seed: int = 0,
    resamples: int = 2_000,
) -> Interval:
    """Unweighted mean of the scores of several tasks; each task varies on its own.

    Right-or-wrong tasks vary as the Jeffreys posterior of their proportion, so that a task without a single
    success still has a width; the documents of graded tasks are resampled. A graded task without a width of its
    own leaves the interval unknown. proportions: whether each task is right or wrong; None: all are.
    """
    value = float(np.mean([mean(values) for values in tasks]))
    n = sum(len(values) for values in tasks)
    drawn = []
    for place, (values, proportion) in enumerate(zip(tasks, proportions or [True] * len(tasks), strict=True)):
        pairs = as_pairs(values)
        if proportion and _right_or_wrong(pairs):
            wins = pairs[:, 0].sum()
            generator = np.random.default_rng(seed + place)
            drawn.append(generator.beta(wins + 0.5, len(pairs) - wins + 0.5, size=resamples))
            continue

        def statistic(rows: NDArray[np.int64], pairs: Floats = pairs) -> Floats:
            return _ratio(pairs[rows])

        means = _resampled(len(pairs), seed + place, resamples, statistic)
        if _percentiles(means) is None:
            return Interval(value, None, None, n, "none")
        drawn.append(means)
    low, high = np.percentile(np.mean(drawn, axis=0), [2.5, 97.5])
    return Interval(value, min(value, float(low)), max(value, float(high)), n, "bootstrap")


@dataclass(frozen=True)
class Paired:
    """Second minus first on the same documents. p: two-sided, by the named test.

    method: paired score, bootstrap or none (unknown: low and high are None).
    """

    difference: float
    low: float | None
    high: float | None
    wins: int
    ties: int
    losses: int
    p: float
    test: str
    n: int
    method: str


def paired_score(wins: int, losses: int, n: int) -> tuple[float, float]:
    """95 % interval of a difference of paired proportions, (wins - losses) / n (Tango 1998, Stat. Med. 17:891).

    It holds every difference that the score test does not reject at the 5 % level: 10 ties give -0.28 to 0.28.
    """
    if not 0 <= wins + losses <= n or n < 1:
        raise ValueError(f"paired_score: expected wins + losses within 1 or more documents; got {wins}+{losses}, {n}.")
    upper = 1.0 if wins == n else _score_edge(wins, losses, n)
    # Exchanging the models turns the interval around.
    lower = -1.0 if losses == n else -_score_edge(losses, wins, n)
    return lower, upper


def _score_edge(wins: int, losses: int, n: int) -> float:
    """The largest difference whose score statistic is not below -z; the statistic falls as the difference grows."""
    inside, outside = (wins - losses) / n, 1.0
    for _ in range(60):
        middle = (inside + outside) / 2
        if _score_statistic(wins, losses, n, middle) >= -_Z:
            inside = middle
        else:
            outside = middle
    return inside


def _score_statistic(wins: int, losses: int, n: int, difference: float) -> float:
    """(wins - losses - n d) / its standard error, with the likeliest share of losses under difference d."""
    linear = (2 * n - wins + losses) * difference - wins - losses
    constant = -losses * difference * (1 - difference)
    share = (math.sqrt(max(0.0, linear * linear - 8 * n * constant)) - linear) / (4 * n)
    variance = n * (2 * share + difference * (1 - difference))
    distance = wins - losses - n * difference
    if variance <= 0:
        return math.copysign(math.inf, distance) if distance else 0.0
    return distance / math.sqrt(variance)


def compare(
    first: Sequence[Value],
    second: Sequence[Value],
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
    proportion: bool = True,
) -> Paired:
    """Paired comparison of two models on one task.

    Right-or-wrong documents: paired score interval and exact McNemar test. Else a bootstrap of the difference over
    documents, unknown for fewer than FEWEST_PAIRS of them, and a sign-flip permutation test of the same difference.
    proportion: whether a document is right or wrong; a graded score that happens to be 0 or 1 is none.
    """
    a, b = as_pairs(first), as_pairs(second)
    if len(a) != len(b):
        raise ValueError(f"compare: expected equally many documents; got {len(a)} and {len(b)}. Join them first.")
    n = len(a)
    quotient_a, quotient_b = a[:, 0] / a[:, 1], b[:, 0] / b[:, 1]
    wins, losses = int((quotient_b > quotient_a).sum()), int((quotient_b < quotient_a).sum())
    difference = mean(second) - mean(first)
    if proportion and _right_or_wrong(a) and _right_or_wrong(b):
        low, high = paired_score(wins, losses, n)
        p, test = mcnemar(wins, losses), "McNemar exact"
        return Paired(difference, low, high, wins, n - wins - losses, losses, p, test, n, "paired score")
    edges: tuple[float, float] | None = None
    if n >= FEWEST_PAIRS:
        edges = _percentiles(_resampled(n, seed, resamples, lambda rows: _ratio(b[rows]) - _ratio(a[rows])))
    p, test = sign_flip(a, b, seed=seed, resamples=resamples), "sign-flip permutation"
    if edges is None:
        return Paired(difference, None, None, wins, n - wins - losses, losses, p, test, n, "none")
    return Paired(difference, *edges, wins, n - wins - losses, losses, p, test, n, "bootstrap")


def mcnemar(wins: int, losses: int) -> float:
    """Two-sided exact McNemar p: binomial(wins + losses, 1/2) on the documents where the models differ."""
    n = wins + losses
    ways, tail = 1, 0
    for k in range(min(wins, losses) + 1):
        tail += ways
        ways = ways * (n - k) // (k + 1)
    p: float = 2 * tail / 2**n
    return min(1.0, p)


def sign_flip(first: Floats, second: Floats, *, seed: int = 0, resamples: int = RESAMPLES) -> float:
    """Two-sided permutation p of a difference of ratios of sums: share of random exchanges at least as extreme.

    first, second: (value, weight) of each document, [n, 2]. An exchange gives a document's pairs to the other model;
    with equal weights that changes the sign of its difference. (1 + hits) / (1 + resamples), so never 0 (Phipson and
    Smyth 2010).
    """
    changed = (second - first)[(second != first).any(axis=1)]
    if len(changed) == 0:
        return 1.0
    generator = np.random.default_rng(seed)
    sum_a, sum_b = first.sum(axis=0), second.sum(axis=0)
    observed = abs(sum_b[0] / sum_b[1] - sum_a[0] / sum_a[1])
    hits, rows = 0, max(1, BLOCK // len(changed))
    for start in range(0, resamples, rows):
        signs = generator.integers(0, 2, size=(min(rows, resamples - start), len(changed))) * 2 - 1
        moved = (changed.sum(axis=0) - signs @ changed) / 2
        a, b = sum_a + moved, sum_b - moved
        hits += int((np.abs(b[:, 0] / b[:, 1] - a[:, 0] / a[:, 1]) >= observed - 1e-12).sum())
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

    value None: the teacher is not better than the base. method: bootstrap; open (that the teacher is better is not
    certain, so the share is unbounded) or none (unknown): low and high are then None.
    """

    value: float | None
    low: float | None
    high: float | None
    n: int
    method: str


def gap_closed(
    base: Sequence[Value],
    student: Sequence[Value],
    teacher: Sequence[Value],
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
    proportion: bool = True,
) -> GapClosed:
    """100 * (student - base) / (teacher - base), bootstrap over the documents all three answered.

    Whether the teacher is certainly better is read from the interval of `compare`. proportion: as there.
    """
    b, s, t = as_pairs(base), as_pairs(student), as_pairs(teacher)
    n = len(b)
    if not n == len(s) == len(t):
        raise ValueError(f"gap_closed: expected equally many documents; got {n}, {len(s)}, {len(t)}. Join them first.")
    gap = mean(teacher) - mean(base)
    if gap <= 0:
        return GapClosed(None, None, None, n, "none")
    value = 100 * (mean(student) - mean(base)) / gap

    def statistic(rows: NDArray[np.int64]) -> Floats:
        floor = _ratio(b[rows])
        return np.stack([_ratio(s[rows]) - floor, _ratio(t[rows]) - floor], axis=1)

    ahead = compare(base, teacher, seed=seed, resamples=resamples, proportion=proportion).low
    if ahead is None or ahead <= 0:
        return GapClosed(value, None, None, n, "open")
    drawn = _resampled(n, seed, resamples, statistic)
    usable = drawn[drawn[:, 1] > 0]
    edges = _percentiles(100 * usable[:, 0] / usable[:, 1])
    if edges is None:
        return GapClosed(value, None, None, n, "none")
    return GapClosed(value, *edges, n, "bootstrap")
