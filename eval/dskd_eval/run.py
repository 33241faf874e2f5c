"""A whole evaluation: checks before anything is loaded, then every task of every model, each saved as it is
done.
"""

from __future__ import annotations

import gc
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from time import monotonic
from typing import Protocol

from dskd_eval import comparison, models, reasoning, records, report, runner, sandbox, stats
from dskd_eval.data import content_hash
from dskd_eval.errors import UserError
from dskd_eval.lm import Backend, EvalLM, GenerationStore
from dskd_eval.models import ModelFolder, ModelRef
from dskd_eval.schema import (
    SCHEMA_VERSION,
    Comparison,
    Identity,
    LoadedModel,
    ModelIdentity,
    ModelRecord,
    ModelTemplate,
    Part,
    PartTimes,
    Results,
    Score,
    Settings,
    SuiteScore,
    TaskIdentity,
    TaskScore,
    TaskTimes,
    Times,
)
from dskd_eval.scorers import registry
from dskd_eval.tasks import planning, selection
from dskd_eval.tasks.planning import Plan
from dskd_eval.tasks.spec import TaskSpec

BACKENDS = ("hf", "vllm")
PROTOCOLS = ("default", "paper")


class Watcher(Protocol):
    """Where progress goes."""

    def model(self, name: str, number: int, total: int) -> None: ...
    def task(self, model: str, task: str, number: int, total: int) -> None: ...
    def step(self, what: str, done: int, total: int) -> None: ...
    def finished(self, model: str, task: str, score: TaskScore, seconds: float, kept: bool) -> None: ...
    def failed(self, model: str, task: str, message: str) -> None: ...
    def note(self, message: str) -> None: ...


@dataclass
class Prepared:
    """A checked evaluation. `plans` holds, per model, one plan per task."""

    settings: Settings
    folders: list[ModelFolder]
    plans: dict[str, list[Plan]]
    data: dict[str, runner.TaskData]
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


def _digest(data: runner.TaskData) -> str | None:
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
    from dskd_eval import templates as chat_templates
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
        data[spec.name] = runner.load_data(spec, directory, settings.num_fewshot)
        runner.check_needs(spec, directory)
        notes += [
            f"{spec.name}: {loaded.note}" for loaded in (data[spec.name].test, data[spec.name].shots)
            if loaded and loaded.note
        ]  # fmt: skip
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
        given = settings.given_template
        tokenizer = hf.load_tokenizer(folder, given)
        known = [tokenizer.chat_template, hf.load_tokenizer(folder).chat_template if given else None]
        markers[folder.name] = reasoning.choose(settings.reasoning, [str(text) for text in known if text])
        chat = hf.has_chat_template(tokenizer)
        if settings.chat_template == "on" and not chat:
            raise UserError(
                f"--chat-template on, model {folder.name}",
                expected="a tokenizer with a chat template",
                got="none",
                fix="Give --chat-template FILE, or leave it to auto.",
            )
        if settings.chat_template == "off":
            chat = False
        if chat:
            chat_templates.check_default(f"model {folder.name}", tokenizer.chat_template)
        templates[folder.name] = tokenizer.chat_template if chat else None
        plans[folder.name] = [
            planning.plan(
                spec,
                chat=chat,
                protocol=settings.protocol,
                num_fewshot=settings.num_fewshot,
                samples=settings.samples,
                temperature=settings.temperature,
                seed=settings.seed,
                max_new_tokens=settings.max_new_tokens,
            )
            for spec in specs
        ]
    for plan in {(plan.spec.name, plan.style): plan for several in plans.values() for plan in several}.values():
        if plan.spec.own:
            seen = runner.check_task(plan, data[plan.spec.name])
            notes += [note for note in seen if note not in notes]
            runner.check_references(plan, data[plan.spec.name])
    notes += comparison.template_notes({name: template is not None for name, template in templates.items()})
    return Prepared(settings, folders, plans, data, box, templates, notes, markers)


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


def load_backend(folder: ModelFolder, settings: Settings) -> Backend:
    """The model in memory, by the chosen backend."""
    given = settings.given_template
    if settings.backend == "vllm":
        from dskd_eval.backends.vllm import VLLMBackend

        return VLLMBackend(folder, dtype=settings.dtype, chat_template=given, seed=settings.seed)
    from dskd_eval.backends.hf import HFBackend

    return HFBackend(folder, dtype=settings.dtype, device=settings.device, chat_template=given)


def evaluate(
    prepared: Prepared,
    output: Path,
    watcher: Watcher,
    *,
    resume: bool = False,
    cache: Path | None = None,
    load: Callable[[ModelFolder, Settings], Backend] = load_backend,
) -> Results:
    """Run everything that is not finished yet; returns (and writes) the results.

    A task that fails is recorded and the rest goes on. KeyboardInterrupt leaves a folder that --resume
    takes up.
    """
    folder = records.RunFolder(output)
    folder.open(prepared.identity(), resume=resume)
    progress = _Progress(prepared, folder, watcher)
    store = GenerationStore(cache or folder.generations)
    try:
        for number, model in enumerate(prepared.folders):
            watcher.model(model.name, number, len(prepared.folders))
            progress.evaluate_model(model, store, load)
    finally:
        store.close()
        with suppress(UserError):
            progress.write(complete=False)
    return progress.write(complete=True)


