"""Generation with transformers: any causal language model folder, with or without a PEFT adapter."""

from __future__ import annotations

import contextlib
import copy
import inspect
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from dskd_eval import templates
from dskd_eval.backends import cpu_attention
from dskd_eval.backends.base import Generation, GenerationSettings, Prompt, Told, cut_at_stop, tell_nobody
from dskd_eval.errors import UserError
from dskd_eval.models import ModelFolder
from dskd_eval.reasoning import Pair

DTYPES = ("auto", "float32", "bfloat16", "float16")
# Ends of turn of models that show none: with a template, such a token may stand inside an answer.
_TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<|end|>", "<end_of_turn>")
_DOCUMENT_ENDS = ("<|endoftext|>", "<|end_of_text|>", "</s>")


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
    """The tokenizer of a model; `chat_template` (text) replaces the template that the model or its recipe names.

    The template is one text. It stays a table of several only where none of them is the default.
    """
    tokenizer = _tokenizer(folder.tokenizer)
    if folder.adapter is not None and folder.tokenizer == folder.weights:
        tokenizer.chat_template = templates.in_folder(folder.adapter) or tokenizer.chat_template
    elif folder.adapter is not None and not tokenizer.chat_template:
        with contextlib.suppress(UserError):  # the weights need no tokenizer of their own
            tokenizer.chat_template = _tokenizer(folder.weights).chat_template
    if chat_template is None:
        found = templates.chosen(folder.ref.chat_template, tokenizer.chat_template, f"chat template of {folder.name}")
        chat_template = templates.one(found) or found  # type: ignore[assignment]
    tokenizer.chat_template = chat_template
    return tokenizer


def _tokenizer(folder: Path) -> Any:
    try:
        return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        raise UserError(
            f"model {folder}",
            expected="a tokenizer that transformers can load",
            got=_first_line(error),
            fix="Save the tokenizer into the folder.",
        ) from error


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


def decode(tokenizer: Any, tokens: Sequence[int], markers: Sequence[Pair] = (), before: Sequence[int] = ()) -> str:
    """The text of an answer without special tokens, but for those that are or make up reasoning markers.

    before: the token that the text follows.
    """
    special = {place: str(token) for place, token in tokenizer.added_tokens_decoder.items() if token.special}
    kept = {
        place: text for place, text in special.items() if any(text in marker for pair in markers for marker in pair)
    }
    before = [token for token in before if token not in special]
    texts, begin = [], 0
    for end in [*(place for place, token in enumerate(tokens) if token in kept), len(tokens)]:
        part = [token for token in tokens[begin:end] if token not in special]
        texts.append(_text_after(tokenizer, before, part))
        texts += [kept[tokens[end]]] if end < len(tokens) else []
        before = list(tokens[end : end + 1])
        begin = end + 1
    return "".join(texts)


def _text_after(tokenizer: Any, before: Sequence[int], tokens: Sequence[int]) -> str:
    """The text of tokens behind others: SentencePiece takes the first space from what it decodes."""

    def text_of(ids: Sequence[int], skip: bool) -> str:
        text: str = tokenizer.decode(list(ids), skip_special_tokens=skip, clean_up_tokenization_spaces=False)
        return text

    start = text_of(before, False) if before else ""
    whole = text_of([*before, *tokens], False) if before else ""
    return whole[len(start) :] if before and whole.startswith(start) else text_of(tokens, True)


def end_tokens(folder: ModelFolder, tokenizer: Any) -> list[int]:
    """Ids that end an answer: the tokenizer's, those of generation_config.json, the end of turn of the chat template.

    A token that ends a document counts wherever the tokenizer has it; a known end of turn where no template shows one.
    """
    try:
        listed = transformers.GenerationConfig.from_pretrained(folder.ends, local_files_only=True).eos_token_id
    except OSError:
        listed = None
    settings = folder.config.get("text_config") or folder.config
    listed = settings.get("eos_token_id") if listed is None else listed
    ids: set[int] = set()
    for value in (tokenizer.eos_token_id, listed, _turn_end(tokenizer, dict(folder.ref.template_options))):
        ids |= {value} if isinstance(value, int) else set(value or ())
    added = tokenizer.get_added_vocab()
    known: tuple[str, ...] = _DOCUMENT_ENDS if has_chat_template(tokenizer) else _DOCUMENT_ENDS + _TURN_ENDS
    # Where a turn has channels, <|end|> ends the reasoning alone.
    known = tuple(token for token in known if not (token == "<|end|>" and "<|channel|>" in added))
    return sorted(ids | {added[token] for token in known if token in added})


def _turn_end(tokenizer: Any, options: dict[str, Any]) -> int | None:
    """The first special, else added, token that the chat template writes after an answer."""
    if not isinstance(tokenizer.chat_template, str):
        return None
    answer = "Quebec"
    turns = [{"role": "user", "content": "Zulu?"}, {"role": "assistant", "content": answer}]
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False, **options)
    except Exception:  # whatever a template raises: told where a prompt is rendered
        return None
    _, found, after = text.rpartition(answer)
    if not found:
        return None
    ids = tokenizer(after, add_special_tokens=False)["input_ids"]
    special = set(tokenizer.all_special_ids)
    added = set(tokenizer.get_added_vocab().values())
    following = [*(token for token in ids if token in special), *(token for token in ids if token in added)]
    return int(following[0]) if following else None


