"""Approximate likelihood matching: how likely each model finds the text of a pair or span (arXiv 2503.20083)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dskd_plugin.methods.base import SegmentMethod, register

if TYPE_CHECKING:
    from dskd_plugin.assemble import Parts
    from dskd_plugin.core.segments import SegmentCompare

SOFTENING = 100.0  # tau, as published


@register
class ApproximateLikelihoodMatching(SegmentMethod):
    """Likelihoods of pairs and spans, as Bernoulli variables of power 1 / 100. Source: arXiv 2503.20083."""

    name = "alm"
    ignores = ("divergence", "temperature", *SegmentMethod.ignores)
    own = ("alm",)

    def segment_compare(self, parts: Parts) -> SegmentCompare:
        import torch

        from dskd_plugin.core.likelihood import LikelihoodCompare
        from dskd_plugin.text.tokens import WHITE

        least, head, table = parts.settings.alm.bias_threshold, parts.teacher_head, parts.pair.teacher
        if not least:
            return LikelihoodCompare(SOFTENING)
        white = tuple(bytes([character]) for character in WHITE)
        ends_U = torch.zeros(head.vocab_size, dtype=torch.bool)
        for token, text in enumerate(table.bytes[: head.vocab_size]):
            ends_U[token] = token in table.special or (text or b"").startswith(white)
        return LikelihoodCompare(SOFTENING, ends_U.to(head.weight_VD.device), least)
