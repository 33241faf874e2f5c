"""The vLLM adapter against a stand-in for the package, which needs a GPU and an environment of its own."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from dskd_eval import models
from dskd_eval.backends.base import GenerationSettings, Prompt


class Engine:
    """Records what it is asked and answers in order, the second answer without an end."""

    def __init__(self, **options: Any) -> None:
        self.options = options

    def generate(self, prompts: list[dict[str, Any]], sampling: Any, **options: Any) -> list[Any]:
        self.asked, self.sampling, self.call = prompts, sampling, options
        return [
            SimpleNamespace(outputs=[SimpleNamespace(text=f"t{n}", token_ids=[1] * (n + 1), finish_reason=reason)])
            for n, (_, reason) in enumerate(zip(prompts, ["stop", "length"], strict=False))
        ]


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch, tiny_model: Path) -> Any:
    vllm = ModuleType("vllm")
    vllm.LLM = Engine  # type: ignore[attr-defined]
    vllm.SamplingParams = lambda **options: options  # type: ignore[attr-defined]
    vllm.__version__ = "0.0"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    from dskd_eval.backends.vllm import VLLMBackend

    return VLLMBackend(models.locate(models.parse_model(str(tiny_model))), dtype="bfloat16", seed=3)


def test_prompts_settings_and_answers_are_passed_on(backend: Any, tiny_model: Path) -> None:
    prompts = [Prompt(text, backend.encode(text, special_tokens=True), {}) for text in ("ab", "c")]
    greedy = backend.generate(prompts, GenerationSettings(7, stop=("\n",), seed=9))
    assert [(g.text, g.new_tokens, g.finish) for g in greedy] == [("t0", 1, "stop"), ("t1", 2, "length")]
    assert backend.engine.asked == [{"prompt_token_ids": prompt.tokens} for prompt in prompts]
    assert backend.engine.sampling == {
        "max_tokens": 7, "stop": ["\n"], "stop_token_ids": backend.end_tokens, "temperature": 0.0, "top_p": 1.0,
        "top_k": -1, "seed": None,
    }  # fmt: skip
    backend.generate(prompts, GenerationSettings(7, temperature=0.8, top_p=0.95, seed=9))
    assert backend.engine.sampling["seed"] == 9 and backend.engine.sampling["stop"] is None
    assert backend.engine.options["model"] == str(tiny_model.resolve())
    assert backend.engine.options["max_model_len"] == backend.max_length == 4096


def test_stop_strings_within_reasoning_do_not_end_an_answer(backend: Any) -> None:
    text = "<think>x\ny</think>4\n5"
    tokens = backend.encode(text, special_tokens=False)
    item = SimpleNamespace(text=text, token_ids=tokens, finish_reason="length")
    asked: list[Any] = []

    def generate(prompts: Any, sampling: Any, **_: Any) -> list[Any]:
        asked.append(sampling["stop"])
        return [SimpleNamespace(outputs=[item])]

    backend.engine.generate = generate
    settings = GenerationSettings(40, stop=("\n",), reasoning=(("<think>", "</think>"),))
    found = backend.generate([Prompt("q", [1], {})], settings)[0]
    assert (found.text, found.finish) == ("<think>x\ny</think>4", "stop")
    assert asked == [None]


def test_identity_differs_from_other_backends(backend: Any, tiny_model: Path) -> None:
    from dskd_eval.backends.hf import HFBackend

    other = HFBackend(models.locate(models.parse_model(str(tiny_model))), dtype="bfloat16", device="cpu")
    assert backend.identity != other.identity
    assert backend.identity["fingerprint"] == other.identity["fingerprint"]
    assert backend.render([{"role": "user", "content": "x"}], True) == other.render(
        [{"role": "user", "content": "x"}], True
    )


def test_tasks_that_rank_choices_are_refused(backend: Any) -> None:
    with pytest.raises(ValueError, match="--backend hf"):
        backend.likelihood_model(1)
