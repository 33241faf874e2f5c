"""What is read of rows in blocks without gradient: likeliest ids, agreement, probabilities of single tokens.

Shape letters as in objective.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dskd_plugin.core.heads import Head, head_logits, logits_at
from dskd_plugin.core.row_blocks import blocks, for_compute, no_autocast, rows_of_block, wide
from dskd_plugin.core.segments import SegmentCompare, token_values


@torch.no_grad()
def teacher_argmax(teacher_NE: Tensor, teacher_head: Head, *, block_elements: int) -> Tensor:
    """The teacher's most likely real id at each row. Returns [N] int64, without gradient."""
    return _argmax(teacher_NE, for_compute(teacher_head), block_elements)


@torch.no_grad()
def agreement_of(
    projected_Nd: Tensor, student_head: Head, label_N: Tensor, *, block_elements: int, event_V: Tensor | None = None
) -> Tensor:
    """Where rows in the student's space predict the label: argmax of head_s over the real ids == label.

    label_N: student ids, -1 for none (never agrees); or events, with the event of each student id in event_V.
    Returns [N] bool, without gradient.
    """
    predicted_N = _argmax(projected_Nd, for_compute(student_head), block_elements)
    return (predicted_N if event_V is None else event_V[predicted_N]) == label_N


@torch.no_grad()
def token_log_probs(hidden_ND: Tensor, head: Head, ids_N: Tensor, *, block_elements: int) -> Tensor:
    """Log-probability of one id at each row, at temperature 1 over all V rows of the head, as ce has it.

    Returns [N] nats, <= 0, fp32 or wider, without gradient.
    """
    head = for_compute(head)
    found_N = torch.empty(len(hidden_ND), dtype=wide(head.weight_VD), device=hidden_ND.device)
    with no_autocast(hidden_ND.device):
        for block in blocks(len(hidden_ND), rows_of_block(block_elements, head)):
            logits_BV = head_logits(hidden_ND[block], head)
            found_N[block] = -torch.nn.functional.cross_entropy(logits_BV, ids_N[block], reduction="none")
    return found_N


@torch.no_grad()
def segment_values(
    hidden_ND: Tensor,
    head: Head,
    ids_N: Tensor,
    compare: SegmentCompare,
    *,
    block_elements: int,
    of_V: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """What a method reads of one token at each row, see segments.token_values: over the real ids of the head.

    Logits need no product with the whole head. of_V: bool, ids whose joint probability is wanted as well, where
    log-probabilities are read; at temperature 1. Returns [N] and that probability, [N] or [0], fp32 or wider, without
    gradient.
    """
    head = for_compute(head).real()
    found_N = torch.empty(len(hidden_ND), dtype=wide(head.weight_VD), device=hidden_ND.device)
    mass_N = torch.empty_like(found_N if of_V is not None else found_N[:0])
    with no_autocast(hidden_ND.device):
        if compare.reads == "logits":
            found_N = logits_at(hidden_ND, head, ids_N[:, None], elements=block_elements)[:, 0] / compare.temperature
            return found_N, mass_N
        for block in blocks(len(hidden_ND), rows_of_block(block_elements, head)):
            logits_BV = head_logits(hidden_ND[block], head)
            found_N[block] = token_values(logits_BV, ids_N[block], reads=compare.reads, temperature=compare.temperature)
            if of_V is not None:
                mass_N[block] = torch.softmax(logits_BV, dim=1)[:, of_V].sum(1)
    return found_N, mass_N


def _argmax(hidden_ND: Tensor, head: Head, block_elements: int) -> Tensor:
    """The most likely real id at each row."""
    real = head.real()
    predicted_N = torch.empty(len(hidden_ND), dtype=torch.long, device=hidden_ND.device)
    with no_autocast(hidden_ND.device):
        for block in blocks(len(hidden_ND), rows_of_block(block_elements, real)):
            predicted_N[block] = head_logits(hidden_ND[block], real).argmax(-1)
    return predicted_N
