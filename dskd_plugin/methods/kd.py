"""Knowledge distillation with one tokenizer: the two distributions over the same ids."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dskd_plugin.methods.base import PROJECTING, Method, register

if TYPE_CHECKING:
    from dskd_plugin.assemble import Parts
    from dskd_plugin.core.objective import Compare


@register
class KnowledgeDistillation(Method):
    """One tokenizer, the two distributions as they are. Source: arXiv 1503.02531."""

    name = "kd"
    ignores = ("span_weight", "shared", "support", *PROJECTING)
    needs_one_tokenizer = True
    fused = True

    def compare(self, parts: Parts) -> Compare | None:
        from dskd_plugin.core import baselines

        assert parts.overlap is not None
        shared = len(parts.overlap.student_ids_O)
        if shared == parts.student_ids == parts.teacher_head.vocab_size:
            return baselines.SameIds(parts.divergence, parts.settings.temperature)
        # One side was given some more tokens: the others are compared.
        return baselines.SharedIds(parts.divergence, parts.settings.temperature, *parts.shared_ids)
