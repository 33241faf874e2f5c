"""Axolotl's options of speed and memory beside a ``dskd:`` block: one line for each, with what it does there.

Three tests and the table of ``docs/options.md`` read this list: tests/plugin/test_options.py (what is refused, and
recipes for a GPU as far as a CPU goes), tests/e2e/test_options.py (trainings), tests/gpu/test_options.py.
"""

from dataclasses import dataclass
from typing import Any

from dskd_plugin.recipe_options import REFUSED as ADVICE

Recipe = dict[str, Any]

SAME, STEPS, NEAR, UNHEEDED = "same numbers", "works", "near", "no effect"
REFUSED, CUDA = "refused", "needs CUDA"
# How the table says what is found.
VERDICTS = {
    SAME: "trained on a CPU: losses, terms and gradient norms are those of the run without it",
    STEPS: "trained on a CPU: it changes how a step is taken, and the first losses are those of the run without it",
    NEAR: "trained on a CPU: it rounds weights or products, and the first losses are near those without it",
    UNHEEDED: "trained on a CPU: the numbers are those without it, and the log says that it has no effect",
    REFUSED: "told before anything is loaded",
    CUDA: "the recipe is accepted and the plugin is in place; **the training itself has never been run**",
}


@dataclass(frozen=True)
class Option:
    """recipe: its lines, plugins by the names below. verdict: one of the above. note: for the reader of the table.

    base: the run that it is compared with, one of BASES. within: largest relative difference of the first losses.
    package: what must be installed.
    """

    recipe: Recipe
    verdict: str
    note: str = ""
    base: str = "padded"
    within: float = 2e-5
    package: str = ""

    @property
    def name(self) -> str:
        return ", ".join(f"{key}: {_yaml(value)}" for key, value in self.recipe.items())

    @property
    def changes(self) -> Recipe:
        """What a recipe needs: its base, and for an attention no other one."""
        base = BASES[self.base]
        changes = {**base, **self.recipe}
        if "dskd" in changes:
            changes["dskd"] = {**base.get("dskd", {}), **self.recipe.get("dskd", {})}
        if set(changes) & set(ATTENTIONS):
            changes = {"sdp_attention": None, "flash_attention": None, **changes}
        listed = [PLUGINS[name] for name in changes.pop("plugins", ())]
        return {**changes, "plugins": ["dskd", *listed]}


ATTENTIONS = ("attn_implementation", "flash_attention", "flex_attention", "eager_attention")
PLUGINS = {
    "liger": "axolotl.integrations.liger.LigerPlugin",
    "cut_cross_entropy": "axolotl.integrations.cut_cross_entropy.CutCrossEntropyPlugin",
}
PACKED = {"sample_packing": True, "eval_sample_packing": True, "sequence_len": 128, "micro_batch_size": 1}
LORA = {"adapter": "lora", "lora_r": 4, "lora_alpha": 8, "lora_target_modules": ["q_proj", "v_proj", "up_proj"]}
CHECKPOINTS = {"gradient_checkpointing": True}
# At a temperature, the cross-entropy cannot share the softmax of the other terms.
WARM = {"dskd": {"temperature": 2.0}}
BASES: dict[str, Recipe] = {
    "padded": {},
    "packed": PACKED,
    "lora": LORA,
    "warm": WARM,
}


