import math

import torch

from dskd_plugin.core.reduce import keep_rows, masked_sum

NAN = math.nan


def test_masked_values_touch_neither_sum_nor_gradient():
    values = torch.tensor([1.5, NAN, -4.0, math.inf], dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([True, False, True, False])
    total, count = masked_sum(values, mask)
    total.backward()
    assert (total.item(), count.item()) == (-2.5, 2)
    assert values.grad.tolist() == [1, 0, 1, 0]


def test_no_row_left_is_zero_and_attached():
    values = torch.tensor([NAN, 2.0], requires_grad=True)
    total, count = masked_sum(values, torch.tensor([False, False]))
    total.backward()
    assert (total.item(), count.item()) == (0, 0)
    assert values.grad.tolist() == [0, 0]
    empty = torch.zeros(0, requires_grad=True)
    total, _ = masked_sum(empty, torch.zeros(0, dtype=torch.bool))
    total.backward()
    assert total.item() == 0
    assert empty.grad.shape == (0,)


def test_rows_left_out_cannot_poison_what_follows():
    rows = torch.tensor([[1.0, 2.0], [NAN, math.inf], [3.0, 4.0]], requires_grad=True)
    mask = torch.tensor([True, False, True])
    kept = keep_rows(rows, mask)
    total, _ = masked_sum(kept.exp().log().sum(-1), mask)
    total.backward()
    assert math.isclose(total.item(), 10, rel_tol=1e-6)
    torch.testing.assert_close(rows.grad, torch.tensor([[1.0, 1.0], [0.0, 0.0], [1.0, 1.0]]))


def test_dtype_is_kept():
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        rows = torch.ones(2, 3, dtype=dtype)
        mask = torch.tensor([True, False])
        assert keep_rows(rows, mask).dtype == dtype
        assert [x.dtype for x in masked_sum(rows[:, 0], mask)] == [dtype, dtype]
