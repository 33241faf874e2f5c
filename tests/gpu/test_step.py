"""A step on the GPU against the same step in float64 on the CPU: no worse than the CPU is in the same dtype."""

import copy

import pytest
import torch

from benchmarks.shapes import METHODS, SIZES, Bench
from dskd_plugin.batch import ask
from dskd_plugin.core.backend import TorchBlocks

# What a rounding at another place may add, of the largest gradient.
FLOOR = {torch.float32: 2e-6, torch.bfloat16: 4e-3}


class SameWeights(Bench):
    """A bench whose models hold the numbers of another one: random numbers differ between devices."""

    def of(self, other):
        self.student.load_state_dict(other.student.state_dict())
        self.teacher.model.load_state_dict(other.teacher.model.state_dict())
        return self


@pytest.fixture(scope="module")
def origin():
    return Bench(SIZES["tiny"], torch.device("cpu"), torch.float32)


def loss_and_gradients(bench, method, backend=None):
    """Loss and every gradient of a step as float64 on the CPU; the projectors start alike on every device."""
    loss = bench.loss(method, backend)
    batch = ask(bench.batch, None if method == "sft" else bench.teacher)
    batch.window = [batch]
    loss.micro_batch = batch
    value = bench.student(input_ids=bench.input_ids, use_cache=False, logits_to_keep=1)["loss"]
    loss.micro_batch = None
    value.backward()
    named = {name: weight.grad for name, weight in bench.student.named_parameters() if weight.grad is not None}
    found = {name: gradient.detach().double().cpu().clone() for name, gradient in named.items()}
    bench.student.zero_grad(set_to_none=True)
    return value.detach().double().cpu(), found


def worst(found, truth):
    """Largest error of the loss and of all gradients, each relative to the largest number of its tensor."""
    (value, gradients), (true_value, true_gradients) = found, truth
    assert gradients.keys() == true_gradients.keys()
    errors = [(value - true_value).abs() / true_value.abs()]
    for name, gradient in gradients.items():
        scale = true_gradients[name].abs().max().clamp(min=1e-12)
        errors.append((gradient - true_gradients[name]).abs().max() / scale)
    return float(torch.stack(errors).max())


@pytest.mark.parametrize("dtype", list(FLOOR), ids=str)
@pytest.mark.parametrize("method", list(METHODS))
def test_numbers_are_the_cpus(method, dtype, origin, device):
    truth = loss_and_gradients(SameWeights(origin.size, torch.device("cpu"), torch.float64).of(origin), method)
    cpu = loss_and_gradients(SameWeights(origin.size, torch.device("cpu"), dtype).of(origin), method)
    here = loss_and_gradients(SameWeights(origin.size, device, dtype).of(origin), method)
    error, budget = worst(here, truth), 2 * worst(cpu, truth) + FLOOR[dtype]
    assert error <= budget, f"{error:.3g} against {worst(cpu, truth):.3g} on the CPU"


@pytest.mark.parametrize("method", list(METHODS))
def test_blocks_of_any_size_give_the_same(method, origin, device):
    bench = SameWeights(origin.size, device, torch.float32).of(origin)
    whole = loss_and_gradients(copy.copy(bench), method, TorchBlocks(2**25))
    small = loss_and_gradients(copy.copy(bench), method, TorchBlocks(3 * 500))  # three rows at a time
    assert worst(small, whole) < 1e-5