def _yaml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_yaml(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(_yaml(inner) for inner in value) + "]"
    return str(value).lower() if isinstance(value, bool) else str(value)


def optimizer(name: str, note: str = "", **more: Any) -> Option:
    return Option({"optimizer": name}, STEPS, note, **more)


OPTIONS: dict[str, list[Option]] = {
    "Attention": [
        Option({"attn_implementation": "eager"}, SAME, "student and teacher; `eager_attention: true` is the same"),
        Option({"attn_implementation": "eager"}, SAME, "packed rows, beside packed rows with sdpa", base="packed"),
        Option(
            {"flash_attention": True},
            CUDA,
            "both sides; a teacher in float32 keeps its own attention. Without flash-attn not even the recipe was read",
            package="flash_attn",
        ),
        Option({"flash_attention": True}, CUDA, "packed rows", base="packed", package="flash_attn"),
        Option({"flex_attention": True}, CUDA, "both sides; torch has no backward of it on a CPU"),
        Option({"flex_attention": True}, CUDA, "packed rows", base="packed"),
        Option(
            {"sdpa_varlen": True},
            CUDA,
            "Axolotl turns it on by itself with sdpa and packed rows on a GPU; on a CPU it keeps plain sdpa",
            base="packed",
        ),
    ],
    "Precision": [
        Option({"bf16": True}, NEAR, "products in bfloat16, sums in float32 and wider", within=0.02),
        Option({"fp16": True}, CUDA, "accelerate has no float16 on a CPU"),
        Option({"tf32": True}, CUDA, "products in float32 lose bits, as without the plugin"),
        Option({"fp8": True}, REFUSED),
    ],
    "Weights of few bits": [
        Option(
            {"adapter": "qlora", "load_in_4bit": True},
            NEAR,
            "the head stays whole; nearness is that of tiny random weights, which lose more than trained ones",
            base="lora",
            within=0.1,
            package="bitsandbytes",
        ),
        Option({"load_in_8bit": True}, NEAR, base="lora", within=0.02, package="bitsandbytes"),
        Option({"dskd": {"teacher": {"quantization": "8bit"}}}, NEAR, within=0.05, package="bitsandbytes"),
        Option({"dskd": {"teacher": {"quantization": "4bit"}}}, NEAR, within=0.3, package="bitsandbytes"),
        Option(
            {"adapter": "qlora", "load_in_4bit": True, "dskd": {"teacher": {"quantization": "4bit"}}},
            NEAR,
            "both sides",
            base="lora",
            within=0.3,
            package="bitsandbytes",
        ),
        Option(
            {"qat": {"weight_dtype": "int4", "group_size": 32}},
            NEAR,
            "the loss reads the student's head as it is rounded",
            within=0.1,
            package="torchao",
        ),
        Option(
            {"qat": {"weight_dtype": "int4", "activation_dtype": "int8", "group_size": 32}},
            NEAR,
            "and the states before it as they are rounded",
            within=0.1,
            package="torchao",
        ),
        Option({"quantization": {"weight_dtype": "int4"}}, SAME, "read by `axolotl quantize` alone"),
    ],
    "Memory": [
        Option(CHECKPOINTS, SAME),
        Option({**CHECKPOINTS, "gradient_checkpointing_kwargs": {"use_reentrant": True}}, SAME),
        Option({**CHECKPOINTS, "selective_checkpointing": True}, SAME),
        Option({**CHECKPOINTS, "activation_offloading": "hidden_states"}, SAME),
        Option(
            {**CHECKPOINTS, "activation_offloading": True},
            CUDA,
            "also `gradient_checkpointing: offload`. The loss's saved tensors survive a trip to other memory (tested)",
        ),
        Option({**CHECKPOINTS, "activation_offloading": "legacy"}, CUDA),
        Option({**CHECKPOINTS, "activation_offloading": "disk"}, CUDA, "also `gradient_checkpointing: offload_disk`"),
        Option({"layer_offloading": True}, SAME, "on a CPU nothing is moved; on a GPU never run"),
        Option({"tiled_mlp": True, "tiled_mlp_num_shards": 4}, SAME, base="packed"),
        Option(
            {"tiled_mlp": True, "tiled_mlp_num_shards": 4, "micro_batch_size": 2},
            REFUSED,
            "Axolotl 0.19 makes wrong gradients of it: cut into shards, rows beside one another are mixed up",
        ),
        Option({"max_memory": {0: "1GiB"}}, REFUSED),
        Option({"gpu_memory_limit": "1GiB"}, REFUSED),
    ],
    "Cross-entropy made cheaper": [
        Option({"chunked_cross_entropy": True}, UNHEEDED),
        Option({"plugins": ["liger"], "liger_fused_linear_cross_entropy": True}, UNHEEDED),
        Option(
            {"plugins": ["liger"], "liger_cross_entropy": True},
            UNHEEDED,
            "at a temperature, where the loss would otherwise call the function that Liger replaces",
            base="warm",
        ),
        Option(
            {"plugins": ["cut_cross_entropy"], "cut_cross_entropy": True, "bf16": True},
            CUDA,
            "no effect, and the log says so: by its source, the patched forward makes logits where it gets no labels",
            package="cut_cross_entropy",
        ),
        Option({"use_eaft": True}, REFUSED),
        Option(
            {"plugins": ["liger"], "liger_fused_linear_cross_entropy": True, "liger_use_token_scaling": True},
            REFUSED,
        ),
        Option({"label_smoothing_factor": 0.1}, REFUSED),
    ],
    "Kernels": [
        Option(
            {
                "plugins": ["liger"],
                "liger_rope": True,
                "liger_rms_norm": True,
                "liger_glu_activation": True,
                "liger_layer_norm": True,
            },
            CUDA,
            "a teacher of the same architecture gets them too",
            package="liger_kernel",
        ),
        Option(
            {"lora_mlp_kernel": True, "lora_qkv_kernel": True, "lora_o_kernel": True, "lora_embedding_kernel": True},
            CUDA,
            "without a GPU the plugin turns them off where the recipe leaves them unset",
            base="lora",
        ),
        Option({"torch_compile": True}, REFUSED),
        Option({"deepcompile": True}, REFUSED),
    ],
    "Optimizers": [
        optimizer("adamw_8bit", package="bitsandbytes"),
        optimizer("paged_adamw_8bit", "pages exist on a GPU alone", package="bitsandbytes"),
        optimizer("lion_8bit", package="bitsandbytes"),
        optimizer("adamw_torch_8bit", "torchao; compiled, which takes a C++ compiler", package="torchao"),
        optimizer(
            "adamw_torch_4bit",
            "torchao; Axolotl 0.19 knows `ao_adamw_4bit` and `ao_adamw_8bit` by name and makes neither",
            package="torchao",
        ),
        optimizer("ao_adamw_fp8", package="torchao"),
        optimizer("adamw_torch_fused"),
        optimizer("adafactor"),
        optimizer("adopt_adamw"),
        optimizer("adamc"),
        optimizer("muon", "the projector is stepped by Muon too, at its own learning rate"),
        optimizer("schedule_free_adamw", package="schedulefree"),
        optimizer("optimi_adamw", package="optimi"),
        optimizer("came_pytorch", package="came_pytorch"),
        Option({"loraplus_lr_ratio": 8}, REFUSED, base="lora"),
        Option({"lr_scheduler": "one_cycle"}, REFUSED),
    ],
    "Rows": [
        Option({"sample_packing_sequentially": True}, STEPS, "other rows in a step", base="packed", within=1.0),
        Option({"group_by_length": True}, STEPS, "other rows in a step", within=1.0),
        Option({"pad_to_sequence_len": True}, SAME),
        Option({"pad_to_sequence_len": True}, SAME, base="packed"),
        Option({"auto_find_batch_size": True}, SAME),
        Option({"batch_flattening": True}, REFUSED),
        Option({"use_pose": True}, REFUSED),
    ],
    "What is trained": [
        Option({"unfrozen_parameters": ["model.layers.1.*"]}, STEPS, "the projector learns in any case"),
        Option({"neftune_noise_alpha": 5}, NEAR, "noise on the student's embeddings, not on the teacher's", within=0.2),
        Option({"lisa_n_layers": 1, "lisa_step_interval": 1}, STEPS),
        Option({"relora": True, "jagged_restart_steps": 1, "relora_prune_ratio": 0.9}, STEPS, base="lora"),
        Option({"dynamic_checkpoint": {"enabled": True}}, SAME),
        Option({"trainer_cls": "axolotl.core.trainers.base.AxolotlTrainer"}, REFUSED),
    ],
}


def written(recipe: Recipe, changes: Recipe) -> Recipe:
    """The recipe with changes; None takes a key away, and `dskd:` is changed key by key."""
    block = {**recipe["dskd"], **changes.get("dskd", {})}
    block["teacher"] = {**recipe["dskd"]["teacher"], **block["teacher"]}
    changed = {**recipe, **changes, "dskd": block}
    return {key: value for key, value in changed.items() if value is not None}


def all_options() -> list[Option]:
    return [option for group in OPTIONS.values() for option in group]


def with_verdict(*verdicts: str) -> list[Option]:
    return [option for option in all_options() if option.verdict in verdicts]


def advice(option: Option) -> str:
    """What the plugin says to do in place of a refused option."""
    return next((ADVICE[key] for key in option.recipe if key in ADVICE), "")
