"""What a recipe says about memory, with Axolotl's defaults where it is silent."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from dskd_plugin.errors import SettingError
from dskd_plugin.recipe_options import whole_number
from dskd_plugin.settings import Settings

Engine = Literal["one process", "DDP", "ZeRO-1", "ZeRO-2", "ZeRO-3", "FSDP2"]
SEQUENCE_LEN = 512  # Axolotl's default

# Bytes that an optimizer keeps for each trained weight: a multiple of the weight's own size, or so many whatever it is.
STATES_LIKE_WEIGHTS = {
    "adamw_torch": 2,
    "adamw_torch_fused": 2,
    "adamw_torch_xla": 2,
    "adamw_apex_fused": 2,
    "adamw_anyprecision": 2,
    "ademamix": 3,
    "came_pytorch": 1,
    "lion_32bit": 1,
    "muon": 1,
    "rmsprop": 1,
    "sgd": 0,
    "adafactor": 0,
}
STATES_OF_BYTES = {
    "adamw_8bit": 2,
    "adamw_bnb_8bit": 2,
    "paged_adamw_8bit": 2,
    "ao_adamw_8bit": 2,
    "ao_adamw_fp8": 2,
    "ao_adamw_4bit": 1,
    "lion_8bit": 1,
    "paged_lion_8bit": 1,
    "ademamix_8bit": 3,
}


@dataclass(frozen=True)
class Facts:
    """A recipe as far as memory goes.

    rows, tokens: of a micro-batch; teacher_tokens: of the longest row of a teacher. ranks: processes, one per device.
    weights: "bfloat16", "float16" or "float32", of the student's layers; quantized: bits of frozen weights, or None.
    offload: what DeepSpeed keeps on the CPU. optimizer_known: whether its states are in the tables above.
    """

    recipe: dict[str, Any]
    settings: Settings
    on_gpu: bool
    ranks: int
    engine: Engine
    rows: int
    tokens: int
    teacher_tokens: int
    accumulation: int
    weights: str
    quantized: int | None
    adapter: bool
    checkpointing: bool
    packed: bool
    attention: str
    optimizer: str
    offload: frozenset[str] = frozenset()

    @property
    def optimizer_known(self) -> bool:
        return self.optimizer in STATES_LIKE_WEIGHTS or self.optimizer in STATES_OF_BYTES

    @property
    def teacher_resident(self) -> bool:
        """Whether the decoder of the teacher, or of some teacher, is in memory while the student trains."""
        from dskd_plugin.methods import method_of

        if len(self.each) > 1:
            return any(one.teacher_resident for one in self.each)
        teacher = self.settings.teacher
        return method_of(self.settings).needs_teacher and (teacher.cache is None or self.settings.on_policy is not None)

    @property
    def each(self) -> list[Facts]:
        """The same with each of the teachers alone."""
        return [replace(self, settings=one) for one in self.settings.each]

    @property
    def teacher_at(self) -> Literal["student", "cpu", "device"]:
        """Where the teacher computes: where the student is, on the CPU beside a GPU, or on another device."""
        named = self.settings.teacher.device
        beside = self.ranks == 1 and named in ("cuda:0", ["cuda:0"])
        if not self.on_gpu or named is None or beside:
            return "student"
        return "cpu" if named in ("cpu", ["cpu"]) else "device"

    @property
    def teacher_waits(self) -> bool:
        """Whether its weights are on the CPU between uses."""
        return self.on_gpu and self.settings.teacher.offload

    @property
    def teacher_on_cpu(self) -> bool:
        """Whether the CPU of a machine with a GPU holds its decoder, always or between uses."""
        return self.teacher_resident and (self.teacher_at == "cpu" or self.teacher_waits)

    def with_recipe(self, **changes: Any) -> Facts:
        """The same with other keys in the recipe; `dskd` is merged, the others are replaced.

        What it says of `dskd.teacher` holds for each of several.
        """
        from dskd_plugin.settings import parse_settings

        recipe = {**self.recipe, **changes}
        block, given = self.recipe["dskd"], dict(changes.get("dskd", {}))
        of_teacher = given.pop("teacher", {})
        if block.get("teachers"):
            teachers: dict[str, Any] = {"teachers": [{**one, **of_teacher} for one in block["teachers"]]}
        else:
            teachers = {"teacher": {**block["teacher"], **of_teacher}}
        recipe["dskd"] = {**block, **given, **teachers}
        made = facts_of(recipe, parse_settings(recipe["dskd"]), self.ranks, self.on_gpu)
        return replace(made, tokens=self.tokens, teacher_tokens=self.teacher_tokens)


def facts_of(recipe: dict[str, Any], settings: Settings, ranks: int, on_gpu: bool) -> Facts:
    """Read a recipe; ``ValueError`` for a DeepSpeed file that is not there."""
    engine, offload, half = _engine(recipe, ranks)
    tokens = whole_number(recipe, "sequence_len", SEQUENCE_LEN)
    checkpointing = bool(recipe.get("gradient_checkpointing")) or bool(recipe.get("activation_offloading"))
    attention = str(recipe.get("attn_implementation") or ("flash" if recipe.get("flash_attention") else "sdpa"))
    return Facts(
        recipe=recipe,
        settings=settings,
        on_gpu=on_gpu,
        ranks=ranks,
        engine=engine,
        rows=whole_number(recipe, "micro_batch_size", 1),
        tokens=tokens,
        # Its limit is twice that, but the same text has about as many tokens on both sides.
        teacher_tokens=max(min(one.teacher.sequence_len or tokens, 2 * tokens) for one in settings.each),
        accumulation=whole_number(recipe, "gradient_accumulation_steps", 1),
        weights=half or _dtype(recipe, on_gpu),
        quantized=4 if recipe.get("load_in_4bit") else 8 if recipe.get("load_in_8bit") else None,
        adapter=bool(recipe.get("adapter")),
        checkpointing=checkpointing,
        packed=bool(recipe.get("sample_packing")),
        attention=attention,
        optimizer=str(recipe.get("optimizer") or "adamw_torch_fused"),
        offload=offload,
    )


def _dtype(recipe: dict[str, Any], on_gpu: bool) -> str:
    """The dtype that Axolotl loads the student in."""
    bf16, fp16 = recipe.get("bf16", "auto"), recipe.get("fp16")
    if bf16 == "auto":
        # Axolotl's `auto` is bfloat16 on every GPU of today, and elsewhere float16 unless the recipe says otherwise.
        fp16 = not on_gpu and not recipe.get("float16") if fp16 is None else fp16
        bf16 = on_gpu and not fp16
    if bf16 or recipe.get("bfloat16"):
        return "bfloat16"
    return "float16" if recipe.get("load_in_8bit") or fp16 or recipe.get("float16") else "float32"


def _engine(recipe: dict[str, Any], ranks: int) -> tuple[Engine, frozenset[str], str | None]:
    """The engine, what it keeps on the CPU, and the half precision that its own file says, if any."""
    if recipe.get("fsdp_config"):
        offload = frozenset({"optimizer", "weights"} if recipe["fsdp_config"].get("offload_params") else ())
        return "FSDP2", offload, None
    if not recipe.get("deepspeed"):
        return ("DDP" if ranks > 1 else "one process"), frozenset(), None
    given = recipe["deepspeed"]
    if isinstance(given, dict):
        config = given
    else:
        try:
            config = json.loads(Path(given).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise SettingError("deepspeed", "a DeepSpeed configuration in JSON", error, "Name another file.") from None
    zero = config.get("zero_optimization") or {}
    engines: dict[int, Engine] = {0: "DDP", 1: "ZeRO-1", 2: "ZeRO-2", 3: "ZeRO-3"}
    named = {"optimizer": "offload_optimizer", "weights": "offload_param"}
    offload = frozenset(
        what for what, key in named.items() if (zero.get(key) or {}).get("device", "none") not in ("none", None)
    )
    # An "auto" is filled in from the recipe.
    dtypes = {"bf16": "bfloat16", "fp16": "float16"}
    half = next((dtype for key, dtype in dtypes.items() if (config.get(key) or {}).get("enabled") is True), None)
    stage = whole_number(zero, "stage", 0)
    if stage not in engines:
        raise SettingError("deepspeed", "a zero_optimization.stage from 0 to 3", repr(stage), "Name another file.")
    return engines[stage], offload, half
