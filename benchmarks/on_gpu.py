"""`python -m benchmarks.on_gpu`: every benchmark at true shapes on one GPU, within a time limit, and a plot of growth.

Qwen2.5-7B -> Llama-3.2-1B with random weights: a step of each method, in blocks and fused, its memory, building and
reading a cache, and how a step grows with tokens, with the vocabulary and with the teacher. What says most runs first;
after `--minutes` nothing new is started, and what was left out is said. Rows are written as they are measured.
"""

from __future__ import annotations

import gc
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import cache, memory, results, step
from benchmarks.options import parser_of
from benchmarks.results import Row
from benchmarks.shapes import SIZES, Bench, Size, impls_on
from benchmarks.timing import Spread, ratios, taking_turns

# What grows -> the sizes to measure, as shares of the size that is named.
GROWTH = {"tokens": (0.25, 0.5, 1.0, 2.0), "vocabulary": (0.25, 0.5, 1.0), "teacher layers": (0.25, 0.5, 1.0)}


def grown(size: Size, what: str, share: float) -> tuple[Size, int]:
    """The size with one thing changed, and how much of that there is."""
    (ours, student), (theirs, teacher) = size.student, size.teacher
    if what == "tokens":
        tokens = int(size.tokens * share)
        return replace(size, tokens=tokens, prompt=tokens // 4), tokens * size.rows
    if what == "vocabulary":
        made = [{**side, "vocab_size": int(side["vocab_size"] * share)} for side in (student, teacher)]
        return replace(size, student=(ours, made[0]), teacher=(theirs, made[1])), made[1]["vocab_size"]
    layers = max(1, int(teacher["num_hidden_layers"] * share))
    return replace(size, teacher=(theirs, {**teacher, "num_hidden_layers": layers})), layers


def growth(size: Size, what: str, device: torch.device, dtype: torch.dtype, repeats: int) -> list[Row]:
    """Seconds of a step of fine-tuning, of F and of dskd at each amount."""
    rows = []
    for share in GROWTH[what]:
        made, amount = grown(size, what, share)
        bench = Bench(made, device, dtype)
        loss = bench.loss("dskd")
        work: dict[str, Callable[[], Any]] = {
            "sft": bench.plain_sft,
            "F": bench.floor,
            "dskd": lambda bench=bench, loss=loss: bench.step(loss),
        }
        for name, seconds in taking_turns(work, repeats, device).items():
            rows.append(Row(f"growth: {name}, s at {what} {amount}", f"{Spread.of(seconds).median:.4g}"))
        del bench, loss, work
        free(device)
    return rows


def cached(size: str, device: torch.device, dtype: torch.dtype, repeats: int) -> list[Row]:
    """Building a teacher cache and a step that reads it."""
    with tempfile.TemporaryDirectory() as folder:
        return cache.measure(cache.Bench(cache.SIZES[size], device, dtype, Path(folder)), repeats)


def offloaded(size: Size, device: torch.device, dtype: torch.dtype, repeats: int) -> list[Row]:
    """A step of dskd whose teacher comes to the device to read, against one whose teacher stays there."""
    bench = Bench(size, device, dtype)
    loss = bench.loss("dskd")
    name = "dskd, teacher on the device"
    stays = taking_turns({name: lambda: bench.step(loss)}, repeats, device)[name]
    bench.teacher.offload(device)
    waits = taking_turns({name: lambda: bench.step(loss)}, repeats, device)[name]
    return [
        Row(f"{name}, s", str(Spread.of(stays))),
        Row("dskd, teacher offloaded, s", str(Spread.of(waits)), name, str(ratios(waits, stays))),
    ]


def free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def plot(rows: list[Row], to: Path) -> None:
    """Seconds of a step against what grows, a line for each of sft, F and dskd."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        print(f"{to}: not drawn, because matplotlib is not installed; the numbers are written")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    found: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for row in rows:
        if row.metric.startswith("growth: "):
            name, rest = row.metric.removeprefix("growth: ").split(", s at ")
            what, amount = rest.rsplit(" ", 1)
            found.setdefault(what, {}).setdefault(name, []).append((int(amount), float(row.value)))
    figure, axes = pyplot.subplots(1, max(1, len(found)), figsize=(4.5 * max(1, len(found)), 3.5), squeeze=False)
    for axis, (what, lines) in zip(axes[0], found.items(), strict=False):
        for name, points in lines.items():
            axis.plot(*zip(*points, strict=True), marker="o", label=name)
        axis.set(xlabel=what, ylabel="seconds of a step", ylim=(0, None))
        axis.legend()
    figure.tight_layout()
    to.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(to, dpi=120)
    pyplot.close(figure)


def parts(size: str, device: torch.device, dtype: torch.dtype, repeats: int) -> dict[str, Callable[[], list[Row]]]:
    """What is measured, in the order in which it starts."""
    one = SIZES[size]
    tokens = one.rows * one.tokens
    methods, impls = list(step.METHODS), impls_on(device)
    wide = memory.of_tokens(one, tokens, one.teacher[1]["vocab_size"])
    made: dict[str, Callable[[], list[Row]]] = {
        "step": lambda: step.measure(Bench(one, device, dtype), methods, repeats, ["dskd"], impls),
        "memory of the loss": lambda: memory.loss_alone(wide, device, dtype, methods, min(512, tokens), impls),
        "memory of a step": lambda: memory.whole_step(Bench(wide, device, dtype), methods),
        "cache": lambda: cached(size, device, dtype, repeats),
        "offload": lambda: offloaded(one, device, dtype, repeats),
    }
    for what in GROWTH:
        made[f"growth with {what}"] = lambda what=what: growth(one, what, device, dtype, repeats)
    return made


def main(words: list[str] | None = None) -> None:
    parser = parser_of("on_gpu", __doc__)
    parser.add_argument("--size", choices=list(SIZES), default="true")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--minutes", type=float, default=6, help="start nothing new after so many (default: 6)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--plot", type=Path, default=Path("out") / "gpu.png")
    options = parser.parse_args(words)
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("benchmarks.on_gpu: no CUDA device here, nothing measured")
        return
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    setting = f"{SIZES[options.size].text()}, {str(dtype).removeprefix('torch.')}"
    options.results.parent.mkdir(parents=True, exist_ok=True)
    started, every = time.monotonic(), []
    for name, measure in parts(options.size, device, dtype, options.repeats).items():
        if time.monotonic() - started > 60 * options.minutes:
            print(f"left out: {name}")
            continue
        rows = measure()
        every += rows
        command = results.command_of("benchmarks.on_gpu", words)
        results.append(name, device, setting, rows, command, options.results)
        free(device)
    plot(every, options.plot)


if __name__ == "__main__":
    main()
