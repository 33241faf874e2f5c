"""Vocabularies mapped by minimum edit distance, rows by dynamic time warping (arXiv 2401.10491)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dskd_plugin.methods.base import PROJECTING, Method, register

if TYPE_CHECKING:
    from dskd_plugin.assemble import Parts
    from dskd_plugin.core.objective import Compare


@register
class MinimumEditDistance(Method):
    """Ids mapped by edit distance, rows by time warping. Source: arXiv 2401.10491."""

    name = "mined"
    ignores = ("alignment", "divergence", "shared", "support", *PROJECTING)
    pairs_by = "warped"
    fused = True

    def compare(self, parts: Parts) -> Compare | None:
        from dskd_plugin.core import baselines
        from dskd_plugin.pair import nearest_ids

        assert parts.overlap is not None
        student, teacher, head = parts.pair.student, parts.pair.teacher, parts.teacher_head
        roles = []
        for teacher_id, student_id in enumerate(parts.overlap.teacher_to_student_V.tolist()):
            if student_id >= 0 and teacher.bytes[teacher_id] is None:
                roles.append((student_id, teacher_id))
        images_V = nearest_ids(student, teacher, roles)[: head.vocab_size].to(head.weight_VD.device)
        images_V[images_V >= parts.student_ids] = -1  # a head may have fewer rows than the tokenizer has ids
        return baselines.MappedIds(parts.settings.temperature, images_V, parts.student_ids)
