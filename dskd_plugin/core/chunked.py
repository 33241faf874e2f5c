"""The objective in row blocks: nothing of the size rows x vocabulary is ever held.

Shape letters as in objective.py: R response rows, N rows with a teacher partner, V ids of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dskd_plugin.core.heads import Head, head_logits
from dskd_plugin.core.objective import (
    RATES,
    TERMS,
    Objective,
    Rows,
    Sums,
    project,
    student_space_sums,
    teacher_space_sums,
    term_weights,
)

# Bounds what fp16 must hold in a block's head gradient, a sum over rows: 64 times a hidden state.
_ROWS_AT_FULL_WEIGHT = 64


@torch.no_grad()
def teacher_argmax(teacher_NE: Tensor, teacher_head: Head, *, block_elements: int) -> Tensor:
    """The teacher's most likely real id at each row. Returns [N] int64, without gradient."""
    head = _for_compute(teacher_head).real()
    return _argmax(teacher_NE, lambda block_BE: head_logits(block_BE, head), head, block_elements)


@torch.no_grad()
def agreement(
    teacher_NE: Tensor, t2s_Dd: Tensor, student_head: Head, label_N: Tensor, *, block_elements: int
) -> Tensor:
    """Where the projected teacher predicts the label: argmax of head_s(H W_t2s) over the real ids == label.

    label_N: student ids, -1 for none (never agrees). Returns [N] bool, without gradient.
    """
    head = _for_compute(student_head).real()
    predicted_N = _argmax(
        teacher_NE, lambda block_BE: head_logits(project(block_BE, t2s_Dd), head), head, block_elements
    )
    return predicted_N == label_N


def dskd_loss(
    rows: Rows,
    *,
    student_head: Head,
    teacher_head: Head,
    t2s_Dd: Tensor | None,
    s2t_dD: Tensor | None,
    objective: Objective,
    divisors_4: Tensor,
    block_elements: int,
) -> tuple[Tensor, Sums]:
    """The loss and the sums of its terms, in blocks of max(1, block_elements // V) rows.

        loss = (1 - r) ce / div_0 + r (t2s_kd / div_1 + t2s_ce / div_2 + s2t_kd / div_3)

    Terms, gradients and shapes: objective.term_sums. divisors_4: rows per term over the whole optimizer
    step in the order of TERMS (counts summed over micro-batches and ranks); a term with divisor 0 is 0.
    block_elements: rows x vocabulary entries at a time, 10 to 13 fp32 tensors of that size with gradients.
    Returns (loss, sums): loss a scalar attached to student_RD, head weight, head bias and t2s_Dd even where a
    term is left out (gradient 0); sums name -> (sum, count) for TERMS and RATES, detached, 0 and 0 for a term
    left out. With gradients disabled only values are computed.
    Values and gradients are both computed in the forward, one block after another, which needs the divisors
    beforehand; the backward only scales them, once per input. No second derivatives.
    Products are taken in the dtype of the weights, or in autocast's where it is on; sums in fp32 or wider.
    """
    walk = _Walk(rows, student_head, teacher_head, s2t_dD, objective, divisors_4, block_elements)
    inputs = (rows.student_RD, student_head.weight_VD, student_head.bias_V, t2s_Dd)
    if torch.is_grad_enabled():
        apply: Callable[..., tuple[Tensor, Tensor]] = _BlockwiseLoss.apply
        loss, sums_62 = apply(*inputs, walk)
    else:
        loss, sums_62, _, _ = walk.run(*inputs, wanted=(False,) * 4)
    return loss, {name: (sums_62[i, 0], sums_62[i, 1]) for i, name in enumerate(TERMS + RATES)}


