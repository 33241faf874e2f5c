"""Records of a model: what was asked for, how it reads, what is in memory."""

from __future__ import annotations

from dskd_eval.schema.base import Record, Text


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
