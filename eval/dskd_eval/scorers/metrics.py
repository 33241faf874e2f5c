"""Metrics: how to read each, and one value per metric from the answers to one prompt.

Values lie in [0, 1], or are a (numerator, denominator) pair of a ratio over prompts; `response_words` is a count.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from dskd_eval.schema import Free, MetricValue

Value = float | tuple[float, float]


@dataclass(frozen=True)
class Metric:
    """How to read a metric: unit 'percent' (in [0, 1], shown times 100), 'words' or 'number' (shown as it is).

    graded: a document may score between 0 and 1, so that the mean is no proportion, not even of zeros and ones.
    """

    label: str
    description: str
    unit: str = "percent"
    higher_is_better: bool = True
    graded: bool = False


@dataclass(frozen=True)
class Judgement:
    """What is known of one answer; details say what was read of it."""

    metrics: dict[str, Value]
    details: dict[str, Free] = field(default_factory=dict)


EXACT_MATCH = Metric("exact match", "answer equals a reference, ignoring case and outer space")


def pass_metric(name: str) -> Metric:
    """pass@1, pass@k."""
    if name == "pass@1":
        return Metric(name, "the program passes all tests of its row")
    return Metric(name, f"at least one of {name[5:]} programs passes all tests (unbiased estimate)")


def combine(scored: Sequence[Judgement], metrics: Sequence[str]) -> dict[str, Value]:
    """One value per metric from the samples of one prompt: means, sums of pairs, pass@k.

    pass@k = 1 - C(n - c, k) / C(n, k) for n samples of which c pass (Chen et al. 2021, eq. 1).
    """
    combined: dict[str, Value] = {}
    for name in metrics:
        if name.startswith("pass@"):
            passed = sum(1 for item in scored if item.metrics["pass@1"] == 1.0)
            combined[name] = pass_at_k(len(scored), passed, int(name[5:]))
            continue
        values = [item.metrics[name] for item in scored]
        if isinstance(values[0], tuple):
            pairs = [value for value in values if isinstance(value, tuple)]
            combined[name] = (sum(pair[0] for pair in pairs), sum(pair[1] for pair in pairs))
        else:
            combined[name] = sum(float(value) for value in values if not isinstance(value, tuple)) / len(values)
    return combined


def pass_at_k(samples: int, passed: int, k: int) -> float:
    """Chance that at least one of k programs drawn without replacement from `samples` passes."""
    if samples - passed < k:
        return 1.0
    return 1.0 - math.comb(samples - passed, k) / math.comb(samples, k)


def plain(metrics: Mapping[str, Value]) -> dict[str, MetricValue]:
    """Values as JSON has them."""
    found: dict[str, MetricValue] = {}
    for name, value in metrics.items():
        found[name] = [float(part) for part in value] if isinstance(value, (tuple, list)) else float(value)
    return found
