"""Ideal initialisation: SVD pseudo-inverse against Gram matrices, on random heads conditioned like real ones.

    python benchmarks/gram_init.py [--width 1024] [--tokens 50000] [--source-width 1024] [--device cpu]

Prints both times, their ratio and the largest difference, and appends a row to benchmarks/results.csv.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from dskd_plugin.core.projectors import head_map

RESULTS = Path(__file__).with_name("results.csv")
COLUMNS = ["date", "benchmark", "device", "setting", "metric", "value", "command"]
CONDITION = 95.0  # as measured on the heads of small public models


def conditioned(tokens: int, width: int, generator: torch.Generator) -> Tensor:
    """A random [tokens, width] head whose singular values fall off to 1 / CONDITION."""
    rotation = torch.linalg.qr(torch.randn(width, width, generator=generator))[0]
    spectrum = torch.logspace(0, -torch.log10(torch.tensor(CONDITION)).item(), width)
    return torch.randn(tokens, width, generator=generator) @ (spectrum[:, None] * rotation)


def timed(work: Callable[[], Tensor], device: torch.device) -> tuple[float, Tensor]:
    start = time.perf_counter()
    result = work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start, result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=1024, help="width of the target's head")
    parser.add_argument("--source-width", type=int, default=1024, help="width of the source's head")
    parser.add_argument("--tokens", type=int, default=50_000, help="shared tokens")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    device = torch.device(args.device)
    generator = torch.Generator().manual_seed(0)
    target = conditioned(args.tokens, args.width, generator).to(device)
    source = conditioned(args.tokens, args.source_width, generator).to(device)
    ids = torch.arange(args.tokens, device=device)

    gram_seconds, by_gram = timed(lambda: head_map(source, target, ids, ids), device)
    svd_seconds, by_svd = timed(lambda: source.T @ torch.linalg.pinv(target.T), device)

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    setting = f"{args.source_width} and {args.width} x {args.tokens}, condition {CONDITION:g}"
    measured = {
        "svd_seconds": f"{svd_seconds:.2f}",
        "gram_seconds": f"{gram_seconds:.2f}",
        "svd_over_gram": f"{svd_seconds / gram_seconds:.2f}",
        "max_abs_difference": f"{(by_gram - by_svd).abs().max().item():.2e}",
    }
    command = " ".join(["python", "benchmarks/gram_init.py", *sys.argv[1:]])
    new = not RESULTS.exists()
    with RESULTS.open("a", newline="") as file:
        writer = csv.writer(file)
        if new:
            writer.writerow(COLUMNS)
        for metric, value in measured.items():
            print(f"{metric:>20} {value}")
            writer.writerow([datetime.date.today(), "gram_init", name, setting, metric, value, command])


def _processor() -> str:
    """What the processor calls itself, with the number of threads in use."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    return f"{model}, {torch.get_num_threads()} threads"


if __name__ == "__main__":
    main()
