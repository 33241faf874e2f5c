"""What a recipe says of a teacher: the block ``dskd.teacher``, and an item of ``dskd.teachers``."""

import re
from typing import Literal

from pydantic import Field, field_validator, model_validator

from dskd_plugin.errors import SettingError
from dskd_plugin.setting_blocks import Block


class TeacherSettings(Block):
    """The block `dskd.teacher`: which model teaches, and how it is loaded or read."""

    model: str = Field(
        min_length=1,
        description="a decoder-only causal language model with its tokenizer, or a PEFT adapter that names its base",
        json_schema_extra={"values": "hub id or folder"},
    )
    revision: str | None = Field(
        None, description="of a hub model", json_schema_extra={"values": "branch, tag or commit"}
    )
    adapter: str | None = Field(
        None,
        description="PEFT adapter, merged into the teacher; tokenizer, chat template, ends of turn and embeddings are "
        "the adapter's where it has its own",
        json_schema_extra={"values": "hub id or folder"},
    )
    dtype: Literal["float32", "float16", "bfloat16"] = Field("bfloat16", description="of the teacher's weights")
    quantization: Literal["none", "8bit", "4bit"] = Field(
        "none", description="bitsandbytes weights of the teacher; its output head stays whole"
    )
    device: str | list[str] | None = Field(
        None,
        description="where the teacher is while the student trains; null: where the student is; a list: one for each "
        "process of a machine",
        json_schema_extra={
            "values": "`cpu`, `cuda:N`, list of these",
            "see": "[another device](runs.md#the-teacher-on-another-device)",
        },
    )
    offload: bool = Field(
        False, description="the teacher's weights wait in the CPU's memory and are on the device while it reads"
    )
    attn_implementation: str | None = Field(
        None, description="attention kernel; null: as the student", json_schema_extra={"values": "as in transformers"}
    )
    chat_template: str = Field(
        "tokenizer_default",
        description="the teacher reads conversations in it; of several that a tokenizer has under names, `default`, "
        "and `tool_use` for rows with tools",
        json_schema_extra={
            "values": "`tokenizer_default`, a name of one of the tokenizer's own, a name from Axolotl's list, "
            "a jinja file"
        },
    )
    chat_template_kwargs: dict[str, object] | None = Field(
        None,
        description="such as `{enable_thinking: false}`, for the teacher alone; null: the recipe's own "
        "`chat_template_kwargs`",
        json_schema_extra={"values": "variables of the template"},
    )
    sequence_len: int | None = Field(
        None,
        ge=8,
        description="longest teacher row in tokens; null: twice the student's `sequence_len`, at most the positions "
        "the teacher knows",
    )
    cache: str | None = Field(
        None,
        min_length=1,
        description="states of the teacher that [`dskd cache build`](cache.md) has computed; the teacher itself is not "
        "loaded. auto: they are computed before the first step and kept beside the prepared rows",
        json_schema_extra={"values": "folder, `auto`"},
    )

    @field_validator("device")
    @classmethod
    def known_device(cls, device: str | list[str] | None) -> str | list[str] | None:
        names = [device] if isinstance(device, str) else device
        if names is not None and (not names or not all(re.fullmatch(r"cpu|cuda:\d+", name) for name in names)):
            raise SettingError(
                "dskd.teacher.device",
                "'cpu', 'cuda:0' and so on, or a list of these with one for each process",
                repr(device),
                "Write one of them, or leave it out: the teacher is then where the student is.",
            )
        return device

    @model_validator(mode="after")
    def whole_weights_to_offload(self) -> "TeacherSettings":
        if self.offload and self.device == "cpu":
            raise SettingError(
                "dskd.teacher.offload",
                "false beside device: cpu",
                "true: the weights never leave the CPU",
                "Remove one of the two.",
            )
        if self.offload and self.quantization != "none":
            raise SettingError(
                "dskd.teacher.offload",
                "false beside a quantised teacher",
                f"true with quantization: {self.quantization}, whose weights have parts that do not move with them",
                "Remove one of the two, or use dskd.teacher.cache.",
            )
        return self


class WeightedTeacher(TeacherSettings):
    """One of several teachers."""

    weight: float = Field(1.0, gt=0, allow_inf_nan=False, description="of its KD terms beside those of the others")

    @property
    def alone(self) -> TeacherSettings:
        return TeacherSettings(**self.model_dump(exclude={"weight"}, exclude_unset=True))
