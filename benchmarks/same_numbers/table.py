"""The runs that are compared, as data: a name and what it changes in the small recipe; a new one is one line."""

from typing import Any

Changes = dict[str, Any]

LORA: Changes = {
    "adapter": "lora",
    "lora_r": 4,
    "lora_alpha": 8,
    "lora_target_modules": ["q_proj", "v_proj", "up_proj"],
}
PACKED: Changes = {"sample_packing": True, "sequence_len": 128, "pad_to_sequence_len": False}
EVALUATED: Changes = {"val_set_size": 0.25, "eval_steps": 2}
SAMPLED: Changes = {"on_policy": {"fraction": 0.5, "max_new_tokens": 12}}

# name -> the `dskd:` block without its teacher.
TWO_TOKENIZERS: dict[str, Changes] = {
    "dskd": {},
    "dskd-both": {"spaces": "both"},
    "dskd-teacher-space": {"spaces": "teacher"},
    "dskd-mask": {"spaces": "both", "agreement_mask": True},
    "dskd-ids": {"shared": "ids"},
    "dskd-projected": {"target": "projected", "projector": {"labels": "hard"}, "spaces": "both"},
    "dskd-kept": {"target": "projected", "spaces": "both", "unmapped_argmax": "teacher_space"},
    "dskd-random": {"projector": {"init": "random", "warmup_steps": 2}},
    "dskd-fitted": {"projector": {"init": "fitted"}},
    "dskd-top": {"target": "projected", "projector": {"top_vocab": 100}},
    # The old name of span_weight, which older checkouts know.
    "dskd-spans": {"chunk_ratio": 1.0},
    "dskd-on-policy": SAMPLED,
    "cma": {"alignment": "cma", "spaces": "both"},
    "cma-mask": {"alignment": "cma", "agreement_mask": True, "projector": {"init": "random"}},
    "sft": {"method": "sft"},
    "overlap": {"method": "overlap_kd"},
    "overlap-ids": {"method": "overlap_kd", "shared": "ids"},
    "overlap-spans": {"method": "overlap_kd", "chunk_ratio": 0.5},
    "overlap-on-policy": {"method": "overlap_kd", **SAMPLED},
    "uld": {"method": "uld"},
    "mined": {"method": "mined", "temperature": 2.0},
    "reverse": {"method": "overlap_kd", "divergence": {"kind": "reverse_kl"}},
    "js": {"divergence": {"kind": "js"}, "kd_ratio": 0.9},
    "skewed": {"divergence": {"kind": "skewed_forward_kl"}, "temperature": 2.0},
    "adaptive": {"divergence": {"kind": "adaptive_kl"}, "spaces": "both"},
    "tvd": {"divergence": {"kind": "tvd"}},
}
ONE_TOKENIZER: dict[str, Changes] = {
    "one-kd": {"method": "kd"},
    "one-dskd": {"spaces": "both"},
    "one-overlap": {"method": "overlap_kd"},
    "one-eta": {"alignment": "eta"},
    "one-cma": {"alignment": "cma"},
    "one-on-policy": {"method": "kd", **SAMPLED},
}
# name -> (a name from above, what else the recipe says)
OTHERWISE: dict[str, tuple[str, Changes]] = {
    "packed": ("dskd-mask", PACKED),
    "packed-cma": ("cma", PACKED),
    "packed-spans": ("dskd-spans", PACKED),
    "packed-overlap": ("overlap", PACKED),
    "packed-on-policy": ("dskd-on-policy", PACKED),
    "lora": ("dskd", LORA),
    "lora-packed": ("overlap", {**LORA, **PACKED}),
    "evaluated": ("dskd-both", EVALUATED),
    "split": ("dskd", {"micro_batch_size": 1, "gradient_accumulation_steps": 4, "gradient_checkpointing": True}),
}


def runs() -> dict[str, Changes]:
    """name -> what the run changes in the recipe; `dskd` without a teacher, `teacher` names its folder in the pair."""
    made: dict[str, Changes] = {}
    for name, block in TWO_TOKENIZERS.items():
        made[name] = {"dskd": block, "teacher": "teacher"}
    for name, block in ONE_TOKENIZER.items():
        made[name] = {"dskd": block, "teacher": "sibling"}
    for name, (base, changes) in OTHERWISE.items():
        made[name] = {**made[base], **changes}
    return made


# Runs that the second checkout also goes on from a checkpoint of the first.
RESUMED = ("dskd", "dskd-both", "cma", "overlap", "dskd-on-policy", "lora")
