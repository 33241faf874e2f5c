"""Records of a task as it was run, of its samples and of its score."""

from __future__ import annotations

from dskd_eval.schema.base import Free, MetricValue, Record, Text


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


class ScoreRow(TaskScore, Place):
    """A score of results.json."""

    @classmethod
    def of(cls, model: str, task: TaskRecord, score: TaskScore) -> ScoreRow:
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
