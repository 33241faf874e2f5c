"""What the study runs: sizes, pairs, methods and ablations, as data.

A method is a `dskd:` block without its teacher. All methods of a pair share rows, steps, batch and the grid of the
student's learning rate; a setting that only some methods have stays at one stated value in the comparison and is
varied in the ablations only.
"""

from dataclasses import dataclass
from typing import Any

Block = dict[str, Any]


@dataclass(frozen=True)
class Student:
    """A student before it learns the task.

    tokenizer: "teacher", the teacher's own; "sentencepiece", one of `vocab_size` ids trained on the student's text.
    layers, width: a Llama of that shape; width None: so many of the teacher's layers, with its width and embeddings.
    pretrain_steps: on plain text; None: one pass.
    """

    tokenizer: str
    layers: int
    width: int | None = None
    vocab_size: int = 0
    pretrain_steps: int | None = None


@dataclass(frozen=True)
class Method:
    """block: the `dskd:` block without its teacher; pairs: where it says something that no other method says."""

    block: Block
    pairs: tuple[str, ...] = ("one", "two")
    rows: str = "train"  # "generated": the teacher's answers to the same questions, by `dskd generate`
    title: str = ""


# The rows of the first study; the plugin's defaults have changed since and are a row of their own.
FIRST: Block = {"temperature": 1.0, "unpaired": "share"}
DSKD: Block = FIRST | {
    "target": "projected",
    "spaces": "student",
    "agreement_mask": False,
    "projector": {"labels": "soft", "learning_rate": 5e-3},
}
PUBLISHED: Block = {
    "target": "projected",
    "spaces": "both",
    "temperature": 2.0,
    "unpaired": "share",
    "agreement_mask": True,
    "projector": {"labels": "hard", "learning_rate": 5e-3},
}
CMA: Block = FIRST | {
    "alignment": "cma",
    "spaces": "both",
    "agreement_mask": True,
    "projector": {"learning_rate": 5e-3},
}
ON_POLICY = {"fraction": 0.5, "start_epoch": 1.0, "max_new_tokens": 24}

METHODS: dict[str, Method] = {
    "sft": Method({"method": "sft"}, title="SFT"),
    "kd": Method({"method": "kd"} | FIRST, pairs=("one",), title="KD"),
    "overlap_kd": Method({"method": "overlap_kd"} | FIRST, pairs=("two",), title="KD, shared vocabulary"),
    "uld": Method({"method": "uld"} | FIRST, title="ULD"),
    "mined": Method({"method": "mined"} | FIRST, pairs=("two",), title="MinED"),
    "dskd": Method(DSKD, title="DSKD, projected target"),
    "dskd_default": Method({}, title="DSKD, defaults"),
    "dskd_v2": Method(PUBLISHED, title="DSKD, as published"),
    "dskd_cma": Method(CMA, title="DSKD, CMA"),
    "dskd_on_policy": Method(DSKD | {"on_policy": ON_POLICY}, title="DSKD, on-policy"),
    "seqkd": Method({"method": "sft"}, rows="generated", title="SeqKD"),
}

# Changes to the `dskd` row, one at a time, those that explain most first; None removes what the change has no use for.
ABLATIONS: dict[str, Method] = {
    "hard labels": Method({"projector": {"labels": "hard"}}),
    "agreement mask": Method({"agreement_mask": True}),
    "both spaces": Method({"spaces": "both"}),
    "temperature 2": Method({"temperature": 2.0}),
    "kd_ratio 0.2": Method({"kd_ratio": 0.2}),
    "kd_ratio 0.8": Method({"kd_ratio": 0.8}),
    "projector rate 5e-4": Method({"projector": {"learning_rate": 5e-4}}),
    "random init": Method({"projector": {"init": "random"}}),
    "teacher space": Method({"spaces": "teacher", "projector": None, "agreement_mask": None, "target": None}),
    "projector warm-up 30": Method({"projector": {"warmup_steps": 30}}),
    "chunk term 1": Method({"span_weight": 1.0}, pairs=("two",)),
    "top_vocab 2048": Method({"projector": {"top_vocab": 2048}}),
    "projector rate 2e-2": Method({"projector": {"learning_rate": 2e-2}}),
    "reverse KL": Method({"divergence": {"kind": "reverse_kl"}}),
    "adaptive KL": Method({"divergence": {"kind": "adaptive_kl"}}),
    "alignment CMA": Method({"alignment": "cma", "target": None, "projector": {"labels": None}}),
}


