"""What the command lines of the benchmarks have in common."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from benchmarks.results import RESULTS

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def parser_of(name: str, says: str | None, *, sizes: Iterable[str] = ()) -> ArgumentParser:
    """For `python -m benchmarks.NAME`, with --results; of a benchmark with sizes also --size, --device and --dtype."""
    parser = ArgumentParser(prog=f"python -m benchmarks.{name}", description=(says or "").split("\n\n")[0])
    if sizes:
        parser.add_argument("--size", choices=list(sizes), default="small")
        parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
        parser.add_argument("--dtype", choices=list(_DTYPES), help="float32 on a CPU, else bfloat16")
    parser.add_argument("--results", type=Path, default=RESULTS)
    return parser


def dtype_of(options: Namespace) -> torch.dtype:
    """The dtype that was asked for, else that of the device."""
    return _DTYPES[options.dtype or ("float32" if options.device.type == "cpu" else "bfloat16")]


def add_stages(parser: ArgumentParser, stages: Sequence[str]) -> None:
    """STAGE...: which parts of a benchmark are done, see `stages_of`."""
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=f"{', '.join(stages)} (default: all of them)")


def stages_of(parser: ArgumentParser, options: Namespace, stages: Sequence[str]) -> list[str]:
    """The stages that were named, or all of them; a word that is none ends the command."""
    unknown = [stage for stage in options.stages if stage not in stages]
    if unknown:
        parser.error(f"STAGE: expected {', '.join(stages)}, got {', '.join(unknown)}. Leave it out to do everything.")
    return options.stages or list(stages)
