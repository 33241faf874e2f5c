"""Sums of rows under a mask, also where no row is left: the one place that adds rows up.

Shape letters: N rows, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor


def keep_rows(rows_ND: Tensor, mask_N: Tensor) -> Tensor:
    """The rows where the mask holds, zeros elsewhere; shape unchanged.

    mask_N: bool. A row that is left out may hold NaN: the function that follows sees zeros, and the row's
    gradient is 0. Masking only the result would not do, because 0 * NaN is NaN on the way back.
    """
    return torch.where(mask_N[:, None], rows_ND, 0)


def masked_sum(values_N: Tensor, mask_N: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of the values where the mask holds, and how many there are.

    values_N: floating point, NaN allowed where the mask is off. mask_N: bool.
    Returns (sum, count), two scalars of the dtype of the values. Without a kept row the sum is 0 and still
    attached to the graph (gradient 0), so that a distributed step stays in lockstep.
    """
    return torch.where(mask_N, values_N, 0).sum(), mask_N.sum().to(values_N.dtype)
