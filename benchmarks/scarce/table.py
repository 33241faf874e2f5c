"""What is compared, as data: a recipe is one training after another; a new one is one line.

The rows and the teacher are the quickstart's: 84 gold answers, and the teacher's answers to 490 questions. So is the
student, with its tokenizer or with another one of `students.py`.
"""

from dataclasses import dataclass, field
from typing import Any

SEEDS = (1, 2, 3)
KD_RATIO = 0.9  # of the quickstart: the teacher's distributions weigh more than its single answers
ROWS = {"gold": ("data/gold.jsonl",), "answers": ("answers/rows.jsonl",)}
ROWS["both"] = ROWS["gold"] + ROWS["answers"]


@dataclass(frozen=True)
class Step:
    """One training. dskd: its block without the teacher, None for plain fine-tuning; rows: a key of ROWS.

    rate: of the student; the first step starts from the quickstart's student, a later one from the step before.
    """

    dskd: dict[str, Any] | None
    rows: str = "both"
    rate: float = 1e-3
    micro_batch: int = 2


@dataclass(frozen=True)
class Recipe:
    """title: its name in the tables."""

    title: str
    steps: tuple[Step, ...]


def one(title: str, **block: Any) -> Recipe:
    """One distillation on gold rows and the teacher's answers."""
    return Recipe(title, (Step({"kd_ratio": KD_RATIO} | block),))


def two(title: str, second: dict[str, Any] | None) -> Recipe:
    """DSKD on the teacher's answers, then the gold rows (arXiv 2606.22942)."""
    return Recipe(title, (Step({"kd_ratio": KD_RATIO}, "answers"), Step(second, "gold", rate=5e-4)))


def sampled(title: str, **block: Any) -> Recipe:
    """Fine-tuning on the teacher's answers, then KD terms alone on what the student says (as SimCT trains)."""
    dskd = {"kd_ratio": 1.0, "divergence": {"kind": "reverse_kl"}}
    dskd["on_policy"] = {"fraction": 1.0, "max_new_tokens": 48, "temperature": 0.6}
    return Recipe(title, (Step(None), Step(dskd | block, rate=2e-4, micro_batch=8)))


SEQKD, DSKD = "seqkd", "dskd"  # what every recipe is compared with
RECIPES: dict[str, Recipe] = {
    SEQKD: Recipe("SeqKD: SFT on the same rows", (Step(None),)),
    DSKD: one("`dskd`, `kd_ratio: 0.9`"),
    "dskd_half": one("`dskd`, all defaults (`kd_ratio: 0.5`)", kd_ratio=0.5),
    "dskd_both": one("`dskd`, `spaces: both`", spaces="both"),
    "dskd_projected": one("`dskd`, `target: projected`", target="projected"),
    "dskd_ids": one("`dskd`, `shared: ids`", shared="ids"),
    "dskd_balanced": one("`dskd`, `kd_weight: balanced`", kd_weight="balanced"),
    "dskd_spans": one("`dskd`, `span_weight: 1`", span_weight=1.0),
    "dskd_spans_100": one("`dskd`, `span_weight: 100`", span_weight=100.0),
    "overlap_kd": one("`overlap_kd`", method="overlap_kd"),
    "overlap_kd_ids": one("`overlap_kd`, `shared: ids`", method="overlap_kd", shared="ids"),
    "overlap_kd_16": one("`overlap_kd`, `shared: ids`, `support: 16`", method="overlap_kd", shared="ids", support=16),
    "overlap_kd_spans": one("`overlap_kd`, `span_weight: 100`", method="overlap_kd", span_weight=100.0),
    "bpm": one("`bpm`", method="bpm"),
    "bpm_published": one(
        "`bpm` as published: `shared: ids`, `mask_whitespace`, `divergence: {kind: js}`",
        method="bpm",
        shared="ids",
        bpm={"mask_whitespace": True},
        divergence={"kind": "js"},
    ),
    "span_kd": one("`span_kd`", method="span_kd"),
    "csd": one("`csd`, `kd_weight: balanced`", method="csd", kd_weight="balanced"),
    "alm": one("`alm`, `kd_weight: balanced`", method="alm", kd_weight="balanced"),
    "gold": one("`gold`", method="gold"),
    "xtoken": one("`xtoken`, projected", method="xtoken"),
    "xtoken_hybrid": one("`xtoken`, hybrid", method="xtoken", xtoken={"loss": "hybrid"}),
    "uld": one("`uld`", method="uld"),
    "mined": one("`mined`", method="mined"),
    "two_stage": two("two stages: `dskd` on answers, `dskd` on gold", {}),
    "two_stage_sft": two("two stages: `dskd` on answers, SFT on gold", None),
    "on_policy": sampled("SeqKD, then `dskd` on-policy, reverse KL"),
    "on_policy_overlap": sampled("SeqKD, then `overlap_kd` on-policy, reverse KL", method="overlap_kd"),
    "on_policy_16": sampled(
        "SeqKD, then `overlap_kd`, `support: 16` on-policy, reverse KL", method="overlap_kd", shared="ids", support=16
    ),
    "on_policy_bpm": sampled("SeqKD, then `bpm` on-policy, Jensen-Shannon", method="bpm", divergence={"kind": "js"}),
    "on_policy_span_kd": sampled("SeqKD, then `span_kd` on-policy, reverse KL", method="span_kd"),
}


@dataclass(frozen=True)
class Run:
    """A recipe from a table above for one student with one seed: of the questions, the student and the training."""

    student: str
    recipe: str
    seed: int
    steps: tuple[Step, ...] = field(repr=False)

    @property
    def name(self) -> str:
        return f"{self.student}-{self.recipe}-{self.seed}"


def runs(students: list[str], recipes: list[str], seeds: list[int]) -> list[Run]:
    """Every recipe of the first student and seed, then of the next seed, then of the next student."""
    return [Run(student, name, seed, RECIPES[name].steps) for student in students for seed in seeds for name in recipes]
