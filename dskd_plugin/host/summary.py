"""The end of a run on a few lines: what it cost, what it changed, an answer of the student, and how to evaluate it."""

import resource
import shlex
import sys
from datetime import timedelta
from typing import Any

import torch
from transformers import GenerationConfig

from dskd_plugin.generation.sampling import generating
from dskd_plugin.models import is_partitioned

WIDTH = 110
ANSWER_TOKENS = 64
MOST_LINES = 15


def summary(trainer: Any) -> str:
    """At most 15 lines about a finished run."""
    seconds, steps = max(trainer.seconds, 1e-9), trainer.state.global_step
    earlier = f", {steps - trainer.first_step} of them since it went on" if trainer.first_step else ""
    lines = [
        f"dskd: finished {steps} steps{earlier} in {timedelta(seconds=round(seconds))}, "
        f"{trainer.tokens / seconds:,.0f} tokens/s of the student, peak memory {_peak_memory(trainer)}",
        *_teachers(trainer.run.settings),
        *_changes(trainer.state.log_history),
        *_example_if_it_can(trainer),
        f"  student: {trainer.args.output_dir}",
        f"  evaluate: {shlex.join(['dskd-eval', '--model', trainer.args.output_dir, '--suite', 'instruct,math,code'])}",
    ]
    return "\n".join(lines[:MOST_LINES])


def changes(history: list[dict[str, Any]]) -> dict[str, tuple[float, float]]:
    """Each logged value of training: the first and the last."""
    steps = [entry for entry in history if "loss" in entry]
    names = [name for name in (steps[0] if steps else {}) if name == "loss" or name.startswith("dskd/")]
    # Of several teachers the means: what has a further slash is of one of them.
    names = [name for name in names if not name.startswith("dskd/rollout_") and name.count("/") < 2]
    return {
        name.removeprefix("dskd/"): (float(steps[0][name]), float(steps[-1][name]))
        for name in names
        if name in steps[-1]
    }


def _teachers(settings: Any) -> list[str]:
    """Who the teachers were, where there were several."""
    if settings.teachers is None:
        return []
    of_each = zip(settings.teachers, settings.weights, strict=True)
    return ["  teachers: " + ", ".join(f"{one.model} (weight {weight:.3g})" for one, weight in of_each)]


def _changes(history: list[dict[str, Any]]) -> list[str]:
    words = [f"{name} {first:.3f} -> {last:.3f}" for name, (first, last) in changes(history).items()]
    return ["  " + ", ".join(words[start : start + 4]) for start in range(0, len(words), 4)]


def _peak_memory(trainer: Any) -> str:
    if trainer.args.device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated() / 2**30:.2f} GiB of {torch.cuda.get_device_name()}"
    unit = 1 if sys.platform == "darwin" else 1024
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30:.2f} GiB (process)"


def _example_if_it_can(trainer: Any) -> list[str]:
    try:
        return _example(trainer)
    except Exception as error:  # some kernels train and do not sample; the other lines stand all the same
        return [f"  no answer of the student: {error!r}"]


def _example(trainer: Any) -> list[str]:
    """A prompt of the validation rows, or of the training rows, its gold answer and the student's."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    if trainer.is_fsdp_enabled or any(is_partitioned(parameter) for parameter in model.parameters()):
        return []  # no process holds the whole student
    rows, name = trainer.eval_dataset, "validation"
    if rows is None:
        rows, name = trainer.train_dataset, "training"
    row = rows[0]
    ids, taught = list(row["input_ids"]), [label != -100 for label in row["labels"]]
    start = taught.index(True) if True in taught else 0
    if not start:
        return []  # no prompt
    end = next((place for place in range(start, len(taught)) if not taught[place]), len(taught))
    answer = _answer(trainer, model, ids[:start], ids[start:end])
    texts = {f"a {name} prompt": ids[:start], "gold": ids[start:end], "answer": answer}
    return [
        f"  {title}: {_short(trainer.processing_class.decode(tokens, skip_special_tokens=True))}"
        for title, tokens in texts.items()
    ]


def _answer(trainer: Any, model: Any, prompt: list[int], gold: list[int]) -> list[int]:
    tokenizer = trainer.processing_class
    ends = {end for end in (tokenizer.eos_token_id, gold[-1]) if end is not None}
    config = GenerationConfig(
        do_sample=False,
        max_new_tokens=ANSWER_TOKENS,
        eos_token_id=sorted(ends) if gold[-1] in tokenizer.all_special_ids else tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id or 0,
    )
    with generating(model, 0, trainer.autocast) as generator:
        ids = torch.tensor([prompt], device=generator.device)
        return generator.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)[
            0, len(prompt) :
        ].tolist()


def _short(text: str) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= WIDTH else f"{flat[: WIDTH // 2]} ... {flat[-WIDTH // 2 :]}"
