"""The two models of a recipe by their configurations: their weights, and what a pass over them keeps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dskd_plugin.errors import SettingError
from dskd_plugin.models import causal_lm, decoder, output_head
from dskd_plugin.plan.facts import Facts
from dskd_plugin.plan.simulate import Lived, empty_model, reading_bytes, training_bytes
from dskd_plugin.teachers.resolve import fetched_adapter, parts_of

# bitsandbytes: a scale for each 64 weights, itself in 8 bits; 8-bit weights have one for each row.
BYTES_OF_BITS = {4: 0.5 + 1 / 64, 8: 1.0}


@dataclass(frozen=True)
class Counts:
    """Weights of a model. layers: all but embedding and head; ends: these two, once where they are tied.

    products: weights of matrix products, those that cost arithmetic. trained: by their bytes each.
    largest: of one layer, what an engine that shards gathers at a time, embedding or head included.
    tied: embedding and head are one.
    """

    layers: int
    ends: int
    products: int
    trained: dict[int, int]
    largest: int
    vocab: int
    width: int
    depth: int
    tied: bool

    @property
    def all(self) -> int:
        return self.layers + self.ends


@dataclass(frozen=True)
class Student:
    counts: Counts
    bytes: int
    lived: Lived


@dataclass(frozen=True)
class Teacher:
    """decoder_bytes: of weights but the output head, head_bytes: of that; reading: at most alive in a forward."""

    counts: Counts
    decoder_bytes: int
    head_bytes: int
    reading: int


def student_of(facts: Facts) -> Student:
    """The student in training, counted and simulated."""
    recipe = facts.recipe
    half = None if facts.weights == "float32" else getattr(torch, facts.weights)
    model = empty_model(
        _config("base_model", recipe["base_model"], recipe.get("revision_of_model"), recipe),
        half or torch.float32,
        repeating=not facts.packed and not facts.attention.startswith("flash"),
        trust_remote_code=bool(recipe.get("trust_remote_code")),
    )
    # Axolotl trains embedding and head in float32, but for adapters and FSDP, whose kernels want one dtype.
    if not (facts.adapter or facts.engine == "FSDP2" or recipe.get("cut_cross_entropy")):
        model.get_input_embeddings().float()
        model.get_output_embeddings().float()
        model.tie_weights()
    if facts.adapter:
        model = _with_adapter(model, recipe)
    counts = _counts(model)
    size = _bytes(model, facts.quantized)
    lived = training_bytes(model, facts.rows, facts.tokens, checkpointing=facts.checkpointing, autocast=half)
    return Student(counts, size, lived)


def teacher_of(facts: Facts) -> Teacher:
    """The frozen teacher of a recipe with one alone, counted and simulated."""
    settings = facts.settings.teacher
    parts = parts_of(settings, fetched_adapter)
    attention = settings.attn_implementation or facts.attention
    model = empty_model(
        _config("dskd.teacher.model", parts.weights, parts.revision, facts.recipe),
        getattr(torch, settings.dtype),
        repeating=not facts.packed and not attention.startswith("flash"),
        trust_remote_code=bool(facts.recipe.get("trust_remote_code")),
    ).requires_grad_(False)
    counts = _counts(model)
    head = output_head(model).weight
    size = _bytes(model, {"none": None, "8bit": 8, "4bit": 4}[settings.quantization])
    head_bytes = head.numel() * head.element_size()
    reading = reading_bytes(model, facts.rows, facts.teacher_tokens)
    return Teacher(counts, size - head_bytes, head_bytes, reading)


def _bytes(model: Any, bits: int | None) -> int:
    """Bytes of the weights; bits: of linear layers that bitsandbytes holds, all but the output head."""
    small: set[int] = set()
    if bits is not None:
        head = output_head(model)
        linear = [module for module in model.modules() if isinstance(module, nn.Linear) and module is not head]
        small = {id(module.weight) for module in linear if not module.weight.requires_grad}
    total = 0.0
    for weight in model.parameters():
        each = BYTES_OF_BITS[bits] if bits is not None and id(weight) in small else weight.element_size()
        total += weight.numel() * each
    return int(total)


def _config(key: str, name: str, revision: str | None, recipe: dict[str, Any]) -> Any:
    """The configuration of a model that the key of the recipe names; ``SettingError`` where there is none."""
    from transformers import AutoConfig

    trusted = bool(recipe.get("trust_remote_code"))
    try:
        return AutoConfig.from_pretrained(name, revision=revision or "main", trust_remote_code=trusted)
    except (OSError, ValueError) as error:
        raise SettingError(
            key,
            "a model whose config.json can be read",
            f"{name!r}: {str(error).splitlines()[0]}",
            "Check the folder or the hub id; without network set HF_HUB_OFFLINE=1 and name a folder.",
        ) from error


def _counts(model: Any) -> Counts:
    base = causal_lm(model)
    head = output_head(model).weight
    ends = {id(p): p for module in (base.get_input_embeddings(), output_head(model)) for p in module.parameters()}
    every = {id(p): p for p in model.parameters()}
    trained: dict[int, int] = {}
    for parameter in every.values():
        if parameter.requires_grad:
            size = parameter.element_size()
            trained[size] = trained.get(size, 0) + parameter.numel()
    lists = [list(module) for module in decoder(model).modules() if isinstance(module, nn.ModuleList)]
    blocks = max(lists, key=len, default=[])
    of_block = [sum(p.numel() for p in block.parameters()) for block in blocks]
    inside = sum(p.numel() for key, p in every.items() if key not in ends)
    return Counts(
        layers=inside,
        ends=sum(p.numel() for p in ends.values()),
        products=sum(p.numel() for key, p in every.items() if key not in ends and p.dim() > 1),
        trained=trained,
        largest=max([head.numel(), *of_block]),
        vocab=head.shape[0],
        width=head.shape[1],
        depth=len(blocks),
        tied=head is base.get_input_embeddings().weight,
    )


def _with_adapter(model: Any, recipe: dict[str, Any]) -> Any:
    """LoRA as Axolotl asks PEFT for it; its own weights are float32."""
    from peft import LoraConfig, get_peft_model

    targets = "all-linear" if recipe.get("lora_target_linear") else recipe.get("lora_target_modules")
    config = LoraConfig(
        r=int(recipe.get("lora_r") or 8),
        lora_alpha=int(recipe.get("lora_alpha") or 16),
        target_modules=targets,
        lora_dropout=float(recipe.get("lora_dropout") or 0),
        modules_to_save=recipe.get("lora_modules_to_save"),
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config)
