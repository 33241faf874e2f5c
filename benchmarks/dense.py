"""The loss of docs/method.md written down plainly: every logit of every row at once, plain autograd.

What the benchmarks compare with, and a second opinion for their test. Default settings, temperature 1; both
vocabularies have ids that the other lacks.
Shapes: R response rows, N paired ones (the first of R), V and U ids of student and teacher, d and D their widths, K
events.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

RATIO = 0.5  # kd_ratio
SUPPORT = 16  # shared ids that are compared, where not all are


def dense_loss(
    method: str,
    *,
    student_Rd: Tensor,
    gold_R: Tensor,
    student_head_Vd: Tensor,
    teacher_ND: Tensor,
    teacher_head_UD: Tensor,
    event_V: Tensor,
    event_U: Tensor,
    shared: int,
    t2s_Dd: Tensor | None = None,
    s2t_dD: Tensor | None = None,
) -> Tensor:
    """The loss of a method of shapes.METHODS.

    shared: ids, the first of both sides, that are the same token. t2s_Dd, s2t_dD: for dskd, s2t_dD for both spaces.
    """
    logits_RV = wide(student_Rd @ student_head_Vd.T)
    if method == "sft":
        return cross_entropy(logits_RV, gold_R)
    whole_R = torch.arange(len(gold_R), device=gold_R.device) >= len(teacher_ND)
    if method != "overlap_kd_support":
        whole_R |= event_V.bincount()[event_V[gold_R]] > 1  # one of several ids of its event
    weight_R = torch.where(whole_R, 1.0, 1 - RATIO)
    ce = (weight_R * cross_entropy(logits_RV, gold_R, reduction="none")).mean()
    student_NV = logits_RV[: len(teacher_ND)].log_softmax(-1)
    teacher_NU = wide(teacher_ND @ teacher_head_UD.T).log_softmax(-1)
    count = int(torch.maximum(event_V.max(), event_U.max())) + 1
    teacher_NK, student_NK = mass(teacher_NU, event_U, count), mass(student_NV, event_V, count)
    if method == "overlap_kd_support":
        likeliest_NK = student_NV.detach()[:, :shared].topk(SUPPORT).indices
        of_both = [log_NV.gather(1, likeliest_NK).log_softmax(-1) for log_NV in (teacher_NU, student_NV)]
        return ce + RATIO * kl(*of_both)
    if method == "overlap_kd":
        return ce + RATIO * kl(teacher_NK, student_NK)
    assert t2s_Dd is not None
    projected_NV = wide(project(teacher_ND, t2s_Dd) @ student_head_Vd.detach().T).log_softmax(-1)
    t2s_ce = kl(teacher_NK, mass(projected_NV, event_V, count))
    # The student shares a mass out inside an event itself, until the projector is seen to know better.
    own_NV = student_NV.detach()
    target_NV = own_NV + (teacher_NK - student_NK.detach())[:, event_V]
    kd = t2s_ce + kl(target_NV, student_NV)
    if method == "dskd_both":
        assert s2t_dD is not None
        read_NU = wide(project(student_Rd[: len(teacher_ND)], s2t_dD) @ teacher_head_UD.T).log_softmax(-1)
        kd = kd + kl(teacher_NU, read_NU)
    return ce + RATIO * kd


def wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def project(hidden_ND: Tensor, map_DE: Tensor) -> Tensor:
    """In the dtype of the map, then back."""
    return (hidden_ND.to(map_DE.dtype) @ map_DE).to(hidden_ND.dtype)


def mass(log_NV: Tensor, event_V: Tensor, count: int) -> Tensor:
    """Log-probability of each event."""
    return log_NV.new_zeros(len(log_NV), count).index_add(1, event_V, log_NV.exp()).log()


def kl(target_NV: Tensor, given_NV: Tensor) -> Tensor:
    """Forward KL of log-probabilities, mean over rows."""
    return (target_NV.exp() * (target_NV - given_NV)).sum(-1).mean()
