"""The frozen teacher in memory: loaded outside every engine, asked for hidden states.

Shapes: T teacher tokens of a batch, N rows that the student needs, E teacher width.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from accelerate.utils import align_module_device
from safetensors import SafetensorError
from torch import Tensor

from dskd_plugin.core.heads import Head
from dskd_plugin.errors import DSKDSetupError
from dskd_plugin.log import LOG
from dskd_plugin.models import check_head, decoder, output_head, read_head
from dskd_plugin.teacher_settings import TeacherSettings
from dskd_plugin.teachers import adapted
from dskd_plugin.teachers.offloaded import Offloaded
from dskd_plugin.teachers.outside_engines import outside_engines
from dskd_plugin.teachers.placement import current, suited_attention
from dskd_plugin.teachers.resolve import fetched_adapter, parts_of


def _load(
    settings: TeacherSettings, attn_implementation: str | None, device: torch.device | str, trust_remote_code: bool
) -> Any:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    options: dict[str, object] = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
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
        device_map=device if isinstance(device, str) else {"": device},
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
    """A frozen decoder that answers with the hidden states of chosen positions, never with logits.

    device: where it computes, or a device map of transformers, such as ``auto``. student: where its head, its embedding
    and its answers are wanted; None: where it computes. offload: whether its decoder waits on the CPU between uses.
    """

    _offloaded: Offloaded | None = None

    def __init__(
        self,
        settings: TeacherSettings,
        *,
        vocab_size: int,
        device: torch.device | str,
        attn_implementation: str | None,
        packed: bool,
        trust_remote_code: bool,
        student: torch.device | None = None,
        offload: bool = False,
    ) -> None:
        at = torch.device("cpu") if offload else device
        attn_implementation = suited_attention(attn_implementation, settings.dtype, device)
        with outside_engines():
            try:
                try:
                    model = _load(settings, settings.attn_implementation or attn_implementation, at, trust_remote_code)
                except ValueError as error:
                    if settings.attn_implementation is not None or "attention" not in str(error):
                        raise
                    LOG.info(
                        "dskd: the teacher does not know the student's %s; using its default",
                        attn_implementation,
                    )
                    model = _load(settings, None, at, trust_remote_code)
            except (ImportError, OSError, RuntimeError, SafetensorError, ValueError) as error:
                raise DSKDSetupError(
                    "dskd.teacher",
                    "a loadable causal language model",
                    f"{settings.model!r}: {error}",
                    "Check that the folder is complete and that what its settings need is installed.",
                ) from error
        self.model = model.requires_grad_(False).eval()
        self.decoder = decoder(self.model)
        head = output_head(self.model)
        with align_module_device(head):  # of weights that a device map keeps elsewhere
            self.head: Head = read_head(self.model, head, vocab_size).detach()
        if isinstance(device, torch.device):
            self.head = self.head.to(student or device)
        self._offloaded = Offloaded(self.model, device) if offload and isinstance(device, torch.device) else None
        with self.staying(), current(self.input_device):
            self._arrive()
            self._try_out(settings, packed)
        if offload and isinstance(device, torch.device):
            self.offload(device)

    def offload(self, device: torch.device) -> None:
        """Let the decoder wait on the CPU from now on, and read on the device. The loss has a head of its own."""
        self.decoder.to("cpu")
        self._offloaded = Offloaded(self.decoder, device)

    @property
    def width(self) -> int:
        return self.head.weight_VD.shape[1]

    @property
    def embedding(self) -> Tensor:
        """Input embeddings [V, D]; D need not be the width of the head in every family."""
        embedding = self.model.get_input_embeddings()
        with align_module_device(embedding):
            weight: Tensor = embedding.weight
        return weight.detach().to(self.head.weight_VD.device)

    @property
    def input_device(self) -> torch.device:
        """Where it reads its tokens."""
        if self._offloaded is not None:
            return self._offloaded.device
        embedding = self.model.get_input_embeddings()
        at = getattr(getattr(embedding, "_hf_hook", None), "execution_device", None)
        return embedding.weight.device if at is None else torch.device(at)

    def staying(self) -> AbstractContextManager[None]:
        """See `base.staying`."""
        return nullcontext() if self._offloaded is None else self._offloaded.staying()

    def _arrive(self) -> None:
        if self._offloaded is not None:
            self._offloaded.arrive()

    def _try_out(self, settings: TeacherSettings, packed: bool) -> None:
        """Let it read a few tokens: whether its layers compute there, packed rows stay apart and the head is known."""
        try:
            self.packed = packed and self._packing_is_exact()
            self._check_head()
        except (RuntimeError, ValueError) as error:
            if isinstance(error, DSKDSetupError) or settings.device is None:
                raise
            raise DSKDSetupError(
                "dskd.teacher.device",
                f"a teacher whose layers compute on {self.input_device}",
                f"{settings.model!r}: {str(error).splitlines()[0]}",
                "Leave out kernels that need a GPU (such as liger_*), or dskd.teacher.device.",
            ) from error

    @torch.no_grad()
    def _check_head(self) -> None:
        ids = torch.arange(1, 9, device=self.input_device)[None] % self.head.vocab_size
        logits = self.model(input_ids=ids, use_cache=False).logits[0]
        hidden = self._hidden(input_ids=ids)[0].to(self.head.weight_VD.device)
        check_head(hidden, logits.to(hidden.device), self.head, "dskd.teacher.model")

    @torch.no_grad()
    def _packing_is_exact(self) -> bool:
        """Whether this architecture keeps packed neighbours apart by position ids alone; measured, not assumed."""
        ids = torch.arange(3, 15, device=self.input_device) % self.head.vocab_size
        lengths = torch.tensor([7, 5])
        together = self._packed_hidden(ids, lengths)
        apart = self.padded_hidden(ids, lengths)
        limit = 1e-3 if self.model.dtype == torch.float32 else 0.05
        return float((together.float() - apart.float()).norm()) <= limit * float(apart.float().norm())

    def _hidden(self, **inputs: Tensor) -> Tensor:
        # With a cache, transformers does not see the packing and neighbours leak into each other.
        # A device map may end on another device.
        return self.decoder(**inputs, use_cache=False).last_hidden_state.to(inputs["input_ids"].device)

    def _packed_hidden(self, ids_T: Tensor, lengths: Tensor) -> Tensor:
        position_ids = torch.cat([torch.arange(int(length)) for length in lengths]).to(ids_T.device, non_blocking=True)
        return self._hidden(input_ids=ids_T[None], position_ids=position_ids[None])[0]

    def padded_hidden(self, ids_T: Tensor, lengths: Tensor) -> Tensor:
        """Hidden states [T, E] of samples, each read in a row of its own. lengths: tokens of each, on the CPU."""
        present = torch.arange(int(lengths.max()))[None] < lengths[:, None]
        # Places are found on the CPU: a mask as index would wait for the GPU.
        at = present.flatten().nonzero().flatten().to(ids_T.device, non_blocking=True)
        ids = torch.zeros(present.numel(), dtype=ids_T.dtype, device=ids_T.device).index_copy(0, at, ids_T)
        mask = present.long().to(ids_T.device, non_blocking=True)
        return self._hidden(input_ids=ids.view_as(mask), attention_mask=mask).flatten(0, 1)[at]

    @torch.no_grad()
    def rows(self, ids_T: Tensor, lengths: Tensor, bins: Tensor, rows_N: Tensor) -> Tensor:
        """Hidden states [N, E] at flat positions ``rows_N`` of the concatenated samples ``ids_T``.

        lengths: tokens of each sample; bins: how many samples share each packed row (used when packing); on the CPU.
        """
        if not len(rows_N):
            return torch.zeros(0, self.width, dtype=self.head.weight_VD.dtype, device=ids_T.device)
        at = self.input_device
        ids, rows = ids_T.to(at), rows_N.to(at)
        with self.staying(), current(at):
            self._arrive()
            return self._every(ids, lengths, bins)[rows].to(ids_T.device)

    def _every(self, ids_T: Tensor, lengths: Tensor, bins: Tensor) -> Tensor:
        """Hidden states [T, E] of all tokens."""
        if not self.packed:
            return self.padded_hidden(ids_T, lengths)
        hidden, start, sample = [], 0, 0
        for count in bins.tolist():
            inside = lengths[sample : sample + count]
            end = start + int(inside.sum())
            hidden.append(self._packed_hidden(ids_T[start:end], inside))
            start, sample = end, sample + count
        return torch.cat(hidden)
