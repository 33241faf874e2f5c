"""Weights and an adapter on them: the vocabulary that it was trained with, and whether the parts fit, by their shapes.

Training with added tokens resizes the embeddings, and PEFT then saves them with the adapter; the base has to be
resized alike before the adapter is put on it.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dskd_plugin.errors import SettingError
from dskd_plugin.log import LOG


def prepare(model: Any, adapter: Path) -> None:
    """Give the embeddings of the base as many rows as the adapter was trained with, and let it change them apart."""
    shapes = shapes_in(adapter)
    rows = vocabulary_rows(model, shapes)
    if rows not in (None, model.get_input_embeddings().weight.shape[0]):
        model.resize_token_embeddings(rows, mean_resizing=False)
    inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()
    names = _names(model, inputs) | _names(model, outputs)
    marks = [f".{name}.lora_" for name in names]
    changed = any(mark in f".{key}" for key in shapes for mark in marks)
    if changed and outputs is not None and outputs.weight is inputs.weight:
        # Merged into one tensor, the change of the embeddings would be that of the head as well.
        outputs.weight = nn.Parameter(outputs.weight.detach().clone())
        model.config.tie_word_embeddings = False


def vocabulary_rows(model: Any, shapes: dict[str, list[int]]) -> int | None:
    """Rows of the embeddings that an adapter was trained with; None where nothing of it depends on them.

    shapes: of the adapter's tensors, see `shapes_in`.
    """
    inputs = _names(model, model.get_input_embeddings())
    outputs = _names(model, model.get_output_embeddings())
    ends = {f"{name}{end}": 0 for name in inputs | outputs for end in (".weight", ".base_layer.weight")}
    # LoRA on the embeddings, saved without them: A of the input has a column for each row, B of the output a row.
    ends |= {f"{name}.lora_embedding_A": 1 for name in inputs} | {f"{name}.lora_B.weight": 0 for name in outputs}
    for key, shape in shapes.items():
        for end, axis in ends.items():
            if f".{key}".endswith(f".{end}") and len(shape) == 2:
                return int(shape[axis])
    return None


def shapes_in(adapter: Path) -> dict[str, list[int]]:
    """Shape of each tensor of an adapter, by its name."""
    file = adapter / "adapter_model.safetensors"
    if not file.is_file():
        tensors = torch.load(adapter / "adapter_model.bin", map_location="meta", weights_only=True)
        return {name: list(tensor.shape) for name, tensor in tensors.items()}
    return _shapes(file)


def _shapes(file: Path) -> dict[str, list[int]]:
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        return {name: list(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118


def check_fit(name: str, config: Any, adapter: Path, trust_remote_code: bool) -> int:
    """Raise ``ValueError`` for an adapter of another base, found on a model without weights.

    name: setting of the recipe; config: of the base. Returns the rows of the embeddings once the adapter is on it.
    """
    from peft import PeftConfig, get_peft_model, get_peft_model_state_dict

    shapes = shapes_in(adapter)
    settings = PeftConfig.from_pretrained(str(adapter))
    if hasattr(settings, "init_lora_weights"):
        settings.init_lora_weights = True  # the others start from the base's weights, which are not there
    try:
        base = _skeleton(config, trust_remote_code)
        with torch.device("meta"):
            prepare(base, adapter)
            rows = int(base.get_input_embeddings().weight.shape[0])
            model = get_peft_model(base, settings, low_cpu_mem_usage=True)
        saved = get_peft_model_state_dict(model, save_embedding_layers=True)
        expected = {key: list(value.shape) for key, value in saved.items()}
    except ValueError as error:  # PEFT: the modules that it is for are not there
        raise _misfit(name, config, adapter, str(error).splitlines()[0]) from error
    except (NotImplementedError, RuntimeError, TypeError) as error:
        # Some kinds cannot be built without weights: whether they fit shows when they are loaded.
        LOG.debug("dskd: %s: not checked against its base: %r", adapter, error)
        return int(config.get_text_config().vocab_size)
    wrong = next(_differences(expected, shapes), None)
    if wrong is None and not expected.keys() & shapes.keys():
        wrong = f"no tensor of a name that the base has, such as {next(iter(shapes), 'none at all')}"
    if wrong is not None:
        raise _misfit(name, config, adapter, wrong)
    return rows


def check_weights(name: str, config: Any, folder: Path, trust_remote_code: bool) -> None:
    """Raise ``ValueError`` for a folder whose weights are not those of its config.json.

    Tensors that transformers renames when it loads them, and quantized ones, are left to the loading.
    """
    if getattr(config, "quantization_config", None) is not None:
        return
    try:
        expected = {key: list(value.shape) for key, value in _skeleton(config, trust_remote_code).state_dict().items()}
    except (NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        LOG.debug("dskd: %s: not checked against its configuration: %r", folder, error)
        return
    for file in sorted(folder.glob("model*.safetensors")):
        wrong = next(_differences(expected, _shapes(file)), None)
        if wrong is not None:
            raise SettingError(
                name,
                f"weights as {folder / 'config.json'} describes them",
                f"{wrong} in {file.name}",
                "Weights and configuration are of two models: save them together.",
            )


def _skeleton(config: Any, trust_remote_code: bool) -> Any:
    """The model without memory for its weights."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)


def _differences(expected: dict[str, list[int]], found: dict[str, list[int]]) -> Iterator[str]:
    for key, shape in found.items():
        if shape != expected.get(key, shape):
            yield f"{key} of shape {shape} in place of {expected[key]}"


def _misfit(name: str, config: Any, adapter: Path, got: str) -> SettingError:
    return SettingError(
        name,
        f"an adapter of {config.name_or_path!r}",
        f"{str(adapter)!r} with {got}",
        "Give the model that it was trained on.",
    )


def _names(model: nn.Module, wanted: nn.Module | None) -> set[str]:
    return {name for name, module in model.named_modules() if module is wanted} if wanted is not None else set()
