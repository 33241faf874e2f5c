"""The projectors on disk: beside every checkpoint and beside the final student, never inside it."""

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dskd_plugin import __version__
from dskd_plugin.models import gathered
from dskd_plugin.student import DistillationLoss

WEIGHTS = "dskd_projectors.safetensors"
STATE = "dskd_state.json"


def projector_state(loss: DistillationLoss) -> dict[str, Tensor]:
    """Whole projector weights and the loss's memory on the CPU, whatever the engine. All ranks must call it."""
    state = {}
    with gathered(list(loss.parameters())):
        for name, parameter in loss.named_parameters():
            value = parameter.detach()
            value = value.full_tensor() if hasattr(value, "full_tensor") else value
            state[name] = value.to("cpu", copy=True).contiguous()
    return state | loss.memory()


def save(folder: str | os.PathLike[str], weights: dict[str, Tensor], pair: dict[str, Any]) -> None:
    """Write both files; each appears whole or not at all."""
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    temporary = target / f".{WEIGHTS}.tmp"
    save_file(weights, temporary)
    os.replace(temporary, target / WEIGHTS)
    temporary = target / f".{STATE}.tmp"
    temporary.write_text(json.dumps({"dskd": __version__, **pair}, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, target / STATE)


def check(folder: str | os.PathLike[str], pair: dict[str, Any]) -> None:
    """Raise ``ValueError`` unless ``folder`` is a complete checkpoint of this teacher and student."""
    source = Path(folder)
    for file in (WEIGHTS, STATE, "trainer_state.json"):
        if not (source / file).is_file():
            raise ValueError(
                f"resume_from_checkpoint: expected a finished checkpoint of a dskd run, got {source} without {file}. "
                "Resume from another checkpoint, or remove this one."
            )
    found = json.loads((source / STATE).read_text(encoding="utf-8"))
    different = [key for key, value in pair.items() if found.get(key) != value]
    if different:
        raise ValueError(
            f"{source / STATE}: expected the projectors of this pair, got those of another: "
            + ", ".join(f"{key} {found.get(key)!r} instead of {pair[key]!r}" for key in different)
            + ". Resume with the teacher and settings of that run, or start a new output_dir."
        )


@torch.no_grad()
def load(folder: str | os.PathLike[str], loss: DistillationLoss, *, weights: bool = True) -> None:
    """Copy saved projectors into place, sharded or not; weights: False where the engine has restored them."""
    saved = load_file(Path(folder) / WEIGHTS)
    loss.remember(saved)
    for name, parameter in loss.named_parameters() if weights else ():
        value = saved[name].to(parameter.device, parameter.dtype)
        if hasattr(parameter, "device_mesh"):
            from torch.distributed.tensor import distribute_tensor

            value = distribute_tensor(value, parameter.device_mesh, parameter.placements)
        parameter.copy_(value)
