"""How a teacher reads a conversation: its parts are found and checked here, without its weights."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dskd_plugin.errors import SettingError
from dskd_plugin.folders import network_advice
from dskd_plugin.pair import read_table
from dskd_plugin.recipe_options import whole_number
from dskd_plugin.settings import Settings
from dskd_plugin.teacher_settings import TeacherSettings
from dskd_plugin.teachers import adapted
from dskd_plugin.teachers.files import check_default, check_positions, check_teacher, unknown_choice
from dskd_plugin.teachers.outside_engines import outside_engines
from dskd_plugin.teachers.resolve import Parts, fetched_adapter, parts_of
from dskd_plugin.text.templates import names, one_template, templates_in
from dskd_plugin.text.tokens import TokenTable
from dskd_plugin.text.turn_ends import PROBE, end_of_turn

Named = Callable[[str, Any], Any]
"""Template of a name, and of a tokenizer where the name asks for its own; ``ValueError`` for an unknown name."""

# Added tokens that no answer goes beyond, whatever a model's files list.
DOCUMENT_ENDS = ("<|endoftext|>", "<|end_of_text|>", "</s>")


def check_reachable(name: str, model: str, revision: str | None, trust_remote_code: bool) -> Any:
    """The configuration of a model; ``ValueError`` where it cannot be read, with the way without network."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(model, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise SettingError(
            name,
            "a model folder or a hub id",
            f"{model!r}: {reason}",
            f"Check the name and the access rights. {network_advice(name, model)}",
        ) from error


def check_config(settings: TeacherSettings, parts: Parts, trust_remote_code: bool) -> Any:
    """The teacher's configuration; ``ValueError`` unless it is a decoder-only language model that can be found."""
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    )

    config = check_reachable(parts.named_by, parts.weights, parts.revision, trust_remote_code)
    architectures = getattr(config, "architectures", None) or []
    encoder = getattr(config, "is_encoder_decoder", False) or (
        config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False)
    )
    known = config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or hasattr(config, "auto_map")
    if encoder or not known:
        raise SettingError(
            "dskd.teacher.model",
            "a decoder-only causal language model",
            (
                f"{settings.model!r} of type {config.model_type!r} "
                f"({', '.join(architectures) or 'no architecture named'})"
            ),
            "Choose a generative teacher.",
        )
    return config


def positions_of(config: Any) -> int | None:
    """The number of positions that a model knows, None without a limit."""
    positions: int | None = getattr(config.get_text_config(), "max_position_embeddings", None)
    return positions


def teacher_sequence_len(settings: TeacherSettings, student_sequence_len: int, positions: int | None) -> int:
    """Longest teacher row: as set, else twice the student's, never beyond the positions that the teacher knows."""
    if settings.sequence_len is None:
        return min(2 * student_sequence_len, positions or 2 * student_sequence_len)
    check_positions(settings, positions)
    return settings.sequence_len


def load_tokenizer(parts: Parts, trust_remote_code: bool) -> Any:
    """The teacher's tokenizer, with the chat template of its adapter, else of its own, else of the weights."""
    tokenizer = _tokenizer(parts.tokenizer, parts.tokenizer_revision, trust_remote_code)
    if parts.adapter is not None and parts.tokenizer == parts.weights:
        tokenizer.chat_template = templates_in(parts.adapter) or tokenizer.chat_template
    elif parts.adapter is not None and not tokenizer.chat_template:
        with contextlib.suppress(ValueError):  # the weights need no tokenizer of their own
            tokenizer.chat_template = _tokenizer(parts.weights, parts.revision, trust_remote_code).chat_template
    return tokenizer


