"""Axolotl's trainer with the distillation loss: batches in, one scalar and exact metrics out."""

import contextlib
import inspect
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from axolotl.core.trainers.base import AxolotlTrainer
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from dskd_plugin import pair_advice, state
from dskd_plugin.assemble import backend_of, distillation_loss, in_common, sampler
from dskd_plugin.batch import KEY, StepBatch, as_window, ask
from dskd_plugin.columns import aligned_share, columns, dataset_of
from dskd_plugin.errors import naming
from dskd_plugin.fitted import fit_projector
from dskd_plugin.generation.rollout import COUNTS, Answers, Rollout, pack
from dskd_plugin.generation.whole import whole
from dskd_plugin.host import model_card, partial
from dskd_plugin.host.collator import ON_POLICY, PairCollator
from dskd_plugin.host.metrics import (
    Totals,
    WithoutPerplexity,
    active_names,
    greater_is_better,
    kd_of,
    loss_of,
    of_answers,
    together,
)
from dskd_plugin.host.parameter_group import give_own_group
from dskd_plugin.host.prepared import named
from dskd_plugin.host.teacher_source import teacher_source
from dskd_plugin.host.watch import Watch
from dskd_plugin.kept_settings import STATE
from dskd_plugin.log import LOG
from dskd_plugin.losses.base import DistillationLoss
from dskd_plugin.losses.dual_space import DualSpaceLoss
from dskd_plugin.losses.several import Loss, SeveralTeachers
from dskd_plugin.models import causal_lm, output_head
from dskd_plugin.run import Run
from dskd_plugin.student import attach
from dskd_plugin.teachers.base import HiddenStates, TeacherParts, staying

# Called with each new trainer, before its first step: whoever studies a run may watch its loss
# (`trainer.distillation.observers`) or put another source of hidden states in place (`trainer.teacher`).
on_create: list[Callable[["DSKDTrainer"], None]] = []


# So many rows are counted for the share of aligned tokens that a run tells.
SAID_ROWS = 1000


class _AfterStep(TrainerCallback):
    """Tells the loss that an optimizer step is over, before the host logs, evaluates or saves."""

    def __init__(self, trainer: "DSKDTrainer") -> None:
        self._trainer = trainer

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self._trainer.after_step()


