"""A task as it will run for one model: style, protocol, shots, number of samples and generation settings."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

from pydantic import JsonValue

from dskd_eval.data import content_hash
from dskd_eval.schema import TaskRecord
from dskd_eval.tasks.spec import Block, GenerationKwargs, TaskSpec, block_of

PASS_AT_K = (1, 5, 10, 25, 50, 100)


@dataclass(frozen=True)
class Plan:
    """A task as it will run for one model: every setting that shapes a prompt or an answer."""

    spec: TaskSpec
    style: str
    protocol: str
    config: Mapping[str, object]
    shots: int
    generation: GenerationKwargs
    seeds: tuple[int, ...]
    metrics: tuple[str, ...]

    @property
    def primary(self) -> str:
        return self.metrics[0]

    def record(self) -> TaskRecord:
        return TaskRecord(
            task=self.spec.name,
            version=self.spec.version,
            suite=self.spec.suite,
            summary=self.spec.summary,
            primary_metric=self.primary,
            metrics=list(self.metrics),
            scorer=self.spec.scorer or "lm-eval metrics",
            style=self.style,
            protocol=self.protocol,
            shots=self.shots,
            prompt=_text_of(self.config.get("doc_to_text")),
            generation=dict(self.generation),
            seeds=list(self.seeds),
            floor=cast(dict[str, JsonValue], self.spec.floor),  # as YAML has it
        )


def _text_of(template: object) -> str | int | None:
    if isinstance(template, (str, int, type(None))):
        return template
    return str(getattr(template, "__name__", "function"))


def plan(
    spec: TaskSpec,
    *,
    chat: bool,
    protocol: str = "default",
    num_fewshot: int | None = None,
    samples: int = 1,
    temperature: float | None = None,
    seed: int = 0,
    max_new_tokens: int | None = None,
) -> Plan:
    """Settle a task for one model.

    chat: whether the chat template is used. protocol: 'default', or a published one; a task without it runs
    its default. samples: answers per prompt of tasks that execute code (pass@k); above 1 they are sampled.
    max_new_tokens: the limit of an answer in place of the task's.
    """
    published = spec.protocols.get(protocol) if protocol != "default" else None
    style = "chat" if chat else "base"
    overrides: Block = {}
    if published is not None:
        style = str(published.get("style", style))
        overrides = {key: value for key, value in published.items() if key not in ("style", "seeds")}
    config = {**spec.config, **spec.styles.get(style, {}), **overrides}
    generation: GenerationKwargs = {"until": [], "max_gen_toks": 256, "do_sample": False}
    for block in (spec.config, spec.styles.get(style, {}), overrides):
        generation.update(cast(GenerationKwargs, block_of(block, "generation_kwargs")))  # checked by `load`
    if max_new_tokens is not None:
        generation["max_gen_toks"] = max_new_tokens
    seeds: tuple[int, ...] = (seed,)
    if published is not None:
        own_seeds = published.get("seeds")
        seeds = tuple(own_seeds) if isinstance(own_seeds, list) and own_seeds else seeds
    metrics = spec.metrics
    if spec.executes_code and samples > 1:
        seeds = tuple(seed + index for index in range(samples))
        sampled = 0.8 if temperature is None else temperature
        generation.update({"do_sample": True, "temperature": sampled, "top_p": 0.95, "top_k": 0})
        extra = [f"pass@{k}" for k in sorted({*PASS_AT_K, samples}) if 1 < k <= samples]
        metrics = (metrics[0], *extra, *metrics[1:])
    fewshot = config.get("num_fewshot")
    shots = fewshot if isinstance(fewshot, int) else 0
    if num_fewshot is not None and spec.takes_shots:
        shots = num_fewshot
    return Plan(
        spec=spec,
        style=style,
        protocol=protocol if published is not None else "default",
        config=config | {"num_fewshot": shots, "generation_kwargs": generation},
        shots=shots,
        generation=generation,
        seeds=seeds,
        metrics=metrics,
    )


def digest(plan_: Plan) -> str:
    """Hash of everything in a plan that shapes prompts, answers and scores."""
    facts: Block = {**plan_.record().plain()}
    facts |= {"config": {key: repr(value) for key, value in plan_.config.items()}, "code": dict(plan_.spec.code)}
    return content_hash(_without_addresses(facts))


def _without_addresses(value: object) -> object:
    if isinstance(value, dict):
        return {key: _without_addresses(item) for key, item in value.items()}
    return re.sub(r" at 0x[0-9a-f]+", "", value) if isinstance(value, str) else value