def _answers(tokens: int) -> str:
    return f"answers, {tokens} tokens" if tokens else "answers"


class _Progress:
    """Runs the tasks of one model after the other and keeps results.json up to date."""

    def __init__(self, prepared: Prepared, folder: records.RunFolder, watcher: Watcher) -> None:
        self.prepared, self.folder, self.watcher = prepared, folder, watcher
        self.started = datetime.now(UTC)
        self.failures: dict[tuple[str, str], str] = {}

    def evaluate_model(
        self, model: ModelFolder, store: GenerationStore, load: Callable[[ModelFolder, Settings], Backend]
    ) -> None:
        plans = self.prepared.plans[model.name]
        lm: EvalLM | None = None
        for number, plan in enumerate(plans):
            task = plan.spec.name
            self.watcher.task(model.name, task, number, len(plans))
            kept = self.folder.load_part(model.name, task)
            if kept is not None:
                self.watcher.finished(model.name, task, kept.score, kept.times.seconds, True)
                continue
            try:
                if lm is None:
                    self.watcher.step("loading the model", 0, 1)
                    lm = EvalLM(
                        load(model, self.prepared.settings),
                        batch_size=self.prepared.settings.batch_size,
                        store=store,
                        markers=self.prepared.markers[model.name],
                    )
                    self._note_model(model, lm)
                self._run_task(model, plan, lm)
            except Exception as error:
                self._fail(model, plan, error)
                if lm is None:
                    for rest in plans[number + 1 :]:
                        if self.folder.load_part(model.name, rest.spec.name) is None:
                            self.failures[model.name, rest.spec.name] = "the model could not be loaded"
                    break
        del lm
        gc.collect()
        with suppress(ImportError):
            import torch

            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def _note_model(self, model: ModelFolder, lm: EvalLM) -> None:
        backend = lm.backend
        facts = LoadedModel(
            backend=backend.kind,
            dtype=str(getattr(backend, "dtype", "")).removeprefix("torch."),
            device=str(getattr(backend, "device", "")),
            parameters=getattr(backend, "parameters", None),
            context_length=backend.max_length,
            batch_size=lm.chunk,
            end_tokens=list(getattr(backend, "end_tokens", [])),
        )
        self.folder.save_loaded(model.name, facts)
        if not facts.end_tokens and backend.kind != "oracle":
            self.watcher.note(
                f"{model.name}: the tokenizer names no end token; answers end at stop strings or their limit"
            )

    def _run_task(self, model: ModelFolder, plan: Plan, lm: EvalLM) -> None:
        begun = monotonic()
        lm.on_progress = lambda done, total: self.watcher.step(_answers(lm.written), done, total)
        result = runner.evaluate_task(
            lm,
            plan,
            self.prepared.data[plan.spec.name],
            limit=self.prepared.settings.limit,
            seed=self.prepared.settings.seed,
            sandbox=self.prepared.sandbox,
            on_scoring=lambda done, total: self.watcher.step("programs", done, total),
        )
        seconds = monotonic() - begun
        times = PartTimes(seconds=round(seconds, 2), answers_reused=lm.trace.reused)
        samples = [sample.of_model(model.name) for sample in result.samples]
        self.folder.save_part(model.name, plan.spec.name, Part(score=result.score, times=times), samples)
        self.failures.pop((model.name, plan.spec.name), None)
        self.watcher.finished(model.name, plan.spec.name, result.score, seconds, False)
        self.write(complete=False)

    def _fail(self, model: ModelFolder, plan: Plan, error: Exception) -> None:
        message = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        self.failures[model.name, plan.spec.name] = message
        with suppress(OSError), (self.folder.path / "errors.log").open("a", encoding="utf-8") as log:
            log.write(f"{datetime.now(UTC).isoformat()} {model.name} {plan.spec.name}\n")
            log.write("".join(traceback.format_exception(error)) + "\n")
        self.watcher.failed(model.name, plan.spec.name, message)

    def write(self, *, complete: bool) -> Results:
        results = self._results()
        records.write_json(self.folder.path / "results.json", results)
        if complete:
            self.folder.join_samples([(score.model, score.task.task) for score in results.scores])
            compared = comparison.within(records.Run(self.folder.path))
            notes = [*results.notes, *(note for note in compared.notes if note not in results.notes)]
            results = results.model_copy(update={"comparisons": compared.without_notes(), "notes": notes})
            records.write_json(self.folder.path / "results.json", results)
            report.write([records.Run(self.folder.path)], self.folder.path)
        return results

    def _results(self) -> Results:
        prepared = self.prepared
        scores, times = [], []
        for model in prepared.folders:
            for plan in prepared.plans[model.name]:
                task = plan.spec.name
                part = self.folder.load_part(model.name, task)
                if part is not None:
                    score = part.score
                    times.append(TaskTimes(model=model.name, task=task, **part.times.given()))
                elif (model.name, task) in self.failures:
                    score = TaskScore(status="failed", error=self.failures[model.name, task])
                else:
                    score = TaskScore(status="waiting")
                record = plan.record().model_copy(update={"data": prepared.data[task].record()})
                scores.append(Score.of(model.name, record, score))
        return Results(
            schema_version=SCHEMA_VERSION,
            complete=all(score.finished for score in scores),
            settings=prepared.settings.complete(),
            environment=records.environment(),
            sandbox=prepared.sandbox.record() if prepared.sandbox else None,
            notes=[*prepared.notes, *_warnings(scores)],
            models=[self._model(model) for model in prepared.folders],
            scores=scores,
            suites=_suites(self.folder, scores, prepared.settings.seed),
            comparisons=Comparison(),
            times=Times(
                started=self.started.isoformat(timespec="seconds"),
                written=datetime.now(UTC).isoformat(timespec="seconds"),
                tasks=times,
            ),
        )

    def _model(self, model: ModelFolder) -> ModelRecord:
        template = self.prepared.templates[model.name]
        reading = ModelTemplate(
            chat_template=template is not None,
            chat_template_hash=content_hash(template) if template else None,
            reasoning_markers=[list(pair) for pair in self.prepared.markers[model.name]],
        )
        loaded = self.folder.loaded(model.name)
        return ModelRecord.model_validate({**model.record().given(), **reading.given(), **loaded.given()})


