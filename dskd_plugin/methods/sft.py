"""Plain fine-tuning on the same rows: cross-entropy alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dskd_plugin.methods.base import PROJECTING, Method, register

if TYPE_CHECKING:
    from dskd_plugin.assemble import Parts
    from dskd_plugin.core.objective import Compare


@register
class FineTuning(Method):
    """Reads the teacher's tokenizer, for the same rows, and needs no more of it."""

    name = "sft"
    ignores = (
        "alignment",
        "divergence",
        "temperature",
        "kd_ratio",
        "kd_weight",
        "unpaired",
        "span_weight",
        "on_policy",
        "shared",
        "support",
        *PROJECTING,
    )
    compares = "nothing"
    needs_teacher = False
    fused = True

    def compare(self, parts: Parts) -> Compare | None:
        return None
