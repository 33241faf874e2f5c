"""A model samples answers: prompts in batches, under a random state and without settings of its own."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessor

from dskd_plugin.models import causal_lm

# Tokens of prompts and answers, padding included, whose keys and values are kept at a time.
CACHE_TOKENS = 2**15


class WithinVocabulary(LogitsProcessor):
    """Heads may have more rows than the tokenizer has ids; those are never sampled."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores[:, self.vocab_size :] = -torch.inf
        return scores


def left_padded(prompts: Sequence[Sequence[int]], pad: int, device: torch.device) -> dict[str, Tensor]:
    """input_ids and attention_mask [B, S] of the prompts, each ending at the last column."""
    width = max(map(len, prompts))
    ids_BS = torch.tensor([[pad] * (width - len(ids)) + list(ids) for ids in prompts], device=device)
    mask_BS = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts], device=device)
    return {"input_ids": ids_BS, "attention_mask": mask_BS}


def batches_exactly(generator: Any, vocab_size: int) -> bool:
    """Whether a prompt's next-token logits are the same alone and left-padded in a batch; measured, not assumed."""
    prompts = [[(7 * place + 3) % vocab_size for place in range(length)] for length in (11, 4)]
    config = GenerationConfig(
        do_sample=False, max_new_tokens=3, output_logits=True, return_dict_in_generate=True, pad_token_id=0
    )
    together = generator.generate(
        **left_padded(prompts, 0, generator.device), generation_config=config, synced_gpus=False
    )
    alone = generator.generate(
        **left_padded(prompts[1:], 0, generator.device), generation_config=config, synced_gpus=False
    )
    limit = 1e-3 if together.logits[0].dtype == torch.float32 == generator.dtype else 0.05
    for place, (one, other) in enumerate(zip(together.logits, alone.logits, strict=True)):
        one, other = one[1, :vocab_size].float(), other[0, :vocab_size].float()
        if not (one - other).norm() <= limit * other.norm():
            return False
        if together.sequences[1, 11 + place] != alone.sequences[0, 4 + place]:
            break  # a tie; from here on the texts differ
    return True


def prompt_parts(prompts: list[list[int]], room: list[int], together: bool) -> Iterator[list[int]]:
    """Numbers of the prompts to answer at a time: those of similar length together, or each alone."""
    part: list[int] = []
    for k in sorted(range(len(prompts)), key=lambda k: len(prompts[k])):
        tokens = (len(part) + 1) * (len(prompts[k]) + max(room[j] for j in [*part, k]))
        if part and (tokens > CACHE_TOKENS or not together):
            yield part
            part = []
        part.append(k)
    yield part


@contextlib.contextmanager
def generating(model: nn.Module, seed: int, autocast: torch.dtype | None) -> Iterator[Any]:
    """The causal language model in eval mode without settings of its own, under a random state of its own."""
    generator = causal_lm(model)
    device = generator.device
    training = [module for module in model.modules() if module.training]
    # A model's own generation_config.json would fill in penalties, forced tokens and limits.
    own = [module for module in model.modules() if "generation_config" in vars(module)]
    configs = [module.generation_config for module in own]
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        if device.type == "cpu":
            stack.enter_context(torch.random.fork_rng(devices=[]))
        else:
            stack.enter_context(torch.random.fork_rng(devices=[device.index], device_type=device.type))
            with torch.get_device_module(device).device(device.index):
                torch.get_device_module(device).manual_seed(seed)
        torch.default_generator.manual_seed(seed)
        if autocast is not None:
            stack.enter_context(torch.autocast(device.type, dtype=autocast))
        try:
            model.eval()
            for module in own:
                module.generation_config = GenerationConfig()  # type: ignore[assignment]
            yield generator
        finally:
            for module in training:
                module.training = True
            for module, config in zip(own, configs, strict=True):
                module.generation_config = config
