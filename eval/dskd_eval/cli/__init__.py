"""The command line: `dskd-eval` runs benchmarks; `list`, `doctor`, `compare` and `report` are about runs."""

from __future__ import annotations

from dskd_eval.cli.root import main

__all__ = ["main"]
