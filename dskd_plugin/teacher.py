"""The frozen teacher: checked before anything is written, loaded outside every engine, asked for hidden states.

Shapes: T teacher tokens of a batch, N rows that the student needs, E teacher width.
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from axolotl.utils.logging import get_logger
from safetensors import SafetensorError
from torch import Tensor

from dskd_plugin.args import TeacherSettings
from dskd_plugin.core.heads import Head
from dskd_plugin.errors import DSKDSetupError
from dskd_plugin.folders import check_adapter, check_files, network_advice
from dskd_plugin.models import check_head, decoder, output_head, read_head

LOG = get_logger("axolotl.dskd")


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


def check_config(settings: TeacherSettings, trust_remote_code: bool) -> int | None:
    """Raise ``ValueError`` unless the teacher is a decoder-only language model that can be found.

    Returns the number of positions that it knows, None without a limit.
    """
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    )

    check_files("dskd.teacher.model", settings.model)
    config = check_reachable("dskd.teacher.model", settings.model, settings.revision, trust_remote_code)
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
    if settings.adapter is not None:
        check_adapter(settings.adapter)
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


def load_tokenizer(settings: TeacherSettings, trust_remote_code: bool) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(
            settings.model, revision=settings.revision, trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"dskd.teacher.model: expected a tokenizer beside the model, got {settings.model!r}: {error}. "
            "Save the teacher's tokenizer in its folder."
        ) from error


def resolve_template(settings: TeacherSettings, tokenizer: Any, needed: bool) -> str | None:
    """The teacher's chat template as text; None when it has none and the datasets do not ask for one."""
    choice = settings.chat_template
    if choice == "tokenizer_default":
        if tokenizer.chat_template is None and needed:
            raise ValueError(
                f"dskd.teacher.chat_template: expected a teacher with a chat template, got {settings.model!r} without "
                "one (a base model?). Name a template or a jinja file: dskd.teacher.chat_template: <name|file>."
            )
        return tokenizer.chat_template
    if Path(choice).is_file():
        return Path(choice).read_text(encoding="utf-8")
    from axolotl.utils.chat_templates import get_chat_template

    try:
        return get_chat_template(choice, tokenizer=tokenizer)
    except ValueError:
        raise ValueError(
            f"dskd.teacher.chat_template: expected 'tokenizer_default', the name of an Axolotl template or an existing "
            f"jinja file, got {choice!r}. Check the spelling or the path."
        ) from None


@contextlib.contextmanager
def _outside_engines() -> Iterator[None]:
    """Hide DeepSpeed ZeRO-3 and FSDP from ``from_pretrained``: the teacher is never sharded."""
    import transformers.integrations.deepspeed as integration
    import transformers.modeling_utils as modeling

    hidden = [(integration, "_hf_deepspeed_config_weak_ref", None)]
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
    model = AutoModelForCausalLM.from_pretrained(
        settings.model,
        revision=settings.revision,
        dtype=dtype,
        device_map={"": device},
        trust_remote_code=trust_remote_code,
        **options,
    )
    if settings.adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, settings.adapter).merge_and_unload()
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