def block(method: str, ablation: str | None = None) -> Block:
    """The `dskd:` block of a run, without its teacher."""
    return merged(METHODS[method].block, {} if ablation is None else ABLATIONS[ablation].block)


def merged(base: Block, change: Block) -> Block:
    """`base` with `change` written over it, block by block; None removes a setting."""
    made = base | change
    for key in base.keys() & change.keys():
        if isinstance(base[key], dict) and isinstance(change[key], dict):
            made[key] = merged(base[key], change[key])
    return {key: value for key, value in made.items() if value is not None}


@dataclass(frozen=True)
class Size:
    """Everything that makes a small or a large study.

    on_policy: change to that block of the methods that have one.
    teacher, pretrain, train: what the recipes of the three trainings say beside what all sizes share.
    longest: characters of question and answer of a GSM8K or Dolly row that is preferred to longer ones.
    plain_rows: GSM8K (three quarters) and Dolly rows for pretraining, or as many as the other splits leave.
    tasks: what runs unless the command names others.
    """

    tasks: tuple[str, ...]
    teacher_rows: dict[str, int]
    rows: dict[str, int]
    heldout: dict[str, int]
    validation: dict[str, int]
    longest: tuple[int, int]
    prose: int
    plain_rows: int
    students: dict[str, Student]
    steps: int
    batch: int
    rates: tuple[float, ...]
    seeds: tuple[int, ...]
    on_policy: Block
    teacher: Block
    pretrain: Block
    train: Block


SMALL = Size(
    tasks=("qa",),
    teacher_rows={"qa": 504, "text": 360},
    rows={"qa": 168, "text": 168},
    heldout={"qa": 168, "text": 120},
    validation={"qa": 112, "text": 64},
    longest=(200, 220),
    prose=24000,
    plain_rows=800,
    students={
        "one": Student("teacher", layers=4, width=192, pretrain_steps=350),
        "two": Student("sentencepiece", layers=4, width=256, vocab_size=6000),
    },
    steps=126,
    batch=8,
    rates=(2.5e-4, 5e-4, 1e-3),
    seeds=(1, 2, 3),
    on_policy={},
    # The upper third of the layers.
    teacher={"unfrozen_parameters": ["model.layers.2[0-9]."], "num_epochs": 1, "learning_rate": 3e-4},
    pretrain={"learning_rate": 3e-3},
    train={},
)

TF32 = {"tf32": True}
GPU = Size(
    tasks=("text",),
    teacher_rows={"qa": 2016, "text": 2000},
    rows={"qa": 504, "text": 504},
    heldout={"qa": 504, "text": 240},
    validation={"qa": 252, "text": 120},
    longest=(400, 400),
    prose=12000,
    plain_rows=7200,
    students={
        "one": Student("teacher", layers=12, pretrain_steps=300),
        "two": Student("sentencepiece", layers=12, vocab_size=16000, pretrain_steps=300),
    },
    steps=126,
    batch=8,
    rates=(3e-5, 1e-4),
    seeds=(1, 2, 3),
    on_policy={"fraction": 0.25, "max_new_tokens": 64},
    teacher=TF32 | {"micro_batch_size": 32, "num_epochs": 2, "learning_rate": 2e-4},
    pretrain=TF32 | {"micro_batch_size": 32, "num_epochs": 8, "learning_rate": 1e-3},
    train=TF32,
)

SIZES = {"small": SMALL, "gpu": GPU}
