"""Shared ids beside one entry for each span of text (SimCT, arXiv 2605.07711)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dskd_plugin.methods.base import SegmentMethod, register

if TYPE_CHECKING:
    from dskd_plugin.assemble import Parts
    from dskd_plugin.core.segments import SegmentCompare


@register
class SpanDistillation(SegmentMethod):
    """Shared ids and one entry for the rest of a span. Source: SimCT, arXiv 2605.07711."""

    name = "span_kd"

    def segment_compare(self, parts: Parts) -> SegmentCompare:
        from dskd_plugin.core.extended import ExtendedCompare

        return ExtendedCompare(parts.divergence, parts.settings.temperature, *parts.shared_ids)
