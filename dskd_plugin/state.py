"""The projectors on disk: beside every checkpoint and beside the final student, never inside it."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from dskd_plugin import __version__
from dskd_plugin.errors import SettingError
from dskd_plugin.folders import check_optimizer, read_json
from dskd_plugin.log import LOG
from dskd_plugin.losses.several import Loss
from dskd_plugin.models import gathered
from dskd_plugin.run import Sides
from dskd_plugin.settings import Settings

WEIGHTS = "dskd_projectors.safetensors"
STATE = "dskd_state.json"
# Where the recipe sets what the file keeps under another name.
SETTINGS = {
    "teacher": "teacher.model",
    "teacher_revision": "teacher.revision",
    "teacher_adapter": "teacher.adapter",
    "teachers": "teachers",
    "method": "method",
    "alignment": "alignment",
    "spaces": "spaces",
    "target": "target",
    "shared": "shared",
    "kd_weight": "kd_weight",
    "projector_init": "projector.init",
}
# The whole `dskd:` block as it was resolved: what of it may change in the middle of a run is told, not refused.
BLOCK = "settings"
# What a run did before the setting was there to be kept.
BEFORE = {"target": "projected", "shared": "ids", "kd_weight": "fixed", "projector_init": "ideal"}


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
    if weights:
        temporary = target / f".{WEIGHTS}.tmp"
        save_file(weights, temporary)
        os.replace(temporary, target / WEIGHTS)
    else:
        (target / WEIGHTS).unlink(missing_ok=True)  # of an earlier run in this folder
    temporary = target / f".{STATE}.tmp"
    content = {"dskd": __version__, "projectors": sorted(weights), **pair}
    temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, target / STATE)


def pair_state(each: Sequence[Sides], settings: Settings, widths: list[int | None]) -> dict[str, object]:
    """What projectors belong to: a run may go on from a checkpoint only where all of it is the same.

    each: one for each teacher; settings: of the run; widths: of the student's and the teachers' hidden states.
    """
    block = settings.model_dump(mode="json", exclude={"teacher", "teachers", "impl"})
    if len(each) > 1:
        block["teachers"] = {"weight": settings.weights}
    return {
        **_teachers(each),
        "student_tokenizer": each[0].pair.student.digest,
        "widths": widths,
        "method": settings.method,
        "alignment": settings.alignment,
        "spaces": settings.spaces,
        "target": "exact" if settings.exact else "projected",
        "shared": "events" if settings.by_events else "ids",
        "kd_weight": settings.kd_weight,
        "projector_init": settings.projector.init,
        BLOCK: block,
    }


def _teachers(each: Sequence[Sides]) -> dict[str, object]:
    """One teacher by its own keys, several as a list in their order."""
    given = [sides.run.settings.teacher for sides in each]
    digests = [sides.pair.teacher.digest for sides in each]
    if len(each) > 1:
        keys = {"model", "revision", "adapter"}
        listed = [teacher.model_dump(include=keys, exclude_none=True) for teacher in given]
        one = dict.fromkeys(("teacher", "teacher_revision", "teacher_adapter", "teacher_tokenizer"))
        return {**one, "teachers": listed, "teacher_tokenizers": digests}
    return {
        "teacher": given[0].model,
        "teacher_revision": given[0].revision,
        "teacher_adapter": given[0].adapter,
        "teacher_tokenizer": digests[0],
        "teachers": None,
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
    if found.get("projectors", True):
        _expect(source, WEIGHTS)
    # A setting that does not apply to the method is None here, and may not have been kept.
    now, then = _flat(pair.get(BLOCK, {})), _flat(found.pop(BLOCK, {}))
    expected = {key: value for key, value in pair.items() if key != BLOCK and (key in found or value is not None)}
    found = {**BEFORE, **found}
    different = [key for key, value in expected.items() if found.get(key) != value]
    if different:
        kept = {key: found.get(key) for key in different if key in SETTINGS}
        # A recipe has one of the two forms.
        other_form = ("teacher", "teacher_revision", "teacher_adapter") if kept.get("teachers") else ("teachers",)
        lines = _recipe_lines({key: value for key, value in kept.items() if key not in other_form})
        told = ", ".join(f"{key} {found.get(key)!r} instead of {pair[key]!r}" for key in different)
        advice = "Resume with the teacher and settings of that run, or start a new output_dir."
        raise SettingError(
            source / STATE,
            "the projectors of this pair",
            f"those of another: {told}",
            f"{advice} The lines of that run's recipe:\n{lines}" if lines else advice,
        )
    changed = [f"dskd.{key} {then[key]} -> {now[key]}" for key in now if key in then and then[key] != now[key]]
    if changed:
        LOG.warning(
            "dskd: %s goes on with other settings than it was trained with: %s. The loss curve may jump.",
            source,
            ", ".join(changed),
        )


def _flat(block: dict[str, object], above: str = "") -> dict[str, object]:
    """The block with its inner keys as `outer.inner`."""
    flat: dict[str, object] = {}
    for key, value in block.items():
        flat |= _flat(value, f"{above}{key}.") if isinstance(value, dict) else {f"{above}{key}": value}
    return flat


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


def _recipe_lines(kept: dict[str, object]) -> str:
    """The part of a `dskd:` block that restores what a checkpoint was trained with."""
    block: dict[str, Any] = {}
    for key, value in kept.items():
        inner = block
        *above, last = SETTINGS[key].split(".")
        for name in above:
            inner = inner.setdefault(name, {})
        inner[last] = value
    return str(yaml.safe_dump({"dskd": block}, sort_keys=False)).rstrip() if block else ""


@torch.no_grad()
def load(folder: str | os.PathLike[str], loss: Loss, *, weights: bool = True) -> None:
    """Copy saved projectors into place, sharded or not, and the loss's memory; weights: False where the engine has
    restored them.
    """
    if not (any(True for _ in loss.parameters()) or loss.memory()):
        return
    saved = load_file(Path(folder) / WEIGHTS)
    loss.remember(saved)
    for name, parameter in loss.named_parameters() if weights else ():
        value = saved[name].to(parameter.device, parameter.dtype)
        if hasattr(parameter, "device_mesh"):
            from torch.distributed.tensor import distribute_tensor

            placed: Any = parameter
            value = distribute_tensor(value, placed.device_mesh, placed.placements)
        parameter.copy_(value)