class HFBackend:
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
        self.model = _load(folder, self.dtype).to(self.device).eval()
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
        self.identity: Mapping[str, Any] = {
            "fingerprint": folder.fingerprint,
            "dtype": str(self.dtype).removeprefix("torch."),
            "device": self.device.type,
            "attention": str(getattr(self.model.config, "_attn_implementation", "")),
        }
        pad = self.tokenizer.pad_token_id
        self._pad = pad if pad is not None else (self.end_tokens[0] if self.end_tokens else 0)
        self._likelihood: Any = None
        # Families that keep no such cache (Mamba), and prompts learned by PEFT, answer the whole batch in one go.
        self._narrows = "past_key_values" in inspect.signature(self.model.forward).parameters

    def encode(self, text: str, *, special_tokens: bool) -> list[int]:
        return encode(self.tokenizer, text, special_tokens=special_tokens) or [self._pad]

    def template(self) -> str | None:
        found: str | None = self.tokenizer.chat_template if has_chat_template(self.tokenizer) else None
        return found

    def render(self, messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
        return render_chat(self.tokenizer, messages, add_generation_prompt, self.template_options)

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
            draw = _processors(settings, asked, width)
            ids, cache = self._write(ids, mask, width + settings.max_new_tokens, cache, watch, draw)
            cut = ids.shape[1] - width >= settings.max_new_tokens
            gone = [done or cut for done in watch.done]
            for row, tokens, leaves in zip(waiting, ids[:, width:].tolist(), gone, strict=True):
                if leaves:
                    found[row] = self._finished(tokens, settings, prompts[row])
            self.told(0, sum(gone) - sum(watch.done))
            waiting = [row for row, leaves in zip(waiting, gone, strict=True) if not leaves]
            stay: Any = torch.tensor(
                [place for place, leaves in enumerate(gone) if not leaves], device=ids.device
            ).long()
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
        self, ids: torch.Tensor, mask: torch.Tensor, limit: int, cache: Any, watch: _Leaving, draw: Any
    ) -> tuple[torch.Tensor, Any]:
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

    def likelihood_model(self, batch_size: int) -> Any:
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
        tokenizer: Any,
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

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
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


def _processors(settings: GenerationSettings, prompts: Sequence[Prompt], width: int) -> Any:
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


def _settings(**options: Any) -> Any:
    make: Any = transformers.GenerationConfig
    return make(**options)


def has_chat_template(tokenizer: Any) -> bool:
    return bool(getattr(tokenizer, "chat_template", None))


def render_chat(
    tokenizer: Any, messages: list[dict[str, str]], add_generation_prompt: bool, options: Mapping[str, Any]
) -> str:
    """A conversation as text. Templates without a system role get the system text in the first user turn.

    options: variables of the template.
    """
    import jinja2

    def apply(turns: list[dict[str, str]]) -> str:
        text: str = tokenizer.apply_chat_template(
            turns,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
            **options,
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

        _prepare(model, _shapes(folder.adapter))
        adapted: Any = peft.PeftModel.from_pretrained(model, str(folder.adapter))
        return adapted if adapted.active_peft_config.is_prompt_learning else adapted.merge_and_unload()
    except Exception as error:
        raise UserError(
            f"adapter {folder.adapter}",
            expected=f"a PEFT adapter that fits {folder.weights}",
            got=_first_line(error),
            fix="Check base_model_name_or_path, and that peft is installed.",
        ) from error


def _prepare(model: Any, shapes: Mapping[str, Sequence[int]]) -> None:
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


def _vocabulary_rows(model: Any, shapes: Mapping[str, Sequence[int]]) -> int | None:
    """Rows of the embeddings that an adapter was trained with, because its training added tokens; else None."""
    inputs, outputs = _name(model, model.get_input_embeddings()), _name(model, model.get_output_embeddings())
    for name, shape in shapes.items():
        for module, along in ((inputs, {"lora_embedding_A": 1}), (outputs, {"lora_B.weight": 0})):
            axes = {"weight": 0, "base_layer.weight": 0, **along}
            found = [axes[end] for end in axes if module and f".{name}".endswith(f".{module}.{end}")]
            if found and len(shape) == 2:
                return int(shape[found[0]])
    return None


def _name(model: Any, wanted: Any) -> str | None:
    return next((name for name, module in model.named_modules() if module is wanted), None)


def _shapes(adapter: Path) -> dict[str, list[int]]:
    path = adapter / "adapter_model.safetensors"
    if not path.is_file():
        tensors = torch.load(adapter / "adapter_model.bin", map_location="cpu", weights_only=True)
        return {name: list(tensor.shape) for name, tensor in tensors.items()}
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return {name: list(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


def _first_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:240]}"
