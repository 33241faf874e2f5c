"""What a distillation method is: the settings that it reads, the tokens that it pairs, and how its loss is built.

A method is one class in one file of this folder. `register` makes it a value of ``dskd.method``; nothing else in the
plugin knows methods by name. Torch is imported where a loss is built, because settings are checked without it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from dskd_plugin.core.fused.cover import COVERED

if TYPE_CHECKING:
    from torch import Tensor

    from dskd_plugin.assemble import Parts
    from dskd_plugin.core.objective import Compare
    from dskd_plugin.core.segments import SegmentCompare
    from dskd_plugin.losses.base import DistillationLoss
    from dskd_plugin.settings import Settings
    from dskd_plugin.text.align import Pairing

# Settings of the methods that have projectors.
PROJECTING = ("spaces", "target", "guard", "agreement_mask", "unmapped_argmax", "projector")


class Method:
    """A distillation method; subclasses are registered by `register`.

    name: the value of ``dskd.method``. alignment: the value of ``dskd.alignment`` that chooses this one among methods
    of the same name; None for all others. ignores: settings that mean nothing to it. own: those that mean something
    to it alone. compares: what its KD terms compare, see `core.objective.Objective`. pairs_by: which tokens of two
    answers belong together, see `align`. needs_teacher: whether the teacher's states are compared. needs_embedding:
    whether its input embeddings are read too. needs_one_tokenizer: whether it works with one alone. fused: whether
    there are kernels for its loss, see `core.fused`.
    """

    name: ClassVar[str]
    alignment: ClassVar[str | None] = None
    ignores: ClassVar[tuple[str, ...]] = ()
    own: ClassVar[tuple[str, ...]] = ()
    compares: ClassVar[Literal["nothing", "distributions", "spaces"]] = "distributions"
    pairs_by: ClassVar[Pairing] = "exact"
    needs_teacher: ClassVar[bool] = True
    needs_embedding: ClassVar[bool] = False
    needs_one_tokenizer: ClassVar[bool] = False
    fused: ClassVar[bool] = False

    def pairing(self, settings: Settings) -> Pairing:
        """Which tokens of two answers belong together, see `align`."""
        # All rows at which both have read the same: a choice by the gold token would bias the shares inside events.
        return "starts" if self.by_events(settings) else self.pairs_by

    @property
    def in_pairs(self) -> bool:
        """Whether it compares token with token; else all tokens of a text meet, and there are no pairs to count."""
        return self.pairs_by != "all"

    def exact(self, settings: Settings) -> bool:
        """Whether the student-space target is the teacher's own between events."""
        return False

    def by_events(self, settings: Settings) -> bool:
        """Whether events of several tokens are compared."""
        return False

    def with_spans(self, settings: Settings) -> bool:
        """Whether it compares spans of text beside pairs of tokens."""
        return False

    def fuses(self, settings: Settings) -> bool:
        """Whether there are kernels for its loss with these settings."""
        return self.fused and ("divergence" in self.ignores or settings.divergence.kind in COVERED)

    def ignored(self, settings: Settings) -> list[str]:
        """Settings in the recipe that mean nothing to the method."""
        of_others = {key for other in METHODS.values() for key in other.own if key not in self.own}
        return [key for key in (*self.ignores, *sorted(of_others)) if key in settings.model_fields_set]

    def chosen_by(self) -> str:
        """The setting that chooses it."""
        return f"method: {self.name}"

    def title(self, settings: Settings) -> str:
        """The method with what matters most of its settings, as a line of the recipe."""
        return f"method: {self.name}"

    def check(self, settings: Settings) -> None:
        """Raise ``ValueError`` for settings that do not go together."""

    def build(self, parts: Parts) -> DistillationLoss:
        """The loss, as a module for the student."""
        from dskd_plugin.losses.direct import Direct

        return Direct(parts.student, parts.objective, self.compare(parts), open_V=self.open_ids(parts), **parts.options)

    def open_ids(self, parts: Parts) -> Tensor | None:
        """Which student ids are one of several of their event, where events are compared."""
        if not self.by_events(parts.settings):
            return None
        assert parts.events is not None
        return parts.events.open_V.to(parts.teacher_head.weight_VD.device)

    def compare(self, parts: Parts) -> Compare | None:
        """The distance of the two distributions at a pair, for a method without projectors."""
        raise NotImplementedError


class SegmentMethod(Method):
    """A method that compares segments, pairs of tokens and spans alike: its formula is a `SegmentCompare`."""

    ignores: ClassVar[tuple[str, ...]] = ("span_weight", "shared", "support", *PROJECTING)

    def with_spans(self, settings: Settings) -> bool:
        return True

    def build(self, parts: Parts) -> DistillationLoss:
        from dskd_plugin.losses.segments import BySegments

        return BySegments(parts.student, parts.objective, self.segment_compare(parts), **parts.options)

    def segment_compare(self, parts: Parts) -> SegmentCompare:
        """The distance of the two models at a segment."""
        raise NotImplementedError


METHODS: dict[tuple[str, str | None], Method] = {}


def register(method: type[Method]) -> type[Method]:
    """Make the method a value of ``dskd.method``."""
    METHODS[method.name, method.alignment] = method()
    return method


def names() -> list[str]:
    """The values of ``dskd.method``, in the order of registration."""
    return list(dict.fromkeys(name for name, _ in METHODS))


def method_of(settings: Settings) -> Method:
    """The method that the settings choose."""
    return METHODS.get((settings.method, settings.alignment)) or METHODS[settings.method, None]
