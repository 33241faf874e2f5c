"""The blocks inside ``dskd:`` beside the teacher's: divergences, projector, what single methods have, on-policy."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field


class Block(BaseModel):
    """A settings block that knows its keys. Only these blocks forbid unknown keys, not the recipe around them."""

    model_config = ConfigDict(extra="forbid")


class ForwardKL(Block):
    """KL(teacher, student)."""

    kind: Literal["forward_kl"]


class ReverseKL(Block):
    """KL(student, teacher)."""

    kind: Literal["reverse_kl"]


class JensenShannon(Block):
    """Jensen-Shannon, with the weight of the teacher in the mixture."""

    kind: Literal["js"]
    teacher_share: float = Field(0.5, gt=0, lt=1, description="weight of the teacher in the mixture")


class SkewedForwardKL(Block):
    """KL(teacher, mixture of both)."""

    kind: Literal["skewed_forward_kl"]
    skew: float = Field(0.1, gt=0, lt=1, description="share of the teacher mixed into the student")


class SkewedReverseKL(Block):
    """KL(student, mixture of both)."""

    kind: Literal["skewed_reverse_kl"]
    skew: float = Field(0.1, gt=0, lt=1, description="share of the student mixed into the teacher")


class AdaptiveKL(Block):
    """Forward and reverse KL, weighed by where they differ."""

    kind: Literal["adaptive_kl"]
    head_mass: float = Field(0.5, gt=0, lt=1, description="cumulative teacher mass that counts as the head")


class TotalVariation(Block):
    """Total variation distance."""

    kind: Literal["tvd"]


_AnyDivergence = ForwardKL | ReverseKL | JensenShannon | SkewedForwardKL | SkewedReverseKL | AdaptiveKL | TotalVariation
Divergence = Annotated[_AnyDivergence, Field(discriminator="kind")]


class ProjectorSettings(Block):
    """The block `dskd.projector`."""

    init: Literal["ideal", "random", "fitted"] = Field(
        "ideal",
        description="ideal: least squares from the two heads; fitted: that, then trained on teacher states of training "
        "rows before the first step",
    )
    learning_rate: float = Field(
        5e-4, gt=0, le=1, description="of the teacher-to-student projector; it follows the recipe's schedule"
    )
    labels: Literal["hard", "soft"] = Field(
        "soft",
        description="what the projector learns: the teacher's most likely token, or its distribution over the tokens "
        "that the student has too; not with `alignment: cma`, which learns the gold tokens",
    )
    top_vocab: int | None = Field(
        None, ge=1, description="initialise from the k most frequent shared tokens (lowest student ids); null: all"
    )
    warmup_steps: int = Field(
        0,
        ge=0,
        description="first steps in which the KD terms train the projectors alone; the student learns from the gold "
        "tokens meanwhile",
    )


class BytePrefixSettings(Block):
    """The block `dskd.bpm`."""

    mask_whitespace: bool = Field(
        True,
        description="`bpm` with `shared: ids`: tokens of white space alone have no KD term, as published; to the two "
        "sides they do not mean the same",
        json_schema_extra={"see": "[bytes](method.md#bytes)"},
    )


class LikelihoodSettings(Block):
    """The block `dskd.alm`."""

    bias_threshold: float = Field(
        0.1,
        ge=0,
        lt=1,
        description="`alm`: leave out a pair or span after which the teacher gives white space and special tokens "
        "together less than this probability: to it the text there is the start of something longer; 0: none",
    )


class GoldSettings(Block):
    """The block `dskd.gold`."""

    beta: float = Field(
        0.5, gt=0, lt=1, description="`gold`: weight of the teacher in the mixture of its Jensen-Shannon divergence"
    )
    matched_weight: float | None = Field(
        None,
        ge=0,
        description="`gold`: weight of the tokens that both vocabularies have; null, with the next: their share of the "
        "teacher's ids",
    )
    unmatched_weight: float | None = Field(
        None, ge=0, description="`gold`: weight of all others, compared by rank; null: 1 minus that share"
    )


class XTokenSettings(Block):
    """The block `dskd.xtoken`."""

    loss: Literal["projected", "hybrid"] = Field(
        "projected",
        description="`xtoken`: compare in the teacher's vocabulary, to which a matrix takes the student's distribution "
        "(P-KL); or as `gold`, each token matched with the largest entry of the matrix (H-KL)",
    )
    top_k: int = Field(
        8192,
        ge=1,
        description="`xtoken.loss: projected`: compare the teacher's k likeliest tokens at a row, renormalised",
    )


class OnPolicySettings(Block):
    """The block `dskd.on_policy`."""

    fraction: float = Field(
        gt=0,
        le=1,
        description="share of steps whose KD terms are taken on answers that the student samples",
        json_schema_extra={"see": "[On-policy](#on-policy)"},
    )
    start_epoch: float = Field(0.0, ge=0, description="epochs before the first such step")
    max_new_tokens: int = Field(256, ge=1, description="longest answer in student tokens")
    temperature: float = Field(1.0, gt=0, le=100, description="of the sampling")
    top_p: float = Field(1.0, gt=0, le=1, description="sample from the most likely tokens of this total probability")
    top_k: int = Field(0, ge=0, description="sample from the k most likely tokens; 0: all")
    log_samples: int = Field(0, ge=0, description="answers written to the log at each such step")
