"""The fused backend against the reference, on the CPU: Triton's interpreter runs the kernels as they are written.

It says nothing of the compiler: `test_the_kernels_compile_for_a_gpu` asks that, and tests/gpu runs them on one.
"""

import importlib
import json
import os
import subprocess
import sys

import pytest
import torch
from fused_cases import HEADS, KNOBS, LOSSES, Case, worst_excess

from benchmarks.counting import VocabularyWork
from dskd_plugin.core.backend import TorchBlocks
from dskd_plugin.core.divergences import DIVERGENCES
from dskd_plugin.core.fused import launch
from dskd_plugin.core.fused.backend import FusedBlocks
from dskd_plugin.core.fused.cover import COVERED
from dskd_plugin.core.fused.walk import FusedWalk
from dskd_plugin.core.rows import Rows
from dskd_plugin.core.walk import Walk

KINDS = sorted(COVERED)

# Triton's own functions and these kernels are interpreted or compiled as the environment says at their import.
with pytest.MonkeyPatch.context() as patch:
    patch.setenv("TRITON_INTERPRET", "1")
    pytest.importorskip("triton", reason="Axolotl brings it, but on macOS")
    row_kernels = importlib.import_module("dskd_plugin.core.fused.row_kernels")
    importlib.import_module("dskd_plugin.core.fused.event_kernel")
    importlib.import_module("dskd_plugin.core.fused.pointwise")


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    """Tiles of 8 ids, so that a row is several of them."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(launch, "TILE", 8)
    assert "Interpreted" in type(row_kernels.tl.max).__name__, "triton was imported before by another test"


def check_equal(case, rtol=1e-10, **options):
    wanted, found = case.numbers(Walk, **options), case.numbers(FusedWalk, **options)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=rtol, atol=1e-12, msg=lambda text, n=name: f"{n}: {text}")
    return found


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_has_the_numbers_of_the_reference(name):
    found = check_equal(Case(name))
    assert any(value.abs().max() > 0 for key, value in found.items() if key.startswith("gradient"))


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("name", ["kd", "events"])
def test_every_head(name, head):
    check_equal(Case(name, head=head))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["kd", "events"])
def test_every_divergence(name, kind):
    check_equal(Case(name, kind=kind, head="plain"))


def test_every_divergence_but_one_is_covered():
    assert set(COVERED) == set(DIVERGENCES) - {"adaptive_kl"}
    assert set(KNOBS) == {kind for kind, knob in COVERED.items() if knob}  # each knob is set in these cases


@pytest.mark.parametrize("name", ["kd", "events"])
def test_what_is_not_covered_is_the_references(name, monkeypatch):
    monkeypatch.setattr(launch, "compare", None)
    case = Case(name, kind="adaptive_kl")
    wanted, found = case.numbers(Walk), case.numbers(FusedWalk)
    assert all(torch.equal(found[key], value) for key, value in wanted.items())


@pytest.mark.parametrize("block_rows", [1, 4])
@pytest.mark.parametrize("name", ["kd, some rows", "exact, both spaces"])
def test_blocks_of_any_size(name, block_rows):
    check_equal(Case(name), block_elements=block_rows * 23)


@pytest.mark.parametrize("name", ["kd, some rows", "projected, soft labels"])
def test_rows_that_no_term_takes_may_hold_nan(name):
    clean = Case(name).numbers(FusedWalk)
    case = Case(name)
    found = case.numbers(FusedWalk, rows=case.with_nan())
    assert case.teacher.isnan().any()
    assert all(torch.equal(found[key], value) for key, value in clean.items())


@pytest.mark.parametrize("name", ["sft", "kd", "events", "exact, both spaces"])
def test_few_rows(name):
    case = Case(name)
    for rows, pairs in ((0, 0), (2, 0), (2, 2)):
        teacher = None if name == "sft" else case.teacher[:pairs]
        check_equal(case, rows=Rows(student_RD=case.student[:rows], labels_R=case.labels[:rows], teacher_NE=teacher))


@pytest.mark.parametrize("name", ["kd", "exact"])
def test_values_alone(name):
    case = Case(name)
    with torch.no_grad():
        loss, sums = case.loss(FusedWalk)
    wanted, wanted_sums = Case(name).loss(Walk)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, wanted.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(sums, wanted_sums, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("frozen", [("weight", "bias"), ("student", "weight"), ("student", "weight", "bias"), ("t2s",)])
def test_only_asked_gradients(frozen):
    case = Case("exact")
    for name in frozen:
        getattr(case, name).requires_grad_(False)
    check_equal(case)


def test_no_divisor_no_gradient():
    """A term without rows in the step weighs nothing, whatever its value."""
    case = Case("kd")
    case.divisors[4] = 0
    found = check_equal(case)
    assert found["kd, s"] > 0


@pytest.mark.parametrize("name", ["sft", "kd", "shared ids", "events", "projected, soft labels", "exact", "attention"])
def test_float32_is_near_float64(name):
    truth = Case(name, rounded=torch.float32).numbers(Walk)
    found = Case(name, dtype=torch.float32).numbers(FusedWalk)
    for key, exact in truth.items():
        assert (found[key].double() - exact).norm() <= 1e-5 * exact.norm() + 1e-7, key


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["sft", "kd", "events", "exact, both spaces"])
def test_error_budget_in_half_precision(name, dtype):
    """No further from float64 than the reference in the same dtype, plus a floor of that dtype."""
    truth = Case(name, rounded=dtype).numbers(Walk)
    naive, found = (Case(name, dtype=dtype).numbers(engine) for engine in (Walk, FusedWalk))
    assert {key: value.dtype for key, value in found.items()} == {key: value.dtype for key, value in naive.items()}
    key, excess = worst_excess(found, naive, truth, torch.finfo(dtype).eps)
    assert excess <= 0, (key, excess)


def test_under_autocast_the_products_follow_it():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        wanted, found = (Case("kd", dtype=torch.float32).numbers(engine) for engine in (Walk, FusedWalk))
    for key, value in wanted.items():
        assert found[key].dtype == value.dtype
        assert (found[key] - value).norm() <= 2e-2 * value.norm() + 1e-6, key


@pytest.mark.parametrize("name", ["kd", "events", "exact", "exact, both spaces"])
def test_products_and_memory(name):
    """As many products with the heads as the reference, and at most two logits, of a block each."""
    counts = []
    for engine in (Walk, FusedWalk):
        case = Case(name, head="plain")
        with VocabularyWork({"student": case.weight, "teacher": case.teacher_weight}) as work:
            case.numbers(engine, block_elements=3 * 21)
        assert work.largest <= 3 * 21
        counts.append(work.products)
    assert counts[0] == counts[1]


def test_nothing_over_the_vocabulary_is_kept_for_a_backward_pass():
    """Between forward and backward: one gradient per input and a scale, nothing saved inside blocks."""
    held = []
    case = Case("kd", head="plain")
    with torch.autograd.graph.saved_tensors_hooks(lambda x: held.append(tuple(x.shape)) or x, lambda x: x):
        case.numbers(FusedWalk)
    assert sorted(held) == sorted([(), tuple(case.student.shape), tuple(case.weight.shape)])


def test_the_backend_takes_the_place_of_the_reference():
    assert FusedBlocks(10).engine is FusedWalk and TorchBlocks(10).engine is Walk


COMPILE = """
import json, sys
import triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from dskd_plugin.core.fused import event_kernel, pointwise, row_kernels
from dskd_plugin.core.fused.cover import COVERED

