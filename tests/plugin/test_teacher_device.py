"""The teacher on another device, and weights that wait on the CPU between uses: where it may be, the same numbers."""

import pytest
import torch

from dskd_plugin.errors import DSKDSetupError
from dskd_plugin.settings import parse_settings
from dskd_plugin.teacher_settings import TeacherSettings
from dskd_plugin.teachers.base import staying
from dskd_plugin.teachers.live import Teacher
from dskd_plugin.teachers.placement import is_offloaded, suited_attention, teacher_device

CPU, FIRST = torch.device("cpu"), torch.device("cuda:0")
QUESTION = torch.arange(3, 30), torch.tensor([15, 12]), torch.tensor([2]), torch.tensor([0, 7, 26])


def settings(**more):
    return TeacherSettings(model="x", **more)


@pytest.fixture
def machine(monkeypatch):
    """machine(devices, processes, number): what the launcher and torch say here."""

    def of(devices, processes=1, number=0):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: devices)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
        monkeypatch.setenv("LOCAL_RANK", str(number))

    return of


@pytest.mark.parametrize(
    ("named", "processes", "number", "expected"),
    [
        (None, 2, 1, "cuda:0"),
        ("cpu", 4, 3, "cpu"),
        ("cuda:3", 1, 0, "cuda:3"),
        (["cuda:2", "cuda:3"], 2, 1, "cuda:3"),
        (["cuda:2", "cuda:3"], 1, 0, "cuda:2"),
        (["cuda:2", "cuda:2"], 2, 1, "cuda:2"),
    ],
)
def test_each_process_has_its_device(machine, named, processes, number, expected):
    machine(4, processes, number)
    assert teacher_device(settings(device=named), FIRST) == torch.device(expected)


@pytest.mark.parametrize(
    ("devices", "processes", "named", "told"),
    [
        (2, 1, "cuda:2", "cpu, or one of the 2 CUDA devices of this machine, got 'cuda:2'"),
        (0, 1, "cuda:0", "cpu on a machine without CUDA, got 'cuda:0'"),
        (4, 2, "cuda:3", "a device for each of the 2 processes of this machine, as a list, or cpu, got 'cuda:3'"),
        (4, 3, ["cuda:2", "cuda:3"], "a device for each of the 3 processes"),
    ],
)
def test_a_device_that_is_not_there_is_told(machine, devices, processes, named, told):
    machine(devices, processes)
    with pytest.raises(DSKDSetupError) as error:
        teacher_device(settings(device=named), FIRST)
    assert str(error.value).startswith("dskd.teacher.device: expected ") and told in str(error.value)


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"device": "gpu"}, "dskd.teacher.device: expected 'cpu', 'cuda:0' and so on, or a list of these .*got 'gpu'"),
        ({"device": "cuda"}, "dskd.teacher.device: expected 'cpu', 'cuda:0'.* got 'cuda'"),
        ({"device": []}, r"dskd.teacher.device: .*got \[\]"),
        ({"device": ["cuda:1", "disk"]}, "dskd.teacher.device: .*'disk'"),
        ({"device": "cpu", "offload": True}, "dskd.teacher.offload: expected false beside device: cpu"),
        ({"quantization": "4bit", "offload": True}, "dskd.teacher.offload: .* true with quantization: 4bit"),
    ],
)
def test_settings_that_cannot_be(more, told):
    with pytest.raises(ValueError, match=told):
        parse_settings({"teacher": {"model": "x", **more}})


def test_weights_on_the_cpu_have_nowhere_to_go():
    assert not is_offloaded(settings(offload=True), CPU)
    assert is_offloaded(settings(offload=True), FIRST) and not is_offloaded(settings(), FIRST)


