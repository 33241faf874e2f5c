"""The fused backend on the GPU: the cases of tests/core/test_fused.py, compiled, and a real vocabulary."""

import os
import warnings

import pytest
import torch
from fused_cases import HEADS, LOSSES, Case, worst_excess

from benchmarks.shapes import SIZES, Bench, computed
from dskd_plugin.core.fused import launch
from dskd_plugin.core.fused.cover import COVERED
from dskd_plugin.core.fused.walk import FusedWalk
from dskd_plugin.core.walk import Walk

FUSED = [name for name in computed(["sft", "overlap_kd", "dskd", "dskd_both"], ["fused"])]


@pytest.fixture(autouse=True)
def kernels(device):
    if device.type != "cuda" and not os.environ.get("TRITON_INTERPRET"):
        pytest.skip("kernels are compiled for CUDA; TRITON_INTERPRET=1 tries these tests on a CPU")


def check(name, device, dtype, floor, **options):
    truth = Case(name, rounded=dtype, **options).numbers(Walk)
    naive, found = (Case(name, dtype=dtype, device=device, **options).numbers(engine) for engine in (Walk, FusedWalk))
    key, excess = worst_excess(found, naive, truth, floor)
    assert excess <= 0, (key, excess)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_is_as_near_to_float64_as_the_reference(name, dtype, device):
    check(name, device, dtype, {torch.float32: 2e-6}.get(dtype, torch.finfo(dtype).eps))


@pytest.mark.parametrize("name", LOSSES)
def test_float64_is_the_references(name, device):
    wanted, found = (Case(name, device=device).numbers(engine) for engine in (Walk, FusedWalk))
    for key, value in wanted.items():
        torch.testing.assert_close(found[key], value, rtol=1e-9, atol=1e-11, msg=lambda text, k=key: f"{k}: {text}")


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("name", ["kd", "events", "exact"])
def test_every_head(name, head, device):
    check(name, device, torch.float32, 2e-6, head=head)


@pytest.mark.parametrize("kind", COVERED)
@pytest.mark.parametrize("name", ["kd", "events"])
def test_every_divergence(name, kind, device):
    check(name, device, torch.float32, 2e-6, kind=kind, head="plain")


@pytest.mark.parametrize("name", ["kd", "events", "exact, both spaces"])
def test_tiles_of_a_few_ids(name, device, monkeypatch):
    """As in the tests on the CPU: events run over the bounds of tiles."""
    monkeypatch.setattr(launch, "TILE", 16)
    monkeypatch.setattr(launch, "WARPS", 1)
    check(name, device, torch.float32, 2e-6)


def waits(case, block_elements):
    """How often a step has the CPU wait for the GPU."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            loss, _ = case.loss(FusedWalk, block_elements=block_elements)
            loss.backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return len(seen)


@pytest.mark.parametrize("name", ["sft", "kd", "shared ids", "events", "exact, both spaces"])
def test_more_rows_do_not_wait_more_often_for_the_gpu(name, device):
    if device.type != "cuda":
        pytest.skip("a CPU waits for nothing")
    case = Case(name, dtype=torch.float32, device=device)
    waits(case, 23)  # the first step compiles kernels and sorts ids by their events
    assert waits(case, 23) == waits(case, 10**6)  # nine blocks of a row, and one of all


@pytest.mark.parametrize("method", [name.removesuffix(", fused") for name in FUSED])
def test_a_vocabulary_of_a_real_model(method, device):
    """Qwen2.5-Coder-0.5B -> SmolLM2-135M with random weights: events of thousands of ids, many tiles."""
    bench = Bench(SIZES["small" if device.type == "cuda" else "tiny"], device, torch.bfloat16)
    backends = [backend for _, backend in computed([method], ["blocks", "fused"]).values()]
    values, gradients = [], []
    weight = bench.student.get_output_embeddings().weight
    weight.register_post_accumulate_grad_hook(lambda p: gradients.append(p.grad.float().clone()))
    for backend in backends:
        values.append(bench.step(bench.loss(method, backend), with_teacher=method != "sft").float())
    torch.testing.assert_close(values[1], values[0], rtol=2e-3, atol=0)
    assert (gradients[1] - gradients[0]).norm() <= 1e-2 * gradients[0].norm()
