"""Generation with transformers: any causal language model folder, with or without a PEFT adapter."""

from __future__ import annotations

import copy
import inspect
import random
from collections.abc import Mapping, Sequence
from typing import cast

import torch
import transformers

from dskd_eval.backends import cpu_attention
from dskd_eval.backends.base import (
    Generation,
    GenerationSettings,
    LikelihoodModel,
    Prompt,
    Told,
    cut_at_stop,
    tell_nobody,
)
from dskd_eval.backends.decoding import decode
from dskd_eval.backends.tokenizers import (
    RendersChats,
    context_length,
    encode,
    end_tokens,
    load_tokenizer,
)
from dskd_eval.backends.weights import load_weights
from dskd_eval.errors import UserError
from dskd_eval.models import ModelFolder

Kept = object  # what a model keeps of the tokens it has read: transformers' cache, or one of the model's own kind


def choose_device(name: str) -> torch.device:
    """'auto' takes the GPU when there is one. Raises UserError for a device this machine lacks."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(
            "--device", expected="auto, cpu, cuda, cuda:N or mps", got=repr(name), fix="Choose one of them."
        ) from error
    available = {
        "cpu": True,
        "cuda": torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count(),
        "mps": torch.backends.mps.is_available(),
    }
    if not available.get(device.type, False):
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        raise UserError(
            "--device",
            expected=f"a device of this machine ({count} CUDA devices)",
            got=repr(name),
            fix="Use --device cpu, or install a torch build that sees your GPU.",
        )
    return device


def choose_dtype(name: str, device: torch.device, config: Mapping[str, object]) -> torch.dtype:
    """'auto': the checkpoint's dtype on a GPU; on a CPU bfloat16 where it has fast instructions, else
    float32.
    """
    if name != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]
    saved = str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch.")
    if device.type == "cpu":
        fast = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()
        return torch.bfloat16 if fast else torch.float32
    if saved == "float32":
        return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32
    return {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(saved, torch.float32)


class HFBackend(RendersChats):
    """A model in memory. Raises UserError when it cannot be loaded or its weights are incomplete."""

    kind = "hf"
    pads = True
    told: Told = staticmethod(tell_nobody)

    def __init__(
        self,
        folder: ModelFolder,
        *,
        dtype: str = "auto",
        device: str = "auto",
        chat_template: str | None = None,
    ) -> None:
        self.name = folder.name
        self.device = choose_device(device)
        self.dtype = choose_dtype(dtype, self.device, folder.config)
        self.tokenizer = load_tokenizer(folder, chat_template)
        self.model = load_weights(folder, self.dtype).to(self.device).eval()
        self.template_options = dict(folder.ref.template_options)
        if self.device.type == "cpu":
            cpu_attention.use_for(self.model)
        self.end_tokens = end_tokens(folder, self.tokenizer)
        # A checkpoint's own sampling settings (repetition penalty, top-k) must not change a benchmark in
        # silence.
        self.model.generation_config = _settings()
        self.max_length = context_length(self.model.config, self.tokenizer)
        self.default_batch_size = 8 if self.device.type == "cpu" else 32
        self.parameters = sum(parameter.numel() for parameter in self.model.parameters())
        self.identity: Mapping[str, object] = {
            "fingerprint": folder.fingerprint,
            "dtype": str(self.dtype).removeprefix("torch."),
            "device": self.device.type,
            "attention": str(getattr(self.model.config, "_attn_implementation", "")),
        }
        pad = self.tokenizer.pad_token_id
        self._pad = pad if pad is not None else (self.end_tokens[0] if self.end_tokens else 0)
        self._likelihood: LikelihoodModel | None = None
        # Families that keep no such cache (Mamba), and prompts learned by PEFT, answer the whole batch in one go.
        self._narrows = "past_key_values" in inspect.signature(self.model.forward).parameters

    def encode(self, text: str, *, special_tokens: bool) -> list[int]:
        return encode(self.tokenizer, text, special_tokens=special_tokens) or [self._pad]

    def generate(self, prompts: Sequence[Prompt], settings: GenerationSettings) -> list[Generation]:
        try:
            return self._generate(prompts, settings)
        except torch.OutOfMemoryError as error:
            if len(prompts) == 1:
                raise UserError(
                    f"model {self.name}",
                    expected=f"memory for one prompt of {len(prompts[0].tokens)} tokens",
                    got="the device is out of memory",
                    fix="Use a smaller --dtype, another --device or a smaller model.",
                ) from error
        torch.cuda.empty_cache()
        half = len(prompts) // 2
        return [*self.generate(prompts[:half], settings), *self.generate(prompts[half:], settings)]

    @torch.inference_mode()
    def _generate(self, prompts: Sequence[Prompt], settings: GenerationSettings) -> list[Generation]:
        """One answer per prompt; a finished one leaves the batch, so that the longest holds up no other."""
        ids, mask = self._padded(prompts)
        width, cache, narrows = ids.shape[1], None, self._narrows
        found: dict[int, Generation] = {}
        waiting = list(range(len(prompts)))
        while waiting:
            enough = max(1, len(waiting) // _LEAVE_TOGETHER) if narrows else len(waiting)
            asked = [prompts[row] for row in waiting]
            watch = _Leaving(self.tokenizer, settings, asked, self.end_tokens, width, enough, self.told)
            draw = processors(settings, asked, width)
            ids, cache = self._write(ids, mask, width + settings.max_new_tokens, cache, watch, draw)
            cut = ids.shape[1] - width >= settings.max_new_tokens
            gone = [done or cut for done in watch.done]
            for row, tokens, leaves in zip(waiting, ids[:, width:].tolist(), gone, strict=True):
                if leaves:
                    found[row] = self._finished(tokens, settings, prompts[row])
            self.told(0, sum(gone) - sum(watch.done))
            waiting = [row for row, leaves in zip(waiting, gone, strict=True) if not leaves]
            staying = [place for place, leaves in enumerate(gone) if not leaves]
            stay = cast(torch.LongTensor, torch.tensor(staying, device=ids.device).long())
            if waiting and isinstance(cache, transformers.Cache):
                cache.reorder_cache(stay)
            else:  # a cache of the model's own kind: read all once more, then without a stop
                cache, narrows = None, False
            ids = ids[stay]
            mask = torch.nn.functional.pad(mask[stay], (0, ids.shape[1] - mask.shape[1]), value=1)
        return [found[row] for row in range(len(prompts))]

    def _padded(self, prompts: Sequence[Prompt]) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids and mask, padded on the left."""
        width = max(len(prompt.tokens) for prompt in prompts)
        ids = torch.full((len(prompts), width), self._pad, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt.tokens) :] = torch.tensor(prompt.tokens)
            mask[row, width - len(prompt.tokens) :] = 1
        return ids.to(self.device), mask.to(self.device)

    def _write(
        self,
        ids: torch.Tensor,
        mask: torch.Tensor,
        limit: int,
        cache: Kept,
        watch: _Leaving,
        draw: transformers.LogitsProcessorList,
    ) -> tuple[torch.Tensor, Kept]:
        """Go on with a batch until the watch stops it or it has `limit` tokens: all ids, and what the model keeps."""
        config = _settings(
            do_sample=False,  # `draw` samples
            max_new_tokens=limit - ids.shape[1],
            eos_token_id=self.end_tokens or None,
            pad_token_id=self._pad,
            use_cache=True,
            return_dict_in_generate=True,
        )
        made = self.model.generate(
            input_ids=ids,
            attention_mask=mask,
            generation_config=config,
            logits_processor=draw,
            stopping_criteria=transformers.StoppingCriteriaList([watch]),
            **({} if cache is None else {"past_key_values": cache}),
        )
        return made.sequences, made.get("past_key_values")

    def _finished(self, tokens: list[int], settings: GenerationSettings, prompt: Prompt) -> Generation:
        ends = [place for place, token in enumerate(tokens) if token in self.end_tokens]
        finish = "stop" if ends else "length"
        tokens = tokens[: ends[0]] if ends else tokens
        while tokens and not ends and tokens[-1] == self._pad:
            tokens = tokens[:-1]
        text = decode(self.tokenizer, tokens, settings.reasoning, prompt.before)
        before = cut_at_stop(text, settings, prompt.opened)
        if before is not None:
            text, finish = before, "stop"
        if not ends and len(tokens) < settings.max_new_tokens:
            finish = "stop"
        return Generation(text, len(tokens), finish)

    def likelihood_model(self, batch_size: int) -> LikelihoodModel:
        """lm-eval's own model around the same weights, for tasks that rank choices."""
        if self._likelihood is None:
            from dskd_eval.lmeval.likelihood import likelihood_model

            tokenizer = copy.deepcopy(self.tokenizer)
            if tokenizer.eos_token_id is None:
                tokenizer.eos_token = tokenizer.convert_ids_to_tokens(self._pad)
            self._likelihood = likelihood_model(self.model, tokenizer, batch_size, self.max_length)
        return self._likelihood


