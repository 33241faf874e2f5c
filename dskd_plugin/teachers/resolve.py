"""What a model is made of: whole weights, an adapter on them, a tokenizer, a chat template, ends of turn.

A name in a recipe is a folder or a hub id of whole weights, or of a PEFT adapter whose base it names. What the adapter
brings along of its own (tokenizer, chat template, ends of turn, embeddings) is taken from it, the rest from the
base. Folders of this machine are read with the standard library alone, before torch is imported; a hub id is fetched
only by ``parts_of(..., fetch=fetched_adapter)``.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dskd_plugin.errors import SettingError
from dskd_plugin.folders import (
    WHOLE_WEIGHTS,
    check_weights,
    holds_vocabulary,
    is_adapter,
    looks_local,
    read_json,
)

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
# Everything of an adapter's repository but whole weights.
ADAPTER_FILES = ["adapter_*", "*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken"]
# PEFT's kinds that put virtual tokens in front of a text, and cannot be merged.
PROMPTS = (
    "PROMPT_TUNING",
    "MULTITASK_PROMPT_TUNING",
    "P_TUNING",
    "PREFIX_TUNING",
    "ADAPTION_PROMPT",
    "CARTRIDGE",
    "CPT",
)

Fetch = Callable[[str, str | None], Path | None]


@dataclass(frozen=True)
class Parts:
    """Where the parts of a model lie: folders of this machine, or hub ids.

    weights, revision: whole weights with their config.json; named_by: the setting, or the file, that names them.
    adapter: a PEFT folder to merge into them.
    tokenizer, tokenizer_revision: the adapter's folder where it holds a vocabulary, else as the weights.
    """

    weights: str
    revision: str | None
    adapter: Path | None
    tokenizer: str
    tokenizer_revision: str | None
    named_by: str = "dskd.teacher.model"

    @property
    def ends(self) -> tuple[str, str | None]:
        """Folder or hub id, and revision, of the generation_config.json that lists the ends of an answer."""
        if self.adapter is not None and (self.adapter / "generation_config.json").is_file():
            return str(self.adapter), None
        return self.weights, self.revision


def parts_of(settings: Any, fetch: Fetch | None = None) -> Parts:
    """The parts of the teacher; ``ValueError`` for an adapter that has no base or cannot be merged.

    settings: `settings.TeacherSettings`. fetch: brings the adapter of a hub id here; without it a hub id of whole
    weights is taken for granted, and that of an adapter is left for later.
    """
    own = _adapter_in("dskd.teacher.model", settings.model, settings.revision, fetch)
    given = None
    if settings.adapter is not None:
        given = _adapter_in("dskd.teacher.adapter", settings.adapter, None, fetch)
    if own is not None and settings.adapter is not None:
        raise SettingError(
            "dskd.teacher.model",
            "whole weights beside dskd.teacher.adapter",
            f"the adapter {settings.model!r}",
            "Merge the two adapters into one model first, or leave one of them out.",
        )
    if own is not None:
        weights, revision = _base_of(own)
        named_by = f"base_model_name_or_path in {own / ADAPTER_CONFIG}"
    else:
        weights, revision = _here(settings.model), settings.revision
        named_by = "dskd.teacher.model"
    adapter = own or given
    if adapter is not None:
        _check_adapter("dskd.teacher.adapter" if own is None else "dskd.teacher.model", adapter)
    if adapter is not None and holds_vocabulary(adapter):
        return Parts(weights, revision, adapter, str(adapter), None, named_by)
    return Parts(weights, revision, adapter, weights, revision, named_by)


def fetched_adapter(model: str, revision: str | None) -> Path | None:
    """The adapter of a hub id, in the cache; None where the id holds whole weights or cannot be reached."""
    from huggingface_hub import snapshot_download
    from transformers.utils.hub import cached_file

    def has(file: str) -> bool:
        found = cached_file(
            model,
            file,
            revision=revision,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        return found is not None

    try:
        if not has(ADAPTER_CONFIG) or any(has(file) for file in WHOLE_WEIGHTS):
            return None
        return Path(snapshot_download(model, revision=revision, allow_patterns=ADAPTER_FILES))
    except (OSError, RuntimeError):
        # Told, with its reason, where the configuration of the weights is read. A RuntimeError comes of huggingface_hub
        # when it asks once more with a connection that it has closed.
        return None


def adapter_settings(adapter: Path) -> dict[str, Any]:
    """adapter_config.json."""
    return read_json(adapter / ADAPTER_CONFIG)


def _here(model: str) -> str:
    """A folder with its ``~`` opened, or the hub id as it is."""
    folder = Path(model).expanduser()
    return str(folder) if folder.exists() else model


def _adapter_in(name: str, model: str, revision: str | None, fetch: Fetch | None) -> Path | None:
    folder = Path(model).expanduser()
    asked = name == "dskd.teacher.adapter"
    if folder.exists() or looks_local(model):
        if is_adapter(folder) or (asked and (folder / ADAPTER_CONFIG).is_file()):
            return folder
        found = None
    else:
        found = None if fetch is None else fetch(model, revision)
        asked = asked and fetch is not None
    if asked and found is None:
        raise SettingError(name, f"a hub id or a PEFT folder with an {ADAPTER_CONFIG}", f"{model!r}", "Check the path.")
    return found


def _base_of(adapter: Path) -> tuple[str, str | None]:
    """The base that an adapter names: beside the adapter, from the working directory, or a hub id with its revision."""
    settings = adapter_settings(adapter)
    base = settings.get("base_model_name_or_path")
    advice = (
        f"Write the folder of its base there, or in the recipe dskd.teacher: {{model: <base>, adapter: {adapter}}}."
    )
    if not base:
        raise SettingError(
            adapter / ADAPTER_CONFIG,
            "base_model_name_or_path, because dskd.teacher.model is an adapter",
            f"{base!r}",
            advice,
        )
    beside = adapter / str(base)
    for folder in (beside, Path(base).expanduser()):
        if (folder / ADAPTER_CONFIG).is_file() and not (folder / "config.json").is_file():
            raise SettingError(
                "dskd.teacher.model",
                "an adapter of whole weights",
                f"{str(adapter)!r}, whose base {str(folder)!r} is an adapter itself",
                "Merge that one into its base and name the result as the base.",
            )
    if beside.is_dir():
        return str(beside), None
    if Path(base).expanduser().exists():
        return _here(base), None
    if looks_local(str(base)):
        raise SettingError(
            "dskd.teacher.model",
            "an adapter whose base is there",
            f"base_model_name_or_path {base!r} in {adapter / ADAPTER_CONFIG}, which does not exist",
            advice,
        )
    return str(base), settings.get("revision")


def _check_adapter(name: str, adapter: Path) -> None:
    """Raise ``ValueError`` for an adapter without weights, a cut one and one that cannot be merged."""
    if not any((adapter / file).is_file() for file in ADAPTER_WEIGHTS):
        raise SettingError(
            name,
            f"an adapter with {ADAPTER_WEIGHTS[0]}",
            f"{str(adapter)!r} without it",
            "Give the folder that PEFT saved, or copy the file.",
        )
    check_weights(adapter)
    kind = adapter_settings(adapter).get("peft_type")
    if kind in PROMPTS:
        raise SettingError(
            name,
            "an adapter that can be merged into its base, such as LoRA",
            f"{str(adapter)!r} of type {kind}, which puts virtual tokens in front of a text",
            "Choose another adapter.",
        )
