"""Axolotl's trainer with the distillation loss: batches in, one scalar and exact metrics out."""

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

from dskd_plugin import advice, state
from dskd_plugin.assemble import distillation_loss, in_common, sampler
from dskd_plugin.batch import KEY, StepBatch, ask
from dskd_plugin.core.objective import CE_TERMS
from dskd_plugin.fitted import fit_projector
from dskd_plugin.generation.rollout import COUNTS, Rollout, pack
from dskd_plugin.host import model_card, partial
from dskd_plugin.host.collator import COLUMNS, ON_POLICY
from dskd_plugin.host.metrics import Totals, WithoutPerplexity, active_names, of_answers
from dskd_plugin.host.prepared import named
from dskd_plugin.host.teacher_source import teacher_source
from dskd_plugin.host.watch import Watch
from dskd_plugin.log import LOG
from dskd_plugin.losses.base import DistillationLoss
from dskd_plugin.losses.dual_space import DualSpaceLoss
from dskd_plugin.models import causal_lm, output_head
from dskd_plugin.run import Run, Sides
from dskd_plugin.student import attach
from dskd_plugin.teachers.base import HiddenStates, TeacherParts, staying

# Called with each new trainer, before its first step: whoever studies a run may watch its loss
# (`trainer.distillation.observers`) or put another source of hidden states in place (`trainer.teacher`).
on_create: list[Callable[["DSKDTrainer"], None]] = []


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
    teacher: HiddenStates | None
    _rollout: Rollout | None
    distillation: DistillationLoss
    reports_token_perplexity = False

    @classmethod
    def configured(cls, run: Run) -> type["DSKDTrainer"]:
        """The trainer class of one run; Axolotl instantiates it with arguments of its own."""
        return type(cls.__name__, (cls,), {"run": run, "cfg": run.recipe})

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        model, tokenizer, training_args = kwargs["model"], kwargs["processing_class"], kwargs["args"]
        settings, method = self.run.settings, self.run.method
        sides = self.run.with_student(tokenizer)
        rows = named(kwargs.get("train_dataset"), kwargs.get("eval_dataset"))
        teacher = teacher_source(sides, model, training_args.device, rows) if method.needs_teacher else None
        self.teacher = teacher
        self.distillation = self._distillation_loss(model, sides, teacher, training_args)
        attach(model, self.distillation)
        super().__init__(*args, **kwargs)
        # Our divisors already cover the accumulation window and all ranks.
        self.model_accepts_loss_kwargs = True
        self.distillation.step = lambda: self.state.global_step
        self._autocast = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.accelerator.mixed_precision)
        self.distillation.matmul_dtype = self._autocast
        # Logits of one position only: the loss makes its own, of chosen rows.
        keeps = "logits_to_keep" in inspect.signature(causal_lm(model).forward).parameters
        self._forward_options = {"use_cache": False, **({"logits_to_keep": 1} if keeps else {})}
        self._masks_by_position = causal_lm(model).config._attn_implementation in ("sdpa", "eager")
        self._rollout = sampler(sides, seed=self.args.seed)
        objective = self.distillation.objective
        logged = active_names(objective, exact=settings.exact, in_pairs=method.in_pairs)
        self._totals = Totals(logged, self.args.device, self._over_ranks)
        self.add_callback(_AfterStep(self))
        target = "exact" if settings.exact else "projected"
        self._watch = Watch(target=target if objective.in_student_space else None)
        # For the summary of the run.
        self.seconds, self._student_tokens = 0.0, torch.zeros((), dtype=torch.long, device=self.args.device)
        for created in on_create:
            created(self)

    def _distillation_loss(
        self, model: nn.Module, sides: Sides, teacher: TeacherParts | None, args: Any
    ) -> DistillationLoss:
        settings, head = self.run.settings, output_head(model).weight
        rows, width = getattr(head, "ds_shape", head.shape)
        self._pair_state = state.pair_state(sides, [width, None if teacher is None else teacher.width])
        overlap = events = None
        if teacher is not None:
            overlap, events = in_common(sides, teacher, rows)
            told = advice.of_pair(sides.pair, settings, overlap.student_share)
            LOG.info("dskd: method %s; widths %d and %d; %s", settings.method, width, teacher.width, told)
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
        )

    def create_optimizer(self, model: nn.Module | None = None) -> Any:
        """The host's optimizer, with the projectors moved into a parameter group of their own learning rate."""
        optimizer = super().create_optimizer() if model is None else super().create_optimizer(model)
        own = list(self.distillation.parameters())
        if own and not any(group.get("dskd") for group in optimizer.param_groups):
            ids = {id(parameter) for parameter in own}
            (home,) = (
                group for group in optimizer.param_groups if ids & {id(parameter) for parameter in group["params"]}
            )
            home["params"] = [parameter for parameter in home["params"] if id(parameter) not in ids]
            learning_rate = self.run.settings.projector.learning_rate
            optimizer.add_param_group({**home, "params": own, "lr": learning_rate, "dskd": True})
        return optimizer

    # -- batches ---------------------------------------------------------------------------------------------------

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        self._signature_columns += [column for column in COLUMNS if column not in self._signature_columns]

    def _asked(self, batch: StepBatch) -> StepBatch:
        """The batch on the trainer's device with what the teacher says of it."""
        # The rows of the dataset have done their service: answers to their prompts are in the batch, if any.
        return ask(replace(batch, samples=None).to(self.args.device), self.teacher)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self._rollout is not None and self._rollout.due(self.state.global_step, self.state.epoch or 0.0):
            batches = [self._with_answers(self._rollout, batch, k) for k, batch in enumerate(batches)]
        for batch in batches:
            mask = batch.get("attention_mask")
            self._student_tokens += batch["input_ids"].numel() if mask is None else (mask != 0).sum()
        window = []
        with staying(self.teacher):
            for batch in batches:
                batch[KEY] = self._asked(batch[KEY])
                window.append(batch[KEY])
        if window:
            window[0].window = window
        # Not None, or the host would divide by the number of accumulation steps.
        return batches, torch.tensor(sum(len(batch.rows_R) for batch in window), device=device)

    def _with_answers(self, rollout: Rollout, batch: dict[str, Any], number: int) -> dict[str, Any]:
        """The batch with the gold rows for the cross-entropy and the student's answers to their prompts for the KD."""
        features = batch[KEY].samples
        packed = isinstance(features[0], list)
        bins = features if packed else [features]
        tokens = rollout.counts["tokens"]
        answered = [
            rollout.answer(
                self.model,
                samples,
                step=self.state.global_step,
                rank=self.args.process_index,
                micro_batch=number * len(bins) + k,
                autocast=self._autocast,
            )
            for k, samples in enumerate(bins)
        ]
        gold = [[{**sample, ON_POLICY: False} for sample in samples] for samples in bins]
        answers = [row for rows in answered for row in rows]
        if len(bins) == 1:
            # One packed row stays one: FlashAttention keeps neighbours apart in a batch of one row only.
            features = [[*gold[0], *answers]] if packed else [*gold[0], *answers]
        else:
            features = [*gold, *pack(answers, self.cfg.sequence_len)]
        new = self.data_collator(features)
        new[KEY].sampled = int(rollout.counts["tokens"] - tokens)
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
            paired.window = [paired]
        inputs.pop("labels", None)
        inputs.pop("length", None)
        if self._masks_by_position and "position_ids" in inputs:
            # With a mask, transformers does not look for packing in the position ids, and neighbours leak.
            inputs.pop("attention_mask", None)
        self.distillation.reduce_counts = self._over_ranks if training else lambda counts: counts
        self.distillation.micro_batch = paired
        try:
            outputs = model(**inputs, **self._forward_options)
        finally:
            self.distillation.micro_batch = None
        loss = outputs["loss"]
        self._totals.add("train" if training else "eval", paired, loss)
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
            means = self._totals.means(kind)
            objective = self.distillation.objective
            shares = objective.shares()
            if kind == "eval":
                logs["eval_loss"] = sum(share * means[term] for term, share in shares.items())
            if objective.with_kd:
                of_kd = (share * means[term] for term, share in shares.items() if term not in CE_TERMS)
                means["kd"] = sum(of_kd) / objective.kd_ratio
            if kind == "train":
                self._warn(means)
                if self.distillation.kd_scale is not None:
                    means["kd_scale"] = self.distillation.kd_scale
            if kind == "train" and self._rollout is not None:
                means |= self._rollout_totals(self._rollout)
            for name, value in means.items():
                logs[f"{prefix}dskd/{name}"] = round(value, 6)
        quiet = WithoutPerplexity(logs)
        super().log(quiet, *args, **kwargs)
        logs.update(quiet)

    def _warn(self, means: dict[str, float]) -> None:
        for warning in self._watch.see(means):
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
        elif (
            not resume_from_checkpoint
            and isinstance(self.distillation, DualSpaceLoss)
            and self.run.settings.projector.init == "fitted"
        ):
            quiet = not self.is_world_process_zero()
            assert self.teacher is not None
            fit_projector(self.distillation, self.teacher, self.train_dataset, seed=self.args.seed, quiet=quiet)
        start = time.monotonic()
        with partial.unfinished(self, self.cfg.axolotl_config_path):
            result = super().train(resume_from_checkpoint, *args, **kwargs)
        self.seconds = time.monotonic() - start
        self._save_projectors(self.args.output_dir)
        return result

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
        if (best / state.STATE).is_file():  # else the host has not found the student's weights either, and says so
            state.load(best, self.distillation, weights=not self.is_deepspeed_enabled)

    def _save_checkpoint(self, model: nn.Module, trial: Any, **kwargs: Any) -> None:
        # First, because trainer_state.json, written last, marks a checkpoint as finished.
        self._save_projectors(f"{self._get_output_dir(trial=trial)}/checkpoint-{self.state.global_step}")
        super()._save_checkpoint(model, trial, **kwargs)

    def _save_projectors(self, folder: str) -> None:
        weights = state.projector_state(self.distillation)
        if self.args.should_save:
            state.save(folder, weights, self._pair_state)
