"""A start for the learned map of teacher states: trained on some rows, stopped where rows that it did not see say so.

Shape letters: N rows, D teacher width, d student width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

_LEARNING_RATE = 1e-3  # of the first pass, for states of size 1; after one that the unseen rows do not like, a quarter
_SLOWER = 0.25
_BATCH_ROWS = 128
_MOST_PASSES = 12
_PATIENCE = 4  # passes in a row without a better result before it stops


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

    After a pass that the unseen rows do not like it goes on from the best map, at a lower rate.
    map_Dd: the start; it comes back as it was where nothing is better. learned_ND, unseen_ND: teacher states, at least
    one row each. generator: of the order of rows, on the CPU. on_batch: told (batches done, batches at most).
    NotFalling where the loss is not a number.
    """
    best_Dd, before = map_Dd.detach().clone(), _measure(map_Dd, unseen_ND, label_loss)
    # How far a step may go depends on the size of the states, which differs a lot between teachers.
    size = float(learned_ND.double().square().mean().sqrt())
    best, passes, rate = before, 0, _LEARNING_RATE / max(size, 1e-6)
    weight_Dd, optimizer = _start(best_Dd, rate)
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
            continue
        if number - passes >= _PATIENCE:
            break
        rate *= _SLOWER
        weight_Dd, optimizer = _start(best_Dd, rate)
    return Fit(best_Dd, before, best, passes)


def _start(map_Dd: Tensor, rate: float) -> tuple[Tensor, torch.optim.Optimizer]:
    weight_Dd = map_Dd.clone().requires_grad_()
    return weight_Dd, torch.optim.Adam([weight_Dd], lr=rate)


@torch.no_grad()
def _measure(map_Dd: Tensor, rows_ND: Tensor, label_loss: LabelLoss) -> Quality:
    total = agreeing = 0.0
    for part_ND in torch.split(rows_ND, _BATCH_ROWS):
        loss_N, agree_N = label_loss(part_ND, map_Dd)
        total += float(loss_N.sum())
        agreeing += float(agree_N.sum())
    return Quality(total / len(rows_ND), agreeing / len(rows_ND))