POINTERS = {"gold": "*i64", "event_of": "*i64", "ids": "*i32", "events": "*i32", "likeliest": "*i32"}
POINTERS |= {"partner_of": "*i32", "product": "*bf16", "out": "*bf16", "other": "*bf16"}
INTEGERS = ("size", "real", "number")
head = dict(TEMPERATURE=2.0, SCALE=1.0, CAP=30.0, TILE=128, WIDE=tl.float32)
other = dict(OTHER_TEMPERATURE=1.0, OTHER_SCALE=1.0, OTHER_CAP=0.0)
jobs = [(event_kernel.event_masses, head), (row_kernels.cross_entropy, dict(head, CE=True, EVENTS=True, WRITE=True))]
for kind, knob in COVERED.items():
    knob, forms = (None if knob is None else 0.3), dict(PAIRED=kind == "js", CHANGED=kind != "js")
    options = dict(head, **other, **forms, CE=True, WRITE=True, KNOB=knob, DIVERGENCE=getattr(pointwise, kind))
    jobs.append((row_kernels.compare, options))
sizes = []
for kernel, constants in jobs:
    types = {}
    for name in kernel.arg_names:
        whole = "i32" if name in INTEGERS or name.endswith("_stride") else POINTERS.get(name, "*fp32")
        types[name] = "constexpr" if name in constants else whole
    made = triton.compile(ASTSource(kernel, types, constants), target=GPUTarget("cuda", 90, 32))
    sizes.append(len(made.asm["cubin"]))
print(json.dumps(sizes))
"""


def test_the_kernels_compile_for_a_gpu(tmp_path):
    """To machine code of an H100, which needs none."""
    kept = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment = kept | {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", COMPILE]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(json.loads(done.stdout)) == 2 + len(COVERED)
