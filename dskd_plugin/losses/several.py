"""Several teachers: a loss for each, with projectors, rows and memory of its own, added up in one forward."""

from collections.abc import Callable, Mapping, Sequence
from typing import cast

from torch import Tensor, nn

from dskd_plugin.batch import StepBatch
from dskd_plugin.losses.base import DistillationLoss


class SeveralTeachers(nn.Module):
    """In the place of a `DistillationLoss`: the sum of the teachers' losses, see `core.objective.Objective`.

    Its children are called teacher1, teacher2 and so on; so are their projectors in a checkpoint.
    """

    def __init__(self, each: Sequence[DistillationLoss]) -> None:
        super().__init__()
        for number, loss in enumerate(each, start=1):
            self.add_module(f"teacher{number}", loss)

    @property
    def each(self) -> tuple[DistillationLoss, ...]:
        return tuple(cast(DistillationLoss, loss) for loss in self.children())

    @property
    def micro_batch(self) -> StepBatch | None:
        """That of the first teacher; each loss is given its own."""
        return self.each[0].micro_batch

    def forward(self, hidden_BSd: Tensor, logits_BSV: Tensor) -> Tensor:
        first, *others = self.each
        assert first.micro_batch is not None
        loss: Tensor = first(hidden_BSd, logits_BSV)
        for one in others:
            assert one.micro_batch is not None
            # What scales its KD terms to the size of the cross-entropy has to know that.
            one.micro_batch.ce_sums = first.micro_batch.sums["ce"]
            loss = loss + one(hidden_BSd, logits_BSV)
        return loss

    def after_step(self, reduce: Callable[[Tensor], Tensor]) -> None:
        """See `DistillationLoss.after_step`."""
        for loss in self.each:
            loss.after_step(reduce)

    def memory(self) -> dict[str, Tensor]:
        """See `DistillationLoss.memory`; under the names of its children."""
        return {
            f"{name}.{key}": value
            for name, loss in zip(self._modules, self.each, strict=True)
            for key, value in loss.memory().items()
        }

    def remember(self, saved: Mapping[str, Tensor]) -> None:
        """Take up a saved memory."""
        for name, loss in zip(self._modules, self.each, strict=True):
            start = f"{name}."
            loss.remember({key.removeprefix(start): value for key, value in saved.items() if key.startswith(start)})


Loss = DistillationLoss | SeveralTeachers