# Of so many answers that are being written, one leaves at once; of twice as many, two together, and so on: a restart
# costs some milliseconds, and little is gained from a batch that is one row smaller.
_LEAVE_TOGETHER = 8


class _Leaving(transformers.StoppingCriteria):
    """Ends a row at an end token or once a stop string appears in its new text, outside reasoning; ends them all when
    enough have ended, so that those can leave.
    """

    def __init__(
        self,
        tokenizer: transformers.PreTrainedTokenizerBase,
        settings: GenerationSettings,
        prompts: Sequence[Prompt],
        ends: Sequence[int],
        width: int,
        enough: int,
        told: Told,
    ) -> None:
        self.tokenizer, self.settings, self.prompts = tokenizer, settings, prompts
        self.width, self.enough, self.told = width, enough, told
        self.tail = max((len(text) for text in settings.stop), default=0) + 4
        self.ends = set(ends)
        self.done = [False] * len(prompts)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: object) -> torch.Tensor:
        waiting = [row for row, done in enumerate(self.done) if not done]
        for row, last in zip(waiting, input_ids[waiting, -1].tolist(), strict=True):
            self.done[row] = last in self.ends
        if self.settings.stop:
            self._find_stops(input_ids)
        ended = sum(self.done)
        self.told(len(waiting), ended - (len(self.done) - len(waiting)))
        return torch.tensor([True] * len(self.done) if ended >= self.enough else self.done, device=input_ids.device)

    def _find_stops(self, input_ids: torch.Tensor) -> None:
        start = max(self.width, input_ids.shape[1] - self.tail)
        waiting = [row for row, done in enumerate(self.done) if not done]
        for row, tokens in zip(waiting, input_ids[waiting, start:].tolist(), strict=True):
            before = self.prompts[row].before
            text = decode(self.tokenizer, tokens, before=before if start == self.width else ())
            found = any(stop in text for stop in self.settings.stop)
            if found and self.settings.reasoning:
                written = input_ids[row, self.width :].tolist()
                whole = decode(self.tokenizer, written, self.settings.reasoning, before)
                found = cut_at_stop(whole, self.settings, self.prompts[row].opened) is not None
            self.done[row] = found


