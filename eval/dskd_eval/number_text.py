"""Numbers as text, the same on the terminal, in report.md and in report.html."""

from __future__ import annotations

from decimal import ROUND_HALF_UP, Decimal

UNKNOWN = "–"
SMALLEST_P = 0.001


def fixed(value: float, digits: int = 1) -> str:
    """The value as it is stored, rounded; a tie goes away from zero, as JavaScript's toFixed has it: 6.25 is 6.3."""
    rounded = Decimal(value).quantize(Decimal(1).scaleb(-digits), ROUND_HALF_UP)
    return f"{rounded:f}"


def signed(value: float, digits: int = 1) -> str:
    """With + or -; ± for no difference at all."""
    sign = "+" if value > 0 else "-" if value < 0 else "±"
    return sign + fixed(abs(value), digits)


def span(low: float | None, high: float | None, digits: int = 1) -> str:
    """The ends of an interval, or – where it is unknown."""
    return UNKNOWN if low is None or high is None else f"{fixed(low, digits)} to {fixed(high, digits)}"


def signed_span(low: float | None, high: float | None, digits: int = 1) -> str:
    """The ends of the interval of a difference, or – where it is unknown."""
    return UNKNOWN if low is None or high is None else f"{signed(low, digits)} to {signed(high, digits)}"


def p_value(p: float) -> str:
    """Three decimals, or '< 0.001'."""
    return f"< {SMALLEST_P}" if p < SMALLEST_P else fixed(p, 3)