@dataclass(frozen=True)
class _Walk:
    """One pass over the row blocks."""

    rows: Rows
    student_head: Head
    teacher_head: Head
    s2t_dD: Tensor | None
    objective: Objective
    divisors_4: Tensor
    block_elements: int

    def run(
        self,
        student_RD: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        t2s_Dd: Tensor | None,
        *,
        wanted: tuple[bool, ...],
    ) -> tuple[Tensor, Tensor, Tensor, list[Tensor | None]]:
        """Loss, sums [6, 2], scale, and the gradients of loss / scale for the wanted inputs."""
        given = (student_RD, weight_VD, bias_V, t2s_Dd)
        head = _for_compute(replace(self.student_head, weight_VD=weight_VD.detach(), bias_V=_detach(bias_V)))
        teacher_head = _for_compute(self.teacher_head.detach())
        leaves = [_leaf(x, want) for x, want in zip((head.weight_VD, head.bias_V, t2s_Dd), wanted[1:], strict=True)]
        head = replace(head, weight_VD=leaves[0], bias_V=leaves[1])
        wide = torch.promote_types(head.weight_VD.dtype, torch.float32)
        gradients = [
            torch.zeros_like(x, dtype=x.dtype if i == 0 else torch.promote_types(x.dtype, torch.float32))
            if want and x is not None
            else None
            for i, (x, want) in enumerate(zip(given, wanted, strict=True))
        ]
        block_rows = min(_block_rows(self.block_elements, head, teacher_head), max(1, len(self.rows)))
        weights_4 = term_weights(self.divisors_4, self.objective.kd_ratio).to(student_RD.device, wide)
        # Weights of order 1 in the blocks, the small rest in wide precision: fp16 gradients would underflow.
        scale = weights_4.max() * max(1.0, block_rows / _ROWS_AT_FULL_WEIGHT)
        relative_4 = weights_4 / torch.where(scale > 0, scale, 1)
        sums_62 = torch.zeros(len(TERMS + RATES), 2, dtype=wide, device=student_RD.device)
        rows = replace(self.rows, student_RD=student_RD.detach(), teacher_NE=self.rows.teacher_NE.detach())
        # One space after the other, so that the tensors of one are gone before those of the next come.
        spaces: tuple[Callable[[Rows], Sums], ...] = (
            partial(student_space_sums, student_head=head, t2s_Dd=leaves[2], objective=self.objective),
            partial(teacher_space_sums, teacher_head=teacher_head, s2t_dD=self.s2t_dD, objective=self.objective),
        )
        for start, stop in _blocks(len(rows), rows.pairs, block_rows):
            block = rows.block(start, stop)
            block_leaf = _leaf(block.student_RD, wanted[0])
            block = replace(block, student_RD=block_leaf)
            for space_sums in spaces:
                with torch.set_grad_enabled(any(wanted)), _no_autocast(student_RD.device):
                    sums = space_sums(block)
                    total = sums_62.new_zeros(())
                    for i, name in enumerate(TERMS + RATES):
                        if name in sums:
                            sums_62[i] += torch.stack(sums[name]).detach()
                            if name in TERMS:
                                total = total + relative_4[i] * sums[name][0]
                    if total.requires_grad:
                        _add_gradients(total, [block_leaf, *leaves], gradients, slice(start, stop))
        loss = (weights_4 * sums_62[: len(TERMS), 0]).sum()
        return loss, sums_62, scale, gradients


class _BlockwiseLoss(torch.autograd.Function):
    """Hands the gradients of the walk to autograd, scaled by whatever multiplies the loss."""

    @staticmethod
    def forward(
        ctx: Any,
        student_RD: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        t2s_Dd: Tensor | None,
        walk: _Walk,
    ) -> tuple[Tensor, Tensor]:
        inputs = (student_RD, weight_VD, bias_V, t2s_Dd)
        loss, sums_62, scale, gradients = walk.run(*inputs, wanted=ctx.needs_input_grad[:4])
        ctx.save_for_backward(scale, *gradients)
        ctx.dtypes = [None if x is None else x.dtype for x in inputs]
        ctx.mark_non_differentiable(sums_62)
        return loss, sums_62

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, loss_gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        scale, *gradients = ctx.saved_tensors
        factor = scale * loss_gradient
        return (*(_scaled(g, factor, dtype) for g, dtype in zip(gradients, ctx.dtypes, strict=True)), None)


def _add_gradients(total: Tensor, leaves: list[Tensor | None], gradients: list[Tensor | None], rows: slice) -> None:
    """Add one block's gradients: those of the student's rows in their place, the others to the whole."""
    wanted = [i for i, gradient in enumerate(gradients) if gradient is not None]
    found = torch.autograd.grad(total, [leaf for i in wanted if (leaf := leaves[i]) is not None], allow_unused=True)
    for i, part in zip(wanted, found, strict=True):
        into = gradients[i]
        if part is not None and into is not None:
            (into[rows] if i == 0 else into).add_(part)


def _argmax(hidden_NE: Tensor, logits: Callable[[Tensor], Tensor], head: Head, block_elements: int) -> Tensor:
    predicted_N = torch.empty(len(hidden_NE), dtype=torch.long, device=hidden_NE.device)
    with _no_autocast(hidden_NE.device):
        for start, stop in _blocks(len(hidden_NE), 0, _block_rows(block_elements, head)):
            predicted_N[start:stop] = logits(hidden_NE[start:stop]).argmax(-1)
    return predicted_N


def _block_rows(block_elements: int, *heads: Head) -> int:
    return max(1, block_elements // max(head.weight_VD.shape[0] for head in heads))


def _blocks(rows: int, pairs: int, block_rows: int) -> Iterator[tuple[int, int]]:
    """Bounds of the blocks; none straddles the end of the rows with a partner."""
    for first, last in ((0, pairs), (pairs, rows)):
        for start in range(first, last, block_rows):
            yield start, min(start + block_rows, last)


def _for_compute(head: Head) -> Head:
    """The head in the dtype of its products: autocast's for an fp32 weight where that is on, else its own."""
    device = head.weight_VD.device.type
    if head.weight_VD.dtype != torch.float32 or not torch.is_autocast_enabled(device):
        return head
    return replace(head, weight_VD=head.weight_VD.to(torch.get_autocast_dtype(device)))


def _no_autocast(device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, enabled=False)


def _detach(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.detach()


def _leaf(x: Tensor | None, wanted: bool) -> Any:
    return None if x is None else x.detach().requires_grad_(wanted)


def _scaled(gradient: Tensor | None, factor: Tensor, dtype: torch.dtype) -> Tensor | None:
    if gradient is None:
        return None
    return torch.mul(gradient, factor, out=torch.empty_like(gradient, dtype=dtype))
