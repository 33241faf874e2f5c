"""Intervals and paired tests against computations written another way."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from dskd_eval import stats


def binary(seed: int, n: int, share: float) -> list[float]:
    return [float(value) for value in np.random.default_rng(seed).random(n) < share]


@pytest.mark.parametrize(("successes", "n"), [(0, 8), (3, 8), (8, 8), (450, 1319), (1, 1)])
def test_wilson_edges_solve_the_score_equation(successes: int, n: int) -> None:
    """An edge p of the interval satisfies |share - p| = z sqrt(p (1 - p) / n)."""
    share, z = successes / n, 1.959963984540054
    low, high = stats.wilson(successes, n)
    for edge, closed in ((low, successes == 0), (high, successes == n)):
        if closed:
            assert edge == share
        else:
            assert abs(share - edge) == pytest.approx(z * math.sqrt(edge * (1 - edge) / n), rel=1e-9)
    assert 0 <= low <= share <= high <= 1


def test_wilson_reference_values() -> None:
    """Newcombe (1998), table I: 81 of 263 and 0 of 20."""
    assert stats.wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert stats.wilson(0, 20)[1] == pytest.approx(0.1611, abs=5e-5)


def test_bootstrap_interval_equals_loop() -> None:
    values = np.random.default_rng(3).random(37).tolist()
    found = stats.interval(values, seed=5, resamples=400)
    drawn = np.random.default_rng(5).integers(0, 37, size=(400, 37))
    means = [sum(values[place] for place in row) / 37 for row in drawn]
    assert found.method == "bootstrap"
    assert (found.low, found.high) == pytest.approx(tuple(np.percentile(means, [2.5, 97.5])), abs=1e-12)
    assert found.value == pytest.approx(sum(values) / 37, abs=1e-12)


def test_ratio_interval_resamples_pairs() -> None:
    rng = np.random.default_rng(8)
    pairs = [(float(min(a, b)), float(b)) for a, b in zip(rng.integers(0, 4, 50), rng.integers(1, 4, 50), strict=True)]
    found = stats.interval(pairs, seed=1, resamples=300)
    drawn = np.random.default_rng(1).integers(0, 50, size=(300, 50))
    ratios = [sum(pairs[k][0] for k in row) / sum(pairs[k][1] for k in row) for row in drawn]
    assert (found.low, found.high) == pytest.approx(tuple(np.percentile(ratios, [2.5, 97.5])), abs=1e-12)
    assert found.value == pytest.approx(sum(p[0] for p in pairs) / sum(p[1] for p in pairs))


def test_blocks_do_not_change_the_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).random(60).tolist()
    whole = stats.interval(values, resamples=500)
    monkeypatch.setattr(stats, "BLOCK", 60 * 7)
    assert stats.interval(values, resamples=500) == whole


def test_wilson_only_for_proportions() -> None:
    assert stats.interval([0.0, 1.0, 1.0]).method == "wilson"
    assert stats.interval([0.0, 1.0, 0.5]).method == "bootstrap"
    assert stats.interval([1.0, 1.0, 0.0], proportion=False).method == "bootstrap"
    assert stats.interval([0.4]).method == "none"


@pytest.mark.parametrize("values", [[0.4], [0.0] * 8, [1.0] * 8, [0.3] * 30, [(1.0, 2.0), (2.0, 4.0), (3.0, 6.0)]])
def test_an_interval_without_width_is_unknown(values: list[float]) -> None:
    """Equal documents say nothing of how much others would differ."""
    found = stats.interval(values, proportion=False)
    assert (found.low, found.high, found.method) == (None, None, "none")


def slow_score_edges(wins: int, losses: int, n: int, step: float = 1e-3) -> tuple[float, float]:
    """Walks away from the estimate until the score test rejects; the nuisance share by search in the likelihood."""

    def likelihood(share: float, difference: float) -> float:
        cells = ((wins, share + difference), (losses, share), (n - wins - losses, 1 - 2 * share - difference))
        return sum(count * math.log(max(chance, 1e-300)) for count, chance in cells if count)

    def rejected(difference: float) -> bool:
        low, high = max(0.0, -difference), (1 - difference) / 2
        for _ in range(200):
            left, right = low + (high - low) / 3, high - (high - low) / 3
            if likelihood(left, difference) < likelihood(right, difference):
                low = left
            else:
                high = right
        share = (low + high) / 2
        variance = n * (2 * share + difference - difference**2)
        distance = abs(wins - losses - n * difference)
        return distance > 1.959963984540054 * math.sqrt(max(variance, 0.0)) + 1e-9

    edges = []
    for direction in (-1, 1):
        difference = (wins - losses) / n
        while abs(difference + direction * step) <= 1 and not rejected(difference + direction * step):
            difference += direction * step
        edges.append(difference)
    return edges[0], edges[1]


@pytest.mark.parametrize(
    ("wins", "losses", "n"),
    [(0, 0, 10), (3, 0, 3), (3, 0, 10), (0, 6, 6), (1, 0, 1), (12, 2, 50), (40, 20, 160), (9, 5, 14), (2, 60, 400)],
)
def test_paired_score_interval_inverts_the_score_test(wins: int, losses: int, n: int) -> None:
    low, high = stats.paired_score(wins, losses, n)
    assert (low, high) == pytest.approx(slow_score_edges(wins, losses, n), abs=1.1e-3)
    assert low < high and low <= (wins - losses) / n <= high
    assert stats.paired_score(losses, wins, n) == pytest.approx((-high, -low), abs=1e-12)


def test_paired_score_interval_of_ties_and_of_a_large_sample() -> None:
    """n ties: z^2 / (n + z^2). Many documents: the normal interval around the difference."""
    z = 1.959963984540054
    assert stats.paired_score(0, 0, 10)[1] == pytest.approx(z * z / (10 + z * z), abs=1e-9)
    low, high = stats.paired_score(5_200, 4_800, 100_000)
    half = z * math.sqrt((0.052 + 0.048 - 0.004**2) / 100_000)
    assert (low, high) == pytest.approx((0.004 - half, 0.004 + half), abs=2e-5)


def test_paired_score_interval_holds_the_true_difference() -> None:
    """Ten documents, second model truly 20 points better: about 95 of 100 intervals hold it."""
    drawn = np.random.default_rng(0).multinomial(10, [0.4, 0.2, 0.4], size=2_000)
    held = [low <= 0.2 <= high for wins, losses, _ in drawn for low, high in [stats.paired_score(wins, losses, 10)]]
    assert 0.93 < np.mean(held) < 0.99


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ([0.0] * 3, [1.0] * 3),
        ([0.0] * 10, [0.0] * 10),
        ([1.0] * 10, [1.0] * 10),
        ([0.2] * 3, [0.5, 0.52, 0.55]),
        ([0.3] * 40, [0.3] * 40),
        ([0.3] * 40, [0.4] * 40),
        ([0.5], [0.7]),
    ],
)
def test_no_interval_of_a_difference_collapses_or_contradicts_the_test(first: list[float], second: list[float]) -> None:
    found = stats.compare(first, second)
    if found.low is None or found.high is None:
        assert (found.low, found.high, found.method) == (None, None, "none")
    else:
        assert found.low < found.high
        assert found.p < 0.05 or found.low <= 0 <= found.high


def test_graded_scores_of_zeros_and_ones_are_no_proportions() -> None:
    first, second = [0.0] * 6 + [1.0] * 6, [1.0] * 12
    assert stats.compare(first, second).method == "paired score"
    graded = stats.compare(first, second, proportion=False)
    assert (graded.method, graded.test) == ("bootstrap", "sign-flip permutation")
    ratios = stats.compare([(0.0, 3.0), (1.0, 1.0)] * 6, [(3.0, 3.0), (0.0, 1.0)] * 6)
    assert ratios.method == "bootstrap" and ratios.difference == pytest.approx(0.5)


@pytest.mark.parametrize(("wins", "losses"), [(0, 0), (1, 0), (6, 0), (5, 2), (40, 22), (3, 3), (300, 260)])
def test_mcnemar_equals_exact_fractions(wins: int, losses: int) -> None:
    n = wins + losses
    tail = sum(math.comb(n, k) for k in range(min(wins, losses) + 1))
    exact = min(Fraction(1), Fraction(2 * tail, 2**n))
    assert stats.mcnemar(wins, losses) == pytest.approx(float(exact), rel=1e-9)


def weighted(differences: Any, weights: tuple[Any, Any] = (1.0, 1.0)) -> list[Any]:
    """Two models with these differences, as (value, weight) of each document."""
    values = np.linspace(1.0, 2.0, len(differences)), np.linspace(1.0, 2.0, len(differences)) + differences
    return [np.stack(np.broadcast_arrays(*pair), axis=1) for pair in zip(values, weights, strict=True)]


def exchanged(a: Any, b: Any, keeps: Any) -> float:
    """Difference of the two ratios of sums where a document that is not kept goes to the other model."""
    sums = [[0.0, 0.0], [0.0, 0.0]]
    for one, other, keep in zip(a, b, keeps, strict=True):
        for place, pair in enumerate((one, other) if keep else (other, one)):
            sums[place] = [sums[place][0] + pair[0], sums[place][1] + pair[1]]
    return abs(sums[1][0] / sums[1][1] - sums[0][0] / sums[0][1])


SIZES = np.array([1, 30, 2, 7, 50, 3, 4, 12, 9, 6]), np.array([2, 28, 2, 9, 40, 3, 5, 10, 9, 7])


@pytest.mark.parametrize("weights", [(1.0, 1.0), (SIZES[0], SIZES[0]), SIZES])
def test_sign_flip_equals_enumeration(weights: tuple[Any, Any]) -> None:
    """Ten documents have 1024 exchanges; the sampled share comes close to the exact one."""
    a, b = weighted(np.array([0.3, -0.1, 0.4, 0.2, -0.05, 0.25, 0.1, 0.15, -0.2, 0.35]), weights)
    observed = exchanged(a, b, [True] * 10)
    hits = sum(exchanged(a, b, [p >> k & 1 for k in range(10)]) >= observed - 1e-12 for p in range(1024))
    assert stats.sign_flip(a, b, resamples=40_000) == pytest.approx(hits / 1024, abs=0.006)


def test_sign_flip_equals_loop() -> None:
    differences = np.random.default_rng(2).normal(0.1, 0.5, 20)
    signs = np.random.default_rng(7).integers(0, 2, size=(300, 20)) * 2 - 1
    hits = sum(
        abs(sum(s * d for s, d in zip(row, differences, strict=True))) >= abs(differences.sum()) - 1e-12
        for row in signs
    )
    assert stats.sign_flip(*weighted(differences), seed=7, resamples=300) == pytest.approx((1 + hits) / 301)


def test_interval_and_p_are_of_one_difference() -> None:
    """A long document that one model has better outweighs many short ones that the other has."""
    first = [(10.0, 10.0)] * 20 + [(900.0, 1000.0)]
    second = [(9.9, 10.0)] * 20 + [(905.0, 1000.0)]
    found = stats.compare(first, second)
    assert found.difference > 0 and found.losses == 20 and found.p > 0.2


def test_holm() -> None:
    """Worked by hand: 0.01*4, max(0.04, 0.02*3), max(0.06, 0.03*2), 0.5."""
    assert stats.holm([0.03, 0.01, 0.5, 0.02]) == pytest.approx([0.06, 0.04, 0.5, 0.06])
    assert stats.holm([]) == []
    assert stats.holm([0.9, 0.8]) == [1.0, 1.0]


def test_compare_finds_a_known_difference() -> None:
    first = binary(0, 800, 0.5)
    second = [1.0 if fix else value for value, fix in zip(first, binary(1, 800, 0.15), strict=True)]
    found = stats.compare(first, second)
    assert (found.low, found.high) == pytest.approx(slow_score_edges(found.wins, 0, 800), abs=1.1e-3)
    assert found.difference == pytest.approx(sum(second) / 800 - sum(first) / 800)
    assert (found.wins, found.losses) == (sum(b > a for a, b in zip(first, second, strict=True)), 0)
    assert found.wins + found.ties + found.losses == 800
    assert found.low > 0 and found.p < 1e-6 and found.test == "McNemar exact"


def test_compare_finds_nothing_between_equals() -> None:
    values = binary(4, 300, 0.4)
    found = stats.compare(values, list(values))
    assert (found.difference, found.p) == (0.0, 1.0)
    assert (found.low, found.high) == pytest.approx((-0.01264, 0.01264), abs=1e-5)
    assert (found.wins, found.ties, found.losses) == (0, 300, 0)


def test_compare_false_alarms_are_rare() -> None:
    """Two models of equal strength: about one in twenty intervals misses zero."""
    alarms = sum(
        not (found.low <= 0 <= found.high)
        for seed in range(100)
        for found in [stats.compare(binary(2 * seed, 200, 0.5), binary(2 * seed + 1, 200, 0.5), resamples=400)]
    )
    assert alarms <= 14


def test_graded_scores_use_the_permutation_test() -> None:
    rng = np.random.default_rng(0)
    first = rng.random(60)
    second = first + rng.normal(0.2, 0.1, 60)
    found = stats.compare(first.tolist(), second.tolist())
    drawn = np.random.default_rng(0).integers(0, 60, size=(10_000, 60))
    edges = np.percentile((second - first)[drawn].mean(axis=1), [2.5, 97.5])
    assert (found.low, found.high) == pytest.approx(tuple(edges), abs=1e-12)
    assert found.test == "sign-flip permutation"
    assert found.p == pytest.approx(1 / 10_001)


def test_gap_closed_equals_loop() -> None:
    base, student, teacher = binary(0, 300, 0.2), binary(1, 300, 0.5), binary(2, 300, 0.8)
    found = stats.gap_closed(base, student, teacher, seed=3, resamples=500)
    b, s, t = (sum(values) / 300 for values in (base, student, teacher))
    shares = []
    for row in np.random.default_rng(3).integers(0, 300, size=(500, 300)):
        rb, rs, rt = (sum(values[k] for k in row) / 300 for values in (base, student, teacher))
        shares.append(100 * (rs - rb) / (rt - rb))
    assert found.value == pytest.approx(100 * (s - b) / (t - b))
    assert (found.low, found.high) == pytest.approx(tuple(np.percentile(shares, [2.5, 97.5])), rel=1e-9)


def test_gap_without_a_better_teacher_has_no_value() -> None:
    weak, strong = binary(0, 100, 0.2), binary(1, 100, 0.8)
    assert stats.gap_closed(strong, strong, weak).value is None
    open_gap = stats.gap_closed([0.0, 1.0, 0.0, 1.0], [1.0, 1.0, 0.0, 0.0], [1.0, 1.0, 0.0, 1.0])
    assert open_gap.value is not None and open_gap.low is None and open_gap.method == "open"


def test_closed_gap_without_width_is_unknown() -> None:
    """A student right wherever the teacher is: 100 %, but not 100 to 100. Three documents prove no gap at all."""
    found = stats.gap_closed([0.0] * 40, [1.0] * 40, [1.0] * 40)
    assert (found.value, found.low, found.high, found.method) == (100.0, None, None, "none")
    assert stats.gap_closed([0.0] * 3, [0.0, 1.0, 1.0], [1.0] * 3).method == "open"


def test_macro_interval_is_the_mean_of_tasks() -> None:
    tasks = [binary(0, 200, 0.3), binary(1, 50, 0.9), np.random.default_rng(0).random(80).tolist()]
    found = stats.macro_interval(tasks)
    assert found.value == pytest.approx(sum(sum(values) / len(values) for values in tasks) / 3)
    spread = math.sqrt(sum(np.var(values) / len(values) for values in tasks)) / 3
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * spread, rel=0.1)
    nothing = stats.macro_interval([[0.0] * 20, [0.0] * 20])
    assert nothing.value == nothing.low == 0.0 and nothing.high > 0.02
    graded = stats.macro_interval([[0.0] * 20, binary(0, 20, 0.5)], proportions=[False, True])
    assert (graded.low, graded.high, graded.method) == (None, None, "none")


def test_unequal_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match=r"expected equally many documents; got 2 and 3"):
        stats.compare([0.0, 1.0], [0.0, 1.0, 1.0])
