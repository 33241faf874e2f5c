"""A whole evaluation before anything is loaded: options, data, packages, sandbox, models and tasks, checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dskd_eval import models, reasoning, sandbox, task_checks
from dskd_eval.entries import template_notes
from dskd_eval.errors import UserError
from dskd_eval.models import ModelFolder, ModelRef
from dskd_eval.schema import SCHEMA_VERSION, Identity, ModelIdentity, Settings, TaskIdentity
from dskd_eval.tasks import planning
from dskd_eval.tasks import rows as task_rows
from dskd_eval.tasks.planning import Plan
from dskd_eval.tasks.rows import TaskData
from dskd_eval.tasks.spec import TaskSpec


@dataclass
class Prepared:
    """A checked evaluation. `plans` holds, per model, one plan per task."""

    settings: Settings
    folders: list[ModelFolder]
    plans: dict[str, list[Plan]]
    data: dict[str, TaskData]
    sandbox: sandbox.Sandbox | None
    templates: dict[str, str | None]
    notes: list[str] = field(default_factory=list)
    markers: dict[str, tuple[reasoning.Pair, ...]] = field(default_factory=dict)

    def identity(self) -> Identity:
        """What --resume compares."""
        tasks = {}
        for plans in self.plans.values():
            for plan in plans:
                name = plan.spec.name
                tasks[name] = TaskIdentity(plan=planning.digest(plan), data=_digest(self.data[name]))
        return Identity(
            schema_version=SCHEMA_VERSION,
            settings=self.settings.complete(),
            models=[ModelIdentity(name=folder.name, fingerprint=folder.fingerprint) for folder in self.folders],
            tasks=tasks,
        )


def _digest(data: TaskData) -> str | None:
    return data.test.digest if data.test else None


def prepare(
    refs: list[ModelRef],
    specs: list[TaskSpec],
    settings: Settings,
    directory: Path | None,
    *,
    execute: bool = True,
) -> Prepared:
    """Check options, data, packages, sandbox and models; loads tokenizers but no weights. Raises UserError.

    execute False (dry run) needs no sandbox.
    """
    from dskd_eval.backends import hf

    if not refs:
        raise UserError("--model", expected="at least one model", got="none", fix="Add --model PATH or --recipe FILE.")
    notes = _check_settings(settings, specs)
    reasoning.choose(settings.reasoning, ())
    if settings.backend == "vllm":
        from dskd_eval.backends import vllm as vllm_backend

        vllm_backend.require()
    else:
        hf.choose_device(settings.device)
    data = {}
    for spec in specs:
        data[spec.name] = task_rows.load_data(spec, directory, settings.num_fewshot)
        task_checks.check_needs(spec, directory)
        for loaded in (data[spec.name].test, data[spec.name].shots):
            if loaded and loaded.note:
                notes.append(f"{spec.name}: {loaded.note}")
    box = None
    if execute and any(spec.executes_code for spec in specs):
        box = sandbox.choose(unsafe=settings.unsafe_code)
        if box.backend == "none":
            notes.append("generated programs run WITHOUT a sandbox (--unsafe-code)")
    folders = [models.locate(ref) for ref in models.distinct(refs)]
    plans: dict[str, list[Plan]] = {}
    templates: dict[str, str | None] = {}
    markers: dict[str, tuple[reasoning.Pair, ...]] = {}
    for folder in folders:
        templates[folder.name], markers[folder.name] = _how_asked(folder, settings)
        plans[folder.name] = [
            planning.plan(
                spec,
                chat=templates[folder.name] is not None,
                protocol=settings.protocol,
                num_fewshot=settings.num_fewshot,
                samples=settings.samples,
                temperature=settings.temperature,
                seed=settings.seed,
                max_new_tokens=settings.max_new_tokens,
            )
            for spec in specs
        ]
    for plan in _distinct(plans):
        if plan.spec.own:
            seen = task_checks.check_task(plan, data[plan.spec.name])
            notes += [note for note in seen if note not in notes]
            task_checks.check_references(plan, data[plan.spec.name])
    notes += template_notes({name: template is not None for name, template in templates.items()})
    return Prepared(settings, folders, plans, data, box, templates, notes, markers)


def _how_asked(folder: ModelFolder, settings: Settings) -> tuple[str | None, tuple[reasoning.Pair, ...]]:
    """The chat template that a model is asked in, None for plain text, and the markers of its reasoning."""
    from dskd_eval import templates as chat_templates
    from dskd_eval.backends import tokenizers

    given = settings.given_template
    tokenizer = tokenizers.load_tokenizer(folder, given)
    known = [tokenizer.chat_template, tokenizers.load_tokenizer(folder).chat_template if given else None]
    markers = reasoning.choose(settings.reasoning, [str(text) for text in known if text])
    chat = tokenizers.has_chat_template(tokenizer)
    if settings.chat_template == "on" and not chat:
        raise UserError(
            f"--chat-template on, model {folder.name}",
            expected="a tokenizer with a chat template",
            got="none",
            fix="Give --chat-template FILE, or leave it to auto.",
        )
    if settings.chat_template == "off" or not chat:
        return None, markers
    chat_templates.check_default(f"model {folder.name}", tokenizer.chat_template)
    return tokenizer.chat_template, markers


def _distinct(plans: Mapping[str, Sequence[Plan]]) -> list[Plan]:
    """One plan per task and style: models of one style are asked the same."""
    found: dict[tuple[str, str], Plan] = {}
    for of_model in plans.values():
        for plan in of_model:
            found[plan.spec.name, plan.style] = plan
    return list(found.values())


def _check_settings(settings: Settings, specs: list[TaskSpec]) -> list[str]:
    """Settings without effect are errors, settings without effect on a part are notes."""
    notes = []
    if settings.samples > 1 or settings.temperature is not None:
        if not any(spec.executes_code for spec in specs):
            raise UserError(
                "--samples/--temperature",
                expected="a task that executes code (pass@k)",
                got="none among " + ", ".join(spec.name for spec in specs),
                fix="Leave it out, or add --suite code.",
            )
        if settings.samples == 1:
            raise UserError(
                "--temperature",
                expected="--samples of 2 or more",
                got="one greedy answer",
                fix="Add --samples 10.",
            )
        if not all(spec.executes_code for spec in specs):
            notes.append(f"--samples {settings.samples} applies to the code tasks; the others are answered once")
    if settings.num_fewshot is not None:
        fixed = [spec.name for spec in specs if not spec.takes_shots]
        if len(fixed) == len(specs):
            raise UserError(
                "--num-fewshot",
                expected="a task with rows for shots (gsm8k, mbpp)",
                got=", ".join(fixed),
                fix="Leave it out.",
            )
        if fixed:
            notes.append(f"--num-fewshot has no effect on {', '.join(fixed)}")
    if settings.max_new_tokens is not None:
        ranked = [spec.name for spec in specs if spec.config.get("output_type", "generate_until") != "generate_until"]
        if len(ranked) == len(specs):
            raise UserError(
                "--max-new-tokens",
                expected="a task that generates text",
                got=", ".join(ranked) + ", which rank choices",
                fix="Leave it out.",
            )
        if ranked:
            notes.append(f"--max-new-tokens has no effect on {', '.join(ranked)}")
    if settings.protocol != "default":
        without = [spec.name for spec in specs if settings.protocol not in spec.protocols]
        if len(without) == len(specs):
            raise UserError(
                f"--protocol {settings.protocol}",
                expected="a task with that protocol (dolly, self_instruct, vicuna, s_ni, unni)",
                got=", ".join(without),
                fix="Leave it out, or add --suite instruct.",
            )
        if without:
            notes.append(f"--protocol {settings.protocol} has no effect on {', '.join(without)}")
    return notes
