"""What a backend takes and gives: prompts with settings in, generations out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from dskd_eval import reasoning
from dskd_eval.data import Row

Told = Callable[[int, int], None]  # tokens and finished answers since the last call


def tell_nobody(tokens: int, finished: int) -> None:
    """A listener to generation that does nothing."""


@dataclass(frozen=True)
class GenerationSettings:
    """How answers are drawn. temperature 0 is greedy; top_k 0 and top_p 1 are off.

    A sampled answer depends on the seed and its prompt, not on what else is in the batch.
    reasoning: pairs of markers; stop strings count only outside the traces between them.
    """

    max_new_tokens: int
    stop: tuple[str, ...] = ()
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    reasoning: tuple[reasoning.Pair, ...] = ()


@dataclass(frozen=True)
class Prompt:
    """One prompt; `row` is the document it was made from, `opened` the reasoning trace that it has begun.

    continues: whether the answer goes on with the prompt's text, so that its first space counts.
    """

    text: str
    tokens: list[int]
    row: Row
    opened: reasoning.Pair | None = None
    continues: bool = True

    @property
    def before(self) -> list[int]:
        """The token that the answer's text follows."""
        return self.tokens[-1:] if self.continues else []


@dataclass(frozen=True)
class Generation:
    """What a model wrote, reasoning included. finish: 'stop' (end token or stop string) or 'length' (ran into
    max_new_tokens).
    """

    text: str
    new_tokens: int
    finish: str


def cut_at_stop(text: str, settings: GenerationSettings, opened: reasoning.Pair | None = None) -> str | None:
    """The text before the first stop string outside reasoning; None without one."""
    begin = reasoning.answer_start(text, settings.reasoning, opened) if settings.reasoning else 0
    if begin is None:
        return None
    found = [place for stop in settings.stop if (place := text.find(stop, begin)) >= 0]
    return text[: min(found)] if found else None


class LikelihoodModel(Protocol):
    """A model as lm-eval has it, for tasks that rank choices; requests are lm-eval's."""

    def loglikelihood(self, requests: list[object], disable_tqdm: bool = False) -> list[tuple[float, bool]]: ...
    def loglikelihood_rolling(self, requests: list[object], disable_tqdm: bool = False) -> list[float]: ...


class Backend(Protocol):
    """What EvalLM needs of a model.

    pads: whether the prompts of a batch are padded to one length. told: called while answers are generated.
    """

    kind: str
    pads: bool
    told: Told
    name: str
    identity: Mapping[str, object]
    max_length: int
    default_batch_size: int

    def encode(self, text: str, *, special_tokens: bool) -> list[int]: ...
    def render(self, messages: list[dict[str, str]], add_generation_prompt: bool) -> str: ...
    def template(self) -> str | None: ...
    def generate(self, prompts: Sequence[Prompt], settings: GenerationSettings) -> list[Generation]: ...
    def likelihood_model(self, batch_size: int) -> LikelihoodModel: ...
