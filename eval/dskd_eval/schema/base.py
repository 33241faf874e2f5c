"""What every record has: text of any kind, free parts, writing only what was given, telling what is wrong."""

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
