"""One micro-batch on its way from the collator to the loss: which rows count, and what the teacher says of them.

The collator builds a `StepBatch` beside the student's own inputs, under the key `KEY`; the trainer has the teacher's
hidden states filled in; the loss adds which rows count, computes and leaves the sums of its terms.

Shapes: R response rows, N aligned rows (the first N of R), T tokens that the teacher reads, S samples of them, B packed
rows of them, M teacher rows (N of them unless all rows of a sample meet in attention), P and Q rows of the spans on the
student's and the teacher's side (Q also the further teacher rows of pairs), D teacher width.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from dskd_plugin.core.objective import Sums
from dskd_plugin.core.rows import Rows
from dskd_plugin.teachers.base import HiddenStates, ReadsAhead

# The key of the step batch in the mapping that the host carries from the collator to the trainer.
KEY = "dskd"
# Read on the host alone: to fetch it from a GPU would wait for all that the GPU still has to do.
ON_HOST = {"on_host": True}


@dataclass(frozen=True)
class TeacherText:
    """What the teacher reads, unpadded, and which of its hidden states the loss compares.

    ids_T: all samples, one after the other. lengths_S: tokens of each; samples_B: how many samples share each packed
    row, both on the CPU. rows_M: flat positions in ids_T, each before the token that it predicts.
    """

    ids_T: Tensor
    lengths_S: Tensor = field(metadata=ON_HOST)
    samples_B: Tensor = field(metadata=ON_HOST)
    rows_M: Tensor


@dataclass(frozen=True)
class SpanRows:
    """Where the tokens of the spans are.

    rows_P: index into the R response rows; of_P: number of the span. teacher_rows_Q: flat positions in the teacher's
    text; teacher_targets_Q: ids after them; teacher_of_Q: number of the span. teacher_QD: the hidden states there.
    """

    rows_P: Tensor
    of_P: Tensor
    teacher_rows_Q: Tensor
    teacher_targets_Q: Tensor
    teacher_of_Q: Tensor
    teacher_QD: Tensor | None = None


@dataclass(frozen=True)
class ReachRows:
    """Where the student's tokens of the N pairs lie in the teacher's text, which they may enter inside a token.

    offset_N: bytes of the teacher's token before the student's; below 0, bytes of the student's before the teacher's.
    targets_N: the teacher's token. Of the Q further teacher tokens that student tokens reach into: of_Q: the pair, not
    falling; teacher_rows_Q: flat positions in the teacher's text before them; teacher_targets_Q: the tokens.
    teacher_QD: the hidden states there.
    """

    offset_N: Tensor
    targets_N: Tensor
    of_Q: Tensor
    teacher_rows_Q: Tensor
    teacher_targets_Q: Tensor
    teacher_QD: Tensor | None = None


@dataclass(frozen=True)
class AttentionRows:
    """What cross-model attention reads: sample number and input token of each row; the teacher's targets."""

    sample_N: Tensor
    inputs_N: Tensor
    sample_M: Tensor
    inputs_M: Tensor
    targets_M: Tensor


