"""How hard each term of the loss pulls at the student, and in which direction, while it trains.

At chosen steps the loss is computed once more for each term alone, the others' divisors set to 0, and
differentiated by the student's last hidden states of the response rows. The training itself is not changed.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dskd_plugin.batch import StepBatch
from dskd_plugin.core.objective import TERMS
from dskd_plugin.losses.base import DistillationLoss

if TYPE_CHECKING:
    from dskd_plugin.host.trainer import DSKDTrainer


def watch(file: Path, *, every: int) -> Callable[["DSKDTrainer"], None]:
    """For `trainer.on_create`: append one line to `file` per probed step, with each term's gradient norm and cosine.

    The cosine is that with the gradient of ce.
    """

    def observe(loss: DistillationLoss, batch: StepBatch, hidden_BSd: Tensor) -> None:
        if loss.training and loss.step() % every == 0:
            with file.open("a", encoding="utf-8") as sink:
                sink.write(json.dumps({"step": loss.step(), **_measured(loss, batch, hidden_BSd)}) + "\n")

    return lambda trainer: trainer.distillation.observers.append(observe)


def _measured(loss: DistillationLoss, batch: StepBatch, hidden_BSd: Tensor) -> dict[str, float]:
    gradients = {}
    for i, term in enumerate(TERMS):
        assert batch.divisors_T is not None and batch.rows is not None
        if float(batch.divisors_T[i]) == 0:
            continue
        alone = torch.zeros_like(batch.divisors_T)
        alone[i] = batch.divisors_T[i]
        student_Rd = hidden_BSd.flatten(0, 1)[batch.rows_R].detach().requires_grad_()
        rows = replace(batch.rows, student_RD=student_Rd)
        with torch.enable_grad():
            part, _ = loss.loss_of(rows, replace(batch, divisors_T=alone), loss.student_head(), loss.objective)
            (gradients[term],) = torch.autograd.grad(part, student_Rd)
    found = {}
    for term, gradient in gradients.items():
        found[f"norm/{term}"] = float(gradient.norm())
        if term != "ce" and float(gradient.norm()) > 0:
            cosine = torch.nn.functional.cosine_similarity(gradient.flatten(), gradients["ce"].flatten(), dim=0)
            found[f"cosine/{term}"] = float(cosine)
    return found
