"""Options of Axolotl that distillation refuses or does not need; ``docs/options.md`` shows them too."""

import math
from typing import Any

from dskd_plugin.errors import SettingError

# Refused: key -> what to do.
REFUSED = {
    "rl": "Remove it: distillation is a supervised run.",
    "reward_model": "Remove it: distillation trains a language model.",
    "process_reward_model": "Remove it: distillation trains a language model.",
    "pretraining_dataset": "List the data under `datasets`.",
    "streaming": "Remove it: teacher and student rows are aligned before training.",
    "skip_prepare_dataset": "Remove it: teacher and student rows are aligned before training.",
    "processor_type": "Remove it: only text is distilled.",
    "batch_flattening": "Use sample_packing instead.",
    "label_smoothing_factor": "Remove it: the cross-entropy of the student's tokens is exact.",
    "push_dataset_to_hub": "Remove it: the hub copy would be shared by different teachers.",
    "kd_trainer": "Remove Axolotl's own distillation settings.",
    "trainer_cls": "Remove it: distillation has a trainer of its own.",
    "torch_compile": "Remove it: the loss inside the student's forward is not compiled.",
    "deepcompile": "Remove it: the loss inside the student's forward is not compiled.",
    "max_memory": "Remove it: the student stays on one device per process; use DeepSpeed or FSDP2.",
    "gpu_memory_limit": "Remove it: the student stays on one device per process; use DeepSpeed or FSDP2.",
    "loraplus_lr_ratio": "Remove it: the projectors need a learning rate of their own.",
    "fp8": "Use bf16: fp8 spares the last linear layer, which is the projector here and not the student's head.",
    "use_eaft": "Remove it: it replaces the loss, and distillation has its own.",
    "liger_use_token_scaling": "Remove it: it weighs a cross-entropy of the host's that distillation does not use.",
    "use_pose": "Remove it: positions with gaps look like several packed rows.",
}

# Accepted and without an effect: they make the host's own cross-entropy cheaper, which distillation does not compute.
UNHEEDED = (
    "chunked_cross_entropy",
    "cut_cross_entropy",
    "flash_attn_cross_entropy",
    "liger_cross_entropy",
    "liger_fused_linear_cross_entropy",
)


_TILE = 32768  # tokens of one shard of a tiled MLP where the recipe names no number of shards


def whole_number(recipe: Any, key: str, default: int) -> int:
    """A number of a recipe that Axolotl has not read yet; like it, this takes a number in quotes."""
    given = recipe.get(key)
    try:
        return int(given or default)
    except (TypeError, ValueError):
        raise SettingError(key, "a whole number", repr(given), "Write the number alone.") from None


def tiled_batches(recipe: Any) -> list[SettingError]:
    """An error where an MLP's rows are cut into shards beside one another: Axolotl 0.19 mixes up their gradients."""
    if not recipe.get("tiled_mlp"):
        return []
    rows = whole_number(recipe, "micro_batch_size", 1)
    shards = whole_number(recipe, "tiled_mlp_num_shards", math.ceil(whole_number(recipe, "sequence_len", 1) / _TILE))
    if rows == 1 or shards == 1:
        return []
    return [
        SettingError(
            "tiled_mlp",
            "micro_batch_size: 1, or one shard",
            f"{rows} rows at a time in {shards} shards, whose gradients Axolotl puts together wrongly",
            "Set micro_batch_size: 1 and raise gradient_accumulation_steps, or set tiled_mlp_num_shards: 1.",
        )
    ]


def unheeded(recipe: Any) -> list[str]:
    """The options of a recipe that have no effect beside a ``dskd:`` block."""
    listed = [str(plugin) for plugin in recipe.get("plugins") or ()]
    # Axolotl's plugin of that name turns its option on where the recipe does not say.
    implied = any("cut_cross_entropy" in plugin for plugin in listed) and recipe.get("cut_cross_entropy") is None
    return [key for key in UNHEEDED if recipe.get(key) or (implied and key == "cut_cross_entropy")]
