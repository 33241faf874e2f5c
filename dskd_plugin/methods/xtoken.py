"""The student's distribution in the teacher's vocabulary, or ids loosely matched (X-Token, arXiv 2605.21699)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dskd_plugin.errors import SettingError
from dskd_plugin.methods.base import PROJECTING, Method, register

if TYPE_CHECKING:
    from dskd_plugin.assemble import Parts
    from dskd_plugin.core.objective import Compare
    from dskd_plugin.core.vocabulary_matrix import VocabularyMatrix
    from dskd_plugin.losses.base import DistillationLoss
    from dskd_plugin.settings import Settings
    from dskd_plugin.text.align import Pairing

LEAST_MATCH = 0.6  # of the largest entry of an id, as published


@register
class CrossToken(Method):
    """The student in the teacher's vocabulary. Source: X-Token, arXiv 2605.21699."""

    name = "xtoken"
    ignores = ("span_weight", "shared", "support", *PROJECTING)
    own = ("xtoken",)

    def pairing(self, settings: Settings) -> Pairing:
        # The matrix says what a token of one side is on the other: the two need not end together.
        return "starts" if settings.xtoken.loss == "projected" else "exact"

    def with_spans(self, settings: Settings) -> bool:
        return settings.xtoken.loss == "hybrid"

    def check(self, settings: Settings) -> None:
        if not self.with_spans(settings):
            return
        ignored = ["divergence"] if "divergence" in settings.model_fields_set else []
        ignored += ["xtoken.top_k"] if "top_k" in settings.xtoken.model_fields_set else []
        if ignored:
            raise SettingError(
                "dskd",
                "only settings that have an effect",
                f"{', '.join(ignored)} which xtoken.loss: hybrid ignores",
                "Remove them, or set xtoken.loss: projected.",
            )

    def build(self, parts: Parts) -> DistillationLoss:
        from dskd_plugin.core.hybrid import HybridCompare
        from dskd_plugin.losses.segments import BySegments

        if not self.with_spans(parts.settings):
            return super().build(parts)
        compare = HybridCompare(
            0.5,
            parts.settings.temperature,
            (1.0, 1.0),
            *_matrix(parts).best_pairs(LEAST_MATCH),
            student_ids=parts.student_ids,
            teacher_ids=parts.teacher_head.vocab_size,
        )
        return BySegments(parts.student, parts.objective, compare, **parts.options)

    def compare(self, parts: Parts) -> Compare | None:
        from dskd_plugin.core.vocabulary_matrix import MatrixCompare

        settings = parts.settings
        return MatrixCompare(parts.divergence, settings.temperature, _matrix(parts), settings.xtoken.top_k)


def _matrix(parts: Parts) -> VocabularyMatrix:
    from dskd_plugin.text.respelled import respelling_matrix

    assert parts.overlap is not None and parts.tokenizers is not None
    head, pair = parts.teacher_head, parts.pair
    ids = parts.student_ids, head.vocab_size
    teacher = parts.tokenizers[1], pair.teacher
    return respelling_matrix(pair.student, teacher, parts.overlap, ids).to(head.weight_VD.device)
