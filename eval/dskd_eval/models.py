"""Models to evaluate: finding them, checking them before anything is loaded, hashing their content."""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path

from dskd_eval.data import file_sha256, offline
from dskd_eval.errors import UserError
from dskd_eval.schema import ModelSource

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+\Z")
_WEIGHTS = ("model*.safetensors", "pytorch_model*.bin")
# The forms of whole weights, in the order in which transformers looks for them: it reads the first that is there.
_FORMS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_SETTINGS = (
    "config.json",
    "generation_config.json",
    "adapter_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
# What a tokenizer is read from; tokenizer_config.json alone is none.
_TOKENIZERS = ("tokenizer.json", "*.model", "vocab.*", "*tekken*", "*.tiktoken")


@dataclass(frozen=True)
class ModelRef:
    """A model as the user named it. role: teacher, base, student or sft when a recipe says so.

    chat_template: tokenizer_default, the name of one of the tokenizer's own or of Axolotl's templates, or a file;
    template_options: variables of the template, as pairs.
    """

    name: str
    source: str
    role: str | None = None
    revision: str | None = None
    adapter: str | None = None
    chat_template: str = "tokenizer_default"
    template_options: tuple[tuple[str, object], ...] = ()


@dataclass(frozen=True)
class ModelFolder:
    """A model on disk. `weights` and `tokenizer` are folders; `adapter` is a PEFT folder or None.

    What an adapter brings along of its own (tokenizer, chat template, ends of turn, embeddings) is the model's.
    """

    ref: ModelRef
    weights: Path
    tokenizer: Path
    adapter: Path | None
    config: dict[str, object]
    fingerprint: str

    @property
    def name(self) -> str:
        return self.ref.name

    @property
    def ends(self) -> Path:
        """The folder whose generation_config.json lists the ends of an answer."""
        own = self.adapter is not None and (self.adapter / "generation_config.json").is_file()
        return self.adapter if own and self.adapter is not None else self.weights

    def record(self) -> ModelSource:
        listed = self.config.get("architectures")
        return ModelSource(
            name=self.name,
            role=self.ref.role,
            source=self.ref.source,
            revision=self.ref.revision,
            adapter=self.ref.adapter if self.ref.adapter else (str(self.adapter) if self.adapter else None),
            architecture=str(listed[0] if isinstance(listed, list) and listed else self.config.get("model_type")),
            fingerprint=self.fingerprint,
        )


def parse_model(text: str) -> ModelRef:
    """`PATH_OR_ID` or `NAME=PATH_OR_ID`; the name defaults to the last part of the path."""
    name, equals, source = text.partition("=")
    if not equals or "/" in name or Path(text).expanduser().is_dir():
        name, source = "", text
    if not source.strip():
        raise UserError("--model", expected="a folder or a hub id", got=repr(text), fix="Write --model PATH.")
    return ModelRef(name or default_name(source), source)


def default_name(source: str) -> str:
    path = Path(source).expanduser()
    parts = Path(os.path.abspath(path)).parts if path.is_dir() else source.rstrip("/").split("/")
    name = parts[-1]
    if re.fullmatch(r"checkpoint-\d+", name) and len(parts) > 1:
        name = f"{parts[-2]}-{name}"
    return name


def distinct(refs: list[ModelRef]) -> list[ModelRef]:
    """The same references with distinct names: a second one gets its parent folder or a number."""
    taken: set[str] = set()
    renamed = []
    for ref in refs:
        name, number = ref.name, 2
        if name in taken:
            parent = Path(ref.source).parent.name
            name = f"{parent}-{name}" if parent and f"{parent}-{name}" not in taken else name
        while name in taken:
            name, number = f"{ref.name}-{number}", number + 1
        taken.add(name)
        renamed.append(replace(ref, name=name))
    return renamed


def locate(ref: ModelRef) -> ModelFolder:
    """Find a model, check that it can be loaded and hash its content.

    Raises UserError: no such folder, no model in it, unreadable config, missing weight file, hub unreachable.
    """
    folder = _folder(ref.source, ref.revision)
    adapter: Path | None = None
    weights = folder
    is_adapter = (folder / "adapter_config.json").is_file() and not _any(folder, _WEIGHTS)
    if ref.adapter and is_adapter:
        raise UserError(
            f"model {ref.source}",
            expected=f"whole weights below the adapter {ref.adapter}",
            got="an adapter",
            fix="Merge the two adapters into one model first, or leave one of them out.",
        )
    if ref.adapter:
        adapter = _folder(ref.adapter, None)
    elif is_adapter:
        adapter = folder
    if adapter is not None:
        if not _any(adapter, _ADAPTER_WEIGHTS):
            raise UserError(
                f"adapter {adapter}",
                expected="adapter_model.safetensors",
                got="no adapter weights",
                fix="Give the folder that PEFT saved.",
            )
        if adapter == folder:
            weights = _base_of(adapter)
    config = _config(weights)
    _check_weights(weights)
    has_tokenizer = adapter is not None and _any(adapter, _TOKENIZERS)
    tokenizer = adapter if has_tokenizer and adapter is not None else weights
    files = [*_fingerprinted(weights), *(_fingerprinted(adapter) if adapter else [])]
    return ModelFolder(ref, weights, tokenizer, adapter, config, _fingerprint(files))


def holds_weights(folder: Path) -> bool:
    """Whether a folder has weights, its own or an adapter's."""
    return _any(folder, (*_WEIGHTS, *_ADAPTER_WEIGHTS))


def _any(folder: Path, patterns: tuple[str, ...]) -> bool:
    return any(next(folder.glob(pattern), None) for pattern in patterns)


def _folder(source: str, revision: str | None) -> Path:
    path = Path(source).expanduser()
    if path.is_dir():
        return path.resolve()
    if path.is_file():
        raise UserError(
            f"model {source}",
            expected="a folder or a hub id",
            got="a file",
            fix="Give the folder that holds it.",
        )
    if not _HUB_ID.match(source) or source.startswith((".", "/", "~")):
        raise UserError(
            f"model {source}",
            expected="an existing folder or a hub id like org/name",
            got="neither",
            fix="Check the path.",
        )
    return _download(source, revision)


def _download(source: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    switch = offline()
    patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.tiktoken"]
    # Second copies of the weights, in other formats.
    copies = ["consolidated*", "original/*", "onnx/*"]

    def fetch(wanted: list[str]) -> str:
        return snapshot_download(
            source,
            revision=revision,
            allow_patterns=wanted,
            ignore_patterns=copies,
            local_files_only=switch is not None,
        )

    try:
        found = fetch(patterns)
        if not holds_weights(Path(found)):
            found = fetch([*patterns, "*.bin"])
    except Exception as error:
        detail = str(error).splitlines()[0][:200] if str(error) else ""
        got = f"{type(error).__name__}: {detail}"
        fix = "Check the id, your access to it and the network, or give a local folder."
        if switch:
            got = f"no folder of this name; as a hub id it is not cached, and {switch} is set"
            fix = f"Check the path, or unset {switch}."
        raise UserError(f"model {source}", expected="an existing folder or a hub model", got=got, fix=fix) from error
    return Path(found).resolve()


def _base_of(adapter: Path) -> Path:
    """The base that an adapter names: beside the adapter, from the working directory, or a hub id with its revision."""
    settings = _json(adapter / "adapter_config.json", f"adapter {adapter}")
    base = settings.get("base_model_name_or_path")
    if not base:
        raise UserError(
            f"adapter {adapter}",
            expected="base_model_name_or_path in adapter_config.json",
            got="none",
            fix="Name the base model there.",
        )
    beside = adapter / str(base)
    if beside.is_dir():
        return beside.resolve()
    try:
        revision = settings.get("revision")
        return _folder(str(base), None if revision is None else str(revision))
    except UserError as error:
        raise UserError(
            f"adapter {adapter}",
            expected="a base that is there, in base_model_name_or_path of adapter_config.json",
            got=f"{base}: {error.got}",
            fix="Write the folder of the base model there.",
        ) from error


def _json(path: Path, where: str) -> dict[str, object]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(where, expected=f"a readable {path.name}", got=str(error), fix="Restore the file.") from error
    if not isinstance(value, dict):
        raise UserError(where, expected=f"an object in {path.name}", got=type(value).__name__, fix="Restore the file.")
    return value


def _subfolder_meant(folder: Path) -> str | None:
    models = [path.parent.name for path in sorted(folder.glob("*/config.json"))][:3]
    return f"Did you mean its subfolder {' or '.join(models)}?" if models else None


def _config(folder: Path) -> dict[str, object]:
    where = f"model {folder}"
    if not (folder / "config.json").is_file():
        inside = sorted(path.name for path in folder.iterdir())[:6]
        fix = _subfolder_meant(folder) or "Give the folder of a saved model."
        raise UserError(
            where,
            expected="a model folder with config.json",
            got="a folder with " + (", ".join(inside) or "nothing in it"),
            fix=fix,
        )
    config = _json(folder / "config.json", where)
    if "model_type" not in config:
        raise UserError(where, expected="model_type in config.json", got="none", fix="Restore the config.")
    return config


def _check_weights(folder: Path) -> None:
    form = next((folder / name for name in _FORMS if (folder / name).is_file()), None)
    if form is not None and form.suffix == ".json":
        mapped = _json(form, f"model {folder}").get("weight_map")
        shards = {str(name) for name in mapped.values()} if isinstance(mapped, dict) else set()
        missing = sorted(name for name in shards if not (folder / name).is_file())
        if missing:
            raise UserError(
                f"model {folder}",
                expected=f"{len(shards)} weight files",
                got=f"no {missing[0]}" + (f" and {len(missing) - 1} more" if len(missing) > 1 else ""),
                fix="Copy the missing files.",
            )
    if not _any(folder, _WEIGHTS):
        raise UserError(
            f"model {folder}",
            expected="model.safetensors (or shards)",
            got="no weights",
            # Training writes its weights here when it has ended, and checkpoints below on the way.
            fix=_subfolder_meant(folder) or "Give the folder that holds the trained model.",
        )


def _fingerprinted(folder: Path) -> list[Path]:
    files = [folder / name for name in _SETTINGS if (folder / name).is_file()]
    files += sorted((folder / "additional_chat_templates").glob("*.jinja"))
    for pattern in (*_TOKENIZERS, *_WEIGHTS, *_ADAPTER_WEIGHTS):
        files += sorted(folder.glob(pattern))
    return list(dict.fromkeys(files))


def _fingerprint(files: list[Path]) -> str:
    digest = hashlib.sha256()
    for path in files:
        digest.update(f"{path.name}\0{file_sha256(path)}\n".encode())
    return digest.hexdigest()[:32]
