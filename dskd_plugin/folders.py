"""What the files of a model folder tell without a model library; hub ids are left to the later checks.

The messages about a teacher are those of `teacher` and `pair`, which see hub models and unusual tokenizers as well.
"""

import json
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dskd_plugin.methods import method_of

# Architectures that read text and cannot write it.
ENCODERS = ("ForMaskedLM", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")
TOKENIZER_FILES = ("token*", "*.model", "vocab*", "*tekken*")


def looks_local(model: str) -> bool:
    return "://" not in model and (Path(model).is_absolute() or model.startswith((".", "~")) or model.count("/") > 1)


def check_files(name: str, model: str, *, cached: bool = True) -> None:
    """Raise ``ValueError`` when ``model`` looks like a folder that is missing or holds a truncated safetensors file."""
    folder = Path(model).expanduser()
    if not folder.exists():
        if looks_local(model):
            raise ValueError(
                f"{name}: expected a model folder or a hub id, got {model!r}, which does not exist. Check the path."
            )
        if cached:
            _check_cached(name, model)
        return
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"{name}: expected a model folder with a config.json, got {model!r} without one. Check the path."
        )
    check_weights(folder)


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
            raise ValueError(
                f"{file}: expected {expected} bytes, got {size}: the file is cut short. Download or save it again."
            )


def _check_cached(name: str, model: str) -> None:
    """Without the hub, a hub id is as good as its copy in the cache."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() not in ("1", "ON", "YES", "TRUE"):
        return
    # As huggingface_hub names it; importing that now would fix settings that Axolotl has yet to make.
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    cache = Path(os.environ.get("HF_HUB_CACHE") or Path(home) / "hub").expanduser()
    if not (cache / f"models--{model.replace('/', '--')}").is_dir():
        raise ValueError(
            f"{name}: expected a model of this machine, because HF_HUB_OFFLINE is set, got the hub id {model!r}, which "
            f"is not in the cache {cache}. {network_advice(name, model)}"
        )


def network_advice(name: str, model: str) -> str:
    """What to do about a hub id that cannot be reached."""
    return (
        f"With network: unset HF_HUB_OFFLINE. Without: copy the model here (`hf download {model} --local-dir <folder>` "
        f"where there is network) and write {name}: <folder>, with ./ or / in front."
    )


def check_adapter(adapter: str) -> None:
    """Raise ``ValueError`` for a folder that is no whole PEFT adapter."""
    if (Path(adapter) / "adapter_config.json").is_file():
        check_weights(Path(adapter))
    elif Path(adapter).exists() or looks_local(adapter):
        raise ValueError(
            f"dskd.teacher.adapter: expected a hub id or a PEFT folder with an adapter_config.json, got {adapter!r}. "
            "Check the path."
        )


def check_teacher(settings: Any, needs_template: bool) -> None:
    """Raise ``ValueError`` for a teacher whose files show that it cannot teach."""
    _check_template_name(settings.chat_template)
    folder = Path(settings.model).expanduser()
    if not folder.is_dir():
        return
    config = _json(folder / "config.json")
    architectures = config.get("architectures") or []
    encoder = bool(architectures) and all(str(name).endswith(ENCODERS) for name in architectures)
    if config.get("is_encoder_decoder") or (encoder and not config.get("is_decoder")):
        raise ValueError(
            f"dskd.teacher.model: expected a decoder-only causal language model, got {settings.model!r} of type "
            f"{config.get('model_type')!r} ({', '.join(architectures) or 'no architecture named'}). "
            "Choose a generative teacher."
        )
    positions = config.get("max_position_embeddings") or (config.get("text_config") or {}).get(
        "max_position_embeddings"
    )
    if positions and settings.sequence_len and settings.sequence_len > positions:
        raise ValueError(
            f"dskd.teacher.sequence_len: expected at most the {positions} positions of the teacher, got "
            f"{settings.sequence_len}. Lower it, or leave it out."
        )
    if not any(file for pattern in TOKENIZER_FILES for file in folder.glob(pattern)):
        raise ValueError(
            f"dskd.teacher.model: expected a tokenizer beside the model, got {settings.model!r} without one. "
            "Save the teacher's tokenizer in its folder."
        )
    if needs_template and settings.chat_template == "tokenizer_default" and not _has_template(folder):
        raise ValueError(
            f"dskd.teacher.chat_template: expected a teacher with a chat template, got {settings.model!r} without "
            "one (a base model?). Name a template or a jinja file: dskd.teacher.chat_template: <name|file>."
        )


def check_pair(student: str, settings: Any) -> None:
    """Raise ``ValueError`` where the settings need one tokenizer and the vocabularies are plainly two."""
    asked = {f"dskd.method: expected {settings.method!r}": method_of(settings).needs_one_tokenizer}
    asked["dskd.alignment: expected 'identity'"] = settings.alignment == "identity"
    if not any(asked.values()):
        return
    sides = [_vocabulary(Path(model).expanduser()) for model in (student, settings.teacher.model)]
    if not all(sides):
        return
    same = len(sides[0].items() & sides[1].items())
    # One tokenizer may have been given some more tokens on one side.
    if 2 * same < min(len(side) for side in sides):
        expected = next(words for words, wanted in asked.items() if wanted)
        raise ValueError(
            f"{expected} only for one tokenizer, got a student with {len(sides[0])} tokens and a teacher with "
            f"{len(sides[1])}, {same} of them under the same id. Use 'method: overlap_kd' or 'dskd', 'alignment: auto'."
        )


def _vocabulary(folder: Path) -> dict[str, int]:
    vocabulary = (_json(folder / "tokenizer.json").get("model") or {}).get("vocab")
    return vocabulary if isinstance(vocabulary, dict) else {}


def _has_template(folder: Path) -> bool:
    files = ("chat_template.jinja", "chat_template.json", "additional_chat_templates")
    written = any((folder / file).exists() for file in files)
    return written or bool(_json(folder / "tokenizer_config.json").get("chat_template"))


def _check_template_name(choice: str) -> None:
    axolotl = find_spec("axolotl")
    places = [] if axolotl is None else list(axolotl.submodule_search_locations or ())
    names = {file.stem for place in places for file in Path(place).glob("utils/chat_templates/templates/*.jinja")}
    if names and not (choice in names or choice.startswith("tokenizer_default") or Path(choice).is_file()):
        raise ValueError(
            f"dskd.teacher.chat_template: expected 'tokenizer_default', the name of an Axolotl template or an existing "
            f"jinja file, got {choice!r}. Check the spelling or the path."
        )


def _json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
