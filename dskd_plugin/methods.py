"""What each distillation method compares, as a loss inside the student.

Shapes as in ``student``: R response rows, N paired rows, M teacher rows, d student width, D teacher width, V ids.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from dskd_plugin.args import Settings
from dskd_plugin.core import baselines
from dskd_plugin.core.attend import Attention, cross_model_attention, partnered
from dskd_plugin.core.chunked import agreement, agreement_of, baseline_loss, cma_loss, dskd_loss, teacher_argmax
from dskd_plugin.core.divergences import Divergence, divergence, forward_kl
from dskd_plugin.core.events import EventCompare, Events, Exact
from dskd_plugin.core.fitting import Fit, fit_map
from dskd_plugin.core.heads import Head, head_logits
from dskd_plugin.core.objective import Compare, Objective, Rows, Sums, label_distance, project
from dskd_plugin.core.overlap import Overlap
from dskd_plugin.core.projectors import TeacherToStudent, gram_inverse, head_map, t2s_projector
from dskd_plugin.models import causal_lm, gathered, output_head
from dskd_plugin.pair import Pair, nearest_ids
from dskd_plugin.student import DistillationLoss, MicroBatch
from dskd_plugin.teacher import Teacher

# Share of what earlier steps saw inside events that counts beside the last: about twenty steps are remembered.
_KEPT_OF_STEP = 0.95
_FEWEST_ROWS_INSIDE = 32
_MEMORY = "inside_events"


def distillation_loss(
    settings: Settings,
    student: nn.Module,
    teacher: Teacher | None,
    pair: Pair,
    overlap: Overlap | None,
    events: Events | None = None,
    *,
    projector_dtype: torch.dtype = torch.float32,
    seed: int,
    block_elements: int | None = None,
) -> DistillationLoss:
    """The loss that the settings name.

    teacher, overlap: None for sft, which needs neither. events: for the settings that compare them (`Settings.exact`,
    `Settings.by_events`).
    """
    knobs = settings.divergence.model_dump()
    chosen = divergence(knobs.pop("kind"), **knobs)
    objective = Objective(
        divergence=chosen,
        temperature=settings.temperature,
        kd_ratio=settings.kd_ratio,
        spaces=settings.spaces,
        agreement_mask=settings.agreement_mask,
        method=settings.method,
        chunk_ratio=settings.chunk_ratio,
    )
    options: dict[str, Any] = {
        "student_vocab_size": pair.student.vocab_size,
        "teacher_head": None if teacher is None else teacher.head,
        "warmup_steps": settings.projector.warmup_steps,
        "block_elements": block_elements,
    }
    if teacher is None or overlap is None:
        return Baseline(student, objective, None, **options)
    if settings.method != "dskd":
        student_ids = min(pair.student.vocab_size, _head_rows(student))
        compare = _compare(settings, chosen, pair, overlap, events, student_ids, teacher.head)
        return Baseline(student, objective, compare, **options)
    options |= {
        "overlap": overlap,
        "projector_init": settings.projector.init,
        "projector_dtype": projector_dtype,
        "seed": seed,
    }
    if settings.alignment == "cma":
        return CrossAttention(student, objective, teacher_embedding_VD=teacher.embedding, **options)
    return DualSpace(
        student,
        objective,
        keep_unmapped=settings.unmapped_argmax == "teacher_space",
        soft_labels=settings.projector.labels == "soft",
        events=events if settings.exact else None,
        **options,
    )


def _head_rows(model: nn.Module) -> int:
    weight = output_head(model).weight
    return int(getattr(weight, "ds_shape", weight.shape)[0])


def _compare(
    settings: Settings,
    chosen: Divergence,
    pair: Pair,
    overlap: Overlap,
    events: Events | None,
    student_ids: int,
    teacher_head: Head,
) -> Compare:
    device, teacher_ids = teacher_head.weight_VD.device, teacher_head.vocab_size
    if settings.method == "uld":
        return baselines.uld(settings.temperature)
    if settings.method == "mined":
        known = enumerate(overlap.teacher_to_student_V.tolist())
        roles = [(student_id, i) for i, student_id in known if student_id >= 0 and pair.teacher.bytes[i] is None]
        images_V = nearest_ids(pair.student, pair.teacher, roles)[:teacher_ids].to(device)
        images_V[images_V >= student_ids] = -1  # a head may have fewer rows than the tokenizer has ids
        return baselines.mapped(settings.temperature, images_V, student_ids)
    if settings.method == "kd" and len(overlap.student_ids_O) == student_ids == teacher_ids:
        return baselines.vanilla(chosen, settings.temperature)
    if settings.by_events:
        assert events is not None
        return EventCompare(chosen, settings.temperature, events.to(device))
    shared = overlap.student_ids_O.to(device), overlap.teacher_ids_O.to(device)
    return baselines.overlap(chosen, settings.temperature, *shared)


class Baseline(DistillationLoss):
    """sft, and the methods that compare the two distributions of a pair directly."""

    def __init__(self, student: nn.Module, objective: Objective, compare: Compare | None, **options: Any) -> None:
        super().__init__(student, objective, **options)
        self._compare = compare
        self._read_with(self._student[1])

    def _loss(self, rows: Rows, batch: MicroBatch, student_head: Head, objective: Objective) -> tuple[Tensor, Sums]:
        return baseline_loss(
            rows,
            student_head=student_head,
            teacher_head=self.teacher_head,
            compare=self._compare,
            objective=objective,
            divisors_T=batch.divisors_T,
            block_elements=self.block_elements,
        )


class _Projecting(DistillationLoss):
    """What the two alignments of dskd share: maps between the spaces from the two heads."""

    teacher_head: Head

    def __init__(self, student: nn.Module, objective: Objective, *, overlap: Overlap, **options: Any) -> None:
        super().__init__(student, objective, **options)
        device = self.teacher_head.weight_VD.device
        self._ids = (overlap.student_ids_O.to(device), overlap.teacher_ids_O.to(device))

    @staticmethod
    def _effective(head: Head) -> Tensor:
        """Rows that map a hidden state to logits, logit scale included."""
        return head.weight_VD if head.scale == 1.0 else head.weight_VD * head.scale

    @torch.no_grad()
    def _ideal_t2s(self, init: str) -> Tensor | None:
        """Least-squares map [D, d] of the teacher's states into the student's space; None for a random start."""
        parameters = list(self._student[1].parameters())
        if init == "random" or parameters[0].device.type == "meta":
            return None
        student_ids, teacher_ids = self._ids
        with gathered(parameters):
            student = self._effective(self.student_head())
            device = self.teacher_head.weight_VD.device
            return head_map(self._effective(self.teacher_head), student.to(device), teacher_ids, student_ids)

    @torch.no_grad()
    def _ideal_s2t(self, student_head: Head, teacher_gram_inverse: Tensor) -> Tensor:
        """Least-squares map [d, D] of the student's states into the teacher's space."""
        student_ids, teacher_ids = self._ids
        with _full_fp32():
            return head_map(
                self._effective(student_head),
                self._effective(self.teacher_head),
                student_ids,
                teacher_ids,
                target_gram_inverse=teacher_gram_inverse,
                dtype=torch.float32,
            )


class DualSpace(_Projecting):
    """dskd on paired rows: exact token alignment, or one tokenizer."""

    def __init__(
        self,
        student: nn.Module,
        objective: Objective,
        *,
        keep_unmapped: bool,
        soft_labels: bool,
        events: Events | None,
        projector_init: str,
        projector_dtype: torch.dtype,
        seed: int,
        overlap: Overlap,
        **options: Any,
    ) -> None:
        super().__init__(student, objective, overlap=overlap, **options)
        head_weight, teacher_weight = self._student[1].weight, self.teacher_head.weight_VD
        self._keep_unmapped = keep_unmapped
        self._to_student_V = overlap.teacher_to_student_V.to(teacher_weight.device)
        student_ids = min(self.student_vocab_size, _head_rows(student))
        self._events = None if events is None else events.to(teacher_weight.device)
        self._soft_labels: Compare | None = None
        if soft_labels and self._events is not None:
            self._soft_labels = EventCompare(forward_kl, 1.0, self._events)
        elif soft_labels:
            # The teacher's distribution over the ids that the student has too.
            self._soft_labels = baselines.mapped(1.0, self._to_student_V, student_ids)
        if self._events is not None:
            # (lead in nats, rows) inside events: of the steps so far, and of the step that runs.
            self._inside = torch.zeros(2, dtype=torch.float64)
            self._seen_inside = torch.zeros(2, dtype=torch.float64, device=teacher_weight.device)
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
            ).to(head_weight.device)
        self._read_with(self._student[1])

    def _t2s_Dd(self) -> Tensor | None:
        return None if self.t2s is None else self.t2s.weight_Dd

    @torch.no_grad()
    def _refresh_s2t(self, student_head: Head) -> None:
        """Recompute the student-to-teacher map from the student's live head, once per optimizer step."""
        if self._gram_inverse_DD is None or self._s2t_step == self.step():
            return
        frozen = not any(parameter.requires_grad for parameter in self._student[1].parameters())
        if self._s2t_dD is None or not frozen:
            self._s2t_dD = self._ideal_s2t(student_head, self._gram_inverse_DD)
        self._s2t_step = self.step()

    @property
    def _exact(self) -> Exact | None:
        """The exact target; inside events the projected teacher has a say once it was seen to know better."""
        if self._events is None:
            return None
        lead, rows = self._inside.tolist()
        return Exact(self._events, shares_inside=rows >= _FEWEST_ROWS_INSIDE and lead > 0)

    @torch.no_grad()
    def fit(self, learned_ND: Tensor, unseen_ND: Tensor, **options: Any) -> Fit:
        """Train the projector alone on teacher states, see fitting.fit_map, and put the result in place."""
        assert self.t2s is not None
        parameters = list(self._student[1].parameters())
        with gathered(parameters):
            head = self.student_head().detach()
            head = replace(head, weight_VD=head.weight_VD.clone())

        def label_loss(teacher_ND: Tensor, map_Dd: Tensor) -> tuple[Tensor, Tensor]:
            teacher_NU = head_logits(teacher_ND, self.teacher_head.real())
            label_N = self._to_student_V[teacher_NU.argmax(-1)] if self._events is None else None
            distance_N, agree_N = label_distance(
                head_logits(project(teacher_ND, map_Dd), head),
                teacher_NU,
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
        fit = fit_map(self.t2s.weight_Dd.float(), learned_ND, unseen_ND, label_loss, **options)
        weight.copy_(fit.map_Dd.T)
        return fit

    def after_step(self, reduce: Callable[[Tensor], Tensor]) -> None:
        """Add what the step saw inside events, on all ranks, to a fading memory of the steps before.

        An exact target's shares rest on it. It changes between steps alone, so that a step does not depend on how its
        batch was split, and is kept with the projectors, so that a resumed run goes on alike.
        """
        if self._events is not None:
            self._inside = _KEPT_OF_STEP * self._inside + reduce(self._seen_inside).cpu()
            self._seen_inside = torch.zeros_like(self._seen_inside)

    def memory(self) -> dict[str, Tensor]:
        return {} if self._events is None else {_MEMORY: self._inside}

    def remember(self, saved: Mapping[str, Tensor]) -> None:
        if self._events is not None:
            self._inside = saved[_MEMORY].clone()

    def forward(self, hidden_BSd: Tensor, logits_BSV: Tensor) -> Tensor:
        loss = super().forward(hidden_BSd, logits_BSV)
        if self._events is not None and self.training and self.micro_batch is not None:
            self._seen_inside += torch.stack(self.micro_batch.sums["t2s_inside"]).to(self._seen_inside)
        return loss

    def _label(self, batch: MicroBatch, student_head: Head) -> None:
        exact, t2s_Dd = self._events, self._t2s_Dd()
        masked = t2s_Dd is not None and self.objective.agreement_mask
        if exact is not None and not masked and not self.objective.in_teacher_space:
            return  # every row counts, and the loss finds the labels on its way
        batch.argmax_N = teacher_argmax(batch.teacher_ND, self.teacher_head, block_elements=self.block_elements)
        label_N = self._to_student_V[batch.argmax_N] if exact is None else exact.teacher_U[batch.argmax_N]
        batch.label_N = label_N if exact is None else None
        if t2s_Dd is not None and masked:
            batch.agree_N = agreement(
                batch.teacher_ND,
                t2s_Dd,
                student_head,
                label_N,
                block_elements=self.block_elements,
                event_V=None if exact is None else exact.student_V,
            )

    def _rows(self, batch: MicroBatch, student_Rd: Tensor | None = None) -> Rows:
        rows = super()._rows(batch, student_Rd)
        return rows if self._keep_unmapped or batch.label_N is None else replace(rows, s2t_N=batch.label_N >= 0)

    def _loss(self, rows: Rows, batch: MicroBatch, student_head: Head, objective: Objective) -> tuple[Tensor, Sums]:
        self._refresh_s2t(student_head)
        return dskd_loss(
            rows,
            student_head=student_head,
            teacher_head=self.teacher_head,
            t2s_Dd=self._t2s_Dd(),
            s2t_dD=self._s2t_dD,
            objective=objective,
            divisors_T=batch.divisors_T,
            block_elements=self.block_elements,
            soft_labels=self._soft_labels,
            exact=self._exact,
        )


class CrossAttention(_Projecting):
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
                raise ValueError(
                    f"{name}: expected input embeddings as wide as the output head ({expected}) for alignment: cma, "
                    f"got {found}. Use another alignment."
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
        ).to(self._student[1].weight.device)
        self._read_with(self._student[1], embedding)

    @torch.no_grad()
    def _first_s2t(self, init: str) -> Tensor | None:
        parameters = list(self._student[1].parameters())
        if init == "random" or parameters[0].device.type == "meta":
            return None
        inverse = gram_inverse(self._effective(self.teacher_head), self._ids[1])
        with gathered(parameters):
            return self._ideal_s2t(self.student_head(), inverse)

    def _attend(self, batch: MicroBatch) -> Attention:
        rows = batch.attention
        targets_N = batch.targets_R[: len(rows.sample_N)]
        student_Vd, teacher_VD = self._embedding[0].weight.detach(), self._teacher_embedding_VD
        return self.attention.attention(
            torch.cat([student_Vd[rows.inputs_N], student_Vd[targets_N]], dim=-1),
            torch.cat([teacher_VD[rows.inputs_M], teacher_VD[rows.targets_M]], dim=-1),
            rows.sample_N,
            rows.sample_M,
        )

    def _t2s(self, batch: MicroBatch, attention: Attention) -> Tensor | None:
        if not self.objective.in_student_space:
            return None
        return self.attention.t2s_rows(attention, batch.teacher_ND, self._teacher_embedding_VD[batch.argmax_N])

    def _label(self, batch: MicroBatch, student_head: Head) -> None:
        rows = batch.attention
        batch.argmax_N = teacher_argmax(batch.teacher_ND, self.teacher_head, block_elements=self.block_elements)
        gold_N = batch.targets_R[: len(rows.sample_N)]
        batch.label_N = torch.where(partnered(rows.sample_N, rows.sample_M), gold_N, -1)
        if self.objective.in_student_space and self.objective.agreement_mask:
            batch.agree_N = agreement_of(
                self._t2s(batch, self._attend(batch)),
                student_head,
                batch.label_N,
                block_elements=self.block_elements,
            )

    def _rows(self, batch: MicroBatch, student_Rd: Tensor | None = None) -> Rows:
        attending = batch.attention
        return replace(
            super()._rows(batch, student_Rd),
            teacher_NE=None,
            teacher_argmax_N=None,
            s2t_M=partnered(attending.sample_M, attending.sample_N),
        )

    def _loss(self, rows: Rows, batch: MicroBatch, student_head: Head, objective: Objective) -> tuple[Tensor, Sums]:
        attention = self._attend(batch)
        s2t_MD = None
        if objective.in_teacher_space:
            student_Nd = rows.student_RD[: rows.pairs]
            s2t_MD = self.attention.s2t_rows(
                attention, student_Nd.detach() if objective.projectors_alone else student_Nd
            )
        return cma_loss(
            rows,
            t2s_Nd=self._t2s(batch, attention),
            s2t_MD=s2t_MD,
            teacher_MD=batch.teacher_ND,
            teacher_argmax_M=batch.argmax_N,
            student_head=student_head,
            teacher_head=self.teacher_head,
            objective=objective,
            divisors_T=batch.divisors_T,
            block_elements=self.block_elements,
        )


@contextlib.contextmanager
def _full_fp32() -> Iterator[None]:
    """No TF32 in the products of a least-squares map: its error grows with the square of a condition number."""
    matmul = torch.backends.cuda.matmul
    # torch 2.9 renamed the switch and refuses to read the old name once the new one was used.
    name, full = ("fp32_precision", "ieee") if hasattr(matmul, "fp32_precision") else ("allow_tf32", False)
    kept = getattr(matmul, name)
    setattr(matmul, name, full)
    try:
        yield
    finally:
        setattr(matmul, name, kept)
