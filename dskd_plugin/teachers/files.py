"""What the files of a teacher tell without a model library: whether it can teach, and whether it suits the settings.

The messages are those of `teacher` and `pair`, which see hub models and unusual tokenizers as well.
"""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dskd_plugin.errors import DSKDSetupError, SettingError
from dskd_plugin.folders import check_files, check_whole, holds_vocabulary, read_json
from dskd_plugin.methods import method_of
from dskd_plugin.teachers.resolve import Parts
from dskd_plugin.text.templates import DEFAULT, Found, names, templates_in

# Architectures that read text and cannot write it.
ENCODERS = ("ForMaskedLM", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")


def check_teacher(
    settings: Any, parts: Parts, *, needs_template: bool, needs_weights: bool = True, cached: bool = True
) -> None:
    """Raise ``ValueError`` for a teacher whose files show that it cannot teach.

    settings: `settings.TeacherSettings`; needs_weights: whether it is loaded; cached: whether a hub id has to be in the
    cache where the hub is off.
    """
    check_packages(settings)
    check_files(parts.named_by, parts.weights, cached=cached)
    folder = Path(parts.weights)
    if folder.is_dir():
        if needs_weights:
            check_whole(parts.named_by, folder)
        _check_kind(settings, read_json(folder / "config.json"))
        if parts.tokenizer == parts.weights and not holds_vocabulary(folder):
            raise SettingError(
                "dskd.teacher.model",
                "a tokenizer beside the model",
                f"{parts.weights!r} without one",
                "Save the teacher's tokenizer in its folder.",
            )
    known = folder.is_dir() or parts.tokenizer != parts.weights
    found = own_templates(parts) if known else None
    _check_choice(settings.chat_template, found, known=known)
    if needs_template and known and settings.chat_template == "tokenizer_default":
        check_default(settings.model, found)


def check_packages(settings: Any) -> None:
    """Raise ``DSKDSetupError`` where a package that the teacher's settings need is not installed."""
    needed = {
        "peft": ("dskd.teacher.adapter", settings.adapter, settings.adapter is not None),
        "bitsandbytes": ("dskd.teacher.quantization", settings.quantization, settings.quantization != "none"),
    }
    for package, (name, value, wanted) in needed.items():
        if wanted and find_spec(package) is None:
            raise DSKDSetupError(
                name, f"the package {package} for {value!r}", "none", f"Install it: pip install {package}."
            )


def own_templates(parts: Parts) -> Found:
    """The chat templates in the folders of a model: the adapter's where it has any, else those of the weights."""
    own = None if parts.adapter is None else templates_in(parts.adapter)
    return templates_in(Path(parts.weights)) if own is None else own


def check_default(model: str, found: Found) -> None:
    """Raise ``ValueError`` where a model has no chat template, or several and no default."""
    if found is None:
        raise SettingError(
            "dskd.teacher.chat_template",
            "a teacher with a chat template",
            f"{model!r} without one (a base model?)",
            "Name a template or a jinja file: dskd.teacher.chat_template: <name|file>.",
        )
    several = names(found)
    if several and DEFAULT not in several:
        raise SettingError(
            "dskd.teacher.chat_template",
            f"a teacher with a chat template named {DEFAULT!r}",
            f"{model!r} with {', '.join(several)}",
            f"Name one of them: dskd.teacher.chat_template: {several[0]}.",
        )


def _check_kind(settings: Any, config: dict[str, Any]) -> None:
    architectures = config.get("architectures") or []
    encoder = bool(architectures) and all(str(name).endswith(ENCODERS) for name in architectures)
    if config.get("is_encoder_decoder") or (encoder and not config.get("is_decoder")):
        raise SettingError(
            "dskd.teacher.model",
            "a decoder-only causal language model",
            (
                f"{settings.model!r} of type {config.get('model_type')!r} "
                f"({', '.join(architectures) or 'no architecture named'})"
            ),
            "Choose a generative teacher.",
        )
    positions = config.get("max_position_embeddings") or (config.get("text_config") or {}).get(
        "max_position_embeddings"
    )
    check_positions(settings, positions)


def check_positions(settings: Any, positions: int | None) -> None:
    """``ValueError`` for a row that is longer than the teacher's positions."""
    if positions and settings.sequence_len and settings.sequence_len > positions:
        raise SettingError(
            "dskd.teacher.sequence_len",
            f"at most the {positions} positions of the teacher",
            settings.sequence_len,
            "Lower it, or leave it out.",
        )


def _check_choice(choice: str, found: Found, *, known: bool) -> None:
    axolotl = find_spec("axolotl")
    places = [] if axolotl is None else list(axolotl.submodule_search_locations or ())
    listed = {file.stem for place in places for file in Path(place).glob("utils/chat_templates/templates/*.jinja")}
    fits = choice in listed or choice in names(found) or choice.startswith("tokenizer_default")
    if listed and known and not (fits or Path(choice).is_file()):
        raise unknown_choice(choice, found)


def unknown_choice(choice: str, found: Found) -> SettingError:
    """The error about a chat template that nobody knows."""
    own = f", one of the teacher's own ({', '.join(names(found))})" if names(found) else ""
    return SettingError(
        "dskd.teacher.chat_template",
        f"'tokenizer_default', the name of an Axolotl template{own} or an existing jinja file",
        f"{choice!r}",
        "Check the spelling or the path.",
    )


def check_pair(student: str, settings: Any, parts: Parts) -> None:
    """Raise ``ValueError`` where the settings need one tokenizer and the vocabularies are plainly two.

    settings: `settings.Settings`.
    """
    asks = None
    if method_of(settings).needs_one_tokenizer:
        asks = "method"
    elif settings.alignment == "identity":
        asks = "alignment"
    if asks is None:
        return
    sides = [_vocabulary(Path(model).expanduser()) for model in (student, parts.tokenizer)]
    if not all(sides):
        return
    same = len(sides[0].items() & sides[1].items())
    # One tokenizer may have been given some more tokens on one side.
    if 2 * same < min(len(side) for side in sides):
        raise SettingError(
            f"dskd.{asks}",
            f"{getattr(settings, asks)!r} only for one tokenizer",
            f"a student with {len(sides[0])} tokens and a teacher with {len(sides[1])}, "
            f"{same} of them under the same id",
            "Use method: dskd or overlap_kd." if asks == "method" else "Remove it, or use alignment: auto.",
        )


def _vocabulary(folder: Path) -> dict[str, int]:
    vocabulary = (read_json(folder / "tokenizer.json").get("model") or {}).get("vocab")
    return vocabulary if isinstance(vocabulary, dict) else {}