def _tokenizer(model: str, revision: str | None, trust_remote_code: bool) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(model, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise SettingError(
            "dskd.teacher.model",
            "a tokenizer beside the model",
            f"{model!r}: {error}",
            "Save the teacher's tokenizer in its folder.",
        ) from error


def resolve_template(settings: TeacherSettings, tokenizer: Any, named: Named, *, needed: bool) -> str | None:
    """The teacher's chat template as text; None when it has none and the datasets do not ask for one.

    named: the templates that the host knows by a name.
    """
    choice, found = settings.chat_template, tokenizer.chat_template
    if choice == "tokenizer_default":
        if needed:
            check_default(settings.model, found or None)
        return one_template(found)
    if Path(choice).is_file():
        return Path(choice).read_text(encoding="utf-8")
    if choice in names(found):
        return str(found[choice])
    try:
        return one_template(named(choice, tokenizer))
    except ValueError:
        raise unknown_choice(choice, found) from None


@dataclass
class TeacherReader:
    """How the teacher reads a conversation, and of which parts it is made.

    config: of its weights; template_options: variables of the chat template; sequence_len: longest row in tokens;
    rows: of its embeddings.
    """

    settings: Settings
    parts: Parts
    config: Any
    tokenizer: Any
    template: str | None
    template_options: dict[str, Any]
    table: TokenTable
    sequence_len: int
    rows: int

    @property
    def positions(self) -> int | None:
        """The number of positions that the model knows, None without a limit."""
        return positions_of(self.config)


def read_teacher(settings: Settings, cfg: Any, named: Named) -> TeacherReader:
    """Find all parts of the teacher of a recipe, without its weights; ``ValueError`` for what is wrong with them.

    named: as `resolve_template` takes it.
    """
    teacher, trust_remote_code = settings.teacher, bool(cfg.get("trust_remote_code"))
    parts = parts_of(teacher, fetched_adapter)
    check_teacher(teacher, parts, needs_template=False, needs_weights=settings.needs_weights)
    config = check_config(teacher, parts, trust_remote_code)
    limit = teacher_sequence_len(teacher, whole_number(cfg, "sequence_len", 512), positions_of(config))
    rows = config.get_text_config().vocab_size
    with outside_engines():
        if Path(parts.weights).is_dir():
            adapted.check_weights(parts.named_by, config, Path(parts.weights), trust_remote_code)
        if parts.adapter is not None:
            name = "dskd.teacher.model" if teacher.adapter is None else "dskd.teacher.adapter"
            rows = adapted.check_fit(name, config, parts.adapter, trust_remote_code)
    tokenizer = load_tokenizer(parts, trust_remote_code)
    entries = [*(cfg.get("datasets") or ()), *(cfg.get("test_datasets") or ())]
    needed = any(str(entry.get("type")).startswith("chat_template") for entry in entries)
    template = resolve_template(teacher, tokenizer, named, needed=needed)
    options = teacher.chat_template_kwargs
    options = dict(cfg.get("chat_template_kwargs") or {}) if options is None else options
    table = read_table("tokenizer of dskd.teacher.model", tokenizer)
    if template is not None and needed:
        check_markup(tokenizer, template, options, rows)
    return TeacherReader(settings, parts, config, tokenizer, template, options, table, limit, rows)


def check_markup(tokenizer: Any, template: str, options: dict[str, Any], rows: int) -> None:
    """Raise ``ValueError`` where a template does not render, or writes tokens that the model has no embedding for."""
    try:
        text = tokenizer.apply_chat_template(PROBE, chat_template=template, tokenize=False, **options)
    except Exception as error:
        raise SettingError(
            "dskd.teacher.chat_template",
            "one that renders a user and an assistant message",
            f"{error!r}",
            "Choose another template, or set what it needs in dskd.teacher.chat_template_kwargs.",
        ) from error
    beyond = [token for token in tokenizer(text, add_special_tokens=False)["input_ids"] if token >= rows]
    if beyond:
        raise SettingError(
            "dskd.teacher.model",
            "embeddings for all tokens of the chat template",
            f"{rows} rows and the token {tokenizer.convert_ids_to_tokens(beyond[0])!r} of id {beyond[0]}",
            "Give the model that was trained with this tokenizer, or the tokenizer of this model.",
        )


def answer_ends(reader: TeacherReader, template: str) -> list[int]:
    """Ids that end an answer of the teacher: of the tokenizer, of the template's turns and of the model's own list.

    A token that ends a document counts wherever the tokenizer has it.
    """
    from transformers import GenerationConfig

    tokenizer, config = reader.tokenizer, reader.config.get_text_config()
    model, revision = reader.parts.ends
    try:
        listed = GenerationConfig.from_pretrained(model, revision=revision or "main").eos_token_id
    except OSError:
        listed = None
    listed = config.eos_token_id if listed is None else listed
    more = listed if isinstance(listed, list) else [listed]
    turn_end = end_of_turn(tokenizer, template, reader.table, reader.template_options)
    added = tokenizer.get_added_vocab()
    documents = [added.get(token) for token in DOCUMENT_ENDS]
    ends = sorted({int(i) for i in (tokenizer.eos_token_id, turn_end, *more, *documents) if i is not None})
    if not ends:
        raise SettingError(
            "dskd.teacher.model",
            "a tokenizer with an end-of-sequence token",
            f"{reader.parts.tokenizer!r} without one: its answers would never end",
            "Set eos_token in its tokenizer_config.json.",
        )
    return ends
