"""The frozen teacher: checked before anything is written, loaded outside every engine, asked for hidden states.

Shapes: T teacher tokens of a batch, N rows that the student needs, E teacher width.
"""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from axolotl.utils.logging import get_logger
from safetensors import SafetensorError
from torch import Tensor

from dskd_plugin import adapted
from dskd_plugin.align import PROBE, end_of_turn
from dskd_plugin.args import Settings, TeacherSettings
from dskd_plugin.core.heads import Head
from dskd_plugin.errors import DSKDSetupError
from dskd_plugin.folders import network_advice
from dskd_plugin.models import check_head, decoder, output_head, read_head
from dskd_plugin.pair import read_table
from dskd_plugin.resolve import Parts, fetched_adapter, parts_of
from dskd_plugin.teacher_files import check_default, check_teacher, unknown_choice
from dskd_plugin.templates import names, one_template, templates_in
from dskd_plugin.tokens import TokenTable

LOG = get_logger("axolotl.dskd")
# Added tokens that no answer goes beyond, whatever a model's files list.
DOCUMENT_ENDS = ("<|endoftext|>", "<|end_of_text|>", "</s>")


def check_reachable(name: str, model: str, revision: str | None, trust_remote_code: bool) -> Any:
    """The configuration of a model; ``ValueError`` where it cannot be read, with the way without network."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(model, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise ValueError(
            f"{name}: expected a model folder or a hub id, got {model!r}: {reason}. "
            f"Check the name and the access rights. {network_advice(name, model)}"
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
        raise ValueError(
            f"dskd.teacher.model: expected a decoder-only causal language model, got {settings.model!r} of type "
            f"{config.model_type!r} ({', '.join(architectures) or 'no architecture named'}). "
            "Choose a generative teacher."
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
    if positions is not None and settings.sequence_len > positions:
        raise ValueError(
            f"dskd.teacher.sequence_len: expected at most the {positions} positions of the teacher, got "
            f"{settings.sequence_len}. Lower it, or leave it out."
        )
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
        raise ValueError(
            f"dskd.teacher.model: expected a tokenizer beside the model, got {model!r}: {error}. "
            "Save the teacher's tokenizer in its folder."
        ) from error


def resolve_template(settings: TeacherSettings, tokenizer: Any, needed: bool) -> str | None:
    """The teacher's chat template as text; None when it has none and the datasets do not ask for one."""
    choice, found = settings.chat_template, tokenizer.chat_template
    if choice == "tokenizer_default":
        if needed:
            check_default(settings.model, found or None)
        return one_template(found)
    if Path(choice).is_file():
        return Path(choice).read_text(encoding="utf-8")
    if choice in names(found):
        return str(found[choice])
    from axolotl.utils.chat_templates import get_chat_template

    try:
        return one_template(get_chat_template(choice, tokenizer=tokenizer))
    except ValueError:
        raise ValueError(unknown_choice(choice, found)) from None


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