class DSKDTrainer(AxolotlTrainer):
    """Trains the student on (1 - kd_ratio) CE + kd_ratio KD against a frozen teacher."""

    run: Run
    cfg: Any
    teachers: list[HiddenStates | None]
    _rollout: Rollout | None
    distillation: Loss
    reports_token_perplexity = False

    @classmethod
    def configured(cls, run: Run) -> type["DSKDTrainer"]:
        """The trainer class of one run; Axolotl instantiates it with arguments of its own."""
        return type(cls.__name__, (cls,), {"run": run, "cfg": run.recipe})

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        model, tokenizer, training_args = kwargs["model"], kwargs["processing_class"], kwargs["args"]
        settings, method = self.run.settings, self.run.method
        self._backend = backend_of(settings, training_args.device)  # what it cannot do is said before models are loaded
        self._sides = self.run.sides(tokenizer)
        self.teachers, losses, widths = [], [], []
        for place, one in enumerate(self._sides):
            rows = named(*(dataset_of(kwargs.get(name), place + 1) for name in ("train_dataset", "eval_dataset")))
            with naming(place, len(self._sides)):
                teacher = teacher_source(one, model, training_args.device, rows) if method.needs_teacher else None
                losses.append(self._distillation_loss(model, place, teacher, training_args))
            if "training" in rows and method.in_pairs and teacher is not None:
                first, share = aligned_share(rows["training"], SAID_ROWS)
                told = pair_advice.of_dataset(share)
                LOG.info("dskd: of the response tokens of %d training rows, the first, %s", first, told)
            self.teachers.append(teacher)
            widths.append(None if teacher is None else teacher.width)
        self.distillation = losses[0] if len(losses) == 1 else SeveralTeachers(losses)
        self._pair_state = state.pair_state(self._sides, settings, [losses[0].student_width, *widths])
        attach(model, self.distillation)
        # DataParallel, which transformers takes for one process that sees several GPUs, would part rows from partners.
        training_args._n_gpu = min(1, training_args.n_gpu)
        training_args.greater_is_better = greater_is_better(training_args, self.cfg.greater_is_better)
        super().__init__(*args, **kwargs)
        for collator in (self.data_collator, self.eval_data_collator):
            if isinstance(collator, PairCollator):
                collator.sources = self.teachers
        # Our divisors already cover the accumulation window and all ranks.
        self.model_accepts_loss_kwargs = True
        self._autocast = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.accelerator.mixed_precision)
        for loss in losses:
            loss.step = lambda: self.state.global_step
            loss.matmul_dtype = self._autocast
        # Logits of one position only: the loss makes its own, of chosen rows.
        keeps = "logits_to_keep" in inspect.signature(causal_lm(model).forward).parameters
        self._forward_options = {"use_cache": False, **({"logits_to_keep": 1} if keeps else {})}
        self._masks_by_position = causal_lm(model).config._attn_implementation in ("sdpa", "eager")
        self._rollout = sampler(self._sides, seed=self.args.seed)
        self._totals = []
        for loss in losses:
            logged = active_names(loss.objective, exact=settings.exact, in_pairs=method.in_pairs)
            self._totals.append(Totals(logged, self.args.device, self._over_ranks))
        self.add_callback(_AfterStep(self))
        target = "exact" if settings.exact else "projected"
        self._watch = Watch(
            target=target if losses[0].objective.in_student_space else None,
            warmup=settings.projector.warmup_steps,
        )
        # For the summary of the run.
        self.seconds, self._student_tokens = 0.0, torch.zeros((), dtype=torch.long, device=self.args.device)
        self.first_step: int | None = None
        for created in on_create:
            created(self)

    def _distillation_loss(
        self, model: nn.Module, place: int, teacher: TeacherParts | None, args: Any
    ) -> DistillationLoss:
        """The loss of a teacher. place: its own in their list, from 0."""
        sides, head = self._sides[place], output_head(model).weight
        settings = sides.run.settings
        rows, width = getattr(head, "ds_shape", head.shape)
        overlap = events = None
        if teacher is not None:
            overlap, events = in_common(sides, teacher, rows)
            told = pair_advice.of_pair(sides.pair, settings, overlap.student_share)
            LOG.info("dskd: method %s; widths %d and %d; %s", settings.method, width, teacher.width, told)
            if warning := pair_advice.of_one_model(self.cfg.base_model, settings):
                LOG.warning("dskd: %s", warning)
        return distillation_loss(
            settings,
            model,
            teacher,
            sides.pair,
            overlap,
            events,
            tokenizers=sides.tokenizers,
            # FSDP2 wants one dtype among the trainable parameters of a group.
            projector_dtype=head.dtype if self.cfg.fsdp_config else torch.float32,
            seed=args.seed,
            teacher_weight=self.run.settings.weights[place],
            adds_ce=place == 0,
            backend=self._backend,
        )

    @property
    def teacher(self) -> HiddenStates | None:
        """The first teacher, for most runs the only one."""
        return self.teachers[0]

    @teacher.setter
    def teacher(self, source: HiddenStates | None) -> None:
        self.teachers[0] = source

    def create_optimizer(self, model: nn.Module | None = None) -> Any:
        """The host's optimizer, with the projectors moved into a parameter group of their own learning rate."""
        optimizer = super().create_optimizer() if model is None else super().create_optimizer(model)
        own = list(self.distillation.parameters())
        give_own_group(optimizer, own, self.run.settings.projector.learning_rate, self.cfg.optimizer)
        return optimizer

    # -- batches ---------------------------------------------------------------------------------------------------

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        ours = columns(len(self.teachers))
        self._signature_columns += [column for column in ours if column not in self._signature_columns]

    def _asked(self, batch: StepBatch) -> StepBatch:
        """The batch on the trainer's device with what each teacher says of it, one after the other."""
        # The rows of the dataset have done their service: answers to their prompts are in the batch, if any.
        moved = replace(batch, samples=None).to(self.args.device)
        first, *others = (ask(one, teacher) for one, teacher in zip(moved.each, self.teachers, strict=True))
        return replace(first, others=tuple(others))

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        self.first_step = self.state.global_step if self.first_step is None else self.first_step
        if self._rollout is not None and self._rollout.due(self.state.global_step, self.state.epoch or 0.0):
            with whole(self.model, self.deepspeed if self.is_deepspeed_enabled else None):
                batches = self._with_answers(self._rollout, batches)
        for batch in batches:
            mask = batch.get("attention_mask")
            self._student_tokens += batch["input_ids"].numel() if mask is None else (mask != 0).sum()
        window = []
        with contextlib.ExitStack() as stack:
            for teacher in self.teachers:
                stack.enter_context(staying(teacher))
            for batch in batches:
                batch[KEY] = self._asked(batch[KEY])
                window.append(batch[KEY])
        as_window(window)
        # Not None, or the host would divide by the number of accumulation steps.
        return batches, torch.tensor(sum(len(batch.rows_R) for batch in window)).to(device, non_blocking=True)

    def _with_answers(self, rollout: Rollout, batches: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The batches with the gold rows for the cross-entropy and the student's answers to their prompts for the KD.

        The prompts of all micro-batches of a step are answered together.
        """
        groups = [[sample for samples in _bins(batch) for sample in samples] for batch in batches]
        place = {"step": self.state.global_step, "rank": self.args.process_index}
        answered = rollout.answer(self.model, groups, **place, autocast=self._autocast)
        return [self._mixed(batch, answers) for batch, answers in zip(batches, answered, strict=True)]

    def _mixed(self, batch: dict[str, Any], answers: Answers) -> dict[str, Any]:
        """One micro-batch of its gold rows and these answers."""
        gold = [[{**sample, ON_POLICY: False} for sample in samples] for samples in _bins(batch)]
        packed = isinstance(batch[KEY].samples[0], list)
        if len(gold) == 1:
            # One packed row stays one: FlashAttention keeps neighbours apart in a batch of one row only.
            features = [[*gold[0], *answers.rows]] if packed else [*gold[0], *answers.rows]
        else:
            features = [*gold, *pack(answers.rows, self.cfg.sequence_len)]
        new = self.data_collator(features)
        for one in new[KEY].each:
            one.sampled = answers.tokens
        return {key: value.to(self.args.device) for key, value in new.items()}

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        inputs = dict(inputs)
        paired = inputs.pop(KEY)
        # In training the teacher was asked for a whole step at once; a batch of an evaluation stands alone.
        training = paired.teacher_MD is not None
        if not training:
            paired = self._asked(paired)
            as_window([paired])
        inputs.pop("labels", None)
        inputs.pop("length", None)
        if self._masks_by_position and "position_ids" in inputs:
            # With a mask, transformers does not look for packing in the position ids, and neighbours leak.
            inputs.pop("attention_mask", None)
        for one, batch in zip(self.distillation.each, paired.each, strict=True):
            one.reduce_counts = self._over_ranks if training else lambda counts: counts
            one.micro_batch = batch
        try:
            outputs = model(**inputs, **self._forward_options)
        finally:
            for one in self.distillation.each:
                one.micro_batch = None
        loss = outputs["loss"]
        for totals, batch in zip(self._totals, paired.each, strict=True):
            totals.add("train" if training else "eval", batch, loss)
        if training:
            # Engines average gradients over ranks; our divisor is already that of all ranks.
            loss = loss * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    def after_step(self) -> None:
        """Let the loss draw its conclusions from the step, on all ranks alike."""
        self.distillation.after_step(self._over_ranks)

    def _over_ranks(self, values: Tensor) -> Tensor:
        return self.accelerator.reduce(values, "sum") if self.accelerator.num_processes > 1 else values

    # -- metrics ---------------------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the terms, exact over accumulation, ranks and the steps since the last log."""
        kind = "train" if "loss" in logs else "eval" if "eval_loss" in logs else None
        if kind is not None:
            prefix = "eval_" if kind == "eval" else ""
            losses = self.distillation.each
            of_each = [totals.means(kind) for totals in self._totals]
            if kind == "eval":
                logs["eval_loss"] = sum(map(loss_of, of_each, (loss.objective for loss in losses)))
            for loss, means in zip(losses, of_each, strict=True):
                if loss.objective.with_kd:
                    means["kd"] = kd_of(means, loss.objective)
                if kind == "train" and loss.kd_scale is not None:
                    means["kd_scale"] = loss.kd_scale
                if kind == "train" and loss.guarded_steps:
                    means["guarded"] = sum(loss.guarded_steps) / len(loss.guarded_steps)
                    loss.guarded_steps.clear()
            means = together(of_each, self.run.settings.weights)
            if kind == "train":
                self._warn(means)
            if kind == "train" and self._rollout is not None:
                means |= self._rollout_totals(self._rollout)
            for name, value in means.items():
                logs[f"{prefix}dskd/{name}"] = round(value, 6)
        quiet = WithoutPerplexity(logs)
        super().log(quiet, *args, **kwargs)
        logs.update(quiet)

    def _warn(self, means: dict[str, float]) -> None:
        step = self.state.global_step
        for warning in [*self._watch.see(means, step), *self._watch.see_guard(means, step)]:
            if self.is_world_process_zero():
                LOG.warning(warning)

    def _rollout_totals(self, rollout: Rollout) -> dict[str, float]:
        counts = [rollout.counts[name] for name in COUNTS]
        totals = self._over_ranks(torch.tensor(counts, dtype=torch.double, device=self.args.device)).tolist()
        rollout.reset_counts()
        return of_answers(totals, self.accelerator.num_processes)

    # -- state -----------------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        if resume_from_checkpoint is True:
            resume_from_checkpoint = get_last_checkpoint(self.args.output_dir)
        if resume_from_checkpoint:
            state.check(resume_from_checkpoint, self._pair_state)
        with partial.unfinished(self, self.cfg.axolotl_config_path, resume_from_checkpoint or None):
            if not resume_from_checkpoint and self.run.settings.projector.init == "fitted":
                self._fit_projectors()
            start = time.monotonic()
            result = super().train(resume_from_checkpoint, *args, **kwargs)
        self.seconds = time.monotonic() - start
        self._save_projectors(self.args.output_dir)
        return result

    def _fit_projectors(self) -> None:
        quiet = not self.is_world_process_zero()
        for number, (loss, teacher) in enumerate(zip(self.distillation.each, self.teachers, strict=True), start=1):
            if isinstance(loss, DualSpaceLoss) and teacher is not None:
                rows = dataset_of(self.train_dataset, number)
                fit_projector(loss, teacher, rows, seed=self.args.seed, quiet=quiet)

    @property
    def tokens(self) -> int:
        """Student tokens of this process's training rows so far."""
        return int(self._student_tokens)

    @property
    def autocast(self) -> torch.dtype | None:
        """Dtype of the mixed precision, if any."""
        return self._autocast

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Ours in place of the host's: that one says "trained from scratch" and prints the recipe with its paths."""
        if self.is_world_process_zero():
            try:
                model_card.write(self)
            except Exception as error:  # the student is saved: its run has not failed
                LOG.warning("dskd: the model card could not be written: %r", error)

    def _prepare_for_training(self, max_steps: Any, train_dataloader: Any, resume_from_checkpoint: Any) -> Any:
        prepared = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        if resume_from_checkpoint is not None:
            # DeepSpeed restores parameters itself.
            state.load(resume_from_checkpoint, self.distillation, weights=not self.is_deepspeed_enabled)
        return prepared

    def _load_best_model(self) -> None:
        """At the end, with ``load_best_model_at_end``: the projectors are those of the student's checkpoint."""
        super()._load_best_model()
        best = Path(self.state.best_model_checkpoint)
        if (best / STATE).is_file():  # else the host has not found the student's weights either, and says so
            state.load(best, self.distillation, weights=not self.is_deepspeed_enabled)

    def _save_checkpoint(self, model: nn.Module, trial: Any, **kwargs: Any) -> None:
        # First, because trainer_state.json, written last, marks a checkpoint as finished.
        self._save_projectors(f"{self._get_output_dir(trial=trial)}/checkpoint-{self.state.global_step}")
        super()._save_checkpoint(model, trial, **kwargs)

    def _save_projectors(self, folder: str) -> None:
        weights = state.projector_state(self.distillation)
        if self.args.should_save:
            state.save(folder, weights, self._pair_state)


def _bins(batch: dict[str, Any]) -> list[list[Any]]:
    """The dataset's rows of a micro-batch: those of each packed row, or all of them."""
    samples = batch[KEY].samples
    return samples if isinstance(samples[0], list) else [samples]
