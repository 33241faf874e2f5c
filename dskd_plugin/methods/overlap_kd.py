"""Knowledge distillation on what both vocabularies can say: events, or the shared ids renormalised."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dskd_plugin.errors import SettingError
from dskd_plugin.methods.base import PROJECTING, Method, register

if TYPE_CHECKING:
    from dskd_plugin.assemble import Parts
    from dskd_plugin.core.objective import Compare
    from dskd_plugin.settings import Settings


@register
class OverlapDistillation(Method):
    """What both vocabularies can say: events, shared ids, or the k likeliest of these (arXiv 2610.08448)."""

    name = "overlap_kd"
    ignores = PROJECTING
    fused = True

    def by_events(self, settings: Settings) -> bool:
        return settings.shared == "events"

    def fuses(self, settings: Settings) -> bool:
        return settings.support is None and super().fuses(settings)

    def check(self, settings: Settings) -> None:
        if settings.support is not None and self.by_events(settings):
            raise SettingError(
                "dskd.shared",
                "'ids' beside support",
                "'events': the mass of an event needs the probabilities of all its tokens",
                "Set shared: ids, or remove support.",
            )

    def compare(self, parts: Parts) -> Compare | None:
        from dskd_plugin.core import baselines
        from dskd_plugin.core.events import EventCompare
        from dskd_plugin.core.top_shared import TopSharedCompare

        device, temperature = parts.teacher_head.weight_VD.device, parts.settings.temperature
        if self.by_events(parts.settings):
            assert parts.events is not None
            return EventCompare(parts.divergence, temperature, parts.events.to(device))
        if parts.settings.support is not None:
            return TopSharedCompare(parts.divergence, temperature, parts.settings.support, *parts.shared_ids)
        return baselines.SharedIds(parts.divergence, temperature, *parts.shared_ids)
