"""Maps between the hidden spaces of two models: least squares from their heads, and the learned one.

Shape letters: O shared ids, V rows of a head, D width of the source (in the learned map: teacher), E width of
the target, d width of the student.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

ROWS_AT_A_TIME = 8192  # shared ids gathered at a time


@torch.no_grad()
def head_map(
    source_VD: Tensor,
    target_VE: Tensor,
    source_ids_O: Tensor,
    target_ids_O: Tensor,
    *,
    target_gram_inverse: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Least-squares map W of hidden states under which the target's head gives the source's logits.

        W = S pinv(T) = S T^T (T T^T)^-1,   S = source[ids]^T [D, O],   T = target[ids]^T [E, O]

    source_VD, target_VE: head weights, any floating dtype. source_ids_O, target_ids_O: the same tokens.
    target_gram_inverse: gram_inverse(target_VE, target_ids_O) when known. Biases and soft-caps are not seen;
    for heads with a logit scale multiply W by source scale / target scale.
    dtype: of the products S T^T. fp32 takes half the time (far less on a consumer GPU) and errs by up to
    1e-7 times the squared condition number of the target's head; the sum over blocks stays fp64.
    Returns [D, E] fp32: source hidden states (rows) times W live in the target's space. In blocks of shared
    ids, so memory is O(D E + E E + block). ValueError when the ids do not pair up or are none.
    Source: arXiv 2504.11426, ideal initialisation; by Gram matrices instead of an SVD of [E, O].
    """
    if source_ids_O.shape != target_ids_O.shape or not len(source_ids_O):
        raise ValueError(
            f"shared ids: expected as many of the source as of the target and at least one, got "
            f"{len(source_ids_O)} and {len(target_ids_O)}. Without shared tokens start at random."
        )
    if target_gram_inverse is None:
        target_gram_inverse = gram_inverse(target_VE, target_ids_O)
    cross_DE = _product(source_VD, target_VE, source_ids_O, target_ids_O, dtype)
    return (cross_DE @ target_gram_inverse.to(cross_DE)).float()


@torch.no_grad()
def gram_inverse(target_VE: Tensor, ids_O: Tensor) -> Tensor:
    """(T T^T)^-1 of the shared rows of a head, the pseudo-inverse where they do not span its width.

    Returns [E, E] fp64: kept wide because the Gram matrix has the squared condition number of the head.
    """
    gram_EE = _product(target_VE, target_VE, ids_O, ids_O, torch.float64)
    factor_EE, failed = torch.linalg.cholesky_ex(gram_EE)
    pivots_E = factor_EE.diagonal().square()
    rounding = torch.finfo(gram_EE.dtype).eps * len(gram_EE)
    if bool(failed) or bool(pivots_E.min() <= rounding * pivots_E.max()):
        pseudo_EE: Tensor = torch.linalg.pinv(gram_EE, hermitian=True, rtol=rounding)
        return pseudo_EE
    return torch.cholesky_inverse(factor_EE)


class TeacherToStudent(nn.Module):
    """The learned map of teacher hidden states into the student's space, without bias."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear

    @property
    def weight_Dd(self) -> Tensor:
        """The map in the orientation of the method, h W: a view of the parameter."""
        return self.linear.weight.T

    def forward(self, teacher_ND: Tensor) -> Tensor:
        """teacher_ND: [..., D]. Returns [..., d]."""
        projected: Tensor = self.linear(teacher_ND)
        return projected


def t2s_projector(
    teacher_width: int,
    student_width: int,
    weight_Dd: Tensor | None = None,
    *,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float32,
) -> TeacherToStudent:
    """The learned map of teacher hidden states: linear_map(D, d).

    weight_Dd: [D, d], e.g. head_map(teacher head, student head, ...), or None.
    """
    return TeacherToStudent(linear_map(teacher_width, student_width, weight_Dd, generator=generator, dtype=dtype))


def linear_map(
    source_width: int,
    target_width: int,
    weight_DE: Tensor | None = None,
    *,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float32,
) -> nn.Linear:
    """A learned map without bias, from the given weight or from uniform noise in +-1 / sqrt(D).

    weight_DE: in the orientation of the method, h W; None draws from the generator, and the global random state is
    left alone. ValueError for a weight of another shape.
    """
    if weight_DE is None:
        bound = 1 / math.sqrt(source_width)
        weight_DE = (torch.rand(source_width, target_width, generator=generator) * 2 - 1) * bound
    if weight_DE.shape != (source_width, target_width):
        raise ValueError(
            f"projector weight: expected shape ({source_width}, {target_width}), got "
            f"{tuple(weight_DE.shape)}. It belongs to another pair of models; build it from these heads."
        )
    linear = nn.Linear(source_width, target_width, bias=False, dtype=dtype, device="meta")
    linear = linear.to_empty(device=weight_DE.device)
    with torch.no_grad():
        linear.weight.copy_(weight_DE.T)
    return linear


def _product(left_VD: Tensor, right_VE: Tensor, left_ids_O: Tensor, right_ids_O: Tensor, dtype: torch.dtype) -> Tensor:
    """left[ids]^T right[ids], a block of ids at a time in the given dtype, summed in fp64. Returns [D, E]."""
    device = left_VD.device
    total_DE = torch.zeros(left_VD.shape[1], right_VE.shape[1], dtype=torch.float64, device=device)
    for start in range(0, len(left_ids_O), ROWS_AT_A_TIME):
        left_BD = left_VD[left_ids_O[start : start + ROWS_AT_A_TIME].to(device)].to(dtype)
        right_BE = right_VE[right_ids_O[start : start + ROWS_AT_A_TIME].to(right_VE.device)].to(device, dtype)
        total_DE += left_BD.T @ right_BE
    return total_DE
