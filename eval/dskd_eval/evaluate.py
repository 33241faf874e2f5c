"""Every task of every model, each saved as it is done."""

from __future__ import annotations

import gc
import traceback
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from time import monotonic
from typing import Protocol

from dskd_eval import comparison, report, run_folder, summary
from dskd_eval.backends.base import Backend
from dskd_eval.data import content_hash
from dskd_eval.errors import UserError
from dskd_eval.lmeval.eval_lm import EvalLM
from dskd_eval.lmeval.run_task import evaluate_task
from dskd_eval.models import ModelFolder
from dskd_eval.prepare import Prepared
from dskd_eval.schema import (
    SCHEMA_VERSION,
    Comparison,
    LoadedModel,
    ModelRecord,
    ModelTemplate,
    Part,
    PartTimes,
    Results,
    ScoreRow,
    Settings,
    TaskScore,
    TaskTimes,
    Times,
)
from dskd_eval.store import GenerationStore
from dskd_eval.tasks.planning import Plan


class Watcher(Protocol):
    """Where progress goes."""

    def model(self, name: str, number: int, total: int) -> None: ...
    def task(self, model: str, task: str, number: int, total: int) -> None: ...
    def step(self, what: str, done: int, total: int) -> None: ...
    def finished(self, model: str, task: str, score: TaskScore, seconds: float, kept: bool) -> None: ...
    def failed(self, model: str, task: str, message: str) -> None: ...
    def note(self, message: str) -> None: ...


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
    folder = run_folder.OutputFolder(output)
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

    def __init__(self, prepared: Prepared, folder: run_folder.OutputFolder, watcher: Watcher) -> None:
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
        result = evaluate_task(
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
        run_folder.write_json(self.folder.path / "results.json", results)
        if complete:
            self.folder.join_samples([(score.model, score.task.task) for score in results.scores])
            compared = comparison.within(run_folder.SavedRun(self.folder.path))
            notes = [*results.notes, *(note for note in compared.notes if note not in results.notes)]
            results = results.model_copy(update={"comparisons": compared.without_notes(), "notes": notes})
            run_folder.write_json(self.folder.path / "results.json", results)
            report.write([run_folder.SavedRun(self.folder.path)], self.folder.path)
        return results

    def _results(self) -> Results:
        prepared = self.prepared
        all_scores: list[ScoreRow] = []
        times: list[TaskTimes] = []
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
                all_scores.append(ScoreRow.of(model.name, record, score))
        return Results(
            schema_version=SCHEMA_VERSION,
            complete=all(score.finished for score in all_scores),
            settings=prepared.settings.complete(),
            environment=run_folder.environment(),
            sandbox=prepared.sandbox.record() if prepared.sandbox else None,
            notes=[*prepared.notes, *summary.warnings(all_scores)],
            models=[self._model(model) for model in prepared.folders],
            scores=all_scores,
            suites=summary.suite_scores(all_scores, self.folder.samples, prepared.settings.seed),
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
