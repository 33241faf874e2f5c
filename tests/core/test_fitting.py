"""The fitted start of the projector: it helps on rows that it did not see, or leaves the start as it was."""

import pytest
import torch

from dskd_plugin.core.fitting import fit_map

D, d, V = 12, 6, 30


def problem(rows, *, noise=0.0, seed=0):
    """Teacher states whose labels a hidden map decides; a label loss as the method has it; a start that is wrong."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    truth_Dd, head_Vd, states_ND = draw(D, d), draw(V, d), draw(rows, D)
    label_N = (states_ND @ truth_Dd @ head_Vd.T).argmax(-1)
    wrong_N = torch.rand(rows, generator=generator) < noise
    label_N = torch.where(wrong_N, torch.randint(V, (rows,), generator=generator), label_N)
    known = {tuple(row.tolist()): label for row, label in zip(states_ND, label_N, strict=True)}

    def label_loss(teacher_ND, map_Dd):
        labels = torch.stack([known[tuple(row.tolist())] for row in teacher_ND])
        logits_NV = teacher_ND @ map_Dd @ head_Vd.T
        return torch.nn.functional.cross_entropy(logits_NV, labels, reduction="none"), logits_NV.argmax(-1) == labels

    return 0.1 * draw(D, d), states_ND, label_loss


def fit(start, states, label_loss, unseen=100, seed=1, **options):
    generator = torch.Generator().manual_seed(seed)
    return fit_map(start, states[unseen:], states[:unseen], label_loss, generator=generator, **options)


def test_it_learns_and_keeps_what_unseen_rows_like_best():
    start, states, label_loss = problem(2000)
    found = fit(start, states, label_loss)
    loss_N, agree_N = label_loss(states[:100], found.map_Dd)
    assert loss_N.mean().item() == pytest.approx(found.after.label_loss)
    assert agree_N.double().mean().item() == pytest.approx(found.after.agreement)
    assert found.after.label_loss < 0.9 * found.before.label_loss
    assert found.after.agreement > found.before.agreement
    assert found.passes > 0


@pytest.mark.parametrize("scale", [1 / 64, 1.0, 32.0, 512.0])  # powers of two, so that labels are found again
def test_the_size_of_the_states_does_not_decide_whether_it_helps(scale):
    """The same problem in other units: a step of one rate would be too long for large states, too short for small."""
    start, states, label_loss = problem(2000)

    def in_units(teacher_ND, map_Dd):
        return label_loss(teacher_ND / scale, scale * map_Dd)

    found = fit(start / scale, scale * states, in_units)
    assert found.passes > 0 and found.after.label_loss < 0.95 * found.before.label_loss


def test_it_stops_and_keeps_the_start_where_nothing_is_better():
    """Labels of pure noise: what is learned of some rows is wrong of the others."""
    start, states, label_loss = problem(1000, noise=1.0)
    start = 0 * start  # even odds: the best there is
    told = []
    found = fit(start, states, label_loss, on_batch=lambda done, total: told.append((done, total)))
    assert found.passes == 0
    assert torch.equal(found.map_Dd, start)
    assert found.after == found.before
    done, total = told[-1]
    assert done < total  # it gave up early
    assert [k for k, _ in told] == [*range(1, len(told) + 1)]


def test_it_is_the_same_each_time_and_leaves_the_random_state_alone():
    start, states, label_loss = problem(600)
    before = torch.get_rng_state()
    one, other = fit(start, states, label_loss), fit(start, states, label_loss)
    assert torch.equal(one.map_Dd, other.map_Dd)
    assert not torch.equal(one.map_Dd, fit(start, states, label_loss, seed=2).map_Dd)
    assert torch.equal(before, torch.get_rng_state())


def test_a_loss_that_is_no_number_is_refused():
    start, states, label_loss = problem(600)

    def broken(teacher_ND, map_Dd):
        loss_N, agree_N = label_loss(teacher_ND, map_Dd)
        return loss_N * float("nan"), agree_N

    with pytest.raises(ValueError, match=r"expected a falling loss .* got nan"):
        fit(start, states, broken)
