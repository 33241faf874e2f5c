"""One micro-batch on its way from the collator to the loss: which rows count, and what the teacher says of them.

Shapes: R response rows, N aligned rows (the first N of R), M teacher rows, P and Q rows of the spans on the student's
and the teacher's side, C spans, T terms, D teacher width.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from dskd_plugin.core.objective import Sums
from dskd_plugin.teachers.base import HiddenStates


@dataclass(frozen=True)
class SpanRows:
    """Where the tokens of the spans are; the teacher's side as hidden states."""

    rows_P: Tensor
    of_P: Tensor
    teacher_QD: Tensor
    teacher_targets_Q: Tensor
    teacher_of_Q: Tensor


@dataclass(frozen=True)
class AttentionRows:
    """What cross-model attention reads: sample number, input token and target of each row."""

    sample_N: Tensor
    inputs_N: Tensor
    sample_M: Tensor
    inputs_M: Tensor
    targets_M: Tensor


@dataclass
class MicroBatch:
    """One micro-batch of paired rows; the fields from ``window`` on are filled in before its first use."""

    rows_R: Tensor
    """Flat student positions that predict a response token; the paired ones first."""
    targets_R: Tensor
    """Their gold token ids."""
    teacher_ND: Tensor
    """Teacher hidden states of the paired rows; with attention those of all M teacher rows."""
    ce_R: Tensor | None = None
    """Which rows have a gold token; None for all."""
    spans: SpanRows | None = None
    attention: AttentionRows | None = None
    aligned: int = 0
    """Rows with a partner, out of ``responses``."""
    responses: int = 0
    window: list["MicroBatch"] = field(default_factory=list)
    """All micro-batches of the optimizer step; set on the first of them only."""
    argmax_N: Tensor | None = None
    label_N: Tensor | None = None
    agree_N: Tensor | None = None
    teacher_C: Tensor | None = None
    divisors_T: Tensor | None = None
    sums: Sums = field(default_factory=dict)

    @property
    def attending(self) -> AttentionRows:
        """The attention rows of a batch that was made for cross-model attention."""
        assert self.attention is not None
        return self.attention


def micro_batch(own: dict[str, Tensor], teacher: HiddenStates | None) -> MicroBatch:
    """The rows of a batch with the teacher's hidden states. own: the keys that the collator added, on one device."""
    pairs, in_spans = own["dskd_teacher_rows"], own.get("dskd_span_teacher_rows")
    hidden = torch.zeros(0, 0, device=pairs.device)
    if teacher is not None:
        wanted = pairs if in_spans is None else torch.cat([pairs, in_spans])
        lengths, bins = own["teacher_lengths"].cpu(), own["teacher_bins"].cpu()
        hidden = teacher.rows(own["teacher_input_ids"], lengths, bins, wanted)
    spans = attention = None
    if in_spans is not None:
        hidden, of_spans = hidden[: len(pairs)], hidden[len(pairs) :]
        spans = SpanRows(
            own["dskd_span_rows"],
            own["dskd_span_of"],
            of_spans,
            own["dskd_span_teacher_targets"],
            own["dskd_span_teacher_of"],
        )
    if "dskd_row_sample" in own:
        attending = own["dskd_row_sample"] >= 0
        attention = AttentionRows(
            own["dskd_row_sample"][attending],
            own["dskd_row_inputs"][attending],
            own["dskd_teacher_row_sample"],
            own["dskd_teacher_row_inputs"],
            own["dskd_teacher_row_targets"],
        )
    rows = own["dskd_rows"]
    return MicroBatch(
        rows,
        own["dskd_targets"],
        hidden,
        ce_R=own["dskd_ce"],
        spans=spans,
        attention=attention,
        aligned=len(pairs),
        responses=int(own.get("dskd_responses", len(rows))),
    )
