"""The projectors on disk: beside every checkpoint and beside the final student, never inside it."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dskd_plugin import __version__, kept_settings
from dskd_plugin.errors import SettingError
from dskd_plugin.folders import check_optimizer, read_json
from dskd_plugin.kept_settings import STATE
from dskd_plugin.log import LOG
from dskd_plugin.losses.several import Loss
from dskd_plugin.models import gathered
from dskd_plugin.run import Sides
from dskd_plugin.settings import Settings
from dskd_plugin.whole_file import write_whole

# In a folder of their own: an inference server loads every safetensors file beside the student as the student.
WEIGHTS = "dskd/projectors.safetensors"
EARLIER_WEIGHTS = "dskd_projectors.safetensors"  # of earlier releases, still resumed from


def projector_state(loss: Loss) -> dict[str, Tensor]:
    """Whole projector weights and the loss's memory on the CPU, whatever the engine. All ranks must call it."""
    state = {}
    with gathered(list(loss.parameters())):
        for name, parameter in loss.named_parameters():
            value = parameter.detach()
            value = value.full_tensor() if hasattr(value, "full_tensor") else value
            state[name] = value.to("cpu", copy=True).contiguous()
    return state | loss.memory()


def save(folder: str | os.PathLike[str], weights: dict[str, Tensor], pair: dict[str, object]) -> None:
    """Write the projectors, if there are any, and their state; each file appears whole or not at all."""
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    file = target / WEIGHTS
    if weights:
        file.parent.mkdir(exist_ok=True)
        temporary = file.with_name(f".{file.name}.tmp")
        save_file(weights, temporary)
        os.replace(temporary, file)
    elif file.exists():  # of an earlier run in this folder
        file.unlink()
    (target / EARLIER_WEIGHTS).unlink(missing_ok=True)
    content = {"dskd": __version__, "projectors": sorted(weights), **pair}
    write_whole(target / STATE, [json.dumps(content, indent=1), "\n"])


def pair_state(each: Sequence[Sides], settings: Settings, widths: list[int | None]) -> dict[str, object]:
    """What projectors belong to: a run may go on from a checkpoint only where all of it is the same.

    each: one for each teacher; settings: of the run; widths: of the student's and the teachers' hidden states.
    """
    digests = [sides.pair.teacher.digest for sides in each]
    tokenizers: dict[str, object] = {"teacher_tokenizer": digests[0] if len(each) == 1 else None}
    if len(each) > 1:
        tokenizers["teacher_tokenizers"] = digests
    return {
        **kept_settings.of(settings),
        **tokenizers,
        "student_tokenizer": each[0].pair.student.digest,
        "widths": widths,
    }


def check(folder: str | os.PathLike[str], pair: dict[str, Any]) -> None:
    """Raise ``ValueError`` unless ``folder`` is a complete checkpoint of this teacher and student.

    Another temperature, weight or label may be meant, as another learning rate may: a warning names it.
    """
    source = Path(folder)
    for file in (STATE, "trainer_state.json"):
        _expect(source, file)
    check_optimizer(source)
    found = json.loads((source / STATE).read_text(encoding="utf-8"))
    if found.get("projectors", True) and not (source / EARLIER_WEIGHTS).is_file():
        _expect(source, WEIGHTS)
    kept_settings.check_same(source / STATE, found, pair)
    changed = kept_settings.changed(found, pair)
    if changed:
        LOG.warning(
            "dskd: %s goes on with other settings than it was trained with: %s. The loss curve may jump.",
            source,
            ", ".join(changed),
        )


def _expect(source: Path, file: str) -> None:
    there = (source / file).is_file()
    # A run that was killed while it wrote leaves an empty file, or half of one.
    if not there or (file.endswith(".json") and not read_json(source / file)):
        found = f"{source} whose {file} is cut short" if there else f"{source} without {file}"
        raise SettingError(
            "resume_from_checkpoint",
            "a finished checkpoint of a dskd run",
            found,
            "Resume from another checkpoint, or remove this one.",
        )


@torch.no_grad()
def load(folder: str | os.PathLike[str], loss: Loss, *, weights: bool = True) -> None:
    """Copy saved projectors into place, sharded or not, and the loss's memory; weights: False where the engine has
    restored them.
    """
    if not (any(True for _ in loss.parameters()) or loss.memory()):
        return
    files = (Path(folder) / name for name in (WEIGHTS, EARLIER_WEIGHTS))
    saved = load_file(next(file for file in files if file.is_file()))
    loss.remember(saved)
    for name, parameter in loss.named_parameters() if weights else ():
        value = saved[name].to(parameter.device, parameter.dtype)
        if hasattr(parameter, "device_mesh"):
            from torch.distributed.tensor import distribute_tensor

            placed: Any = parameter
            value = distribute_tensor(value, placed.device_mesh, placed.placements)
        parameter.copy_(value)
