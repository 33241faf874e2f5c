"""`python -m benchmarks.memory`: how much memory a step takes at its peak, beside the floor and the dense reference.

Two tables. The whole step, of a student with activation checkpointing whose vocabulary is as large as the teacher's,
beside F (`benchmarks.step`) with plain logits and F with the plugin's own sft. The loss alone, on random states, beside
the dense reference on fewer rows. Bytes are those of tensors that live at once beyond the weights and inputs, counted
by torch's profiler, on a GPU those of its allocator.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from benchmarks import results
from benchmarks.options import dtype_of, parser_of
from benchmarks.results import Row
from benchmarks.shapes import IMPLS, METHODS, SIZES, Bench, Size, computed, impls_on
from benchmarks.step import dense_step
from dskd_plugin.batch import ask
from dskd_plugin.losses.base import DistillationLoss
from dskd_plugin.models import output_head

MIB = 2**20


def peak(work: Callable[[], Any], device: torch.device) -> int:
    """Bytes beyond those that lived before."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    living = highest = 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            living += event.nbytes()
            highest = max(highest, living)
    return highest


def of_tokens(size: Size, tokens: int, vocab: int | None) -> Size:
    """The same models with a batch of so many tokens in all, and a student of the given vocabulary."""
    family, options = size.student
    student = (family, options if vocab is None else {**options, "vocab_size": vocab})
    each = tokens // size.rows
    return replace(size, student=student, tokens=each, prompt=size.prompt * each // size.tokens)


class StatesAlone(Bench):
    """A bench whose decoders are random hidden states, so that only the loss is left."""

    def student_states(self) -> Tensor:
        return self._states.requires_grad_()

    def teacher_states(self) -> Tensor:
        return self._teacher_states

    def draw(self) -> None:
        def states(rows: int, weight: Tensor) -> Tensor:
            return torch.randn(rows, weight.shape[1], device=self.device, dtype=self.dtype)

        self._states = states(self.response_rows, output_head(self.student).weight)
        self._teacher_states = states(self.paired_rows, self.teacher.head.weight_VD)

    def step(self, loss: DistillationLoss, *, with_teacher: bool = True) -> Tensor:
        """The loss of the states, forward and backward."""
        batch = ask(self.batch, _Kept(self._teacher_states) if with_teacher else None)
        batch.window, batch.rows_R = [batch], torch.arange(self.response_rows, device=self.device)
        loss.micro_batch = batch
        try:
            value = loss(self.student_states()[None], self._states.new_zeros(1, 1, 1))
        finally:
            loss.micro_batch = None
        value.backward()
        self.student.zero_grad(set_to_none=True)
        self._states.grad = None
        loss.zero_grad(set_to_none=True)
        return value.detach()


class _Kept:
    """Hidden states that are there already."""

    def __init__(self, states_ND: Tensor) -> None:
        self._states_ND = states_ND

    def rows(self, *_: Tensor) -> Tensor:
        return self._states_ND


def whole_step(bench: Bench, methods: list[str]) -> list[Row]:
    bench.student.gradient_checkpointing_enable({"use_reentrant": False})
    bench.student.train()
    with_teacher = {method: method != "sft" for method in methods}
    losses = {method: bench.loss(method) for method in methods}
    sft = bench.loss("sft")
    floors = {
        "F, plain logits": peak(bench.floor, bench.device),
        "F, logits in blocks": peak(lambda: bench.step(sft), bench.device),
    }
    rows = [Row(f"step: {name}, MiB", f"{value / MIB:.4g}") for name, value in floors.items()]
    for method, loss in losses.items():
        found = peak(lambda loss=loss, method=method: bench.step(loss, with_teacher=with_teacher[method]), bench.device)
        for name, base in floors.items():
            rows.append(Row(f"step: {method}, MiB", f"{found / MIB:.4g}", name, f"{found / base:.3f}"))
    return rows


def loss_alone(
    size: Size, device: torch.device, dtype: torch.dtype, methods: list[str], dense: int, impls: Iterable[str]
) -> list[Row]:
    """The loss at the rows of the size, and of the dense reference at as many tokens as `dense` says."""
    few = StatesAlone(of_tokens(size, dense, None), device, dtype)
    many = StatesAlone(size, device, dtype)
    few.student = many.student
    few.teacher = many.teacher
    rows = []
    for label, (method, backend) in computed(methods, impls).items():
        found = {}
        for name, bench in (("many", many), ("few", few)):
            bench.draw()
            loss = bench.loss(method, backend)
            loss.head_checked = True  # there are no logits to check it by
            loss.step = lambda: 0
            found[name] = peak(lambda: bench.step(loss, with_teacher=method != "sft"), device)  # noqa: B023
        base = peak(lambda: dense_step(few, method, loss), device)  # noqa: B023
        rows.append(Row(f"loss: {label}, {many.response_rows} rows, MiB", f"{found['many'] / MIB:.4g}"))
        name = f"dense, {base / MIB:.4g} MiB"
        metric = f"loss: {label}, {few.response_rows} rows, MiB"
        rows.append(Row(metric, f"{found['few'] / MIB:.4g}", name, f"{found['few'] / base:.3f}"))
    return rows


def main(words: list[str] | None = None) -> None:
    parser = parser_of("memory", __doc__, sizes=SIZES)
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--tokens", type=int, help="of the batch; 4096, with --size tiny its own")
    parser.add_argument("--dense-tokens", type=int, default=512, help="of the batch of the dense reference")
    parser.add_argument("--impl", nargs="+", choices=IMPLS, help="of the loss alone; blocks, on CUDA also fused")
    parser.add_argument("--parts", nargs="+", choices=["step", "loss"], default=["step", "loss"])
    options = parser.parse_args(words)
    device, dtype = options.device, dtype_of(options)
    size = SIZES[options.size]
    tokens = options.tokens or (size.rows * size.tokens if options.size == "tiny" else 4096)
    size = of_tokens(size, tokens, size.teacher[1]["vocab_size"])
    rows = []
    dense = min(options.dense_tokens, tokens)
    if "loss" in options.parts:
        rows += loss_alone(size, device, dtype, options.methods, dense, options.impl or impls_on(device))
    if "step" in options.parts:
        rows += whole_step(Bench(size, device, dtype), options.methods)
    setting = f"{size.text()}, {str(dtype).removeprefix('torch.')}"
    results.append("memory", device, setting, rows, results.command_of("benchmarks.memory", words), options.results)


if __name__ == "__main__":
    main()
