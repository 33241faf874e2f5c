"""The language model that lm-eval talks to: prompts in, answers out, each batch kept on disk as it is finished.

`EvalLM` turns lm-eval requests into batches, fits them into the model's context and looks every batch up in
the generation store. A backend only tokenizes, renders and generates.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from lm_eval.api.model import LM

from dskd_eval import reasoning
from dskd_eval.backends.base import Backend, Generation, GenerationSettings, Prompt, Told
from dskd_eval.data import content_hash
from dskd_eval.schema import GenerationInfo
from dskd_eval.store import GenerationStore

SMALLEST_ANSWER_SHARE = 4
_STEP = 32
# A batch of B rows holds at most B times as many prompt tokens, padding included.
TOKENS_PER_ROW = 2048
# A prompt is padded to at most twice its length, unless all of its batch are short.
_PADDED_AT_MOST = 2
_SHORT = 256


@dataclass
class Work:
    place: int
    prompt: Prompt
    repeat: int
    settings: GenerationSettings
    cut_tokens: int
    clamped: bool


@dataclass
class Trace:
    """What happened during one task, for its record."""

    infos: dict[tuple[int, int], GenerationInfo] = field(default_factory=dict)
    messages: dict[str, list[dict[str, str]]] = field(default_factory=dict)
    reused: int = 0


class EvalLM(LM):  # type: ignore[misc]
    """lm-eval's view of a backend.

    Batches depend only on the prompts of the task, so a run that is stopped and resumed forms the same
    batches and gives the same answers. Prompts that leave less than a quarter of the context for the answer
    lose their beginning (the start token stays); all other long prompts only shorten the answer.

    written: tokens generated so far for the task, for progress.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        batch_size: int | None = None,
        store: GenerationStore | None = None,
        markers: Sequence[reasoning.Pair] = (),
    ):
        super().__init__()
        self.markers = tuple(markers)
        self.backend = backend
        self.chunk = batch_size or backend.default_batch_size
        self.store = store
        self.on_progress: Callable[[int, int], None] = lambda done, total: None
        self.written = 0
        self.begin(seeds=(0,))

    def begin(self, seeds: tuple[int, ...]) -> Trace:
        """Start a task; the k-th answer to a prompt is drawn with the k-th seed."""
        self.seeds, self.trace, self.written = seeds, Trace(), 0
        return self.trace

    @property
    def tokenizer_name(self) -> str:
        return self.backend.name

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return self.backend.template() if chat_template else ""

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        rendered = self.backend.render(chat_history, add_generation_prompt)
        self.trace.messages[rendered] = [dict(message) for message in chat_history]
        return rendered

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        works = self.works(requests)
        batches = _batches(works, self.chunk, pads=getattr(self.backend, "pads", True))
        answers: list[str] = [""] * len(works)
        done = 0
        self.on_progress(0, len(works))
        for batch in batches:
            self.backend.told = self._listener(done, len(works))
            for work, generation in zip(batch, self._answer(batch), strict=True):
                separated = reasoning.separate(
                    generation.text, self.markers, work.prompt.opened, self._asked(work.prompt.text)
                )
                answers[work.place] = separated.answer
                request = requests[work.place]
                self.trace.infos[(request.doc_id, work.repeat)] = GenerationInfo(
                    prompt_tokens=len(work.prompt.tokens) + work.cut_tokens,
                    cut_tokens=work.cut_tokens,
                    max_new_tokens=work.settings.max_new_tokens,
                    new_tokens=generation.new_tokens,
                    finish=generation.finish,
                    clamped=work.clamped,
                    reasoning=separated.reasoning,
                    trace=separated.state,
                )
            done += len(batch)
            self.on_progress(done, len(works))
        return answers

    def _asked(self, prompt: str) -> str:
        """What a prompt says, without what its chat template adds."""
        messages = self.trace.messages.get(prompt)
        return "\n".join(str(message["content"]) for message in messages) if messages else prompt

    def _listener(self, done: int, total: int) -> Told:
        """Adds the tokens and finished answers of a batch to those before it."""

        def told(tokens: int, finished: int) -> None:
            nonlocal done
            self.written += tokens
            done = min(total, done + finished)
            self.on_progress(done, total)

        return told

    def works(self, requests: Sequence[Any]) -> list[Work]:
        seen: dict[int, int] = {}
        start = self.backend.encode("", special_tokens=True)[:1]
        encoded: dict[tuple[str, int], list[int]] = {}
        works = []
        for place, request in enumerate(requests):
            text, kwargs = request.args[0], dict(request.args[1])
            repeat = seen.get(request.doc_id, 0)
            seen[request.doc_id] = repeat + 1
            first = int(kwargs.get("keep_first_tokens") or 0)
            if (text, first) not in encoded:
                special = text not in self.trace.messages and not first
                encoded[text, first] = self.backend.encode(text, special_tokens=special)
            tokens = encoded[text, first]
            kept = tokens[:first] if first else tokens
            cut = len(tokens) - len(kept)
            wanted = int(kwargs.get("max_gen_toks") or 256)
            keep_start = text in self.trace.messages or bool(start and kept[:1] == start)
            new, tokens = fit(kept, wanted, self.backend.max_length, keep_start=keep_start)
            cut += len(kept) - len(tokens)
            sampled = bool(kwargs.get("do_sample"))
            settings = GenerationSettings(
                max_new_tokens=new,
                stop=tuple(kwargs.get("until") or ()),
                temperature=float(kwargs.get("temperature", 1.0)) if sampled else 0.0,
                top_p=float(kwargs.get("top_p", 1.0)) if sampled else 1.0,
                top_k=int(kwargs.get("top_k", 0)) if sampled else 0,
                seed=self.seeds[repeat % len(self.seeds)],
                reasoning=self.markers,
            )
            messages = self.trace.messages.get(text)
            opened = reasoning.opened_by(text, messages, self.markers)
            continues = not messages or messages[-1]["role"] == "assistant"
            prompt = Prompt(text, tokens, request.doc, opened, continues)
            works.append(Work(place, prompt, repeat, settings, cut, new < wanted))
        return works

    def _answer(self, batch: list[Work]) -> list[Generation]:
        settings = batch[0].settings
        prompts = [work.prompt for work in batch]
        shaping = asdict(settings) | {"seed": settings.seed if settings.temperature > 0 else None}
        if not settings.reasoning:
            del shaping["reasoning"]
        key = content_hash_long(
            {
                "model": dict(self.backend.identity),
                "backend": self.backend.kind,
                "settings": shaping,
                "prompts": [prompt.tokens for prompt in prompts],
            }
        )
        if self.store is not None and (kept := self.store.get(key)) is not None:
            self.trace.reused += len(kept)
            return kept
        generations = self.backend.generate(prompts, settings)
        if self.store is not None:
            self.store.put(key, generations)
        return generations

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        model = self.backend.likelihood_model(self.chunk)
        self.on_progress(0, len(requests))
        answers = model.loglikelihood(requests, disable_tqdm=True)
        self.on_progress(len(requests), len(requests))
        return answers

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        model = self.backend.likelihood_model(self.chunk)
        answers = model.loglikelihood_rolling(requests, disable_tqdm=True)
        self.on_progress(len(requests), len(requests))
        return answers


