"""Method dskd: which settings it takes and how its loss is built, `losses.dual_space` (arXiv 2406.17328)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dskd_plugin.errors import SettingError
from dskd_plugin.methods.base import Method, register

if TYPE_CHECKING:
    from dskd_plugin.assemble import Parts
    from dskd_plugin.losses.base import DistillationLoss
    from dskd_plugin.settings import Settings


@register
class DualSpace(Method):
    """dskd on aligned rows. Source: arXiv 2504.11426; the exact target is of our own."""

    name = "dskd"
    compares = "spaces"
    fused = True

    def exact(self, settings: Settings) -> bool:
        return settings.spaces != "teacher" and settings.target == "exact"

    def by_events(self, settings: Settings) -> bool:
        return settings.shared == "events" and self.exact(settings)

    def title(self, settings: Settings) -> str:
        return f"method: dskd {'with target: exact' if self.exact(settings) else 'without an exact target'}"

    def check(self, settings: Settings) -> None:
        given = settings.model_fields_set
        if "support" in given:
            raise SettingError(
                "dskd.support",
                "it unset beside method: dskd",
                f"{settings.support!r}: the projector learns from the teacher's whole distribution",
                "Remove it, or use method: overlap_kd with shared: ids.",
            )
        if self.exact(settings) and "unmapped_argmax" in given:
            raise SettingError(
                "dskd.unmapped_argmax",
                "it unset beside target: exact",
                f"{settings.unmapped_argmax!r}: every prediction of the teacher has an event",
                "Remove it, or set target: projected.",
            )
        if settings.target == "projected" and "shared" in given:
            raise SettingError(
                "dskd.shared",
                "it unset beside target: projected",
                f"{settings.shared!r}: it has no effect there",
                "Remove it, or set target: exact.",
            )
        if "guard" in given and settings.spaces != "teacher" and not settings.can_guard:
            lacks = "unpaired: ce" if settings.exact else "target: exact"
            raise SettingError(
                "dskd.guard", f"it unset without {lacks}", f"{settings.guard}: it has no effect", "Remove it."
            )
        check_spaces(settings)

    def build(self, parts: Parts) -> DistillationLoss:
        from dskd_plugin.losses.dual_space import DualSpaceLoss

        settings = parts.settings
        return DualSpaceLoss(
            parts.student,
            parts.objective,
            keep_unmapped=settings.unmapped_argmax == "teacher_space",
            soft_labels=settings.projector.labels == "soft",
            events=parts.events if settings.exact else None,
            guard=settings.guards,
            **parts.projectors,
        )


def check_spaces(settings: Settings) -> None:
    """Raise ``ValueError`` for settings of the space that is not compared."""
    given, of_projector = settings.model_fields_set, settings.projector.model_fields_set
    ignored: list[str] = []
    beside = ""
    if settings.spaces == "teacher":
        ignored += [key for key in ("target", "shared", "guard") if key in given]
        ignored += [f"projector.{key}" for key in ("init", "learning_rate", "labels") if key in of_projector]
        ignored += ["agreement_mask"] if "agreement_mask" in given else []
    if settings.spaces == "student":
        ignored += ["unmapped_argmax"] if "unmapped_argmax" in given else []
        if settings.projector.init == "random" and settings.projector.top_vocab is not None:
            ignored.append("projector.top_vocab")
            beside = " with projector.init: random"
    if ignored:
        raise SettingError(
            "dskd",
            "only settings that have an effect",
            f"{', '.join(ignored)} which spaces: {settings.spaces}{beside} ignores",
            "Remove them, or choose other spaces.",
        )
