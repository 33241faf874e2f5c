"""Where a teacher's hidden states come from: the model itself, or whatever has kept them."""

from typing import Protocol

from torch import Tensor


class HiddenStates(Protocol):
    """A source of the teacher's last hidden states; `live.Teacher` is the one that computes them."""

    def rows(self, ids_T: Tensor, lengths: Tensor, bins: Tensor, rows_N: Tensor) -> Tensor:
        """Hidden states [N, E] at flat positions ``rows_N`` of the concatenated samples ``ids_T``, without gradient.

        lengths: tokens of each sample; bins: how many samples share each packed row.
        """
        ...
