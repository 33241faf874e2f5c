"""Ideal initialisation: SVD pseudo-inverse against Gram matrices, on random heads conditioned like real ones.

    python -m benchmarks.gram_init [--width 1024] [--tokens 50000] [--source-width 1024] [--device cpu]

Prints both times, their ratio and the largest difference, and appends a row to benchmarks/results.csv.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks import results
from benchmarks.results import Row
from dskd_plugin.core.projectors import head_map

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

    setting = f"{args.source_width} and {args.width} x {args.tokens}, condition {CONDITION:g}"
    rows = [
        Row("svd_seconds", f"{svd_seconds:.2f}"),
        Row("gram_seconds", f"{gram_seconds:.2f}", "svd", f"{gram_seconds / svd_seconds:.3f}"),
        Row("max_abs_difference", f"{(by_gram - by_svd).abs().max().item():.2e}"),
    ]
    results.append("gram_init", device, setting, rows, results.command_of("benchmarks.gram_init"))


if __name__ == "__main__":
    main()
