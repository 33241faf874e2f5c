"""The loss of sft and of all methods that compare the two distributions of a pair without a projector."""

from typing import Any

from torch import Tensor, nn

from dskd_plugin.batch import StepBatch
from dskd_plugin.core.heads import Head
from dskd_plugin.core.objective import Compare, Objective, Sums
from dskd_plugin.core.rows import Rows
from dskd_plugin.losses.base import DistillationLoss


class Direct(DistillationLoss):
    """The two distributions of a pair compared as they are; without a comparison, cross-entropy alone.

    open_V: student ids that the comparison does not tell from others, see `Rows.opened`; None for none.
    """

    def __init__(
        self,
        student: nn.Module,
        objective: Objective,
        compare: Compare | None,
        *,
        open_V: Tensor | None = None,
        **options: Any,
    ) -> None:
        super().__init__(student, objective, **options)
        self._compare, self._open_V = compare, open_V
        self._read_with(self.student_and_head[1])

    def labelled(self, batch: StepBatch, student_head: Head) -> Rows:
        rows = super().labelled(batch, student_head)
        return rows if self._open_V is None else rows.opened(self._open_V)

    def loss_of(self, rows: Rows, batch: StepBatch, student_head: Head, objective: Objective) -> tuple[Tensor, Sums]:
        return self.backend.direct_loss(
            rows,
            student_head=student_head,
            teacher_head=self.teacher_head,
            compare=self._compare,
            objective=objective,
            divisors_T=batch.divisors_T,
        )
