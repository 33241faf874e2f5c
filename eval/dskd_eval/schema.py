"""Records: what a run writes and what `compare`, `report` and --resume read back, as one class for each part.

results.json is a `Results`, a line of samples.jsonl a `Sample`, parts/<model>/<task>.json a `Part`, run.json an
`Identity`, comparison.json a `Comparison`.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, GetPydanticSchema, JsonValue, ValidationError
from pydantic_core import core_schema

SCHEMA_VERSION = 1

# pydantic's own text is UTF-8 alone; names of folders may hold half a character, and JSON can carry it.
Text = Annotated[str, GetPydanticSchema(lambda source, handler: core_schema.is_instance_schema(str))]
# A part whose form belongs to a task or a user: kept as it came.
Free = Annotated[JsonValue, GetPydanticSchema(lambda source, handler: core_schema.any_schema())]
# A number, or the numerator and denominator of a ratio over prompts.
MetricValue = float | list[float]


class Record(BaseModel):
    """A part of a file. Only what was given is written, in the order of the fields and then whatever else there was,
    so that the file of another version is written as it was read.
    """

    model_config = ConfigDict(frozen=True, extra="allow", protected_namespaces=())

    def plain(self) -> dict[str, JsonValue]:
        """The record as JSON has it."""
        return self.model_dump(exclude_unset=True)

    def has(self, name: str) -> bool:
        """Whether a field was given."""
        return name in self.model_fields_set

    def given(self) -> dict[str, object]:
        """The fields that were given, as they are."""
        return {name: value for name, value in self if name in self.model_fields_set}


def problem(error: ValidationError) -> str:
    """The first thing that is wrong with a record: its place and what was expected there."""
    first = error.errors(include_url=False, include_input=False)[0]
    place = ".".join(str(part) for part in first["loc"]) or "the record"
    return f"{place}: {first['msg']}"


# --- a task as it was run -------------------------------------------------------------------------


class DataRecord(Record):
    """Where the rows of a task came from. digest: hash of the rows themselves."""

    source: Text = ""
    sha256: str | None = None
    digest: str = ""
    rows: int = 0
    note: Text | None = None


class TaskRecord(Record):
    """What a result is worth comparing by; two results with equal records measured the same thing."""

    task: Text
    version: float
    suite: Text
    summary: Text
    primary_metric: Text
    metrics: list[Text]
    scorer: Text
    style: str
    protocol: Text
    shots: int
    prompt: Text | int | None
    generation: dict[str, Free]
    seeds: list[int]
    floor: dict[str, Free] = {}
    data: dict[str, DataRecord] = {}

    @property
    def stops(self) -> list[str]:
        """Texts at which an answer ends."""
        listed = self.generation.get("until")
        return [str(text) for text in listed] if isinstance(listed, list) else []

    @property
    def limit(self) -> Free:
        """Tokens that an answer may have."""
        return self.generation.get("max_gen_toks")

    @property
    def sampled(self) -> bool:
        """Whether answers are drawn, so that they depend on the seeds."""
        return bool(self.generation.get("do_sample"))


# --- one row and its answers ----------------------------------------------------------------------


class GenerationInfo(Record):
    """How one answer came about; cut_tokens is what the prompt lost to fit the context.

    reasoning: the trace before the answer. trace: 'none', 'closed', 'unclosed', or 'unread' where an answer begins
    with a known marker and no markers were asked for.
    """

    prompt_tokens: int
    cut_tokens: int
    max_new_tokens: int
    new_tokens: int
    finish: str
    clamped: bool
    reasoning: Text = ""
    trace: str = "none"


class Sample(Record):
    """One document: its prompt, answers and scores. details, answer_metrics and generation go with the answers."""

    model: Text = ""
    task: Text
    doc_id: int
    doc_hash: str
    prompt_hash: str
    prompt: Text
    references: list[Text]
    answers: list[Text]
    metrics: dict[str, MetricValue]
    details: list[dict[str, Free]] = []
    answer_metrics: list[dict[str, MetricValue]] = []
    generation: list[GenerationInfo | None] = []

    def of_model(self, name: str) -> Sample:
        return self.model_copy(update={"model": name})


# --- the score of a task --------------------------------------------------------------------------


class MetricScore(Record):
    """One metric over the documents. low and high: None where the interval is unknown."""

    value: float
    low: float | None
    high: float | None
    n: int
    interval: str = ""
    unit: str
    higher_is_better: bool


class AnswerCounts(Record):
    """Counts that tell how far a score may be trusted."""

    count: int = 0
    empty: int = 0
    unfinished: int = 0
    clamped: int = 0
    smallest_limit: int = 0
    prompts_cut: int = 0
    prompt_tokens_cut: int = 0
    longest_prompt: int = 0
    with_reasoning: int = 0
    unfinished_reasoning: int = 0
    unread_reasoning: int = 0
    references_unseen: int = 0
    mean_new_tokens: float = 0.0


class SeedScore(Record):
    seed: int
    value: float


class Place(Record):
    """Which model did which task."""

    model: Text
    task: TaskRecord


class TaskScore(Record):
    """How one model did one task. status: finished, failed or waiting; only a finished one has numbers."""

    status: str
    n: int = 0
    documents: int = 0
    metrics: dict[str, MetricScore] = {}
    answers: AnswerCounts = AnswerCounts()
    per_seed: list[SeedScore] = []
    error: Text = ""

    @property
    def finished(self) -> bool:
        return self.status == "finished"


class Score(TaskScore, Place):
    """A score of results.json."""

    @classmethod
    def of(cls, model: str, task: TaskRecord, score: TaskScore) -> Score:
        return cls.model_validate({"model": model, "task": task, **score.given()})

    @property
    def primary(self) -> MetricScore:
        """The score that counts."""
        return self.metrics[self.task.primary_metric]


class PartTimes(Record):
    seconds: float
    answers_reused: int


class Part(Record):
    """A finished task, kept for --resume."""

    score: TaskScore
    times: PartTimes


# --- a model --------------------------------------------------------------------------------------


class ModelSource(Record):
    """What was asked for and where it was found."""

    name: Text
    role: str | None = None
    source: Text
    revision: Text | None = None
    adapter: Text | None = None
    architecture: Text | None = None
    fingerprint: str


class ModelTemplate(Record):
    """How the model reads a conversation."""

    chat_template: bool
    chat_template_hash: str | None = None
    reasoning_markers: list[list[Text]] = []


class LoadedModel(Record):
    """The model in memory."""

    backend: str = ""
    dtype: str = ""
    device: str = ""
    parameters: int | None = None
    context_length: int | None = None
    batch_size: int | None = None
    end_tokens: list[int] = []


class ModelRecord(LoadedModel, ModelTemplate, ModelSource):
    """A model of results.json; the facts of `LoadedModel` are there once it was loaded."""


# --- a comparison ---------------------------------------------------------------------------------


class PairRow(Record):
    """One task, second model against first. better: first, second or None (not certain)."""

    task: Text
    metric: Text
    first: float
    second: float
    difference: float
    low: float | None
    high: float | None
    interval: str = ""
    better: str | None
    wins: int
    ties: int
    losses: int
    p: float
    test: str
    n: int
    of: int
    p_holm: float = 1.0


class PairedModels(Record):
    """`model` against `against`, task by task."""

    model: Text
    against: Text | None = None
    rows: list[PairRow]


class GapRow(Record):
    """One task: how much of the way from base to teacher the student went, in percent."""

    task: Text
    base: float
    student: float
    teacher: float
    closed: float | None
    low: float | None
    high: float | None
    interval: str = ""
    n: int


class GapOfModel(Record):
    model: Text
    rows: list[GapRow]


class Comparison(Record):
    """Every model against the baseline, and closed gaps; within results.json the notes stand with those of the run."""

    baseline: Text = ""
    pairs: list[PairedModels] = []
    gaps: list[GapOfModel] = []
    notes: list[Text] = []

    def without_notes(self) -> Comparison:
        return Comparison.model_validate({name: value for name, value in self.given().items() if name != "notes"})


# --- a run ----------------------------------------------------------------------------------------


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
    scores: list[Score]
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
