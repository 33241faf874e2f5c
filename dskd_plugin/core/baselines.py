"""The other methods' comparisons of two next-token distributions: logits of the real ids in, one number per row out.

The gradient reaches the student's logits alone. Shape letters: N rows, V ids (the student's in student_NV, the
teacher's in teacher_NV), O ids that both vocabularies share.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from dskd_plugin.core.divergences import Divergence, forward_kl, log_probs
from dskd_plugin.core.events import IdsByEvent
from dskd_plugin.core.objective import Compare
from dskd_plugin.core.overlap import check_shared


@dataclass(frozen=True)
class SameIds:
    """Plain distillation between models of one tokenizer: dist(z_s, z_t) over its ids, at the temperature.

    Returns [N] nats; ValueError at the call for vocabularies of unequal size.
    Source: Hinton et al., arXiv 1503.02531, without the factor temperature^2.
    """

    divergence: Divergence
    temperature: float

    def __call__(self, *, student_NV: Tensor, teacher_NV: Tensor) -> Tensor:
        return self.divergence(
            student_NV=log_probs(student_NV, temperature=self.temperature),
            teacher_NV=log_probs(teacher_NV.detach(), temperature=self.temperature),
        )


@dataclass(frozen=True)
class SharedIds:
    """Distillation on the shared vocabulary: dist of the two distributions given that the id is a shared one.

    student_ids_O, teacher_ids_O: the same tokens, overlap.Overlap. Ids beyond them get no gradient.
    Returns [N] nats; ValueError when the ids do not pair up or are none.
    """

    divergence: Divergence
    temperature: float
    student_ids_O: Tensor
    teacher_ids_O: Tensor

    def __post_init__(self) -> None:
        check_shared(self.student_ids_O, self.teacher_ids_O)

    def __call__(self, *, student_NV: Tensor, teacher_NV: Tensor) -> Tensor:
        return SameIds(self.divergence, self.temperature)(
            student_NV=student_NV.index_select(-1, self.student_ids_O),
            teacher_NV=teacher_NV.index_select(-1, self.teacher_ids_O),
        )

    @cached_property
    def partner_V(self) -> Tensor:
        """The teacher's id of each student id up to the last shared one, int32, -1 for none."""
        partner_V = torch.full((int(self.student_ids_O.max()) + 1,), -1, device=self.student_ids_O.device)
        return partner_V.index_copy(0, self.student_ids_O, self.teacher_ids_O).int()


def uld(temperature: float) -> Compare:
    """Universal logit distillation: how far the sorted probabilities are apart, whatever the ids.

        sum over k of |p_(k) - q_(k)|,   p teacher, q student, each sorted from the largest, at the temperature

    The shorter vocabulary is padded with probability 0.
    Returns [N], from 0 (equal up to order) to below 2; a sum of probabilities and not nats.
    Source: Boizard et al., arXiv 2402.12030.
    """

    def compare(*, student_NV: Tensor, teacher_NV: Tensor) -> Tensor:
        # Sorted logits have the sorted probabilities, so the sort is not in the way of an exact log softmax.
        student_NV, teacher_NV = (
            log_probs(x.sort(dim=-1, descending=True).values, temperature=temperature).exp()
            for x in (student_NV, teacher_NV.detach())
        )
        both = min(student_NV.shape[-1], teacher_NV.shape[-1])
        paired_N = (student_NV[:, :both] - teacher_NV[:, :both]).abs().sum(-1)
        return paired_N + student_NV[:, both:].sum(-1) + teacher_NV[:, both:].sum(-1)

    return compare


@dataclass(frozen=True)
class MappedIds:
    """Forward KL from the teacher's mass moved to student ids.

        sum over ids of p log(p / q),   p(id) = sum of the teacher's probabilities of all tokens with this image

    Moved to the nearest ids it is minimum-edit-distance distillation, moved to equal tokens it gives the soft labels
    of dskd's projector (blockwise.dskd_loss).

    to_student_V: image of each teacher id, -1 for none: its mass is left out and the rest renormalised. Student ids
    that are no image have teacher probability 0. student_vocab: number of the student's real ids.
    Returns [N] nats; ValueError for images beyond the student's ids or for none at all.
    Source: Wan et al., arXiv 2401.10491 (FuseLLM), as the baseline MinED of arXiv 2406.17328.
    """

    temperature: float
    to_student_V: Tensor
    student_vocab: int

    def __post_init__(self) -> None:
        images_V = self.to_student_V[self.to_student_V >= 0]
        if not len(images_V) or int(images_V.max()) >= self.student_vocab:
            raise ValueError(
                f"map of the teacher's ids: expected student ids below {self.student_vocab} and at least one, got "
                f"{len(images_V)} up to {int(self.to_student_V.max()) if len(self.to_student_V) else None}. "
                "Build the map from these two tokenizers."
            )

    @cached_property
    def mapped_ids_O(self) -> Tensor:
        """Teacher ids that have an image."""
        return (self.to_student_V >= 0).nonzero()[:, 0]

    @cached_property
    def images_O(self) -> Tensor:
        """Their images."""
        return self.to_student_V[self.mapped_ids_O]

    @cached_property
    def by_image(self) -> IdsByEvent:
        """Teacher ids by their image, as if that were an event."""
        return IdsByEvent.of(self.mapped_ids_O, self.images_O)

    def __call__(self, *, student_NV: Tensor, teacher_NV: Tensor) -> Tensor:
        mapped_NO = teacher_NV.detach().index_select(-1, self.mapped_ids_O)
        mass_NO = log_probs(mapped_NO, temperature=self.temperature).exp()
        moved_NV = mass_NO.new_zeros(len(mass_NO), self.student_vocab).index_add(-1, self.images_O, mass_NO)
        return forward_kl(student_NV=log_probs(student_NV, temperature=self.temperature), teacher_NV=moved_NV.log())
