"""Generation with transformers: any causal language model folder, with or without a PEFT adapter."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from dskd_eval import cpu_attention
from dskd_eval.errors import UserError
from dskd_eval.lm import Generation, GenerationSettings, Prompt, cut_at_stop
from dskd_eval.models import ModelFolder
from dskd_eval.reasoning import Pair

DTYPES = ("auto", "float32", "bfloat16", "float16")
_TURN_ENDS = (
    "<|im_end|>",
    "<|eot_id|>",
    "<|end|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "</s>",
)


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


def choose_dtype(name: str, device: torch.device, config: Mapping[str, Any]) -> torch.dtype:
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


def load_tokenizer(folder: ModelFolder, chat_template: str | None = None) -> Any:
    """The tokenizer of a model; `chat_template` (text) replaces its own template."""
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder.tokenizer, local_files_only=True)
    except Exception as error:
        raise UserError(
            f"model {folder.tokenizer}",
            expected="a tokenizer that transformers can load",
            got=_first_line(error),
            fix="Save the tokenizer into the folder.",
        ) from error
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    return tokenizer


def context_length(config: Any, tokenizer: Any) -> int:
    """Tokens that prompt and answer may have together: the smallest limit that config and tokenizer name."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    names = ("max_position_embeddings", "n_positions", "n_ctx", "max_sequence_length", "max_seq_len", "seq_length")
    limits = [getattr(text, name, None) for name in names]
    limits.append(getattr(tokenizer, "model_max_length", None))
    known = [int(limit) for limit in limits if isinstance(limit, (int, float)) and 0 < limit < 10_000_000]
    return min(known) if known else 2048


def encode(tokenizer: Any, text: str, *, special_tokens: bool) -> list[int]:
    """Ids of a prompt: with the start token that a tokenizer adds, without the end token that some add."""
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    if special_tokens:
        whole: list[int] = tokenizer(text, add_special_tokens=True, verbose=False)["input_ids"]
        ended = len(whole) > len(ids) and whole[-1] == tokenizer.eos_token_id and whole[-1:] != ids[-1:]
        ids = whole[:-1] if ended else whole
    if not ids and tokenizer.bos_token_id is not None:
        return [tokenizer.bos_token_id]
    return ids


def decode(tokenizer: Any, tokens: Sequence[int], markers: Sequence[Pair] = ()) -> str:
    """The text of an answer without special tokens, but for those that are or make up reasoning markers."""
    special = {place: str(token) for place, token in tokenizer.added_tokens_decoder.items() if token.special}
    kept = {
        place: text for place, text in special.items() if any(text in marker for pair in markers for marker in pair)
    }
    texts, begin = [], 0
    for end in [*(place for place, token in enumerate(tokens) if token in kept), len(tokens)]:
        part = list(tokens[begin:end])
        texts.append(tokenizer.decode(part, skip_special_tokens=True, clean_up_tokenization_spaces=False))
        texts += [kept[tokens[end]]] if end < len(tokens) else []
        begin = end + 1
    return "".join(texts)


def end_tokens(tokenizer: Any, generation_config: Any) -> list[int]:
    """Ids that end an answer: the tokenizer's, the generation config's, and known turn ends it has as
    tokens.
    """
    ids: set[int] = set()
    for value in (tokenizer.eos_token_id, getattr(generation_config, "eos_token_id", None)):
        ids |= {value} if isinstance(value, int) else set(value or ())
    added = tokenizer.get_added_vocab()
    # Where a turn has channels, <|end|> ends the reasoning alone.
    ends = [token for token in _TURN_ENDS if not (token == "<|end|>" and "<|channel|>" in added)]
    return sorted(ids | {added[token] for token in ends if token in added})


class HFBackend:
    """A model in memory. Raises UserError when it cannot be loaded or its weights are incomplete."""

    kind = "hf"

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
        self.model = _load(folder, self.dtype).to(self.device).eval()
        saved = self.model.generation_config
        if self.device.type == "cpu":
            cpu_attention.use_for(self.model)
        self.end_tokens = end_tokens(self.tokenizer, saved)
        # A checkpoint's own sampling settings (repetition penalty, top-k) must not change a benchmark in
        # silence.
        self.model.generation_config = _settings()
        self.max_length = context_length(self.model.config, self.tokenizer)
        self.default_batch_size = 8 if self.device.type == "cpu" else 32
        self.parameters = sum(parameter.numel() for parameter in self.model.parameters())
        self.identity = {
            "fingerprint": folder.fingerprint,
            "dtype": str(self.dtype).removeprefix("torch."),
            "device": self.device.type,
            "attention": str(getattr(self.model.config, "_attn_implementation", "")),
        }
        pad = self.tokenizer.pad_token_id
        self._pad = pad if pad is not None else (self.end_tokens[0] if self.end_tokens else 0)
        self._likelihood: Any = None

    def encode(self, text: str, *, special_tokens: bool) -> list[int]:
        return encode(self.tokenizer, text, special_tokens=special_tokens) or [self._pad]

    def template(self) -> str | None:
        found: str | None = self.tokenizer.chat_template if has_chat_template(self.tokenizer) else None
        return found

    def render(self, messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
        return render_chat(self.tokenizer, messages, add_generation_prompt)

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
        width = max(len(prompt.tokens) for prompt in prompts)
        ids = torch.full((len(prompts), width), self._pad, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt.tokens) :] = torch.tensor(prompt.tokens)
            mask[row, width - len(prompt.tokens) :] = 1
        sampled = settings.temperature > 0
        options: dict[str, Any] = {"do_sample": sampled}
        if sampled:
            torch.manual_seed(settings.seed)
            options |= {"temperature": settings.temperature, "top_p": settings.top_p, "top_k": settings.top_k}
        config = _settings(
            max_new_tokens=settings.max_new_tokens,
            eos_token_id=self.end_tokens or None,
            pad_token_id=self._pad,
            use_cache=True,
            **options,
        )
        criteria = transformers.StoppingCriteriaList()
        if settings.stop:
            criteria.append(_StopStrings(self.tokenizer, settings, prompts, width))
        output = self.model.generate(
            input_ids=ids.to(self.device),
            attention_mask=mask.to(self.device),
            generation_config=config,
            stopping_criteria=criteria,
        )
        answers = output[:, width:].tolist()
        return [self._finished(row, settings, prompt) for row, prompt in zip(answers, prompts, strict=True)]

    def _finished(self, tokens: list[int], settings: GenerationSettings, prompt: Prompt) -> Generation:
        ends = [place for place, token in enumerate(tokens) if token in self.end_tokens]
        finish = "stop" if ends else "length"
        tokens = tokens[: ends[0]] if ends else tokens
        while tokens and not ends and tokens[-1] == self._pad:
            tokens = tokens[:-1]
        text = decode(self.tokenizer, tokens, settings.reasoning)
        before = cut_at_stop(text, settings, prompt.opened)
        if before is not None:
            text, finish = before, "stop"
        if not ends and len(tokens) < settings.max_new_tokens:
            finish = "stop"
        return Generation(text, len(tokens), finish)

    def likelihood_model(self, batch_size: int) -> Any:
        """lm-eval's own model around the same weights, for tasks that rank choices."""
        if self._likelihood is None:
            from lm_eval.models.huggingface import HFLM

            logging.getLogger("lm_eval").setLevel(logging.ERROR)
            tokenizer = copy.deepcopy(self.tokenizer)
            if tokenizer.eos_token_id is None:
                tokenizer.eos_token = tokenizer.convert_ids_to_tokens(self._pad)
            self._likelihood = HFLM(
                pretrained=self.model, tokenizer=tokenizer, batch_size=batch_size, max_length=self.max_length
            )
        return self._likelihood


