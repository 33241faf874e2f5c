"""Method dskd with alignment: cma: its settings, and how its loss is built (arXiv 2406.17328)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dskd_plugin.errors import SettingError
from dskd_plugin.methods.base import register
from dskd_plugin.methods.dual_space import DualSpace, check_spaces

if TYPE_CHECKING:
    from dskd_plugin.assemble import Parts
    from dskd_plugin.losses.base import DistillationLoss
    from dskd_plugin.settings import Settings


@register
class CrossAttention(DualSpace):
    """dskd with `alignment: cma`. Source: arXiv 2406.17328."""

    alignment = "cma"
    ignores = ("unmapped_argmax", "shared", "support", "guard")
    pairs_by = "all"
    needs_embedding = True

    def exact(self, settings: Settings) -> bool:
        return False

    def ignored(self, settings: Settings) -> list[str]:
        labels = ["projector.labels"] if "labels" in settings.projector.model_fields_set else []
        return super().ignored(settings) + labels

    def chosen_by(self) -> str:
        return "alignment: cma"

    def title(self, settings: Settings) -> str:
        return "method: dskd with alignment: cma"

    def check(self, settings: Settings) -> None:
        if settings.target == "exact" and "target" in settings.model_fields_set:
            raise SettingError(
                "dskd.target",
                "'projected' beside alignment: cma",
                (
                    "'exact': attention mixes teacher rows, so that no single distribution of the teacher belongs to a "
                    "row"
                ),
                "Remove it, or use alignment: eta.",
            )
        if settings.projector.init == "fitted":
            raise SettingError(
                "dskd.projector.init",
                "'ideal' or 'random' beside alignment: cma",
                "'fitted': attention has three maps that only fit together",
                "Remove it, or use alignment: eta.",
            )
        check_spaces(settings)

    def build(self, parts: Parts) -> DistillationLoss:
        from dskd_plugin.losses.cross_attention import CrossAttentionLoss

        assert parts.teacher is not None
        return CrossAttentionLoss(
            parts.student, parts.objective, teacher_embedding_VD=parts.teacher.embedding, **parts.projectors
        )