def read_teacher(settings: Settings, cfg: Any) -> TeacherReader:
    """Find all parts of the teacher of a recipe, without its weights; ``ValueError`` for what is wrong with them."""
    teacher, trust_remote_code = settings.teacher, bool(cfg.get("trust_remote_code"))
    parts = parts_of(teacher, fetched_adapter)
    check_teacher(teacher, parts, needs_template=False)
    config = check_config(teacher, parts, trust_remote_code)
    limit = teacher_sequence_len(teacher, cfg.get("sequence_len") or 512, positions_of(config))
    rows = config.get_text_config().vocab_size
    with _outside_engines():
        if Path(parts.weights).is_dir():
            adapted.check_weights(parts.named_by, config, Path(parts.weights), trust_remote_code)
        if parts.adapter is not None:
            name = "dskd.teacher.model" if teacher.adapter is None else "dskd.teacher.adapter"
            rows = adapted.check_fit(name, config, parts.adapter, trust_remote_code)
    tokenizer = load_tokenizer(parts, trust_remote_code)
    entries = [*(cfg.get("datasets") or ()), *(cfg.get("test_datasets") or ())]
    needed = any(str(entry.get("type")).startswith("chat_template") for entry in entries)
    template = resolve_template(teacher, tokenizer, needed)
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
        raise ValueError(
            f"dskd.teacher.chat_template: expected one that renders a user and an assistant message, got {error!r}. "
            "Choose another template, or set what it needs in dskd.teacher.chat_template_kwargs."
        ) from error
    beyond = [token for token in tokenizer(text, add_special_tokens=False)["input_ids"] if token >= rows]
    if beyond:
        raise ValueError(
            f"dskd.teacher.model: expected embeddings for all tokens of the chat template, got {rows} rows and the "
            f"token {tokenizer.convert_ids_to_tokens(beyond[0])!r} of id {beyond[0]}. Give the model that was "
            "trained with this tokenizer, or the tokenizer of this model."
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
        raise ValueError(
            f"dskd.teacher.model: expected a tokenizer with an end-of-sequence token, got {reader.parts.tokenizer!r} "
            "without one: its answers would never end. Set eos_token in its tokenizer_config.json."
        )
    return ends


@contextlib.contextmanager
def _outside_engines() -> Iterator[None]:
    """Hide DeepSpeed ZeRO-3 and FSDP from ``from_pretrained``: the teacher is never sharded."""
    import transformers.integrations.deepspeed as integration
    import transformers.modeling_utils as modeling

    hidden: list[tuple[Any, str, Any]] = [(integration, "_hf_deepspeed_config_weak_ref", None)]
    hidden += [
        (module, "is_deepspeed_zero3_enabled", lambda: False)
        for module in (integration, modeling)
        if hasattr(module, "is_deepspeed_zero3_enabled")
    ]
    kept = [(module, name, getattr(module, name)) for module, name, _ in hidden]
    use_fsdp = os.environ.pop("ACCELERATE_USE_FSDP", None)
    try:
        for module, name, value in hidden:
            setattr(module, name, value)
        yield
    finally:
        for module, name, value in kept:
            setattr(module, name, value)
        if use_fsdp is not None:
            os.environ["ACCELERATE_USE_FSDP"] = use_fsdp


def _load(
    settings: TeacherSettings, attn_implementation: str | None, device: torch.device, trust_remote_code: bool
) -> Any:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    options: dict[str, Any] = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    dtype = getattr(torch, settings.dtype)
    if settings.quantization == "8bit":
        options["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True)
    elif settings.quantization == "4bit":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
        )
    parts = parts_of(settings, fetched_adapter)
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        parts.weights,
        revision=parts.revision,
        dtype=dtype,
        device_map={"": device},
        trust_remote_code=trust_remote_code,
        output_loading_info=True,
        **options,
    )
    model, info = loaded
    missing = sorted(info["missing_keys"])
    if missing:
        raise ValueError(f"no weights for {len(missing)} of its tensors, such as {missing[0]}, which would be random")
    if parts.adapter is not None:
        from peft import PeftModel

        adapted.prepare(model, parts.adapter)
        model = PeftModel.from_pretrained(model, str(parts.adapter)).merge_and_unload()
    return model


