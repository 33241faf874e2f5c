"""The teacher on the GPU: every attention, packed and padded, whole and quantised, live and from a cache."""

import importlib.util

import pytest
import torch

from benchmarks.cache import SIZES
from benchmarks.cache import Bench as CacheBench
from benchmarks.tiny import make_pair
from dskd_plugin.batch import ask
from dskd_plugin.teacher_settings import TeacherSettings
from dskd_plugin.teachers.base import staying
from dskd_plugin.teachers.live import Teacher

ATTENTIONS = ["eager", "sdpa", "flex_attention", "flash_attention_2"]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    # The kernels of FlexAttention on a GPU take heads of 16 numbers or more.
    return make_pair(tmp_path_factory.mktemp("pair"), head_dim=16)


def teacher(pair, device, *, attention=None, packed=False, student=None, offload=False, **settings):
    made = TeacherSettings(model=pair["teacher"], **settings)
    return Teacher(
        made,
        vocab_size=460,
        device=device,
        attn_implementation=attention,
        packed=packed,
        trust_remote_code=False,
        student=student,
        offload=offload,
    )


def states(one, device):
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([17, 5, 30, 9])
    ids_T = torch.randint(3, one.head.vocab_size, (int(lengths.sum()),), generator=generator).to(device)
    rows_N = torch.arange(0, len(ids_T), 2, device=device)
    return one.rows(ids_T, lengths, torch.tensor([2, 2]), rows_N).detach().double().cpu()


def error(found, truth):
    return float((found - truth).norm() / truth.norm())


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_every_attention_says_the_same(pair, device, attention, packed):
    dtype = "float32"
    if attention.startswith("flash"):
        if importlib.util.find_spec("flash_attn") is None:
            pytest.skip("flash-attn is not installed")
        dtype = "bfloat16"
    if attention == "flex_attention" and device.type == "cpu":
        pytest.skip("flex_attention is compiled for a GPU")
    truth = states(teacher(pair, torch.device("cpu"), dtype="float32", attention="eager"), torch.device("cpu"))
    made = teacher(pair, device, dtype=dtype, attention=attention, packed=packed)
    found = states(made, device)
    if packed:
        assert made.packed  # its own test of packing has passed
    assert error(found, truth) < (1e-4 if dtype == "float32" else 0.05)


@pytest.mark.parametrize(("quantization", "limit"), [("8bit", 0.15), ("4bit", 0.5)])
def test_a_quantised_teacher_is_near_the_whole_one(pair, device, quantization, limit):
    pytest.importorskip("bitsandbytes")
    if device.type == "cpu":
        pytest.skip("quantised weights are for a GPU")
    truth = states(teacher(pair, device, dtype="bfloat16"), device)
    found = states(teacher(pair, device, dtype="bfloat16", quantization=quantization), device)
    assert 0 < error(found, truth) < limit


def test_a_cache_holds_what_the_live_teacher_says(device, tmp_path):
    """States are kept in bfloat16, the dtype of this teacher."""
    bench = CacheBench(SIZES["tiny"], device, torch.bfloat16, tmp_path)
    _, batch = bench.batch
    live, kept = (ask(batch, teacher).teacher_states for teacher in (bench.teacher, bench.cached))
    assert error(kept.double().cpu(), live.double().cpu()) < 0.02


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("where", ["cpu", "the next device"])
def test_a_teacher_elsewhere_answers_where_the_student_is(pair, device, where, packed):
    if where != "cpu" and torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device or none here")
    at = torch.device("cpu" if where == "cpu" else "cuda:1")
    made = teacher(pair, at, dtype="float32", packed=packed, student=device)
    truth = teacher(pair, device, dtype="float32", packed=packed)
    assert made.input_device.type == at.type and made.packed == packed
    asked = torch.arange(3, 12, device=device), torch.tensor([9]), torch.tensor([1]), torch.tensor([8], device=device)
    found = made.rows(*asked)
    assert found.device.type == device.type == made.head.weight_VD.device.type == made.embedding.device.type
    assert error(states(made, device), states(truth, device)) < 1e-4


@pytest.mark.parametrize("packed", [False, True])
def test_weights_that_wait_on_the_cpu_are_on_the_device_while_it_reads(pair, device, packed):
    if device.type == "cpu":
        pytest.skip("there is no other memory to wait in")
    truth = states(teacher(pair, device, dtype="bfloat16", packed=packed), device)
    before = torch.cuda.memory_allocated(device)
    made = teacher(pair, device, dtype="bfloat16", packed=packed, offload=True)
    size = sum(weight.numel() * weight.element_size() for weight in made.decoder.parameters())
    head = made.head.weight_VD.numel() * made.head.weight_VD.element_size()
    held = torch.cuda.memory_allocated(device) - before
    assert head <= held < head + size // 2
    assert next(made.decoder.parameters()).is_pinned()
    torch.cuda.reset_peak_memory_stats(device)
    with staying(made):
        assert torch.equal(states(made, device), truth) and torch.equal(states(made, device), truth)
        assert torch.cuda.memory_allocated(device) - before >= head + size
    assert torch.cuda.memory_allocated(device) - before < head + size // 2
