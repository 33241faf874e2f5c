"""Dual-space distillation on paired rows: a projector between the spaces, and an exact target where there is one.

Shapes: R response rows, N paired rows, d student width, D teacher width, V ids of the student, U of the teacher.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from dskd_plugin.batch import StepBatch
from dskd_plugin.core import baselines
from dskd_plugin.core.divergences import forward_kl
from dskd_plugin.core.events import EventCompare, Events, Exact
from dskd_plugin.core.fading import Fading
from dskd_plugin.core.fitting import Fit, fit_map
from dskd_plugin.core.heads import Head, head_logits
from dskd_plugin.core.objective import Compare, Objective, Sums
from dskd_plugin.core.overlap import Overlap
from dskd_plugin.core.projectors import TeacherToStudent, gram_inverse, t2s_projector
from dskd_plugin.core.row_blocks import no_autocast
from dskd_plugin.core.rows import Rows
from dskd_plugin.core.teacher_rows import TeacherRows
from dskd_plugin.core.terms import label_distance, project
from dskd_plugin.losses.projecting import Projecting
from dskd_plugin.models import gathered, head_rows

# Rates of which the last steps are remembered, and under which name a checkpoint keeps them.
_REMEMBERED = {"t2s_inside": "inside_events", "teacher_lead": "teacher_lead"}


class DualSpaceLoss(Projecting):
    """dskd on paired rows: exact token alignment, or one tokenizer."""

    def __init__(
        self,
        student: nn.Module,
        objective: Objective,
        *,
        keep_unmapped: bool,
        soft_labels: bool,
        events: Events | None,
        guard: bool,
        projector_init: str,
        projector_dtype: torch.dtype,
        seed: int,
        overlap: Overlap,
        **options: Any,
    ) -> None:
        super().__init__(student, objective, overlap=overlap, **options)
        teacher_weight = self.teacher_head.weight_VD
        self._keep_unmapped = keep_unmapped
        self.guarded_steps = [] if guard else None
        self._to_student_V = overlap.teacher_to_student_V.to(teacher_weight.device)
        student_ids = min(self.student_vocab_size, head_rows(student))
        self._events = None if events is None else events.to(teacher_weight.device)
        self._soft_labels: Compare | None = None
        if soft_labels and self._events is not None:
            self._soft_labels = EventCompare(forward_kl, 1.0, self._events)
        elif soft_labels:
            # The teacher's distribution over the ids that the student has too.
            self._soft_labels = baselines.MappedIds(1.0, self._to_student_V, student_ids)
        # What the last steps have shown: how far the projected teacher leads inside events, the teacher between them.
        self._fading = {} if self._events is None else {rate: Fading() for rate in _REMEMBERED}
        self._seen_F2 = torch.zeros(len(self._fading), 2, dtype=torch.float64, device=teacher_weight.device)
        self._s2t_dD: Tensor | None = None
        self._s2t_step: int | None = None
        self._gram_inverse_DD = (
            None if objective.spaces == "student" else gram_inverse(self._effective(self.teacher_head), self._ids[1])
        )
        self.t2s: TeacherToStudent | None = None
        if objective.spaces != "teacher":
            self.t2s = t2s_projector(
                teacher_weight.shape[1],
                self.student_width,
                self._ideal_t2s(projector_init),
                generator=torch.Generator().manual_seed(seed),
                dtype=projector_dtype,
            ).to(self.head_weight.device)
        self._read_with(self.student_and_head[1])

    def _t2s_Dd(self) -> Tensor | None:
        return None if self.t2s is None else self.t2s.weight_Dd

    @torch.no_grad()
    def s2t_map(self, student_head: Head) -> Tensor | None:
        """The student-to-teacher map: from the student's live head, computed anew once per optimizer step."""
        if self._gram_inverse_DD is None or self._s2t_step == self.step():
            return self._s2t_dD
        frozen = not any(parameter.requires_grad for parameter in self.student_and_head[1].parameters())
        if self._s2t_dD is None or not frozen:
            self._s2t_dD = self._ideal_s2t(student_head, self._gram_inverse_DD)
        self._s2t_step = self.step()
        return self._s2t_dD

    @property
    def _exact(self) -> Exact | None:
        """The exact target; inside events the projected teacher has a say once it was seen to know better."""
        if self._events is None:
            return None
        lead = self._fading["t2s_inside"].mean
        return Exact(self._events, shares_inside=lead is not None and lead > 0)

    @property
    def _is_behind(self) -> bool:
        """Whether the teacher found the gold tokens of the last steps less likely than the student did."""
        lead = self._fading["teacher_lead"].mean
        return lead is not None and lead < 0

    def objective_of_step(self) -> Objective:
        objective = super().objective_of_step()
        guards = self.guarded_steps is not None
        return replace(objective, gold_alone=True) if guards and self._is_behind else objective

    @torch.no_grad()
    def fit(self, learned_ND: Tensor, unseen_ND: Tensor, **options: Any) -> Fit:
        """Train the projector alone on teacher states, see fitting.fit_map, and put the result in place."""
        assert self.t2s is not None
        parameters = list(self.student_and_head[1].parameters())
        with gathered(parameters):
            head = self.student_head().detach()
            # Where the states are: an engine that has yet to spread the student leaves it on the CPU until then.
            device, bias_V = learned_ND.device, head.bias_V
            bias_V = None if bias_V is None else bias_V.to(device, copy=True)
            head = replace(head, weight_VD=head.weight_VD.to(device, copy=True), bias_V=bias_V)

        def label_loss(teacher_ND: Tensor, map_Dd: Tensor) -> tuple[Tensor, Tensor]:
            teacher = TeacherRows(head_logits(teacher_ND, self.teacher_head.real()), self._events)
            label_N = None
            if self._events is None:
                label_N = self._to_student_V[teacher.logits_NU.argmax(-1)]
            else:
                teacher.read_events(1.0)
            distance_N, agree_N, _ = label_distance(
                head_logits(project(teacher_ND, map_Dd), head),
                teacher,
                label_N,
                real=head.vocab_size,
                soft_labels=self._soft_labels,
                exact=self._exact,
            )
            if label_N is None:
                return distance_N, agree_N
            # Without an id of the student's for it there is no label.
            return torch.where(label_N >= 0, distance_N, 0), agree_N & (label_N >= 0)

        weight = self.t2s.linear.weight
        fit = fit_map(self.t2s.weight_Dd.float().to(learned_ND.device), learned_ND, unseen_ND, label_loss, **options)
        weight.copy_(fit.map_Dd.T)
        return fit

    def after_step(self, reduce: Callable[[Tensor], Tensor]) -> None:
        """Let an exact target's shares, and the guard, rest on what the step has shown on all ranks."""
        super().after_step(reduce)
        if self.guarded_steps is not None:
            self.guarded_steps.append(self._is_behind)
        if self._fading:
            for fading, step in zip(self._fading.values(), reduce(self._seen_F2).cpu(), strict=True):
                fading.take_in(step)
            self._seen_F2 = torch.zeros_like(self._seen_F2)

    def memory(self) -> dict[str, Tensor]:
        return super().memory() | {_REMEMBERED[rate]: fading.kept for rate, fading in self._fading.items()}

    def remember(self, saved: Mapping[str, Tensor]) -> None:
        super().remember(saved)
        for rate, fading in self._fading.items():
            if _REMEMBERED[rate] in saved:  # the lead is younger than the rest
                fading.kept = saved[_REMEMBERED[rate]].clone()

    def forward(self, hidden_BSd: Tensor, logits_BSV: Tensor) -> Tensor:
        loss = super().forward(hidden_BSd, logits_BSV)
        # A token that the student drew itself says nothing of who knows better: on average its own share is the best.
        if self._fading and self.training and self.micro_batch is not None and self.micro_batch.sampled is None:
            sums = self.micro_batch.sums
            self._seen_F2 += torch.stack([torch.stack(sums[rate]) for rate in self._fading]).to(self._seen_F2)
        return loss

    def labelled(self, batch: StepBatch, student_head: Head) -> Rows:
        rows = super().labelled(batch, student_head)
        if self._events is not None:
            rows = rows.opened(self._events.open_V)
        exact, t2s_Dd, teacher_ND = self._events, self._t2s_Dd(), batch.teacher_states
        masked = t2s_Dd is not None and self.objective.agreement_mask
        if exact is not None and not masked:
            return rows  # every row counts, and the loss finds the labels on its way
        argmax_N = self.backend.argmax(teacher_ND, self.teacher_head)
        label_N = self._to_student_V[argmax_N] if exact is None else exact.teacher_U[argmax_N]
        agree_N = s2t_N = None
        if t2s_Dd is not None and masked:
            with no_autocast(teacher_ND.device):
                projected_Nd = project(teacher_ND, t2s_Dd)
            event_V = None if exact is None else exact.student_V
            agree_N = self.backend.agreement(projected_Nd, student_head, label_N, event_V)
        if exact is not None:
            return replace(rows, agree_N=agree_N)
        if not self._keep_unmapped:
            s2t_N = label_N >= 0
        return replace(rows, label_N=label_N, agree_N=agree_N, s2t_N=s2t_N)

    def loss_of(self, rows: Rows, batch: StepBatch, student_head: Head, objective: Objective) -> tuple[Tensor, Sums]:
        return self.backend.paired_loss(
            rows,
            student_head=student_head,
            teacher_head=self.teacher_head,
            t2s_Dd=self._t2s_Dd(),
            s2t_dD=self.s2t_map(student_head),
            objective=objective,
            divisors_T=batch.divisors_T,
            soft_labels=self._soft_labels,
            exact=self._exact,
        )
