"""How hard each term of the loss pulls at the student, and in which direction, while it trains.

At chosen steps the loss is computed once more for each term alone, the others' divisors set to 0, and
differentiated by the student's last hidden states of the response rows. The training itself is not changed.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any


def install(file: Path, *, every: int) -> None:
    """Append one JSON line per probed step to `file`: norm of every term's gradient and its cosine with that of CE."""
    import torch

    from dskd_plugin.core.objective import TERMS
    from dskd_plugin.losses.base import DistillationLoss

    forward = DistillationLoss.forward

    def probed(self: Any, hidden_BSd: Any, logits_BSV: Any) -> Any:
        batch, step = self.micro_batch, self.step()
        loss = forward(self, hidden_BSd, logits_BSV)
        if self.training and step % every == 0:
            found: dict[str, Any] = {"step": step}
            gradients = {}
            for i, term in enumerate(TERMS):
                if float(batch.divisors_T[i]) == 0:
                    continue
                alone = torch.zeros_like(batch.divisors_T)
                alone[i] = batch.divisors_T[i]
                student_Rd = hidden_BSd.flatten(0, 1)[batch.rows_R].detach().requires_grad_()
                rows = replace(self._rows(batch), student_RD=student_Rd)
                part, _ = self._loss(rows, replace(batch, divisors_T=alone), self.student_head(), self.objective)
                (gradients[term],) = torch.autograd.grad(part, student_Rd)
            for term, gradient in gradients.items():
                found[f"norm/{term}"] = float(gradient.norm())
                if term != "ce" and float(gradient.norm()) > 0:
                    cosine = torch.nn.functional.cosine_similarity(gradient.flatten(), gradients["ce"].flatten(), dim=0)
                    found[f"cosine/{term}"] = float(cosine)
            with file.open("a", encoding="utf-8") as sink:
                sink.write(json.dumps(found) + "\n")
        return loss

    DistillationLoss.forward = probed  # type: ignore[method-assign]
