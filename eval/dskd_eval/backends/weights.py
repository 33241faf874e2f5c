"""Weights of a model folder in memory, with a PEFT adapter merged into them where there is one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from dskd_eval.backends.tokenizers import first_line
from dskd_eval.errors import UserError
from dskd_eval.models import ModelFolder

LoadedModel = Any  # one of transformers or PEFT's around it: they have no type in common that generates


def load_weights(folder: ModelFolder, dtype: torch.dtype) -> LoadedModel:
    """The model with its adapter merged; ``UserError`` where a weight is missing, misshapen or does not load."""
    try:
        loaded: LoadedModel = transformers.AutoModelForCausalLM.from_pretrained(
            folder.weights, dtype=dtype, local_files_only=True, output_loading_info=True
        )
        model, info = loaded
    except Exception as error:
        raise UserError(
            f"model {folder.weights}",
            expected="a causal language model that transformers can load",
            got=first_line(error),
            fix="Check config.json and the weight files; code from the hub (trust_remote_code) is not run.",
        ) from error
    missing = sorted(info.get("missing_keys") or ())
    mismatched = list(info.get("mismatched_keys") or ())
    if missing or mismatched:
        raise UserError(
            f"model {folder.weights}",
            expected="weights for every parameter of the config",
            got=f"{len(missing)} missing, {len(mismatched)} misshapen, as {(missing or mismatched)[0]}",
            fix="A part would be random: export the model again.",
        )
    if folder.adapter is None:
        return model
    try:
        import peft

        _prepare(model, _shapes(folder.adapter))
        adapted: LoadedModel = peft.PeftModel.from_pretrained(model, str(folder.adapter))
        return adapted if adapted.active_peft_config.is_prompt_learning else adapted.merge_and_unload()
    except Exception as error:
        raise UserError(
            f"adapter {folder.adapter}",
            expected=f"a PEFT adapter that fits {folder.weights}",
            got=first_line(error),
            fix="Check base_model_name_or_path, and that peft is installed.",
        ) from error


def _prepare(model: LoadedModel, shapes: Mapping[str, Sequence[int]]) -> None:
    """Give the embeddings of a base as many rows as an adapter was trained with, and let it change them apart."""
    rows = _vocabulary_rows(model, shapes)
    if rows not in (None, model.get_input_embeddings().weight.shape[0]):
        model.resize_token_embeddings(rows, mean_resizing=False)
    inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()
    names = [_name(model, inputs), _name(model, outputs)]
    changed = any(f".{name}.lora_" in f".{key}" for key in shapes for name in names)
    if changed and outputs is not None and outputs.weight is inputs.weight:
        # Merged into one tensor, the change of the embeddings would be that of the head as well.
        outputs.weight = torch.nn.Parameter(outputs.weight.detach().clone())
        model.config.tie_word_embeddings = False


def _vocabulary_rows(model: LoadedModel, shapes: Mapping[str, Sequence[int]]) -> int | None:
    """Rows of the embeddings that an adapter was trained with, because its training added tokens; else None."""
    inputs, outputs = _name(model, model.get_input_embeddings()), _name(model, model.get_output_embeddings())
    for name, shape in shapes.items():
        for module, along in ((inputs, {"lora_embedding_A": 1}), (outputs, {"lora_B.weight": 0})):
            axes = {"weight": 0, "base_layer.weight": 0, **along}
            found = [axes[end] for end in axes if module and f".{name}".endswith(f".{module}.{end}")]
            if found and len(shape) == 2:
                return int(shape[found[0]])
    return None


def _name(model: LoadedModel, wanted: object) -> str | None:
    return next((name for name, module in model.named_modules() if module is wanted), None)


def _shapes(adapter: Path) -> dict[str, list[int]]:
    path = adapter / "adapter_model.safetensors"
    if not path.is_file():
        tensors = torch.load(adapter / "adapter_model.bin", map_location="cpu", weights_only=True)
        return {name: list(tensor.shape) for name, tensor in tensors.items()}
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return {name: list(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