class Teacher:
    """A frozen decoder that answers with the hidden states of chosen positions, never with logits."""

    def __init__(
        self,
        settings: TeacherSettings,
        *,
        vocab_size: int,
        device: torch.device,
        attn_implementation: str | None,
        packed: bool,
        trust_remote_code: bool,
    ) -> None:
        with _outside_engines():
            try:
                if attn_implementation and attn_implementation.startswith("flash") and settings.dtype == "float32":
                    attn_implementation = None  # FlashAttention computes in half precision only
                try:
                    model = _load(
                        settings, settings.attn_implementation or attn_implementation, device, trust_remote_code
                    )
                except ValueError as error:
                    if settings.attn_implementation is not None or "attention" not in str(error):
                        raise
                    LOG.info(
                        "dskd: the teacher does not know the student's %s; using its default",
                        attn_implementation,
                    )
                    model = _load(settings, None, device, trust_remote_code)
            except (ImportError, OSError, RuntimeError, SafetensorError, ValueError) as error:
                raise DSKDSetupError(
                    f"dskd.teacher: expected a loadable causal language model, got {settings.model!r}: {error}. "
                    "Check that the folder is complete "
                    "and that what its settings need is installed."
                ) from error
        self.model = model.requires_grad_(False).eval()
        self.decoder = decoder(self.model)
        self.head: Head = read_head(self.model, output_head(self.model), vocab_size).detach()
        self.packed = packed and self._packing_is_exact()
        self._check_head()

    @property
    def width(self) -> int:
        return self.head.weight_VD.shape[1]

    @property
    def embedding(self) -> Tensor:
        """Input embeddings [V, D]; D need not be the width of the head in every family."""
        weight: Tensor = self.model.get_input_embeddings().weight
        return weight.detach()

    @torch.no_grad()
    def _check_head(self) -> None:
        ids = torch.arange(1, 9, device=self.model.device)[None] % self.head.vocab_size
        logits = self.model(input_ids=ids, use_cache=False).logits[0]
        check_head(self._hidden(input_ids=ids)[0], logits, self.head, "dskd.teacher.model")

    @torch.no_grad()
    def _packing_is_exact(self) -> bool:
        """Whether this architecture keeps packed neighbours apart by position ids alone; measured, not assumed."""
        ids = torch.arange(3, 15, device=self.model.device) % self.head.vocab_size
        lengths = torch.tensor([7, 5])
        together = self._packed_hidden(ids, lengths)
        apart = self._padded_hidden(ids, lengths)
        limit = 1e-3 if self.model.dtype == torch.float32 else 0.05
        return float((together.float() - apart.float()).norm()) <= limit * float(apart.float().norm())

    def _hidden(self, **inputs: Tensor) -> Tensor:
        # With a cache, transformers does not see the packing and neighbours leak into each other.
        return self.decoder(**inputs, use_cache=False).last_hidden_state

    def _packed_hidden(self, ids_T: Tensor, lengths: Tensor) -> Tensor:
        position_ids = torch.cat([torch.arange(int(length)) for length in lengths]).to(ids_T.device)
        return self._hidden(input_ids=ids_T[None], position_ids=position_ids[None])[0]

    def _padded_hidden(self, ids_T: Tensor, lengths: Tensor) -> Tensor:
        lengths = lengths.to(ids_T.device)
        present = torch.arange(int(lengths.max()), device=ids_T.device)[None] < lengths[:, None]
        ids = torch.zeros(present.shape, dtype=ids_T.dtype, device=ids_T.device).masked_scatter(present, ids_T)
        return self._hidden(input_ids=ids, attention_mask=present.long())[present]

    @torch.no_grad()
    def rows(self, ids_T: Tensor, lengths: Tensor, bins: Tensor, rows_N: Tensor) -> Tensor:
        """Hidden states [N, E] at flat positions ``rows_N`` of the concatenated samples ``ids_T``.

        lengths: tokens of each sample; bins: how many samples share each packed row (used when packing).
        """
        if not len(rows_N):
            return torch.zeros(0, self.width, dtype=self.head.weight_VD.dtype, device=ids_T.device)
        if not self.packed:
            return self._padded_hidden(ids_T, lengths)[rows_N]
        hidden, start, sample = [], 0, 0
        for count in bins.tolist():
            inside = lengths[sample : sample + count]
            end = start + int(inside.sum())
            hidden.append(self._packed_hidden(ids_T[start:end], inside))
            start, sample = end, sample + count
        return torch.cat(hidden)[rows_N]
