"""What to change when a run does not fit, each change with what the run would then need."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from dskd_plugin.plan.facts import STATES_OF_BYTES, Facts
from dskd_plugin.plan.memory import Memory

# Optimizers that Axolotl refuses beside DeepSpeed, by how their names begin.
NOT_WITH_DEEPSPEED = ("muon", "polora", "flash_")


@dataclass(frozen=True)
class Change:
    """lines: what to write into the recipe; recipe: the same for `Facts.with_recipe`."""

    lines: str
    recipe: dict[str, Any]


@dataclass(frozen=True)
class Planned:
    """A change and the memory of the run with it, and with all changes before it."""

    change: Change
    alone: Memory
    together: Memory


def changes(facts: Facts) -> Iterator[Change]:
    """What the recipe does not do yet, those that cost the run least first."""
    teachers = [one.settings.teacher for one in facts.each]
    setting = "dskd.teacher." if len(teachers) == 1 else "each of dskd.teachers: "
    whole = all(teacher.quantization == "none" for teacher in teachers)
    if facts.teacher_resident and facts.settings.on_policy is None:
        # auto would need the teacher in memory before the first step.
        yield Change(f"{setting}cache: FOLDER, of `dskd cache build`", {"dskd": {"teacher": {"cache": "FOLDER"}}})
    adapted = any(teacher.adapter is not None for teacher in teachers)
    if facts.teacher_resident and facts.on_gpu and whole and not adapted:
        yield Change(f"{setting}quantization: 4bit", {"dskd": {"teacher": {"quantization": "4bit"}}})
    deepspeed = facts.ranks > 1 and not facts.optimizer.startswith(NOT_WITH_DEEPSPEED)
    if deepspeed and facts.engine in ("one process", "DDP", "ZeRO-1"):
        yield Change("deepspeed: zero2.json", {"deepspeed": _zero(2)})
    if not facts.checkpointing:
        yield Change("gradient_checkpointing: true", {"gradient_checkpointing": True})
    if facts.rows > 1:
        steps = facts.rows * facts.accumulation
        yield Change(
            f"micro_batch_size: 1, gradient_accumulation_steps: {steps}",
            {"micro_batch_size": 1, "gradient_accumulation_steps": steps},
        )
    # Under ZeRO it makes no difference in half precision, and Axolotl refuses it beside FSDP2.
    if facts.on_gpu and facts.optimizer not in STATES_OF_BYTES and facts.engine in ("one process", "DDP"):
        yield Change("optimizer: adamw_8bit", {"optimizer": "adamw_8bit"})
    if deepspeed and facts.engine not in ("ZeRO-3", "FSDP2"):
        yield Change("deepspeed: zero3.json", {"deepspeed": _zero(3)})
    if not facts.adapter:
        lora = {"adapter": "lora", "lora_r": 32, "lora_alpha": 64, "lora_target_linear": True}
        yield Change("adapter: lora, lora_r: 32, lora_target_linear: true", lora)


def _zero(stage: int) -> dict[str, Any]:
    """A DeepSpeed configuration as far as memory goes, in the recipe's own precision."""
    return {"zero_optimization": {"stage": stage}}
