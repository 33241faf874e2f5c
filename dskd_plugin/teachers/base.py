"""Where a teacher's hidden states come from: the model itself, or whatever has kept them."""

from contextlib import AbstractContextManager, nullcontext
from typing import Protocol, runtime_checkable

from torch import Tensor

from dskd_plugin.core.heads import Head


class HiddenStates(Protocol):
    """A source of the teacher's last hidden states; `live.Teacher` is the one that computes them."""

    def rows(self, ids_T: Tensor, lengths: Tensor, bins: Tensor, rows_N: Tensor) -> Tensor:
        """Hidden states [N, E] at flat positions ``rows_N`` of the concatenated samples ``ids_T``, without gradient.

        lengths: tokens of each sample; bins: how many samples share each packed row; both on the CPU.
        """
        ...


class TeacherParts(HiddenStates, Protocol):
    """What a loss needs of a teacher: its states, and the maps from ids to them and from them to ids.

    embedding: input embeddings [V, D]; D need not be the width of the head in every family.
    """

    head: Head

    @property
    def width(self) -> int: ...

    @property
    def embedding(self) -> Tensor: ...


@runtime_checkable
class ReadsAhead(Protocol):
    """A source that can get ready for a question which is asked later."""

    def read_ahead(self, ids_T: Tensor, lengths: Tensor, rows_N: Tensor) -> None:
        """As `HiddenStates.rows`, all on the CPU; called in a worker of the dataloader."""
        ...


def staying(teacher: HiddenStates | None) -> AbstractContextManager[None]:
    """Inside, weights that wait elsewhere between uses stay where they are used, for several questions in a row."""
    stay = getattr(teacher, "staying", None)
    found: AbstractContextManager[None] = nullcontext() if stay is None else stay()
    return found
