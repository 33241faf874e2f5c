"""Records: what a run writes and what `compare`, `report` and --resume read back, one class for each part.

results.json is a `Results`, a line of samples.jsonl a `Sample`, parts/<model>/<task>.json a `Part`, run.json an
`Identity`, comparison.json a `Comparison`.
"""

from __future__ import annotations

from dskd_eval.schema.base import SCHEMA_VERSION, Free, MetricValue, Record, Text, problem
from dskd_eval.schema.models import LoadedModel, ModelRecord, ModelSource, ModelTemplate
from dskd_eval.schema.pairs_and_gaps import Comparison, GapOfModel, GapRow, PairedModels, PairRow
from dskd_eval.schema.runs import (
    Environment,
    Identity,
    ModelIdentity,
    Results,
    SandboxRecord,
    Settings,
    SuiteScore,
    TaskIdentity,
    TaskTimes,
    Times,
)
from dskd_eval.schema.tasks import (
    AnswerCounts,
    DataRecord,
    GenerationInfo,
    MetricScore,
    Part,
    PartTimes,
    Place,
    Sample,
    ScoreRow,
    SeedScore,
    TaskRecord,
    TaskScore,
)

__all__ = [
    "SCHEMA_VERSION",
    "AnswerCounts",
    "Comparison",
    "DataRecord",
    "Environment",
    "Free",
    "GapOfModel",
    "GapRow",
    "GenerationInfo",
    "Identity",
    "LoadedModel",
    "MetricScore",
    "MetricValue",
    "ModelIdentity",
    "ModelRecord",
    "ModelSource",
    "ModelTemplate",
    "PairRow",
    "PairedModels",
    "Part",
    "PartTimes",
    "Place",
    "Record",
    "Results",
    "Sample",
    "SandboxRecord",
    "ScoreRow",
    "SeedScore",
    "Settings",
    "SuiteScore",
    "TaskIdentity",
    "TaskRecord",
    "TaskScore",
    "TaskTimes",
    "Text",
    "Times",
    "problem",
]