def content_hash_long(value: Any) -> str:
    """sha256 of the canonical JSON of a value; token lists make `content_hash` prefixes worth avoiding."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def message_hash(style: str, content: Any) -> str:
    """Hash of what is asked, before any chat template: equal for models whose templates differ."""
    return content_hash({"style": style, "content": content})


def fit(tokens: list[int], wanted: int, context: int, *, keep_start: bool) -> tuple[int, list[int]]:
    """Fit a prompt and its answer into a context: (new tokens, kept prompt tokens).

    The answer is shortened first, down to a quarter of the context; then the prompt loses tokens at its
    beginning, where few-shot examples stand. keep_start keeps the very first token (start of text).
    """
    room = context - len(tokens)
    if room >= wanted:
        return wanted, tokens
    least = min(wanted, max(1, context // SMALLEST_ANSWER_SHARE))
    new = max(least, room // _STEP * _STEP)
    keep = max(1, context - new)
    if len(tokens) <= keep:
        return new, tokens
    if keep_start and keep > 1:
        return new, [tokens[0], *tokens[-(keep - 1) :]]
    return new, tokens[-keep:]


def _batches(works: list[Work], size: int, *, pads: bool = True) -> list[list[Work]]:
    """Batches of equal settings and, where they are padded, of like length, longest first; the order depends on the
    prompts alone. Very long prompts come last: no other answer waits for them.
    """
    groups: dict[GenerationSettings, list[Work]] = {}
    for work in works:
        groups.setdefault(work.settings, []).append(work)
    batches: list[list[Work]] = []
    for settings in sorted(groups, key=lambda item: (item.seed, -item.max_new_tokens)):
        batch: list[Work] = []
        for work in sorted(groups[settings], key=lambda work: (-len(work.prompt.tokens), work.place)):
            if batch and not _fits(batch, work, size, pads):
                batches.append(batch)
                batch = []
            batch.append(work)
        batches.append(batch)
    return sorted(batches, key=lambda batch: pads and len(batch[0].prompt.tokens) > TOKENS_PER_ROW)


def _fits(batch: list[Work], work: Work, size: int, pads: bool) -> bool:
    """Whether a prompt, no longer than those of the batch, may join it."""
    if len(batch) >= size:
        return False
    widest = len(batch[0].prompt.tokens)
    alike = widest <= max(_SHORT, _PADDED_AT_MOST * len(work.prompt.tokens))
    return not pads or (alike and (len(batch) + 1) * widest <= size * TOKENS_PER_ROW)