def _suites(folder: records.RunFolder, scores: list[Score], seed: int) -> list[SuiteScore]:
    """Unweighted mean of the primary metrics of a suite, for models that finished all tasks of the suite."""
    known = selection.builtin_tasks().values()
    groups: dict[tuple[str, str], list[Score]] = {}
    for score in scores:
        groups.setdefault((score.model, score.task.suite), []).append(score)
    suites = []
    for (model, suite), members in groups.items():
        percent = all(score.finished and score.primary.unit == "percent" for score in members)
        whole = {spec.name for spec in known if spec.suite == suite}
        if not whole or whole != {score.task.task for score in members} or not percent:
            continue
        names = [score.task.primary_metric for score in members]
        columns = []
        for score in members:
            samples = folder.samples(model, score.task.task)
            columns.append([sample.metrics[score.task.primary_metric] for sample in samples])
        right_or_wrong = [registry.is_proportion(name, "percent") for name in names]
        found = stats.macro_interval(columns, proportions=right_or_wrong, seed=seed)
        suites.append(
            SuiteScore(
                model=model,
                suite=suite,
                tasks=[score.task.task for score in members],
                value=round(100 * found.value, 6),
                low=None if found.low is None else round(100 * found.low, 6),
                high=None if found.high is None else round(100 * found.high, 6),
                n=found.n,
            )
        )
    return suites


def _warnings(scores: list[Score]) -> list[str]:
    """What a reader must know before trusting a number."""
    notes = []
    subset = [score.n for score in scores if score.finished and score.n < score.documents]
    if subset:
        notes.append(f"seeded random subset of at most {max(subset)} documents per task: numbers are rough")
    kinds: dict[tuple[str, str], list[str]] = {}
    for score in scores:
        for text, number in _doubts(score):
            told = f"{score.task.task} {number}/{score.answers.count}"
            kinds.setdefault((score.model, text), []).append(told)
    return notes + [f"{model}: {text}: {', '.join(tasks)}" for (model, text), tasks in kinds.items()]


def _doubts(score: Score) -> Iterator[tuple[str, int]]:
    """What may be wrong with the answers to a task, each with the number of such answers."""
    facts, task, count = score.answers, score.task, score.answers.count
    if facts.clamped:
        yield "answers limited to fewer tokens than the task asks, because the context is short", facts.clamped
    if facts.prompts_cut and task.protocol == "default":
        yield "prompts longer than the context, cut at their beginning", facts.prompts_cut
    if count and facts.unfinished > count / 10:
        yield "answers that ran into their token limit", facts.unfinished
    if count and facts.empty > count / 20:
        yield "empty answers", facts.empty
    if count and facts.references_unseen > count / 20 and task.primary_metric == "rouge_l":
        yield "references with letters that rouge_l does not see (rouge_l_unicode does)", facts.references_unseen
    if facts.unfinished_reasoning:
        yield "answers whose reasoning did not end count as empty (--max-new-tokens)", facts.unfinished_reasoning
    if facts.unread_reasoning:
        yield "answers begin with reasoning that is scored with them (--reasoning START,END)", facts.unread_reasoning
