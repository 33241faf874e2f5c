"""`python -m benchmarks.growth`: how long a step takes as its tokens, its vocabulary or its teacher grow, and a plot.

Fine-tuning, F (`benchmarks.step`) and dskd take turns at each amount. Models have random weights. Seconds are this
process's CPU seconds, on a GPU the clock's.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import results
from benchmarks.options import dtype_of, parser_of
from benchmarks.results import Row
from benchmarks.shapes import SIZES, Bench, Size
from benchmarks.timing import Spread, taking_turns

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


def main(words: list[str] | None = None) -> None:
    parser = parser_of("growth", __doc__, sizes=SIZES)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--plot", type=Path, default=Path("out") / "growth.png")
    options = parser.parse_args(words)
    device, dtype, size = options.device, dtype_of(options), SIZES[options.size]
    setting, every = f"{size.text()}, {str(dtype).removeprefix('torch.')}", []
    for what in GROWTH:
        rows = growth(size, what, device, dtype, options.repeats)
        every += rows
        results.append("growth", device, setting, rows, results.command_of("benchmarks.growth", words), options.results)
    plot(every, options.plot)


if __name__ == "__main__":
    main()
