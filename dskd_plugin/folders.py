"""What the files of a model folder tell without a model library; hub ids are left to the later checks.

The messages about a teacher are those of `teachers` and `pair`, which see hub models and unusual tokenizers as well.
"""

import json
import os
import re
from pathlib import Path
from typing import Any

from dskd_plugin.errors import SettingError

# What a tokenizer is read from; tokenizer_config.json alone is none.
VOCABULARIES = ("tokenizer.json", "*.model", "vocab.*", "*tekken*", "*.tiktoken")
WEIGHTS = ("model*.safetensors", "pytorch_model*.bin")
# The forms of whole weights, in the order in which transformers looks for them: it reads the first that is there.
WHOLE_WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


def looks_local(model: str) -> bool:
    return "://" not in model and (Path(model).is_absolute() or model.startswith((".", "~")) or model.count("/") > 1)


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds a PEFT adapter and no whole weights; Axolotl puts a config.json beside it."""
    return (folder / "adapter_config.json").is_file() and not _any(folder, WEIGHTS)


def holds_vocabulary(folder: Path) -> bool:
    """Whether a tokenizer can be read from a folder."""
    return _any(folder, VOCABULARIES)


def _any(folder: Path, patterns: tuple[str, ...]) -> bool:
    return any(file for pattern in patterns for file in folder.glob(pattern))


def check_files(name: str, model: str, *, cached: bool = True) -> None:
    """Raise ``ValueError`` when ``model`` looks like a folder that is missing or holds a truncated safetensors file."""
    folder = Path(model).expanduser()
    if not folder.exists():
        if looks_local(model):
            raise SettingError(
                name, "a model folder or a hub id", f"{model!r}, which does not exist", "Check the path."
            )
        if cached:
            _check_cached(name, model)
        return
    if not (folder / "config.json").is_file():
        raise SettingError(name, "a model folder with a config.json", f"{model!r} without one", "Check the path.")
    check_weights(folder)


def check_student(model: str, *, cached: bool = True) -> None:
    """`check_files` of the student, which Axolotl loads as whole weights."""
    if is_adapter(Path(model).expanduser()):
        raise SettingError(
            "base_model",
            "a model with weights of its own",
            f"the adapter {model!r}",
            f"Write base_model: <its base> and lora_model_dir: {model}, or merge it first (axolotl merge-lora).",
        )
    check_files("base_model", model, cached=cached)


def loaded_weights(folder: Path) -> tuple[str | None, list[str]]:
    """The weight files that transformers reads from a folder, by name: (the index that lists them if any, the names).

    They are the first of the forms that is here; a repository may hold the same weights in another form beside them,
    whole or in part.
    """
    form = next((name for name in WHOLE_WEIGHTS if (folder / name).is_file()), None)
    if form is None:
        return None, sorted({file.name for pattern in WEIGHTS for file in folder.glob(pattern)})
    if not form.endswith(".json"):
        return None, [form]
    return form, sorted(set((read_json(folder / form).get("weight_map") or {}).values()))


def check_whole(name: str, folder: Path) -> None:
    """Raise ``ValueError`` for a model folder without weights, or without some of those that its index lists."""
    listing, listed = loaded_weights(folder)
    missing = [file for file in listed if not (folder / file).is_file()]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise SettingError(
            folder / str(listing),
            f"the {len(listed)} weight files that it lists",
            f"no {missing[0]}{more}",
            "Copy or download the missing files.",
        )
    if not listed:
        raise SettingError(
            name,
            "a folder with weights (model.safetensors)",
            f"{str(folder)!r} without any",
            "Give the folder of a saved model.",
        )


def check_weights(folder: Path) -> None:
    """Raise ``ValueError`` for a truncated safetensors file."""
    for file in sorted(folder.glob("*.safetensors")):
        size = file.stat().st_size
        with file.open("rb") as stream:
            start = stream.read(8)
            length = int.from_bytes(start, "little")
            header = stream.read(length) if len(start) == 8 and length <= size else b""
        try:
            end = max(
                (entry["data_offsets"][1] for key, entry in json.loads(header).items() if key != "__metadata__"),
                default=0,
            )
            expected = 8 + length + end
        except ValueError:
            expected = 8 + length
        if size < expected:
            raise SettingError(
                file, f"{expected} bytes", f"{size}: the file is cut short", "Download or save it again."
            )


def _check_cached(name: str, model: str) -> None:
    """Without the hub, a hub id is as good as its copy in the cache."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() not in ("1", "ON", "YES", "TRUE"):
        return
    # As huggingface_hub names it; importing that now would fix settings that Axolotl has yet to make.
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    cache = Path(os.environ.get("HF_HUB_CACHE") or Path(home) / "hub").expanduser()
    if not (cache / f"models--{model.replace('/', '--')}").is_dir():
        raise SettingError(
            name,
            "a model of this machine, because HF_HUB_OFFLINE is set",
            f"the hub id {model!r}, which is not in the cache {cache} and no folder in {os.getcwd()}",
            f"If a folder is meant, check the path. {network_advice(name, model)}",
        )


def network_advice(name: str, model: str) -> str:
    """What to do about a hub id that cannot be reached."""
    return (
        f"With network: unset HF_HUB_OFFLINE. Without: copy the model here (`hf download {model} --local-dir <folder>` "
        f"where there is network) and write {name}: <folder>, with ./ or / in front."
    )


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run by their steps; a copy that the user made of one has another name."""
    named = {path: re.fullmatch(r"checkpoint-(\d+)", path.name) for path in folder.glob("checkpoint-*")}
    steps = {path: int(found[1]) for path, found in named.items() if found}
    return sorted(steps, key=steps.__getitem__)


def check_optimizer(checkpoint: Path) -> None:
    """Raise ``ValueError`` for a checkpoint from which transformers would go on with a fresh optimizer, unsaid."""
    # Every engine writes these for a run that goes on; DeepSpeed has optimizer and schedule in a folder of its own.
    needed = {"optimizer*": "the optimizer", "scheduler.pt": "the schedule", "rng_state*.pth": "the random numbers"}
    if any(checkpoint.glob("global_step*")):
        del needed["optimizer*"], needed["scheduler.pt"]
    missing = {pattern: state for pattern, state in needed.items() if not any(checkpoint.glob(pattern))}
    inside = checkpoints(checkpoint)
    if missing and inside:
        raise SettingError(
            "resume_from_checkpoint",
            "the folder of a checkpoint",
            f"{checkpoint}, the output_dir of a run",
            f"Give the checkpoint inside it: {inside[-1]}.",
        )
    if missing:
        by = "it was written with save_only_model: true" if len(missing) == len(needed) else "its files were removed"
        raise SettingError(
            "resume_from_checkpoint",
            "a checkpoint with the optimizer's state",
            f"{checkpoint} without that of {' and '.join(missing.values())} ({', '.join(missing)}): {by}",
            "Resume from another checkpoint, or start a new run with base_model: <that folder>.",
        )


def nearest(path: Path) -> Path:
    """The path, or the nearest of the folders above it, that is there."""
    return next(one for one in (path, *path.absolute().parents) if one.exists())


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object; empty where the file is missing or holds something else."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
