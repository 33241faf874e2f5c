"""The loss of a micro-batch as a module inside the student; what each method compares is in the files beside it.

Shapes: B batch, S student positions, R response rows, Q teacher rows of the spans, V ids, d student width.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn

from dskd_plugin.batch import StepBatch
from dskd_plugin.core.backend import Backend, TorchBlocks
from dskd_plugin.core.balance import Balance
from dskd_plugin.core.heads import Head
from dskd_plugin.core.objective import TERMS, Objective, Sums, means_of_step
from dskd_plugin.core.rows import Rows, Spans, counts
from dskd_plugin.core.terms import span_sums
from dskd_plugin.models import as_read, check_head, drops_out, is_partitioned, output_head, read_head

# Logits computed at a time: enough rows for a product with a head to run at full speed. Up to 10 fp32 tensors of this
# size live at the peak (1.3 GiB, on a CPU 0.6 GiB where both vocabularies are large).
BLOCK_ELEMENTS = {"cuda": 2**25, "cpu": 2**24}
# For the fused backend, which holds half as much of each: two logits in the heads' dtype and five fp32 of events.
FUSED_BLOCK_ELEMENTS = 2**26
_MEMORY = "kd_balance"


class DistillationLoss(nn.Module):
    """Child of the student that owns the projectors, if the method has some, and computes the loss of a micro-batch.

    Methods fill in :meth:`loss_of`, and :meth:`labelled` where not every row counts.
    """

    def __init__(
        self,
        student: nn.Module,
        objective: Objective,
        *,
        student_vocab_size: int,
        teacher_head: Head | None,
        warmup_steps: int = 0,
        balanced: bool = False,
        backend: Backend | None = None,
    ) -> None:
        super().__init__()
        self.objective = objective
        self.teacher_head = teacher_head
        self.student_vocab_size = student_vocab_size
        self.warmup_steps = warmup_steps
        # A tuple, because neither may become a child of this module.
        self.student_and_head = (student, output_head(student))
        device = self.head_weight.device.type
        self.backend = backend or TorchBlocks(BLOCK_ELEMENTS.get(device, BLOCK_ELEMENTS["cuda"]))
        self.matmul_dtype: torch.dtype | None = None
        self.micro_batch: StepBatch | None = None
        self.reduce_counts: Callable[[Tensor], Tensor] = lambda counts: counts
        self.step: Callable[[], int] = lambda: 0
        # Whether the head, as it is read here, was seen to give the student's own logits.
        self.head_checked = False
        # How the KD part is scaled to the size of the cross-entropy, and the sums of the step that runs.
        self._balance = Balance() if balanced else None
        self._seen_T2 = torch.zeros(len(TERMS), 2, dtype=torch.float64)
        self.kd_scale = 1.0 if balanced else None
        """What the KD terms that move the student were multiplied with in the last step; None where they never are."""
        self.guarded_steps: list[bool] | None = None
        """Whether each step since they were last logged learned from gold answers alone; None where none ever does."""
        # Called after the loss of each micro-batch with this module, the micro-batch and the student's hidden states.
        self.observers: list[Callable[[DistillationLoss, StepBatch, Tensor], None]] = []

    def _read_with(self, *modules: nn.Module) -> None:
        """ZeRO-3 gathers a module's own parameters only; name the others that its forward reads."""
        if is_partitioned(self.head_weight):
            import deepspeed

            for parameter in [p for module in (self, *modules) for p in module.parameters()]:
                deepspeed.zero.register_external_parameter(self, parameter)

    @property
    def each(self) -> "tuple[DistillationLoss, ...]":
        """The loss of each teacher; see `several.SeveralTeachers`."""
        return (self,)

    @property
    def head_weight(self) -> Tensor:
        """The weight [V, d] of the student's head, as the engine holds it."""
        return cast(Tensor, self.student_and_head[1].weight)

    @property
    def student_width(self) -> int:
        return int(getattr(self.head_weight, "ds_shape", self.head_weight.shape)[1])

    def student_head(self) -> Head:
        return read_head(*self.student_and_head, self.student_vocab_size, self.matmul_dtype)

    def labelled(self, batch: StepBatch, student_head: Head) -> Rows:
        """The rows of a micro-batch with what decides which of them count; the student's states come with `forward`."""
        return Rows(
            student_RD=torch.empty(len(batch.targets_R), 0),
            labels_R=batch.targets_R,
            ce_R=batch.ce_R,
            spans=self._spans(batch),
            teacher_NE=batch.teacher_MD,
        )

    def _spans(self, batch: StepBatch) -> Spans | None:
        spans = batch.spans
        if spans is None:
            return None
        assert self.teacher_head is not None and spans.teacher_QD is not None
        log_probs_Q = self.backend.token_log_probs(spans.teacher_QD, self.teacher_head, spans.teacher_targets_Q)
        number = int(spans.teacher_of_Q.max()) + 1 if len(spans.teacher_of_Q) else 0
        teacher_C = span_sums(log_probs_Q, spans.teacher_of_Q, number)
        return Spans(rows_P=spans.rows_P, of_P=spans.of_P, teacher_C=teacher_C)

    def loss_of(self, rows: Rows, batch: StepBatch, student_head: Head, objective: Objective) -> tuple[Tensor, Sums]:
        """The loss of the rows and the sums of its terms."""
        raise NotImplementedError

    def after_step(self, reduce: Callable[[Tensor], Tensor]) -> None:
        """Called after each optimizer step on all ranks. reduce: the sum of a tensor over ranks.

        What is learned from steps changes between them alone: a step does not depend on how its batch was split.
        """
        if self._balance is not None:
            self.kd_scale = self._balance.scale
            found = means_of_step(reduce(self._seen_T2), self.objective)
            if found is not None:
                self._balance = self._balance.after(*found)
            self._seen_T2 = torch.zeros_like(self._seen_T2)

    def memory(self) -> dict[str, Tensor]:
        """What a resumed run must know beside the weights, the same on all ranks."""
        if self._balance is None:
            return {}
        return {_MEMORY: torch.tensor([self._balance.ce, self._balance.kd], dtype=torch.float64)}

    def remember(self, saved: Mapping[str, Tensor]) -> None:
        """Take up a saved memory."""
        if self._balance is not None:
            self._balance = Balance(*saved[_MEMORY].tolist())

    def objective_of_step(self) -> Objective:
        """The objective with what changes from step to step of a training."""
        objective = self.objective
        if self.step() < self.warmup_steps:
            objective = replace(objective, projectors_alone=True)
        if self._balance is not None:
            objective = replace(objective, kd_scale=self._balance.scale)
        return objective

    @torch.no_grad()
    def _prepare_window(self, window: list[StepBatch], student_head: Head) -> None:
        """Labels, agreement and divisors of all micro-batches of one optimizer step.

        Teacher, projectors and heads stand still between two optimizer steps, so everything that decides which rows
        count is known before the first loss, and the loss does not depend on how the batch was split.
        """
        needed = []
        for batch in window:
            batch.rows = self.labelled(batch, student_head)
            needed.append(counts(batch.rows, self.objective))
        totals = self.reduce_counts(torch.stack(needed).sum(0))
        for batch in window:
            batch.divisors_T = totals

    def forward(self, hidden_BSd: Tensor, logits_BSV: Tensor) -> Tensor:
        batch = self.micro_batch
        assert batch is not None
        hidden_BSd = as_read(self.student_and_head[1], hidden_BSd)
        student_head = self.student_head()
        if not (self.head_checked or drops_out(self.student_and_head[1])):
            check_head(hidden_BSd[:, -1], logits_BSV[:, -1], student_head, "base_model")
            self.head_checked = True
        if batch.window:
            self._prepare_window(batch.window, student_head)
            batch.window = []
        assert batch.rows is not None
        rows = replace(batch.rows, student_RD=hidden_BSd.flatten(0, 1)[batch.rows_R])
        objective = self.objective_of_step() if self.training else self.objective
        loss, batch.sums = self.loss_of(rows, batch, student_head, objective)
        if batch.ce_sums is not None:
            batch.sums["ce"] = batch.ce_sums
        if self.training and self._balance is not None:
            seen_T2 = torch.stack([torch.stack(batch.sums[term]) for term in TERMS])
            self._seen_T2 = self._seen_T2.to(seen_T2.device) + seen_T2
        for observe in self.observers:
            observe(self, batch, hidden_BSd)
        return loss
