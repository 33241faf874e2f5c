"""On which device a process has its teacher: where the student is, unless ``dskd.teacher.device`` names another one."""

import os
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from dskd_plugin.errors import DSKDSetupError
from dskd_plugin.log import LOG


def teacher_device(settings: Any, student: torch.device) -> torch.device:
    """The device on which this process's teacher computes; `DSKDSetupError` where the machine does not have it.

    settings: `settings.TeacherSettings`; student: where this process has the student.
    """
    named = settings.device
    if named is None:
        return student
    name = _of_this_process(named)
    found = torch.device(name)
    count = torch.cuda.device_count()
    if found.type == "cuda" and (found.index or 0) >= count:
        raise DSKDSetupError(
            "dskd.teacher.device",
            f"cpu, or one of the {count} CUDA devices of this machine" if count else "cpu on a machine without CUDA",
            repr(name),
            "Choose another device, or leave it out: the teacher is then where the student is.",
        )
    return found


def _of_this_process(named: str | list[str]) -> str:
    """The name for this process out of those for all processes of the machine."""
    processes, number = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), int(os.environ.get("LOCAL_RANK", "0"))
    devices = [named] if isinstance(named, str) else named
    if devices == ["cpu"]:
        return "cpu"
    if len(devices) < processes:
        raise DSKDSetupError(
            "dskd.teacher.device",
            f"a device for each of the {processes} processes of this machine, as a list, or cpu",
            repr(named),
            "Name as many devices, such as [cuda:2, cuda:3], or start fewer processes.",
        )
    return devices[number]


def current(device: torch.device) -> AbstractContextManager[object]:
    """Inside, a CUDA device is the one that kernels are started on, whatever their tensors say: Triton's need that."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def is_offloaded(settings: Any, device: torch.device) -> bool:
    """Whether the teacher's weights leave the device between uses."""
    if settings.offload and device.type == "cpu":
        LOG.info("dskd: the teacher is on the CPU already: teacher.offload changes nothing here")
        return False
    return bool(settings.offload)


def suited_attention(name: str | None, dtype: str, device: torch.device | str) -> str | None:
    """The student's attention kernel for the teacher; None where the teacher cannot use it there."""
    if name is None:
        return None
    on_cpu = isinstance(device, torch.device) and device.type == "cpu"
    # FlashAttention computes in half precision only, and like FlexAttention on a GPU only.
    if name.startswith("flash") and (dtype == "float32" or on_cpu):
        return None
    return None if name.startswith("flex") and on_cpu else name
