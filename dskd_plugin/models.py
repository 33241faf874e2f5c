"""What distillation needs of any Hugging Face causal language model: its decoder and its output head.

Shapes: B batch, S positions, V rows of the output head, D width of the last hidden state.
"""

import contextlib
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from dskd_plugin.core.heads import Head, head_logits
from dskd_plugin.errors import DSKDSetupError


def causal_lm(model: nn.Module) -> Any:
    """The transformers model inside a PEFT wrapper, or the model itself."""
    wrapped: Any = model
    return wrapped.get_base_model() if hasattr(model, "get_base_model") else model


def decoder(model: nn.Module) -> nn.Module:
    """The module whose ``last_hidden_state`` the output head reads."""
    base = causal_lm(model)
    found = base.get_decoder() if hasattr(base, "get_decoder") else None
    if found is None or found is base:
        found = base.base_model
    return found


def output_head(model: nn.Module) -> Any:
    """The output embedding module (tied or not)."""
    head = causal_lm(model).get_output_embeddings()
    if head is None or getattr(head, "weight", None) is None:
        raise DSKDSetupError(
            f"model {causal_lm(model).config.name_or_path!r}",
            "a causal language model with a linear output head",
            f"{type(causal_lm(model)).__name__} without one",
            "Use a decoder-only language model.",
        )
    return head


def read_head(model: nn.Module, head: Any, vocab_size: int, dtype: torch.dtype | None = None) -> Head:
    """The output head as plain tensors: weight [V, D], bias, logit scale and soft-cap.

    Gradients flow through the result to whatever parameters the head is made of (LoRA factors included), and through
    the rounding of quantisation-aware training.
    dtype: of the products; None keeps the weight's own.
    """
    weight, bias = head.weight, getattr(head, "bias", None)
    for name in getattr(head, "active_adapters", ()):
        if hasattr(head, "get_delta_weight") and name in head.lora_A:
            weight = weight + head.get_delta_weight(name)
    rounded = getattr(head, "weight_fake_quantizer", None)
    if rounded is not None:
        weight = rounded(weight)
    if dtype is not None:
        weight = weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    config = causal_lm(model).config.get_text_config()
    scale = getattr(config, "logit_scale", None) or 1.0
    divisor = getattr(config, "logits_scaling", None) or 1.0
    return Head(
        weight_VD=weight,
        bias_V=bias,
        scale=float(scale) / float(divisor),
        softcap=getattr(config, "final_logit_softcapping", None),
        vocab_size=min(vocab_size, weight.shape[0]),
    )


def as_read(head: nn.Module, states: Tensor) -> Tensor:
    """Hidden states as the head's own forward takes them: rounded where it learns to read states of few bits."""
    rounded = getattr(head, "activation_fake_quantizer", None)
    return states if rounded is None else cast(Tensor, rounded(states))


def check_head(hidden_ND: Tensor, logits_NV: Tensor, head: Head, name: str) -> None:
    """Raise unless the model's own logits are what ``head`` makes of its last hidden state.

    Catches every architecture whose forward does something between decoder and logits that we do not know.
    """
    ours, theirs = head_logits(hidden_ND.detach(), head.detach()), logits_NV.detach().float()
    low_precision = head.weight_VD.dtype != torch.float32 or logits_NV.dtype != torch.float32
    tolerance = (0.05 if low_precision else 1e-3) * max(1.0, float(theirs.abs().max()))
    if bool(theirs.isnan().any()):
        raise DSKDSetupError(
            name,
            "weights whose logits are numbers",
            "NaN",
            "Check the weights (a copy that was cut, or another dtype than they were trained in).",
        )
    worst = float((ours - theirs).abs().max()) if ours.shape == theirs.shape else float("inf")
    if not worst <= tolerance:
        raise DSKDSetupError(
            name,
            "logits = output head of the last hidden state",
            f"a difference of {worst:.3g} (shapes {tuple(ours.shape)} and {tuple(theirs.shape)})",
            (
                "This architecture does more between its decoder and its logits than dskd knows; please report it "
                "with the model's name."
            ),
        )


def drops_out(head: nn.Module) -> bool:
    """Whether the head's logits are made with dropout at present, as LoRA's are in training."""
    return any(isinstance(part, nn.Dropout) and part.training and part.p > 0 for part in head.modules())


def is_partitioned(parameter: Tensor) -> bool:
    """Whether DeepSpeed ZeRO-3 holds the parameter in pieces."""
    return hasattr(parameter, "ds_id")


@contextlib.contextmanager
def gathered(parameters: list[nn.Parameter]) -> Iterator[None]:
    """Whole parameters inside the block, read-only, under ZeRO-3; a no-op elsewhere. All ranks must enter."""
    if any(is_partitioned(parameter) for parameter in parameters):
        import deepspeed

        with deepspeed.zero.GatheredParameters(parameters):
            yield
    else:
        yield


def head_rows(model: nn.Module) -> int:
    """Rows of the output head, also where an engine has split it over ranks."""
    weight = output_head(model).weight
    return int(getattr(weight, "ds_shape", weight.shape)[0])
