"""What computes the losses over row blocks, behind one interface: a faster backend is another class with these methods.

Shape letters as in objective.py. Each method means what the function of `blockwise` or `readings` means that the
reference calls.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from dskd_plugin.core import blockwise, readings
from dskd_plugin.core.heads import Head
from dskd_plugin.core.objective import Compare, Sums
from dskd_plugin.core.rows import Rows
from dskd_plugin.core.segments import SegmentCompare
from dskd_plugin.core.walk import Walk


class Backend(Protocol):
    """Everything that touches rows x vocabulary."""

    def argmax(self, teacher_NE: Tensor, teacher_head: Head) -> Tensor:
        """The teacher's most likely real id at each row, [N]."""
        ...

    def agreement(self, projected_Nd: Tensor, student_head: Head, label_N: Tensor, event_V: Tensor | None) -> Tensor:
        """Where rows in the student's space predict their label, [N] bool."""
        ...

    def token_log_probs(self, hidden_ND: Tensor, head: Head, ids_N: Tensor) -> Tensor:
        """Log-probability of one id at each row, [N]."""
        ...

    def segment_values(
        self, hidden_ND: Tensor, head: Head, ids_N: Tensor, compare: SegmentCompare, of_V: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """What a method that compares segments reads of one token at each row, and the mass of some ids, [N] each."""
        ...

    def paired_loss(self, rows: Rows, **options: Any) -> tuple[Tensor, Sums]:
        """Spaces compared on paired rows, see `blockwise.dskd_loss`."""
        ...

    def attention_loss(self, rows: Rows, **options: Any) -> tuple[Tensor, Sums]:
        """Spaces compared through cross-model attention, see `blockwise.cma_loss`."""
        ...

    def direct_loss(self, rows: Rows, *, compare: Compare | None, **options: Any) -> tuple[Tensor, Sums]:
        """Two distributions compared, or cross-entropy alone, see `blockwise.baseline_loss`."""
        ...

    def segment_loss(self, rows: Rows, *, compare: SegmentCompare, **options: Any) -> tuple[Tensor, Sums]:
        """Segments compared, see `blockwise.segment_loss`."""
        ...


@dataclass(frozen=True)
class TorchBlocks:
    """The reference: plain torch, one block of rows after another.

    block_elements: rows x vocabulary entries at a time; up to 10 fp32 tensors of this size live at the peak.
    """

    block_elements: int

    @property
    def engine(self) -> Callable[..., Walk]:
        """What computes the sums of a block and their gradients."""
        return Walk

    def argmax(self, teacher_NE: Tensor, teacher_head: Head) -> Tensor:
        return readings.teacher_argmax(teacher_NE, teacher_head, block_elements=self.block_elements)

    def agreement(self, projected_Nd: Tensor, student_head: Head, label_N: Tensor, event_V: Tensor | None) -> Tensor:
        return readings.agreement_of(
            projected_Nd, student_head, label_N, block_elements=self.block_elements, event_V=event_V
        )

    def token_log_probs(self, hidden_ND: Tensor, head: Head, ids_N: Tensor) -> Tensor:
        return readings.token_log_probs(hidden_ND, head, ids_N, block_elements=self.block_elements)

    def segment_values(
        self, hidden_ND: Tensor, head: Head, ids_N: Tensor, compare: SegmentCompare, of_V: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        return readings.segment_values(hidden_ND, head, ids_N, compare, block_elements=self.block_elements, of_V=of_V)

    def paired_loss(self, rows: Rows, **options: Any) -> tuple[Tensor, Sums]:
        return blockwise.dskd_loss(rows, block_elements=self.block_elements, engine=self.engine, **options)

    def attention_loss(self, rows: Rows, **options: Any) -> tuple[Tensor, Sums]:
        return blockwise.cma_loss(rows, block_elements=self.block_elements, engine=self.engine, **options)

    def direct_loss(self, rows: Rows, *, compare: Compare | None, **options: Any) -> tuple[Tensor, Sums]:
        return blockwise.baseline_loss(
            rows, compare=compare, block_elements=self.block_elements, engine=self.engine, **options
        )

    def segment_loss(self, rows: Rows, *, compare: SegmentCompare, **options: Any) -> tuple[Tensor, Sums]:
        return blockwise.segment_loss(rows, compare=compare, block_elements=self.block_elements, **options)
