"""Divergences id by id, for kernels: what one id adds to the value, and to the derivative by the student's log q.

Each is named as in core/divergences.py, where its formula is, and takes log q of the student, log p of the teacher and
its knob. All of them are sums over ids, so that with g = d/d log q and G = sum g the gradient by the student's logits
z at the temperature tau is (g - q G) / tau. Shape letters: none, every argument is a tile of ids of one row.
"""

import triton
import triton.language as tl


@triton.jit
def forward_kl(own, other, KNOB: tl.constexpr):
    value, _, slope = kl_to_mixture(other, own, 0.0)
    return value, slope


@triton.jit
def reverse_kl(own, other, KNOB: tl.constexpr):
    value, slope, _ = kl_to_mixture(own, other, 0.0)
    return value, slope


@triton.jit
def js(own, other, KNOB: tl.constexpr):
    of_teacher, _, slope_of_teacher = kl_to_mixture(other, own, KNOB)
    of_student, slope_of_student, _ = kl_to_mixture(own, other, 1 - KNOB)
    value = KNOB * of_teacher + (1 - KNOB) * of_student
    return value, KNOB * slope_of_teacher + (1 - KNOB) * slope_of_student


@triton.jit
def skewed_forward_kl(own, other, KNOB: tl.constexpr):
    value, _, slope = kl_to_mixture(other, own, KNOB)
    return value, slope


@triton.jit
def skewed_reverse_kl(own, other, KNOB: tl.constexpr):
    value, slope, _ = kl_to_mixture(own, other, KNOB)
    return value, slope


@triton.jit
def tvd(own, other, KNOB: tl.constexpr):
    q, p = tl.exp(own), tl.exp(other)
    sign = tl.where(q > p, 1.0, tl.where(q < p, -1.0, 0.0))
    return tl.abs(p - q) / 2, sign * q / 2


@triton.jit
def kl_to_mixture(own, other, SHARE: tl.constexpr):
    """a log(a / (s a + (1 - s) b)) and its derivatives by log a and log b, as divergences._KLToMixture has them."""
    a = tl.exp(own)
    ratio = tl.where(a > 0, other - own, 0.0)
    if SHARE == 0:
        log_mixture = ratio
        weight = a
    else:
        damped = tl.exp(-tl.abs(ratio)) - 1
        damped = tl.where(ratio > 0, SHARE * damped, (1 - SHARE) * damped)
        log_mixture = tl.log(1 + damped) + tl.maximum(ratio, 0.0)
        weight = a * (1 - SHARE) / ((1 - SHARE) + SHARE * tl.exp(-ratio))
    return -a * log_mixture, weight - a * log_mixture, -weight
