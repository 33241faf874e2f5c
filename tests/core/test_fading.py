"""A mean that forgets, against a loop."""

import pytest
import torch

from dskd_plugin.core.fading import FEWEST_ROWS, Fading


def test_older_steps_count_less():
    fading, steps = Fading(), [(3.0, 20), (-1.0, 40), (5.0, 10)]
    for total, rows in steps:
        fading.take_in(torch.tensor([total, rows], dtype=torch.float64))
    shares = [0.95**age for age in (2, 1, 0)]
    total, rows = (sum(share * step[k] for share, step in zip(shares, steps, strict=True)) for k in (0, 1))
    assert fading.mean == pytest.approx(total / rows)


def test_few_rows_say_nothing():
    fading = Fading()
    assert fading.mean is None
    fading.take_in(torch.tensor([9.0, FEWEST_ROWS - 1], dtype=torch.float64))
    assert fading.mean is None
    fading.take_in(torch.tensor([0.0, 4.0], dtype=torch.float64))
    assert fading.mean is not None


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_a_step_that_overflowed_is_forgotten(value):
    fading = Fading()
    fading.take_in(torch.tensor([8.0, 40.0], dtype=torch.float64))
    fading.take_in(torch.tensor([value, 40.0], dtype=torch.float64))
    assert fading.mean == pytest.approx(0.2)
