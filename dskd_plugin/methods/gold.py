"""Shared ids by their probabilities, all others by rank, groups of tokens merged (GOLD of TRL)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dskd_plugin.errors import SettingError
from dskd_plugin.methods.base import SegmentMethod, register

if TYPE_CHECKING:
    from dskd_plugin.assemble import Parts
    from dskd_plugin.core.segments import SegmentCompare
    from dskd_plugin.settings import Settings


@register
class GeneralLogitDistillation(SegmentMethod):
    """Shared ids by probability, the others by rank. Source: TRL's GOLD."""

    name = "gold"
    ignores = ("divergence", *SegmentMethod.ignores)
    own = ("gold",)

    def check(self, settings: Settings) -> None:
        weights = settings.gold.matched_weight, settings.gold.unmatched_weight
        if (weights[0] is None) != (weights[1] is None) or weights == (0, 0):
            raise SettingError(
                "dskd.gold",
                "matched_weight and unmatched_weight together, one of them above 0, or neither",
                f"{weights[0]} and {weights[1]}",
                "Set both, or remove both for weights by the share of matched tokens.",
            )

    def segment_compare(self, parts: Parts) -> SegmentCompare:
        from dskd_plugin.core.hybrid import HybridCompare

        settings, shared_ids = parts.settings.gold, parts.shared_ids
        teacher_ids = parts.teacher_head.vocab_size
        matched, others = settings.matched_weight, settings.unmatched_weight
        if matched is None or others is None:
            matched = len(shared_ids[1]) / teacher_ids
            others = 1 - matched
        return HybridCompare(
            settings.beta,
            parts.settings.temperature,
            (matched, others),
            *shared_ids,
            student_ids=parts.student_ids,
            teacher_ids=teacher_ids,
        )
