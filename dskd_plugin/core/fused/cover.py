"""Which divergences the kernels have. Standard library only: settings are checked by it."""

from __future__ import annotations

# Name of a divergence, which is that of its function in pointwise.py -> its knob there. adaptive_kl sorts a row.
COVERED: dict[str, str | None] = {
    "forward_kl": None,
    "reverse_kl": None,
    "js": "teacher_share",
    "skewed_forward_kl": "skew",
    "skewed_reverse_kl": "skew",
    "tvd": None,
}