def test_the_students_attention_is_taken_where_it_computes():
    assert suited_attention("flash_attention_2", "bfloat16", FIRST) == "flash_attention_2"
    assert suited_attention("flash_attention_2", "float32", FIRST) is None
    assert [suited_attention(name, "bfloat16", CPU) for name in ("flash_attention_2", "flex_attention", "sdpa")] == [
        *(None, None, "sdpa")
    ]
    assert suited_attention("sdpa", "bfloat16", "auto") == "sdpa" and suited_attention(None, "float32", CPU) is None


def load(tiny, *, packed=False, **more):
    made = TeacherSettings(model=tiny["teacher"], dtype="float32")
    return Teacher(
        made,
        vocab_size=418,
        device=CPU,
        attn_implementation="sdpa",
        packed=packed,
        trust_remote_code=False,
        **more,
    )


@pytest.mark.parametrize("packed", [False, True])
def test_a_teacher_that_waits_says_the_same(tiny, packed):
    """On a CPU the way to the device is a copy as well, so that all but the device is real."""
    here, waits = load(tiny, packed=packed), load(tiny, packed=packed, offload=True)
    assert here.packed == waits.packed == packed
    assert torch.equal(waits.rows(*QUESTION), here.rows(*QUESTION))
    assert torch.equal(waits.head.weight_VD, here.head.weight_VD) and torch.equal(waits.embedding, here.embedding)
    assert waits.input_device == CPU


def places(teacher):
    return [weight.data_ptr() for weight in teacher.decoder.parameters()]


def test_its_weights_come_once_for_several_questions_and_leave_after_the_last(tiny, monkeypatch):
    teacher, seen = load(tiny, offload=True), []
    waiting = places(teacher)
    forward = teacher.decoder.forward

    def watched(*arguments, **named):
        seen.append(places(teacher))
        return forward(*arguments, **named)

    monkeypatch.setattr(teacher.decoder, "forward", watched)
    with staying(teacher):
        assert places(teacher) == waiting  # nobody has asked yet
        with staying(teacher):
            teacher.rows(*QUESTION)
        teacher.rows(*QUESTION)
    assert places(teacher) == waiting
    assert seen[0] == seen[1] and not set(seen[0]) & set(waiting)
    teacher.rows(*QUESTION)
    assert len(seen) == 3 and places(teacher) == waiting
    with pytest.raises(IndexError):
        teacher.rows(torch.tensor([10**6]), torch.tensor([1]), torch.tensor([1]), torch.tensor([0]))
    assert places(teacher) == waiting


def test_a_teacher_without_such_weights_stays_where_it_is(tiny):
    teacher = load(tiny)
    before = places(teacher)
    for one in (teacher, object(), None):
        with staying(one):
            teacher.rows(*QUESTION)
    assert places(teacher) == before


def test_layers_that_do_not_compute_there_are_told(tiny, monkeypatch):
    """As kernels for a GPU do that an option of the recipe has put into the teacher's family."""
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

    def on_gpu_only(self, states):
        raise ValueError("Pointer argument (at 0) cannot be accessed from Triton (cpu tensor?)")

    monkeypatch.setattr(Qwen3RMSNorm, "forward", on_gpu_only)
    made = TeacherSettings(model=tiny["teacher"], dtype="float32", device="cpu")
    with pytest.raises(DSKDSetupError, match=r"dskd.teacher.device: expected a teacher whose layers compute on cpu"):
        Teacher(
            made,
            vocab_size=418,
            device=CPU,
            attn_implementation=None,
            packed=False,
            trust_remote_code=False,
        )


def test_one_process_trains_on_one_device_and_leaves_the_others_to_the_teacher(machine, monkeypatch):
    from dskd_plugin.host.plugin import on_one_device

    def made(processes=1, **cfg):
        monkeypatch.setenv("WORLD_SIZE", str(processes))
        on_one_device(cfg)
        return cfg

    machine(2)
    assert made() == {"device_map": {"": 0}}
    assert made(processes=2) == {}
    assert made(device_map={"": 1}) == {"device_map": {"": 1}}
    machine(1)
    assert made() == {}
