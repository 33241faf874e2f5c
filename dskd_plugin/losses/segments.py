"""The loss of methods that compare segments: pairs of tokens, and spans that the two sides cut in other ways.

Shape letters as in core/segments.py: N pairs, G segments, P and Q their tokens on the student's and the teacher's side,
R response rows, E teacher width.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from dskd_plugin.batch import SpanRows, StepBatch
from dskd_plugin.core.heads import Head
from dskd_plugin.core.objective import Objective, Sums
from dskd_plugin.core.rows import Rows
from dskd_plugin.core.segments import SegmentCompare, Segments, cut, followed_by, put_first
from dskd_plugin.core.terms import span_sums
from dskd_plugin.losses.base import DistillationLoss


class BySegments(DistillationLoss):
    """All tokens of a segment at once; a segment of one token on each side is a pair."""

    def __init__(self, student: nn.Module, objective: Objective, compare: SegmentCompare, **options: Any) -> None:
        super().__init__(student, objective, **options)
        self._compare = compare
        self._read_with(self.student_and_head[1])

    def labelled(self, batch: StepBatch, student_head: Head) -> Rows:
        """The open tokens of all segments first; what is read of the teacher's other tokens is read here."""
        text, compare = batch.teacher_text, self._compare
        assert text is not None and self.teacher_head is not None
        spans = batch.spans or _no_spans(batch)
        pairs_N = torch.arange(len(text.rows_M), device=batch.rows_R.device)
        number = len(pairs_N) + (int(spans.of_P[-1]) + 1 if len(spans.of_P) else 0)
        of_P = torch.cat([pairs_N, len(pairs_N) + spans.of_P])
        of_Q = torch.cat([pairs_N, len(pairs_N) + spans.teacher_of_Q])
        ids_Q = torch.cat([text.ids_T[text.rows_M + 1], spans.teacher_targets_Q])
        states_QE = batch.teacher_states
        if spans.teacher_QD is not None and len(spans.teacher_QD):
            states_QE = torch.cat([states_QE, spans.teacher_QD])
        own = cut(torch.cat([pairs_N, spans.rows_P]), of_P, number, compare.opens)
        theirs = cut(torch.arange(len(of_Q), device=of_Q.device), of_Q, number, compare.opens)
        read_Q, of_read_Q = theirs.others_P, theirs.of_P
        # Where likelihoods alone are compared, the open token is one of those whose number is read.
        if not compare.whole_teacher:
            read_Q, of_read_Q = torch.arange(len(of_Q), device=of_Q.device), of_Q
        values_Q, ends_Q = self.backend.segment_values(
            states_QE[read_Q], self.teacher_head, ids_Q[read_Q], compare, compare.ends_U
        )
        kept_G = None
        if compare.ends_U is not None:
            next_G = followed_by(torch.cat([text.rows_M, spans.teacher_rows_Q]), of_Q, number)
            # Nothing is known of what follows a segment whose next token is in none.
            kept_G = (next_G < 0) | (ends_Q[next_G.clamp(min=0)] >= compare.least_end)
        # The engine takes the first rows as those that have a partner.
        order_R, place_R = put_first(own.open_G, len(batch.rows_R))
        others_P = place_R[own.others_P]
        taken_R = torch.zeros_like(batch.rows_R, dtype=torch.bool)
        taken_R[others_P] = True if kept_G is None else kept_G[own.of_P]
        return Rows(
            student_RD=torch.empty(len(order_R), 0),
            labels_R=batch.targets_R[order_R],
            ce_R=None if batch.ce_R is None else batch.ce_R[order_R],
            teacher_NE=states_QE[theirs.open_G],
            kd_N=kept_G,
            taken_R=taken_R,
            segments=Segments(
                order_R=order_R,
                paired_G=torch.arange(number, device=order_R.device) < len(pairs_N),
                others_P=others_P,
                of_P=own.of_P,
                sizes_G=own.sizes_G,
                teacher_ids_G=ids_Q[theirs.open_G],
                teacher_others_G=span_sums(values_Q, of_read_Q, number),
                teacher_sizes_G=theirs.sizes_G,
            ),
        )

    def loss_of(self, rows: Rows, batch: StepBatch, student_head: Head, objective: Objective) -> tuple[Tensor, Sums]:
        assert rows.segments is not None
        return self.backend.segment_loss(
            replace(rows, student_RD=rows.student_RD[rows.segments.order_R]),
            student_head=student_head,
            teacher_head=self.teacher_head,
            compare=self._compare,
            objective=objective,
            divisors_T=batch.divisors_T,
        )


def _no_spans(batch: StepBatch) -> SpanRows:
    """Of rows that were prepared without spans: those of one tokenizer."""
    none = batch.rows_R[:0]
    return SpanRows(rows_P=none, of_P=none, teacher_rows_Q=none, teacher_targets_Q=none, teacher_of_Q=none)
