"""The student's loss, computed inside the forward of the root module so that every training engine sees it.

DDP, DeepSpeed and FSDP hook the root module's forward: outside it, parameters are missing or sharded. So a hook on the
root, registered before any engine wraps it, hands the decoder's last hidden state to :class:`DistillationLoss`, a child
module of the root, and puts the result into ``output["loss"]``.

Shapes: B batch, S student positions, R response rows, N aligned rows (the first N of R), d student width, D teacher
width, V vocabulary.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dskd_plugin.core.chunked import agreement, dskd_loss, teacher_argmax
from dskd_plugin.core.heads import Head
from dskd_plugin.core.objective import Objective, Rows, Sums, counts
from dskd_plugin.core.overlap import Overlap
from dskd_plugin.core.projectors import TeacherToStudent, gram_inverse, head_map, t2s_projector
from dskd_plugin.models import (
    causal_lm,
    check_head,
    decoder,
    gathered,
    is_partitioned,
    output_head,
    read_head,
)

# Logits computed at a time; about 13 fp32 tensors of this size live at the peak (1.7 GiB, on a CPU 0.2 GiB).
BLOCK_ELEMENTS = {"cuda": 2**25, "cpu": 2**22}


@dataclass
class MicroBatch:
    """One micro-batch of aligned rows; the window fields are filled in before its first use."""

    rows_R: Tensor
    """Flat student positions that predict a response token; the aligned ones first."""
    targets_R: Tensor
    """Their gold token ids."""
    teacher_ND: Tensor
    """Teacher hidden states of the aligned rows."""
    window: list["MicroBatch"] = field(default_factory=list)
    """All micro-batches of the optimizer step; set on the first of them only."""
    argmax_N: Tensor | None = None
    label_N: Tensor | None = None
    agree_N: Tensor | None = None
    divisors_4: Tensor | None = None
    sums: Sums = field(default_factory=dict)


class DistillationLoss(nn.Module):
    """Child of the student that owns the teacher-to-student projector and computes the loss of a micro-batch."""

    def __init__(
        self,
        student: nn.Module,
        *,
        student_vocab_size: int,
        teacher_head: Head,
        overlap: Overlap,
        objective: Objective,
        keep_unmapped: bool,
        projector_init: str,
        projector_dtype: torch.dtype,
        seed: int,
        block_elements: int | None = None,
    ) -> None:
        super().__init__()
        self.objective = objective
        self.teacher_head = teacher_head
        self.keep_unmapped = keep_unmapped
        self.student_vocab_size = student_vocab_size
        self.block_elements = block_elements or BLOCK_ELEMENTS.get(teacher_head.weight_VD.device.type, 2**25)
        self.matmul_dtype: torch.dtype | None = None
        self.micro_batch: MicroBatch | None = None
        self.reduce_counts: Callable[[Tensor], Tensor] = lambda counts: counts
        self.step = lambda: 0
        # A tuple, because the head must not become a child of this module.
        self._student = (student, output_head(student))
        self._s2t_dD: Tensor | None = None
        self._s2t_step: int | None = None
        self._head_checked = False

        head_weight = self._student[1].weight
        device = teacher_head.weight_VD.device
        self._ids = (overlap.student_ids_O.to(device), overlap.teacher_ids_O.to(device))
        self._to_student_V = overlap.teacher_to_student_V.to(device)
        self._gram_inverse_DD = (
            None if objective.spaces == "student" else gram_inverse(self._effective(teacher_head), self._ids[1])
        )
        self.t2s: TeacherToStudent | None = None
        if objective.spaces != "teacher":
            width = head_weight.ds_shape[1] if is_partitioned(head_weight) else head_weight.shape[1]
            self.t2s = t2s_projector(
                teacher_head.weight_VD.shape[1],
                width,
                self._ideal_t2s() if projector_init == "ideal" and head_weight.device.type != "meta" else None,
                generator=torch.Generator().manual_seed(seed),
                dtype=projector_dtype,
            ).to(head_weight.device)
        if is_partitioned(head_weight):
            self._register_external_parameters()

    def _register_external_parameters(self) -> None:
        """ZeRO-3 gathers a module's own parameters only; name the others that its forward reads."""
        import deepspeed

        for parameter in [*self._student[1].parameters(), *self.parameters()]:
            deepspeed.zero.register_external_parameter(self, parameter)

    def _student_head(self) -> Head:
        return read_head(*self._student, self.student_vocab_size, self.matmul_dtype)

    @staticmethod
    def _effective(head: Head) -> Tensor:
        """Rows that map a hidden state to logits, logit scale included."""
        return head.weight_VD if head.scale == 1.0 else head.weight_VD * head.scale

    @torch.no_grad()
    def _ideal_t2s(self) -> Tensor:
        student_ids, teacher_ids = self._ids
        with gathered(list(self._student[1].parameters())):
            student = self._effective(read_head(*self._student, self.student_vocab_size))
            return head_map(
                self._effective(self.teacher_head),
                student.to(self.teacher_head.weight_VD.device),
                teacher_ids,
                student_ids,
            )

    @torch.no_grad()
    def _refresh_s2t(self, student_head: Head) -> None:
        """Recompute the student-to-teacher map from the student's live head, once per optimizer step."""
        if self._gram_inverse_DD is None or self._s2t_step == self.step():
            return
        frozen = not any(parameter.requires_grad for parameter in self._student[1].parameters())
        if self._s2t_dD is None or not frozen:
            student_ids, teacher_ids = self._ids
            with _full_fp32():
                self._s2t_dD = head_map(
                    self._effective(student_head),
                    self._effective(self.teacher_head),
                    student_ids,
                    teacher_ids,
                    target_gram_inverse=self._gram_inverse_DD,
                    dtype=torch.float32,
                )
        self._s2t_step = self.step()

    @torch.no_grad()
    def _prepare_window(self, window: list[MicroBatch], student_head: Head) -> None:
        """Labels, agreement and divisors of all micro-batches of one optimizer step.

        Teacher, projector and head stand still between two optimizer steps, so everything that decides which rows
        count is known before the first loss, and the loss does not depend on how the batch was split.
        """
        for batch in window:
            batch.argmax_N = teacher_argmax(batch.teacher_ND, self.teacher_head, block_elements=self.block_elements)
            batch.label_N = self._to_student_V[batch.argmax_N]
            if self.t2s is not None and self.objective.agreement_mask:
                batch.agree_N = agreement(
                    batch.teacher_ND,
                    self._t2s_Dd(),
                    student_head,
                    batch.label_N,
                    block_elements=self.block_elements,
                )
        totals = torch.stack([counts(self._rows(batch), self.objective) for batch in window]).sum(0)
        totals = self.reduce_counts(totals)
        for batch in window:
            batch.divisors_4 = totals

    def _t2s_Dd(self) -> Tensor | None:
        return None if self.t2s is None else self.t2s.weight_Dd

    def _rows(self, batch: MicroBatch, student_Rd: Tensor | None = None) -> Rows:
        return Rows(
            student_RD=torch.empty(len(batch.targets_R), 0) if student_Rd is None else student_Rd,
            labels_R=batch.targets_R,
            teacher_NE=batch.teacher_ND,
            teacher_argmax_N=batch.argmax_N,
            label_N=batch.label_N,
            agree_N=batch.agree_N,
            s2t_N=None if self.keep_unmapped else batch.label_N >= 0,
        )

    def forward(self, hidden_BSd: Tensor, logits_BSV: Tensor) -> Tensor:
        batch = self.micro_batch
        student_head = self._student_head()
        if not self._head_checked:
            check_head(hidden_BSd[:, -1], logits_BSV[:, -1], student_head, "base_model")
            self._head_checked = True
        self._refresh_s2t(student_head)
        if batch.window:
            self._prepare_window(batch.window, student_head)
            batch.window = []
        student_Rd = hidden_BSd.flatten(0, 1)[batch.rows_R]
        loss, batch.sums = dskd_loss(
            self._rows(batch, student_Rd),
            student_head=student_head,
            teacher_head=self.teacher_head,
            t2s_Dd=self._t2s_Dd(),
            s2t_dD=self._s2t_dD,
            objective=self.objective,
            divisors_4=batch.divisors_4,
            block_elements=self.block_elements,
        )
        return loss


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


def attach(student: nn.Module, loss: DistillationLoss) -> None:
    """Make ``loss`` a child of the student and let the student's forward return it whenever a micro-batch is set."""
    hidden: list[Tensor] = []  # the last hidden state on its way from the decoder's hook to the root's

    def keep_hidden(_module: nn.Module, _inputs: Any, output: Any) -> None:
        if loss.micro_batch is not None:
            hidden[:] = [output.last_hidden_state if hasattr(output, "last_hidden_state") else output[0]]

    def put_loss(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        if loss.micro_batch is None:
            return None
        output["loss"] = loss(hidden.pop(), output.logits)
        return output

    student.add_module("dskd", loss)
    names = {f"dskd.{name}" for name in loss.state_dict()}
    for module in {student, causal_lm(student)}:
        module._keys_to_ignore_on_save = {*(getattr(module, "_keys_to_ignore_on_save", None) or ()), *names}
    decoder(student).register_forward_hook(keep_hidden)
    student.register_forward_hook(put_loss)
