"""`python -m benchmarks.on_gpu`: every benchmark at true shapes on one GPU, within a time limit, and a plot of growth.

Qwen2.5-7B -> Llama-3.2-1B with random weights: a step of each method, in blocks and fused, its memory, building and
reading a cache, and how a step grows with tokens, with the vocabulary and with the teacher. What says most runs first;
after `--minutes` nothing new is started, and what was left out is said. Rows are written as they are measured.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks import cache, memory, results, step
from benchmarks.growth import GROWTH, free, growth, plot
from benchmarks.options import parser_of
from benchmarks.results import Row
from benchmarks.shapes import SIZES, Bench, Size, impls_on
from benchmarks.timing import Spread, ratios, taking_turns


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