class _Draw(transformers.LogitsProcessor):
    """Leaves one token of each row: where the row's own random number falls in the cumulative probabilities.

    The numbers of a row come from the seed and its prompt, so they do not depend on its batch.
    """

    def __init__(self, settings: GenerationSettings, prompts: Sequence[Prompt], width: int) -> None:
        sources = [random.Random(f"{settings.seed}:{prompt.tokens}") for prompt in prompts]
        numbers = [[source.random() for _ in range(settings.max_new_tokens)] for source in sources]
        self.numbers, self.width = torch.tensor(numbers, dtype=torch.float64), width

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        precise = torch.float32 if scores.device.type == "mps" else torch.float64
        cumulative = scores.to(precise).softmax(-1).cumsum(-1)
        number = self.numbers[:, input_ids.shape[1] - self.width].to(scores.device, precise)
        # The last bits of the sum are rounding: never beyond the last token with a probability.
        target = (number.clamp(max=1 - 1e-6) * cumulative[:, -1])[:, None]
        chosen = torch.searchsorted(cumulative, target, right=True)
        return torch.full_like(scores, -torch.inf).scatter(1, chosen, 0.0)


def processors(settings: GenerationSettings, prompts: Sequence[Prompt], width: int) -> transformers.LogitsProcessorList:
    found = transformers.LogitsProcessorList()
    if settings.temperature > 0:
        if settings.temperature != 1:
            found.append(transformers.TemperatureLogitsWarper(settings.temperature))
        if settings.top_k > 0:
            found.append(transformers.TopKLogitsWarper(settings.top_k))
        if settings.top_p < 1:
            found.append(transformers.TopPLogitsWarper(settings.top_p))
        found.append(_Draw(settings, prompts, width))
    return found


def _settings(**options: object) -> transformers.GenerationConfig:
    return transformers.GenerationConfig(**options)  # type: ignore[no-untyped-call]
