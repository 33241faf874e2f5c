"""A backend that answers from the data: the reference solutions, or one constant text.

It shows that a task can be solved: references must score 100, a constant its known floor.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import NoReturn

from dskd_eval.backends.base import Generation, GenerationSettings, Prompt, Told, tell_nobody
from dskd_eval.data import Row
from dskd_eval.tasks import planning
from dskd_eval.tasks.right_answers import reference_answer

_TEMPLATE = "{role}: {content}"


class OracleBackend:
    """Answers every prompt with the reference of its row, or with `constant`. Tokens are characters' code points.

    answer: the reference of a row, where the plan does not tell it (tasks that lm-eval scores).
    """

    kind = "oracle"
    pads = False
    told: Told = staticmethod(tell_nobody)
    default_batch_size = 256

    def __init__(
        self,
        plan: planning.Plan,
        *,
        constant: str | None = None,
        max_length: int = 1 << 30,
        answer: Callable[[Row], str] | None = None,
    ) -> None:
        self.answer = answer or functools.partial(reference_answer, plan)
        self.plan, self.constant, self.max_length = plan, constant, max_length
        self.name = "oracle" if constant is None else "constant"
        self.identity: Mapping[str, object] = {"fingerprint": self.name, "constant": constant}

    def encode(self, text: str, *, special_tokens: bool) -> list[int]:
        return [ord(letter) for letter in text]

    def render(self, messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
        return "\n".join(_TEMPLATE.format(**message) for message in messages) + "\nassistant: "

    def template(self) -> str | None:
        return _TEMPLATE

    def generate(self, prompts: Sequence[Prompt], settings: GenerationSettings) -> list[Generation]:
        texts = [self.answer(prompt.row) if self.constant is None else self.constant for prompt in prompts]
        return [Generation(text, len(text), "stop") for text in texts]

    def likelihood_model(self, batch_size: int) -> NoReturn:
        raise NotImplementedError("an oracle has no likelihoods")
