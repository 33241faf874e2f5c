"""Distances between two next-token distributions, in nats per row, unreduced.

Log-probabilities are the only currency; an excluded id has log-probability -inf.
Shape letters: N rows, V vocabulary of the space compared in.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

# Largest log-probability whose complement has digits left in fp32; one that was rounded there may even lie above 0.
NEARLY_CERTAIN = -1e-6


class Divergence(Protocol):
    """A distance with its knobs set."""

    def __call__(self, *, student_NV: Tensor, teacher_NV: Tensor) -> Tensor: ...


def log_probs(logits_NV: Tensor, *, temperature: float) -> Tensor:
    """Log-probabilities at a temperature: log softmax(z / temperature).

    logits_NV: any floating dtype; -inf excludes an id, at least one id of a row must be finite.
    temperature: > 0. Returns [N, V] in fp32 or wider; ValueError for another temperature.
    The only function in which temperature meets logits.
    """
    if not temperature > 0:
        raise ValueError(f"temperature: expected a number above 0, got {temperature}. Use 1.0 for none.")
    wide_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
    return torch.log_softmax(wide_NV if temperature == 1.0 else wide_NV / temperature, dim=-1)


def token_nll(logits_NV: Tensor, ids_N: Tensor) -> Tensor:
    """Minus the log-probability of one id of each row, [N] in fp32 or wider.

    Not torch's cross_entropy: Liger replaces that for the whole process, by one that writes its gradient over logits.
    """
    return torch.nn.functional.nll_loss(log_probs(logits_NV, temperature=1.0), ids_N, reduction="none")


def forward_kl(*, student_NV: Tensor, teacher_NV: Tensor) -> Tensor:
    """Kullback-Leibler divergence of the student from the teacher.

        sum p log(p / q),   p teacher, q student

    student_NV, teacher_NV: log-probabilities of one shape, fp32 or wider, -inf for excluded ids.
    Returns [N] nats, 0 where the sides agree, no upper bound; infinite where the student excludes an id
    that the teacher allows. Source: arXiv 2406.17328, without the factor temperature^2 of Hinton et al..
    """
    _check_shapes(student_NV, teacher_NV)
    return _kl(teacher_NV, student_NV)


def reverse_kl(*, student_NV: Tensor, teacher_NV: Tensor) -> Tensor:
    """Kullback-Leibler divergence of the teacher from the student.

        sum q log(q / p),   p teacher, q student

    student_NV, teacher_NV: log-probabilities of one shape, fp32 or wider, -inf for excluded ids.
    Returns [N] nats, 0 where the sides agree, no upper bound; infinite where the teacher excludes an id
    that the student allows. Source: Gu et al., arXiv 2306.08543, per token instead of per sequence.
    """
    _check_shapes(student_NV, teacher_NV)
    return _kl(student_NV, teacher_NV)


def js(*, student_NV: Tensor, teacher_NV: Tensor, teacher_share: float = 0.5) -> Tensor:
    """Jensen-Shannon divergence of the two sides from their mixture.

        w KL(p | m) + (1 - w) KL(q | m),   m = w p + (1 - w) q,   p teacher, q student

    student_NV, teacher_NV: log-probabilities of one shape, fp32 or wider, -inf for excluded ids.
    teacher_share: w, strictly inside (0, 1); the weight of the teacher in both places.
    Returns [N] nats, 0 where the sides agree, at most the entropy of (w, 1 - w); always finite.
    At the ends of w the value goes to 0; it does not become a one-sided KL.
    Source: Lin 1991 (generalised JS). In other libraries the weight may belong to the student.
    """
    _check_shapes(student_NV, teacher_NV)
    _check_share("teacher_share", teacher_share)
    of_teacher_N = _kl_to_mixture(teacher_NV, student_NV, own_share=teacher_share)
    of_student_N = _kl_to_mixture(student_NV, teacher_NV, own_share=1 - teacher_share)
    return teacher_share * of_teacher_N + (1 - teacher_share) * of_student_N


def skewed_forward_kl(*, student_NV: Tensor, teacher_NV: Tensor, skew: float = 0.1) -> Tensor:
    """Forward KL against a student softened with a share of the teacher.

        sum p log(p / (s p + (1 - s) q)),   p teacher, q student

    student_NV, teacher_NV: log-probabilities of one shape, fp32 or wider, -inf for excluded ids.
    skew: s, strictly inside (0, 1).
    Returns [N] nats, 0 where the sides agree, at most -log s; always finite.
    Source: Ko et al., arXiv 2402.03898 (skew KL).
    """
    _check_shapes(student_NV, teacher_NV)
    _check_share("skew", skew)
    return _kl_to_mixture(teacher_NV, student_NV, own_share=skew)


def skewed_reverse_kl(*, student_NV: Tensor, teacher_NV: Tensor, skew: float = 0.1) -> Tensor:
    """Reverse KL against a teacher softened with a share of the student.

        sum q log(q / ((1 - s) p + s q)),   p teacher, q student

    student_NV, teacher_NV: log-probabilities of one shape, fp32 or wider, -inf for excluded ids.
    skew: s, strictly inside (0, 1). The gradient also flows through the student's share of the mixture.
    Returns [N] nats, 0 where the sides agree, at most -log s; always finite.
    Source: Ko et al., arXiv 2402.03898 (skew reverse KL).
    """
    _check_shapes(student_NV, teacher_NV)
    _check_share("skew", skew)
    return _kl_to_mixture(student_NV, teacher_NV, own_share=skew)


def adaptive_kl(*, student_NV: Tensor, teacher_NV: Tensor, head_mass: float = 0.5) -> Tensor:
    """Forward and reverse KL, weighted by where the two sides differ.

        (g_head KL(p | q) + g_tail KL(q | p)) / (g_head + g_tail),   g = sum |p - q| over head or tail

    The head is the smallest set of the teacher's likeliest ids whose mass reaches head_mass, with every id
    as likely as the last of them, so the order of the vocabulary cannot matter. Where both gaps are 0 the
    weights are one half each. The weights are constants: no gradient flows through them.
    student_NV, teacher_NV: log-probabilities of one shape, fp32 or wider, -inf for ids excluded on both
    sides. head_mass: strictly inside (0, 1).
    Returns [N] nats, 0 where the sides agree, no upper bound; infinite or NaN where one side alone
    excludes an id. Source: Wu et al., arXiv 2404.02657.
    """
    _check_shapes(student_NV, teacher_NV)
    _check_share("head_mass", head_mass)
    with torch.no_grad():
        prob_NV = teacher_NV.exp()
        sorted_NV = prob_NV.sort(dim=-1, descending=True).values
        last_N1 = (sorted_NV.cumsum(-1) < head_mass).sum(-1, keepdim=True).clamp(max=prob_NV.shape[-1] - 1)
        head_NV = prob_NV >= sorted_NV.gather(-1, last_N1)
        gap_NV = (prob_NV - student_NV.exp()).abs()
        head_N = torch.where(head_NV, gap_NV, 0).sum(-1)
        tail_N = torch.where(head_NV, 0, gap_NV).sum(-1)
        both_N = head_N + tail_N
        forward_share_N = torch.where(both_N > 0, head_N / both_N, 0.5)
    return forward_share_N * _kl(teacher_NV, student_NV) + (1 - forward_share_N) * _kl(student_NV, teacher_NV)


def tvd(*, student_NV: Tensor, teacher_NV: Tensor) -> Tensor:
    """Total variation distance.

        1/2 sum |p - q|,   p teacher, q student

    student_NV, teacher_NV: log-probabilities of one shape, fp32 or wider, -inf for excluded ids.
    Returns [N], between 0 (equal) and 1 (no id in common); always finite. A probability and not nats,
    though it is weighed like the others. Where p = q at an id the gradient through that id is 0.
    Source: Wen et al., arXiv 2307.15190.
    """
    _check_shapes(student_NV, teacher_NV)
    return (teacher_NV.exp() - student_NV.exp()).abs().sum(-1) / 2


def binary_kl(*, student_C: Tensor, teacher_C: Tensor, temperature: float) -> Tensor:
    """Forward KL of two events of one text each: that it is said, or that it is not.

        p log(p / q) + (1 - p) log((1 - p) / (1 - q)),   p = exp(teacher / temperature), q = exp(student / temperature)

    student_C, teacher_C: log-likelihoods in nats, <= 0, -inf allowed. temperature: > 0; it keeps the likelihood of
    a long text away from 0. Returns [C] nats, 0 where the sides agree, no upper bound, always finite: both sides are
    held at or below -1e-6 nats, where fp32 log-probabilities end, and at or above -1e30. Beyond, the gradient is 0.
    Source: approximate likelihood matching, arXiv 2503.20083.
    """
    p_C, q_C = (x.clamp(-1e30, NEARLY_CERTAIN) / temperature for x in (teacher_C, student_C))
    said_C = p_C.exp()
    return said_C * (p_C - q_C) - torch.expm1(p_C) * (log1mexp(p_C) - log1mexp(q_C))


DIVERGENCES: dict[str, Callable[..., Tensor]] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "js": js,
    "skewed_forward_kl": skewed_forward_kl,
    "skewed_reverse_kl": skewed_reverse_kl,
    "adaptive_kl": adaptive_kl,
    "tvd": tvd,
}


def divergence(kind: str, **knobs: float) -> Divergence:
    """The distance of that name with its knobs set.

    kind: a key of DIVERGENCES. knobs: keyword arguments of that function beyond the two sides.
    Raises ValueError for an unknown kind, a knob that belongs to another kind, or a knob out of range.
    """
    if kind not in DIVERGENCES:
        raise ValueError(f"kind: expected one of {', '.join(DIVERGENCES)}, got {kind!r}. Choose one of these.")
    function = DIVERGENCES[kind]
    known = set(inspect.signature(function).parameters) - {"student_NV", "teacher_NV"}
    for name in knobs:
        if name not in known:
            raise ValueError(
                f"{name}: expected {' or '.join(sorted(known)) or 'no setting'} for kind "
                f"{kind!r}, got {name!r}. Remove it or choose another kind."
            )
    bound: Divergence = functools.partial(function, **knobs)
    certain_11 = torch.zeros(1, 1)
    bound(student_NV=certain_11, teacher_NV=certain_11)  # a knob out of range fails here, before any step
    return bound


def _kl(own_NV: Tensor, other_NV: Tensor) -> Tensor:
    """sum a log(a / b)."""
    return _kl_to_mixture(own_NV, other_NV, own_share=0.0)


def _kl_to_mixture(own_NV: Tensor, other_NV: Tensor, *, own_share: float) -> Tensor:
    """sum a log(a / (s a + (1 - s) b)), s in [0, 1); an id with a = 0 adds nothing, whatever b is."""
    apply: Callable[..., Tensor] = _KLToMixture.apply
    return apply(own_NV, other_NV, own_share)


class _KLToMixture(torch.autograd.Function):
    """With r = log b - log a, m = s a + (1 - s) b and L = log(m / a): value - sum a L.

    d / d log b = -a u and d / d log a = a (u - L), u = (1 - s) b / m. Its own rule because plain autograd
    makes NaN of excluded ids and holds a dozen [N, V] tensors; this one holds its inputs alone.
    """

    @staticmethod
    def forward(ctx: Any, own_NV: Tensor, other_NV: Tensor, own_share: float) -> Tensor:
        ctx.save_for_backward(own_NV, other_NV)
        ctx.own_share = own_share
        prob_NV, ratio_NV = _prob_and_ratio(own_NV, other_NV)
        return -(prob_NV * _log_mixture(ratio_NV, own_share)).sum(-1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient_N: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        share = ctx.own_share
        prob_NV, ratio_NV = _prob_and_ratio(*ctx.saved_tensors)
        other_part_NV = torch.sigmoid(ratio_NV + math.log((1 - share) / share)) if share else 1.0
        weight_NV = prob_NV.mul_(gradient_N[:, None])
        to_own_NV = to_other_NV = None
        if ctx.needs_input_grad[0]:
            to_own_NV = weight_NV * (other_part_NV - _log_mixture(ratio_NV, share))
        if ctx.needs_input_grad[1]:
            to_other_NV = -weight_NV * other_part_NV
        return to_own_NV, to_other_NV, None


def _prob_and_ratio(own_NV: Tensor, other_NV: Tensor) -> tuple[Tensor, Tensor]:
    """a and r = log b - log a, with r = 0 where a = 0 so that 0 times it is 0."""
    prob_NV = own_NV.exp()
    return prob_NV, torch.where(prob_NV > 0, other_NV - own_NV, 0)


def _log_mixture(ratio_NV: Tensor, own_share: float) -> Tensor:
    """log(s + (1 - s) exp(r)), exactly 0 at r = 0; by exp(-r) above, where exp(r) may overflow."""
    if own_share == 0:
        return ratio_NV
    damped_NV = torch.expm1(-ratio_NV.abs())
    damped_NV = torch.where(ratio_NV > 0, own_share * damped_NV, (1 - own_share) * damped_NV)
    return torch.log1p(damped_NV) + ratio_NV.clamp(min=0)


def log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x < 0, see NEARLY_CERTAIN: by expm1 near 0 and log1p far from it, where each has digits."""
    near = x > -math.log(2)
    return torch.where(
        near,
        torch.log(-torch.expm1(torch.where(near, x, -1.0))),
        torch.log1p(-torch.exp(torch.where(near, -1.0, x))),
    )


def _check_shapes(student_NV: Tensor, teacher_NV: Tensor) -> None:
    if student_NV.shape != teacher_NV.shape:
        raise ValueError(
            f"student and teacher log-probabilities: expected one shape, got {tuple(student_NV.shape)} and "
            f"{tuple(teacher_NV.shape)}. Project to one space, or restrict to shared ids, first."
        )


def _check_share(name: str, value: float) -> None:
    if not 0 < value < 1:
        raise ValueError(
            f"{name}: expected a number strictly between 0 and 1, got {value}. Leave it out for the default."
        )
