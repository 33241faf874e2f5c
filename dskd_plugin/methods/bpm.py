"""Byte-prefix marginalization: the teacher's distribution said in the student's tokens by bytes (arXiv 2607.22334)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dskd_plugin.errors import SettingError
from dskd_plugin.methods.base import PROJECTING, Method, register

if TYPE_CHECKING:
    from dskd_plugin.assemble import Parts
    from dskd_plugin.losses.base import DistillationLoss
    from dskd_plugin.settings import Settings
    from dskd_plugin.text.align import Pairing


@register
class BytePrefixes(Method):
    """The teacher by bytes: a target for every token of the student. Source: arXiv 2607.22334."""

    name = "bpm"
    ignores = ("support", *PROJECTING)
    own = ("bpm",)
    pairs_by = "bytes"

    def pairing(self, settings: Settings) -> Pairing:
        return self.pairs_by

    def by_events(self, settings: Settings) -> bool:
        return settings.shared == "events"

    def check(self, settings: Settings) -> None:
        if self.by_events(settings) and "bpm" in settings.model_fields_set:
            raise SettingError(
                "dskd.bpm.mask_whitespace",
                "it unset beside shared: events",
                f"{settings.bpm.mask_whitespace!r}: events of white space mean the same on both sides",
                "Remove it, or set shared: ids.",
            )
        if settings.divergence.kind in ("reverse_kl", "adaptive_kl"):
            raise SettingError(
                "dskd.divergence.kind",
                "a divergence that is finite where the teacher gives a token no mass, beside method: bpm",
                repr(settings.divergence.kind),
                "Use js, as published, or skewed_reverse_kl.",
            )

    def build(self, parts: Parts) -> DistillationLoss:
        import torch

        from dskd_plugin.core.prefixes import PrefixCompare
        from dskd_plugin.losses.by_bytes import ByBytes
        from dskd_plugin.text.prefix_maps import maps_by_events, maps_by_ids
        from dskd_plugin.text.tokens import WHITE

        assert parts.overlap is not None
        student, teacher, device = parts.pair.student, parts.pair.teacher, parts.teacher_head.weight_VD.device
        student_V, silent_V = None, None
        if self.by_events(parts.settings):
            assert parts.events is not None
            maps = maps_by_events(student, teacher, parts.events, device)
            student_V = parts.events.student_V.to(device)
        else:
            to_student = parts.overlap.teacher_to_student_V[: parts.teacher_head.vocab_size]
            maps = maps_by_ids(student, teacher, to_student.tolist(), parts.student_ids, device)
            if parts.settings.bpm.mask_whitespace:
                silent_V = torch.tensor([text is not None and not text.strip(WHITE) for text in student.bytes])
        compare = PrefixCompare(
            parts.divergence, parts.settings.temperature, maps.together, maps.residual + 1, student_V
        )
        return ByBytes(
            parts.student,
            parts.objective,
            compare,
            places=maps.places,
            silent_V=silent_V,
            open_V=self.open_ids(parts),
            **parts.options,
        )
