"""What both models can say of a segment of text, and the rest (Common-Support, arXiv 2610.28895)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dskd_plugin.methods.base import SegmentMethod, register

if TYPE_CHECKING:
    from dskd_plugin.assemble import Parts
    from dskd_plugin.core.segments import SegmentCompare


@register
class CommonSupportDistillation(SegmentMethod):
    """What both can say at the end of a segment, and the rest. Source: arXiv 2610.28895."""

    name = "csd"

    def segment_compare(self, parts: Parts) -> SegmentCompare:
        from dskd_plugin.core.common_support import CommonSupport, Completions
        from dskd_plugin.text.pieces import shared_id_events
        from dskd_plugin.text.tokens import ids_of_bytes

        assert parts.overlap is not None
        head = parts.teacher_head
        ids = parts.student_ids, head.vocab_size
        events = shared_id_events(parts.overlap, ids).to(head.weight_VD.device)
        student, teacher = parts.pair.student, parts.pair.teacher
        completions = Completions(
            *(student.bytes[: ids[0]], teacher.bytes[: ids[1]]),
            *(ids_of_bytes(student, ids[0]), ids_of_bytes(teacher, ids[1])),
        )
        return CommonSupport(parts.divergence, parts.settings.temperature, events, completions)
