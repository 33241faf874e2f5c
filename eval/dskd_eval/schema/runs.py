"""Records of a whole run: its settings, its results and what --resume compares."""

from __future__ import annotations

from dskd_eval.schema.base import Record, Text
from dskd_eval.schema.models import ModelRecord
from dskd_eval.schema.pairs_and_gaps import Comparison
from dskd_eval.schema.tasks import ScoreRow


class Settings(Record):
    """Everything of the command line that shapes a score. chat_template: auto, on, off or the text of a
    template. reasoning: auto, off or START,END.
    """

    limit: int | None = None
    seed: int = 0
    batch_size: int | None = None
    dtype: str = "auto"
    device: str = "auto"
    backend: str = "hf"
    protocol: str = "default"
    num_fewshot: int | None = None
    samples: int = 1
    temperature: float | None = None
    chat_template: Text = "auto"
    reasoning: Text = "auto"
    max_new_tokens: int | None = None
    unsafe_code: bool = False

    def complete(self) -> Settings:
        """The same with every default written out, as a record of a run has them."""
        return Settings.model_validate(self.model_dump())

    @property
    def given_template(self) -> str | None:
        """The text that stands in for the models' own chat templates."""
        return None if self.chat_template in ("auto", "on", "off") else self.chat_template


class Environment(Record):
    """Versions that can move a score."""

    python: str
    platform: str
    packages: dict[str, str]


class SandboxRecord(Record):
    backend: str
    version: str
    limits: dict[str, int | float] = {}


class SuiteScore(Record):
    """Unweighted mean of the primary metrics of a suite."""

    model: Text
    suite: str
    tasks: list[Text]
    value: float
    low: float | None
    high: float | None
    n: int


class TaskTimes(Record):
    model: Text
    task: Text
    seconds: float
    answers_reused: int


class Times(Record):
    """The only part of results.json that differs between two runs of the same thing."""

    started: str
    written: str
    tasks: list[TaskTimes]


class Results(Record):
    """results.json."""

    schema_version: int
    complete: bool
    settings: Settings
    environment: Environment
    sandbox: SandboxRecord | None
    notes: list[Text]
    models: list[ModelRecord]
    scores: list[ScoreRow]
    suites: list[SuiteScore]
    comparisons: Comparison
    times: Times | None = None


class ModelIdentity(Record):
    name: Text
    fingerprint: str


class TaskIdentity(Record):
    """Hashes of the plan of a task and of its rows."""

    plan: str
    data: str | None


class Identity(Record):
    """run.json: what --resume compares."""

    schema_version: int
    settings: Settings
    models: list[ModelIdentity]
    tasks: dict[str, TaskIdentity]
