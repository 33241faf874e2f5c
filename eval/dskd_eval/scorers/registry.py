"""The scorers by name, and what is known of a metric by its name."""

from __future__ import annotations

from collections.abc import Sequence

from dskd_eval.schema import MetricValue
from dskd_eval.scorers.base import Scorer
from dskd_eval.scorers.ifeval import IFEval
from dskd_eval.scorers.mathematics import Math
from dskd_eval.scorers.metrics import Metric, pass_metric
from dskd_eval.scorers.number import Number
from dskd_eval.scorers.python_programs import Python, RunPrograms
from dskd_eval.scorers.text import Contains, ExactMatch, RougeL

SCORERS: dict[str, type[Scorer]] = {
    scorer.name: scorer for scorer in (RougeL, ExactMatch, Contains, Number, Math, IFEval, Python)
}
METRICS = {name: metric for scorer in SCORERS.values() for name, metric in scorer.metrics.items()}


def make(name: str, run_programs: RunPrograms | None = None) -> Scorer:
    """A scorer; `run_programs` executes programs (`Sandbox.run_all`), for a scorer that needs it."""
    scorer = SCORERS[name]
    return scorer(run_programs) if issubclass(scorer, Python) else scorer()


def metric_info(name: str) -> Metric:
    """Description of a metric; pass@k and metrics of user tasks included."""
    if name.startswith("pass@"):
        return pass_metric(name)
    return METRICS.get(name) or Metric(name, "metric of the task file")


def unit_of(name: str, values: Sequence[MetricValue]) -> str:
    """Unit of a metric; one of a user's task is a percentage when all its values lie in [0, 1]."""
    if name in METRICS or name.startswith("pass@"):
        return metric_info(name).unit
    return "percent" if all(isinstance(value, float) and 0 <= value <= 1 for value in values) else "number"


def is_proportion(name: str, unit: str) -> bool:
    """Whether the score is the share of documents that are right."""
    return unit == "percent" and not metric_info(name).graded