class _StopStrings(transformers.StoppingCriteria):
    """Ends a row once a stop string appears in its new text, outside reasoning."""

    def __init__(self, tokenizer: Any, settings: GenerationSettings, prompts: Sequence[Prompt], width: int) -> None:
        self.tokenizer, self.settings, self.prompts, self.width = tokenizer, settings, prompts, width
        self.tail = max(len(text) for text in settings.stop) + 4
        self.done = [False] * len(prompts)

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        start = max(self.width, input_ids.shape[1] - self.tail)
        waiting = [row for row, done in enumerate(self.done) if not done]
        texts = self.tokenizer.batch_decode(
            input_ids[waiting, start:], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        for row, text in zip(waiting, texts, strict=True):
            found = any(stop in text for stop in self.settings.stop)
            if found and self.settings.reasoning:
                whole = decode(self.tokenizer, input_ids[row, self.width :].tolist(), self.settings.reasoning)
                found = cut_at_stop(whole, self.settings, self.prompts[row].opened) is not None
            self.done[row] = found
        return torch.tensor(self.done, device=input_ids.device)


def _settings(**options: Any) -> Any:
    make: Any = transformers.GenerationConfig
    return make(**options)


def has_chat_template(tokenizer: Any) -> bool:
    return bool(getattr(tokenizer, "chat_template", None))


def render_chat(tokenizer: Any, messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
    """A conversation as text. Templates without a system role get the system text in the first user turn."""
    import jinja2

    def apply(turns: list[dict[str, str]]) -> str:
        text: str = tokenizer.apply_chat_template(
            turns,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        return text

    try:
        return apply(messages)
    except jinja2.TemplateError as error:
        if messages and messages[0]["role"] == "system" and len(messages) > 1:
            first = {"role": "user", "content": f"{messages[0]['content']}\n\n{messages[1]['content']}"}
            return apply([first, *messages[2:]])
        raise UserError(
            "chat template",
            expected="a template that renders user and assistant turns",
            got=_first_line(error),
            fix="Give --chat-template FILE, or --chat-template off.",
        ) from error


def _load(folder: ModelFolder, dtype: torch.dtype) -> Any:
    try:
        loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
            folder.weights, dtype=dtype, local_files_only=True, output_loading_info=True
        )
        model, info = loaded
    except Exception as error:
        raise UserError(
            f"model {folder.weights}",
            expected="a causal language model that transformers can load",
            got=_first_line(error),
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

        rows = _vocabulary_of(folder.adapter)
        if rows not in (None, model.get_input_embeddings().weight.shape[0]):
            model.resize_token_embeddings(rows, mean_resizing=False)
        adapted: Any = peft.PeftModel.from_pretrained(model, str(folder.adapter))
        return adapted if adapted.active_peft_config.is_prompt_learning else adapted.merge_and_unload()
    except Exception as error:
        raise UserError(
            f"adapter {folder.adapter}",
            expected=f"a PEFT adapter that fits {folder.weights}",
            got=_first_line(error),
            fix="Check base_model_name_or_path, and that peft is installed.",
        ) from error


def _vocabulary_of(adapter: Path) -> int | None:
    """Rows of the embeddings that an adapter was saved with, because its training added tokens; else None."""
    from safetensors import safe_open

    path = adapter / "adapter_model.safetensors"
    if not path.is_file():
        return None
    with safe_open(path, "pt") as file:
        shapes = [
            file.get_slice(key).get_shape()
            for key in file.keys()  # noqa: SIM118
            if "lora" not in key and ("embed_tokens" in key or "wte" in key or "lm_head" in key or "embed_in" in key)
        ]
    return next((shape[0] for shape in shapes if len(shape) == 2), None)


def _first_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:240]}"