@dataclass
class StepBatch:
    """One micro-batch of paired rows; the loss fills in the fields from ``rows`` on before its first use."""

    rows_R: Tensor
    """Flat student positions that predict a response token; the paired ones first."""
    targets_R: Tensor
    """Their gold token ids."""
    ce_R: Tensor | None = None
    """Which rows count for the cross-entropy; None for all."""
    teacher_text: TeacherText | None = None
    teacher_MD: Tensor | None = None
    """Teacher hidden states of the compared rows, empty without a teacher; None before `ask`."""
    spans: SpanRows | None = None
    reach: ReachRows | None = None
    attention: AttentionRows | None = None
    samples: list[Any] | None = None
    """The rows of the dataset, where the student may answer their prompts in place of the gold answers."""
    others: tuple["StepBatch", ...] = ()
    """The same rows beside the text of each further teacher, if there are several."""
    ce_sums: tuple[Tensor, Tensor] | None = None
    """Sum and number of rows of the cross-entropy where the loss of another teacher has taken it."""
    sampled: int | None = None
    """Tokens that the student has sampled for these rows; None for gold rows."""
    window: list["StepBatch"] = field(default_factory=list)
    """All micro-batches of the optimizer step, see `as_window`; set on the first of them only."""
    rows: Rows | None = None
    """What the loss takes, but for the student's hidden states."""
    teacher_argmax_M: Tensor | None = None
    divisors_T: Tensor | None = None
    sums: Sums = field(default_factory=dict)

    @property
    def each(self) -> tuple["StepBatch", ...]:
        """The rows beside each teacher's text."""
        return self, *self.others

    @property
    def aligned(self) -> int:
        """Rows of the teacher that are compared, out of ``responses``."""
        return 0 if self.teacher_text is None else len(self.teacher_text.rows_M)

    @property
    def responses(self) -> int:
        """Response tokens that could have a partner."""
        return len(self.rows_R) if self.sampled is None else self.sampled

    @property
    def teacher_states(self) -> Tensor:
        """`teacher_MD` of a batch for which the teacher was asked."""
        assert self.teacher_MD is not None
        return self.teacher_MD

    @property
    def attending(self) -> AttentionRows:
        """The attention rows of a batch that was made for cross-model attention."""
        assert self.attention is not None
        return self.attention

    # torch and accelerate move whatever has these methods, as they move tensors.

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> "StepBatch":
        return _with_each_tensor(self, lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "StepBatch":
        return _with_each_tensor(self, lambda tensor: tensor.pin_memory())


Part = TypeVar("Part")


def _with_each_tensor(part: Part, change: Callable[[Tensor], Tensor]) -> Part:
    """A copy of a dataclass with each of its tensors changed, and those of the dataclasses inside it."""
    changed: dict[str, Any] = {}
    for one in fields(part):  # type: ignore[arg-type]
        value = getattr(part, one.name)
        if isinstance(value, Tensor):
            if one.metadata != ON_HOST:
                changed[one.name] = change(value)
        elif is_dataclass(value):
            changed[one.name] = _with_each_tensor(value, change)
        elif isinstance(value, tuple):
            changed[one.name] = tuple(_with_each_tensor(inner, change) for inner in value)
    return replace(part, **changed)  # type: ignore[type-var]


def as_window(batches: list[StepBatch]) -> None:
    """Let the first of an optimizer step's micro-batches know them all, beside each teacher's text."""
    for of_teacher in zip(*(batch.each for batch in batches), strict=True):
        of_teacher[0].window = list(of_teacher)


def _further(batch: StepBatch) -> dict[str, Any]:
    """What reads further rows of the teacher, by the name of its field."""
    return {name: part for name in ("spans", "reach") if (part := getattr(batch, name)) is not None}


def _asked_rows(batch: StepBatch) -> list[Tensor]:
    """The rows of the teacher that are compared, and those of each of `_further`."""
    assert batch.teacher_text is not None
    return [batch.teacher_text.rows_M, *(part.teacher_rows_Q for part in _further(batch).values())]


def ask(batch: StepBatch, teacher: HiddenStates | None) -> StepBatch:
    """The batch with the hidden states of the teacher, of the compared rows and of what reads further ones."""
    text = batch.teacher_text
    assert text is not None
    further = _further(batch)
    if teacher is None:
        nothing = torch.zeros(0, 0, device=batch.rows_R.device)
        empty = {name: replace(part, teacher_QD=nothing) for name, part in further.items()}
        return replace(batch, teacher_MD=nothing, **empty)
    # One question for all: the teacher reads the text once.
    rows = _asked_rows(batch)
    hidden = teacher.rows(text.ids_T, text.lengths_S, text.samples_B, torch.cat(rows))
    compared, *found = torch.split(hidden, [len(part) for part in rows])
    of_parts = zip(further.items(), found, strict=True)
    return replace(
        batch, teacher_MD=compared, **{name: replace(part, teacher_QD=states) for (name, part), states in of_parts}
    )


def announce(batch: StepBatch, teacher: ReadsAhead) -> None:
    """Tell a teacher what `ask` will ask; the batch is on the CPU."""
    text = batch.teacher_text
    assert text is not None
    teacher.read_ahead(text.ids_T, text.lengths_S, torch.cat(_asked_rows(batch)))
