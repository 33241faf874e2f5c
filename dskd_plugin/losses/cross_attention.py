"""Dual-space distillation with cross-model attention, which needs no pairs of tokens.

Shapes: R response rows, N of them that take part, M teacher rows, d student width, D teacher width, V ids.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from dskd_plugin.batch import StepBatch
from dskd_plugin.core.attend import Attention, cross_model_attention, partnered
from dskd_plugin.core.heads import Head
from dskd_plugin.core.objective import Objective, Sums
from dskd_plugin.core.overlap import Overlap
from dskd_plugin.core.projectors import gram_inverse
from dskd_plugin.core.rows import Rows
from dskd_plugin.errors import SettingError
from dskd_plugin.losses.projecting import Projecting
from dskd_plugin.models import causal_lm, gathered


class CrossAttentionLoss(Projecting):
    """dskd with cross-model attention: every row sees all rows of the other model in its sample."""

    def __init__(
        self,
        student: nn.Module,
        objective: Objective,
        *,
        teacher_embedding_VD: Tensor,
        projector_init: str,
        projector_dtype: torch.dtype,
        seed: int,
        overlap: Overlap,
        **options: Any,
    ) -> None:
        super().__init__(student, objective, overlap=overlap, **options)
        width, teacher_width = self.student_width, self.teacher_head.weight_VD.shape[1]
        embedding = causal_lm(student).get_input_embeddings()
        embedding_width = int(getattr(embedding.weight, "ds_shape", embedding.weight.shape)[1])
        for name, found, expected in (
            ("base_model", embedding_width, width),
            ("dskd.teacher.model", teacher_embedding_VD.shape[1], teacher_width),
        ):
            if found != expected:
                raise SettingError(
                    name,
                    f"input embeddings as wide as the output head ({expected}) for alignment: cma",
                    found,
                    "Use another alignment.",
                )
        self._teacher_embedding_VD = teacher_embedding_VD
        self._embedding = (embedding,)  # a tuple, because it must not become a child of this module
        self.attention = cross_model_attention(
            width,
            teacher_width,
            t2s_weight_Dd=self._ideal_t2s(projector_init),
            s2t_weight_dD=self._first_s2t(projector_init),
            generator=torch.Generator().manual_seed(seed),
            dtype=projector_dtype,
        ).to(self.head_weight.device)
        self._read_with(self.student_and_head[1], embedding)

    @torch.no_grad()
    def _first_s2t(self, init: str) -> Tensor | None:
        parameters = list(self.student_and_head[1].parameters())
        if init == "random" or parameters[0].device.type == "meta":
            return None
        inverse = gram_inverse(self._effective(self.teacher_head), self._ids[1])
        with gathered(parameters):
            return self._ideal_s2t(self.student_head(), inverse)

    def _attend(self, batch: StepBatch) -> Attention:
        rows = batch.attending
        targets_N = batch.targets_R[: len(rows.sample_N)]
        student_Vd, teacher_VD = self._embedding[0].weight.detach(), self._teacher_embedding_VD
        return self.attention.attention(
            torch.cat([student_Vd[rows.inputs_N], student_Vd[targets_N]], dim=-1),
            torch.cat([teacher_VD[rows.inputs_M], teacher_VD[rows.targets_M]], dim=-1),
            rows.sample_N,
            rows.sample_M,
        )

    def _t2s(self, batch: StepBatch, attention: Attention) -> Tensor | None:
        if not self.objective.in_student_space:
            return None
        return self.attention.t2s_rows(
            attention, batch.teacher_states, self._teacher_embedding_VD[batch.teacher_argmax_M]
        )

    def labelled(self, batch: StepBatch, student_head: Head) -> Rows:
        attending = batch.attending
        batch.teacher_argmax_M = self.backend.argmax(batch.teacher_states, self.teacher_head)
        gold_N = batch.targets_R[: len(attending.sample_N)]
        label_N = torch.where(partnered(attending.sample_N, attending.sample_M), gold_N, -1)
        agree_N = None
        if self.objective.in_student_space and self.objective.agreement_mask:
            projected_Nd = self._t2s(batch, self._attend(batch))
            assert projected_Nd is not None
            agree_N = self.backend.agreement(projected_Nd, student_head, label_N, None)
        return replace(
            super().labelled(batch, student_head),
            teacher_NE=None,
            label_N=label_N,
            agree_N=agree_N,
            s2t_M=partnered(attending.sample_M, attending.sample_N),
        )

    def loss_of(self, rows: Rows, batch: StepBatch, student_head: Head, objective: Objective) -> tuple[Tensor, Sums]:
        attention = self._attend(batch)
        s2t_MD = None
        if objective.in_teacher_space:
            student_Nd = rows.student_RD[: rows.pairs]
            s2t_MD = self.attention.s2t_rows(
                attention, student_Nd.detach() if objective.projectors_alone else student_Nd
            )
        return self.backend.attention_loss(
            rows,
            t2s_Nd=self._t2s(batch, attention),
            s2t_MD=s2t_MD,
            teacher_MD=batch.teacher_MD,
            student_head=student_head,
            teacher_head=self.teacher_head,
            objective=objective,
            divisors_T=batch.divisors_T,
        )
