"""A start for the learned map of teacher states: trained on some rows, stopped where rows that it did not see say so.

Shape letters: N rows, D teacher width, d student width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

_LEARNING_RATE = 1e-3
_BATCH_ROWS = 128
_MOST_PASSES = 12
_PATIENCE = 2  # passes without a better result before it stops


class LabelLoss(Protocol):
    """Distance of the projected rows from their labels [N], and where they predict the label [N] bool."""

    def __call__(self, teacher_ND: Tensor, map_Dd: Tensor) -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True)
class Quality:
    """Means over unseen rows. label_loss in nats, agreement in [0, 1]."""

    label_loss: float
    agreement: float


@dataclass(frozen=True)
class Fit:
    """The fitted map, and what it was worth before and after. passes: how many it took to get there."""

    map_Dd: Tensor
    before: Quality
    after: Quality
    passes: int


class NotFalling(ValueError):
    """The loss is not a number while a map is fitted. loss: what it is."""

    def __init__(self, loss: float) -> None:
        super().__init__(f"label loss: expected a falling loss while the map is fitted, got {loss}. Check the states.")
        self.loss = loss


def fit_map(
    map_Dd: Tensor,
    learned_ND: Tensor,
    unseen_ND: Tensor,
    label_loss: LabelLoss,
    *,
    generator: torch.Generator,
    on_batch: Callable[[int, int], None] = lambda done, total: None,
) -> Fit:
    """Minimise the mean label loss of the learned rows by Adam, and keep the map that the unseen rows like best.

    map_Dd: the start; it comes back as it was where nothing is better. learned_ND, unseen_ND: teacher states, at least
    one row each. generator: of the order of rows, on the CPU. on_batch: told (batches done, batches at most).
    NotFalling where the loss is not a number.
    """
    weight_Dd = map_Dd.detach().clone().requires_grad_()
    optimizer = torch.optim.Adam([weight_Dd], lr=_LEARNING_RATE)
    best_Dd, before = map_Dd.detach().clone(), _measure(map_Dd, unseen_ND, label_loss)
    best, passes = before, 0
    batches = -(-len(learned_ND) // _BATCH_ROWS)
    for number in range(1, _MOST_PASSES + 1):
        order_N = torch.randperm(len(learned_ND), generator=generator).to(learned_ND.device)
        for k, rows in enumerate(torch.split(order_N, _BATCH_ROWS)):
            with torch.enable_grad():
                loss_N, _ = label_loss(learned_ND[rows], weight_Dd)
                (weight_Dd.grad,) = torch.autograd.grad(loss_N.mean(), weight_Dd)
            optimizer.step()
            on_batch((number - 1) * batches + k + 1, _MOST_PASSES * batches)
        found = _measure(weight_Dd, unseen_ND, label_loss)
        if not found.label_loss < float("inf"):
            raise NotFalling(found.label_loss)
        if found.label_loss < best.label_loss:
            best_Dd, best, passes = weight_Dd.detach().clone(), found, number
        elif number - passes >= _PATIENCE:
            break
    return Fit(best_Dd, before, best, passes)


@torch.no_grad()
def _measure(map_Dd: Tensor, rows_ND: Tensor, label_loss: LabelLoss) -> Quality:
    total = agreeing = 0.0
    for part_ND in torch.split(rows_ND, _BATCH_ROWS):
        loss_N, agree_N = label_loss(part_ND, map_Dd)
        total += float(loss_N.sum())
        agreeing += float(agree_N.sum())
    return Quality(total / len(rows_ND), agreeing / len(rows_ND))
