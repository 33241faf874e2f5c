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
    """A Llama of our own: its shape and what its tokenizer is."""

    tokenizer: str  # "teacher": the teacher's own; "sentencepiece": trained on the student's text
    width: int
    layers: int
    vocab_size: int = 0
    pretrain_steps: int | None = None  # None: one pass over the plain text


@dataclass(frozen=True)
class Method:
    """block: the `dskd:` block without its teacher; pairs: where it says something that no other method says."""

    block: Block
    pairs: tuple[str, ...] = ("one", "two")
    rows: str = "train"  # "generated": the teacher's answers to the same questions, by `dskd generate`
    title: str = ""


PROJECTOR = {"learning_rate": 5e-3}
ON_POLICY = {"fraction": 0.5, "start_epoch": 1.0, "max_new_tokens": 24}

METHODS: dict[str, Method] = {
    "sft": Method({"method": "sft"}, title="SFT"),
    "kd": Method({"method": "kd"}, pairs=("one",), title="KD"),
    "overlap_kd": Method({"method": "overlap_kd"}, pairs=("two",), title="KD, shared vocabulary"),
    "uld": Method({"method": "uld"}, title="ULD"),
    "mined": Method({"method": "mined"}, pairs=("two",), title="MinED"),
    "dskd": Method({"projector": PROJECTOR}, title="DSKD"),
    "dskd_cma": Method({"alignment": "cma", "projector": PROJECTOR}, title="DSKD, CMA"),
    "dskd_on_policy": Method({"projector": PROJECTOR, "on_policy": ON_POLICY}, title="DSKD, on-policy"),
    "seqkd": Method({"method": "sft"}, rows="generated", title="SeqKD"),
}

# Changes to the `dskd` row, one at a time, those that explain most first.
ABLATIONS: dict[str, Method] = {
    "student space": Method({"spaces": "student"}),
    "student space, temperature 1": Method({"spaces": "student", "temperature": 1.0}),
    "temperature 4": Method({"temperature": 4.0}),
    "top_vocab 2048": Method({"projector": {"top_vocab": 2048}}),
    "kd_ratio 0.2": Method({"kd_ratio": 0.2}),
    "no agreement mask": Method({"agreement_mask": False}),
    "projector warm-up 30": Method({"projector": {"warmup_steps": 30}}),
    "random init": Method({"projector": {"init": "random"}}),
    "chunk term 1": Method({"chunk_ratio": 1.0}, pairs=("two",)),
    "temperature 1": Method({"temperature": 1.0}, pairs=("two",)),
    "teacher space": Method({"spaces": "teacher"}, pairs=("two",)),
    "projector rate 5e-4": Method({"projector": {"learning_rate": 5e-4}}),
    "kd_ratio 0.8": Method({"kd_ratio": 0.8}, pairs=("two",)),
    "projector rate 2e-2": Method({"projector": {"learning_rate": 2e-2}}, pairs=("two",)),
    "reverse KL": Method({"divergence": {"kind": "reverse_kl"}}, pairs=("two",)),
    "adaptive KL": Method({"divergence": {"kind": "adaptive_kl"}}, pairs=("two",)),
}


def block(method: str, ablation: str | None = None) -> Block:
    """The `dskd:` block of a run, without its teacher."""
    return merged(METHODS[method].block, {} if ablation is None else ABLATIONS[ablation].block)


def merged(base: Block, change: Block) -> Block:
    """`base` with `change` written over it, block by block; the projector goes where no space uses it."""
    made = base | change
    for key in base.keys() & change.keys():
        if isinstance(base[key], dict) and isinstance(change[key], dict):
            made[key] = merged(base[key], change[key])
    if made.get("spaces") == "teacher":
        made.pop("projector", None)
    return made


@dataclass(frozen=True)
class Size:
    """Everything that makes a small or a large study."""

    teacher_rows: dict[str, int]
    rows: dict[str, int]
    heldout: dict[str, int]
    validation: dict[str, int]
    prose: int
    plain_rows: int
    students: dict[str, Student]
    steps: int
    batch: int
    rates: tuple[float, ...]
    seeds: tuple[int, ...]
    pretrain_batch: int
    pretrain_rate: float


SMALL = Size(
    teacher_rows={"qa": 504, "text": 360},
    rows={"qa": 168, "text": 168},
    heldout={"qa": 168, "text": 120},
    validation={"qa": 112, "text": 64},
    prose=24000,
    plain_rows=800,
    students={
        "one": Student("teacher", width=192, layers=4, pretrain_steps=350),
        "two": Student("sentencepiece", width=256, layers=4, vocab_size=6000),
    },
    steps=126,
    batch=8,
    rates=(5e-4, 1e-3),
    seeds=(1, 2, 3),
    pretrain_batch=2,
    pretrain_rate=3e-3,
)

GPU = Size(
    teacher_rows={"qa": 4032, "text": 1600},
    rows={"qa": 504, "text": 504},
    heldout={"qa": 504, "text": 240},
    validation={"qa": 252, "text": 120},
    prose=120000,
    plain_rows=4000,
    students={
        "one": Student("teacher", width=384, layers=8),
        "two": Student("sentencepiece", width=384, layers=8, vocab_size=8000),
    },
    steps=504,
    batch=8,
    rates=(3e-4, 6e-4, 1.2e-3),
    seeds=(1, 2, 3),
    pretrain_batch=16,
    pretrain_rate=1e-3,
)

SIZES = {"small": SMALL, "gpu": GPU}
