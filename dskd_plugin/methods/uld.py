"""Universal logit distillation: sorted probabilities, position by position (arXiv 2402.12030)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dskd_plugin.methods.base import PROJECTING, Method, register

if TYPE_CHECKING:
    from dskd_plugin.assemble import Parts
    from dskd_plugin.core.objective import Compare


@register
class UniversalLogitDistillation(Method):
    """Sorted probabilities, position by position. Source: arXiv 2402.12030."""

    name = "uld"
    ignores = ("alignment", "divergence", "shared", "support", *PROJECTING)
    pairs_by = "position"

    def compare(self, parts: Parts) -> Compare | None:
        from dskd_plugin.core import baselines

        return baselines.uld(parts.settings.temperature)
