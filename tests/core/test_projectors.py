import pytest
import torch

from dskd_plugin.core import projectors
from dskd_plugin.core.projectors import TeacherToStudent, gram_inverse, head_map, t2s_projector


def conditioned(rows, width, condition, seed=0):
    """A [rows, width] head of the given condition number."""
    generator = torch.Generator().manual_seed(seed)
    left = torch.linalg.qr(torch.randn(rows, width, generator=generator, dtype=torch.float64))[0]
    right = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64))[0]
    spectrum = torch.linspace(1, 1 / condition, width, dtype=torch.float64)
    return (left * spectrum) @ right


def by_svd(source, target, source_ids, target_ids):
    return source[source_ids].double().T @ torch.linalg.pinv(target[target_ids].double().T, rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("condition", [1.5, 95, 3000])
def test_equals_the_pseudo_inverse(dtype, condition):
    source = conditioned(700, 24, 20, seed=1).to(dtype)
    target = conditioned(600, 40, condition, seed=2).to(dtype)
    source_ids = torch.randperm(700, generator=torch.Generator().manual_seed(3))[:500]
    target_ids = torch.randperm(600, generator=torch.Generator().manual_seed(4))[:500]
    got = head_map(source, target, source_ids, target_ids)
    expected = by_svd(source, target, source_ids, target_ids)
    assert got.dtype == torch.float32
    assert got.shape == (24, 40)
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


def test_least_squares_by_a_plain_solver():
    source, target = conditioned(80, 5, 4, seed=1), conditioned(80, 7, 4, seed=2)
    ids = torch.arange(80)
    expected = torch.linalg.lstsq(target, source).solution.T
    torch.testing.assert_close(head_map(source, target, ids, ids).double(), expected, rtol=1e-5, atol=1e-6)


def test_fp32_products_at_the_conditioning_of_real_heads():
    source, target = conditioned(4000, 64, 20, seed=1), conditioned(4000, 96, 95, seed=2)
    ids = torch.arange(4000)
    narrow = head_map(source.float(), target.float(), ids, ids, dtype=torch.float32)
    torch.testing.assert_close(narrow.double(), by_svd(source, target, ids, ids), rtol=0, atol=1e-4)


@pytest.mark.parametrize(("shared", "repeat"), [(5, 1), (1, 1), (40, 1), (30, 3)])
def test_fewer_shared_tokens_than_width(shared, repeat):
    # the Gram matrix is singular, also when some tokens have the same row
    source = conditioned(60, 8, 3, seed=1)
    target = conditioned(60, 40, 3, seed=2)
    ids = torch.arange(shared).repeat(repeat)
    got = head_map(source, target, ids, ids).double()
    torch.testing.assert_close(got, by_svd(source, target, ids, ids), rtol=1e-5, atol=1e-5)


def test_a_constant_zero_column_is_handled():
    source, target = conditioned(60, 8, 3, seed=1), conditioned(60, 10, 3, seed=2)
    target[:, 4] = 0
    ids = torch.arange(60)
    got = head_map(source, target, ids, ids).double()
    torch.testing.assert_close(got, by_svd(source, target, ids, ids), rtol=1e-5, atol=1e-5)
    assert got[:, 4].abs().max() < 1e-12


@pytest.mark.parametrize("seed", range(8))
def test_a_column_that_repeats_another_is_handled(seed):
    # whether the factorisation notices depends on the sign of a rounding error
    source, target = conditioned(60, 8, 3, seed=1), conditioned(60, 10, 3, seed=seed)
    target[:, 4] = target[:, 7]
    ids = torch.arange(60)
    got = head_map(source, target, ids, ids).double()
    torch.testing.assert_close(got, by_svd(source, target, ids, ids), rtol=1e-5, atol=1e-5)


def test_a_precomputed_inverse_changes_nothing():
    source, target = conditioned(300, 8, 3, seed=1), conditioned(300, 12, 95, seed=2)
    ids = torch.arange(10, 300)
    inverse = gram_inverse(target, ids)
    assert inverse.shape == (12, 12)
    torch.testing.assert_close(inverse, torch.linalg.inv(target[ids].T @ target[ids]), rtol=1e-9, atol=1e-6)
    given = head_map(source, target, ids, ids, target_gram_inverse=inverse)
    assert torch.equal(given, head_map(source, target, ids, ids))


def test_one_model_with_itself_is_the_identity():
    head = conditioned(300, 16, 95, seed=5).float()
    ids = torch.arange(300)
    torch.testing.assert_close(head_map(head, head, ids, ids), torch.eye(16), rtol=0, atol=1e-5)


def test_projected_states_keep_their_logits_when_the_target_can_express_them():
    # source logits lie in the span of the target's head: least squares has no residual
    target = conditioned(200, 12, 9, seed=6)
    mixing = conditioned(12, 7, 5, seed=7)
    source = target @ mixing
    ids = torch.arange(200)
    hidden = conditioned(4, 4, 2, seed=8) @ conditioned(7, 4, 2, seed=9).T
    projected = hidden @ head_map(source, target, ids, ids).double()
    torch.testing.assert_close(projected @ target.T, hidden @ source.T, rtol=0, atol=1e-6)


def test_every_block_counts(monkeypatch):
    source, target = conditioned(300, 8, 3, seed=1), conditioned(300, 12, 9, seed=2)
    ids = torch.arange(299)
    whole = head_map(source, target, ids, ids)
    for rows in (1, 7, 299, 1000):
        monkeypatch.setattr(projectors, "ROWS_AT_A_TIME", rows)
        torch.testing.assert_close(head_map(source, target, ids, ids), whole, rtol=1e-6, atol=1e-7)


def test_no_gradient_is_tracked():
    source, target = conditioned(60, 8, 3).requires_grad_(), conditioned(60, 6, 3).requires_grad_()
    ids = torch.arange(60)
    assert not head_map(source, target, ids, ids).requires_grad
    assert not gram_inverse(target, ids).requires_grad


@pytest.mark.parametrize(("of_source", "of_target"), [(3, 4), (0, 0)])
def test_ids_that_do_not_pair_up_are_refused(of_source, of_target):
    head = conditioned(60, 8, 3)
    with pytest.raises(ValueError, match=f"got {of_source} and {of_target}"):
        head_map(head, head, torch.arange(of_source), torch.arange(of_target))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_projector_holds_the_given_weight(dtype):
    weight = conditioned(9, 4, 3).float()
    projector = t2s_projector(9, 4, weight, dtype=dtype)
    assert isinstance(projector, TeacherToStudent)
    assert [name for name, _ in projector.named_parameters()] == ["linear.weight"]
    assert projector.linear.weight.dtype == dtype
    assert projector.linear.weight.shape == (4, 9)
    assert torch.equal(projector.weight_Dd, weight.to(dtype))
    hidden = conditioned(9, 9, 3).to(dtype)
    torch.testing.assert_close(projector(hidden), hidden @ projector.weight_Dd)


def test_random_projector_follows_its_generator_alone():
    def build(seed):
        return t2s_projector(64, 48, generator=torch.Generator().manual_seed(seed)).weight_Dd

    before = torch.random.get_rng_state()
    first, again, other = build(1), build(1), build(2)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert 0.9 / 8 < first.abs().max() <= 1 / 8
    assert abs(first.mean()) < 0.01


def test_a_weight_of_another_pair_is_refused():
    with pytest.raises(ValueError, match=r"expected shape \(9, 4\), got \(4, 9\)"):
        t2s_projector(9, 4, torch.zeros(4, 9))
