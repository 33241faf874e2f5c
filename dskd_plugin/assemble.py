"""Puts a run's loss together: the settings, the two models and what their vocabularies have in common."""

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from dskd_plugin.core.backend import Backend
from dskd_plugin.core.divergences import Divergence, divergence
from dskd_plugin.core.events import Events
from dskd_plugin.core.fused.backend import FusedBlocks
from dskd_plugin.core.heads import Head
from dskd_plugin.core.objective import Objective
from dskd_plugin.core.overlap import Overlap
from dskd_plugin.errors import SettingError
from dskd_plugin.generation.rollout import Rollout
from dskd_plugin.losses.base import FUSED_BLOCK_ELEMENTS, DistillationLoss
from dskd_plugin.methods import method_of
from dskd_plugin.models import head_rows
from dskd_plugin.pair import Pair, pair_events, shared_ids
from dskd_plugin.run import Sides
from dskd_plugin.settings import Settings
from dskd_plugin.teachers.base import TeacherParts


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What the loss of a method is made of.

    teacher, overlap: None for a method that needs neither. events: for the settings that compare them
    (`Settings.exact`, `Settings.by_events`). tokenizers: (student, teacher), for methods that cut texts.
    options: what every loss takes.
    """

    settings: Settings
    student: nn.Module
    objective: Objective
    pair: Pair
    teacher: TeacherParts | None = None
    overlap: Overlap | None = None
    events: Events | None = None
    tokenizers: tuple[Any, Any] | None = None
    projector_dtype: torch.dtype = torch.float32
    seed: int
    options: dict[str, object] = field(default_factory=dict)

    @property
    def divergence(self) -> Divergence:
        return self.objective.divergence

    @property
    def student_ids(self) -> int:
        """Ids that both the student's tokenizer and its head have."""
        return min(self.pair.student.vocab_size, head_rows(self.student))

    @property
    def teacher_head(self) -> Head:
        assert self.teacher is not None
        return self.teacher.head

    @property
    def shared_ids(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids of student and teacher that mean the same, where the loss is computed."""
        assert self.overlap is not None
        device = self.teacher_head.weight_VD.device
        return self.overlap.student_ids_O.to(device), self.overlap.teacher_ids_O.to(device)

    @property
    def projectors(self) -> dict[str, Any]:
        """What the losses with projectors take beside the options."""
        return {
            "overlap": self.overlap,
            "projector_init": self.settings.projector.init,
            "top_vocab": self.settings.projector.top_vocab,
            "projector_dtype": self.projector_dtype,
            "seed": self.seed,
            **self.options,
        }


def distillation_loss(
    settings: Settings,
    student: nn.Module,
    teacher: TeacherParts | None,
    pair: Pair,
    overlap: Overlap | None,
    events: Events | None = None,
    *,
    tokenizers: tuple[Any, Any] | None = None,
    projector_dtype: torch.dtype = torch.float32,
    seed: int,
    backend: Backend | None = None,
    teacher_weight: float = 1.0,
    adds_ce: bool = True,
) -> DistillationLoss:
    """The loss that the settings name, see `Parts`. backend: None for the reference.

    teacher_weight, adds_ce: of one of several teachers, see `core.objective.Objective`.
    """
    method = method_of(settings)
    knobs = settings.divergence.model_dump()
    objective = Objective(
        divergence=divergence(knobs.pop("kind"), **knobs),
        temperature=settings.temperature,
        kd_ratio=settings.kd_ratio,
        spaces=settings.spaces,
        agreement_mask=settings.agreement_mask,
        compares=method.compares,
        span_weight=settings.span_weight,
        unpaired_ce=settings.unpaired_ce,
        teacher_weight=teacher_weight,
        adds_ce=adds_ce,
    )
    parts = Parts(
        settings=settings,
        student=student,
        objective=objective,
        pair=pair,
        teacher=teacher,
        overlap=overlap,
        events=events,
        tokenizers=tokenizers,
        projector_dtype=projector_dtype,
        seed=seed,
        options={
            "student_vocab_size": pair.student.vocab_size,
            "teacher_head": None if teacher is None else teacher.head,
            "warmup_steps": settings.projector.warmup_steps,
            "balanced": settings.kd_weight == "balanced",
            "backend": backend,
        },
    )
    return method.build(parts)


def backend_of(settings: Settings, device: torch.device) -> Backend | None:
    """What `dskd.impl` chooses where the student trains; None for the reference."""
    able = check_impl(settings, device.type)
    if settings.impl == "blocks" or not (able and method_of(settings).fuses(settings)):
        return None
    return FusedBlocks(FUSED_BLOCK_ELEMENTS)


def check_impl(settings: Settings, device_type: str) -> bool:
    """Whether the kernels can run there; ``ValueError`` where they cannot and the recipe insists on them."""
    able = device_type == "cuda" and importlib.util.find_spec("triton") is not None
    if settings.impl == "fused" and not able:
        raise SettingError(
            "dskd.impl",
            "'blocks' or 'auto' without a CUDA device and Triton",
            f"'fused', and a student on {device_type}",
            "Set impl: auto, which takes blocks there.",
        )
    return able


def in_common(sides: Sides, teacher: TeacherParts, rows: int) -> tuple[Overlap, Events | None]:
    """What the two vocabularies have in common: tokens, and events for settings that compare them.

    rows: of the student's output head.
    """
    pair, settings = sides.pair, sides.run.settings
    overlap = shared_ids(pair, sides.ends, head_rows=(rows, teacher.head.weight_VD.shape[0]))
    if not (settings.exact or settings.by_events):
        return overlap, None
    ids = min(rows, pair.student.vocab_size), teacher.head.vocab_size
    return overlap, pair_events(pair, sides.tokenizers, overlap, settings, sides.ends, ids)


def sampler(each: Sequence[Sides], *, seed: int) -> Rollout | None:
    """What samples answers of the student in training; None without ``dskd.on_policy``. each: one for each teacher."""
    on_policy, student_len = each[0].run.settings.on_policy, each[0].run.student_len
    if on_policy is None:
        return None
    found = [
        Rollout(
            on_policy,
            *sides.tokenizers,
            sides.aligner(),
            seed=seed,
            teacher_len=sides.run.teacher.sequence_len,
            student_len=student_len,
            teacher_rows=sides.run.teacher.rows,
            markers=sides.markers,
        )
        for sides in each
    ]
    first, *others = found
    return first.read_by_all(others)
