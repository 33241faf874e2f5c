"""Where the command line writes, how it tells user errors, and the group of commands."""

from __future__ import annotations

import io
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from typing import NoReturn

import click
from rich.console import Console
from rich.markup import escape

from dskd_eval.errors import UserError, nearest

OUT = Console(highlight=False)
ERR = Console(stderr=True, highlight=False)


class Commands(click.Group):
    """A group whose own options run an evaluation, and which prints user errors without a traceback."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0] if args else ""
        if name and self.get_command(ctx, name) is None:
            hint = nearest(name, self.list_commands(ctx))
            ctx.fail(f"No command {name!r}. {hint} A model is given with --model.")
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> object:
        for stream in (sys.stdout, sys.stderr):
            # A terminal without UTF-8, and names of files that are none, must not end a run.
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")
        try:
            done: object = super().invoke(ctx)
            return done
        except UserError as error:
            fail(error)
        except KeyboardInterrupt:
            ERR.print("\n[yellow]Stopped.[/]")
            sys.exit(130)
        except BrokenPipeError:
            sys.exit(1)


def fail(error: UserError) -> NoReturn:
    """Print the four parts of a user error and end with exit code 1."""
    ERR.print(f"[bold red]Error[/] {escape(error.where)}", soft_wrap=True)
    ERR.print(f"  expected  {escape(error.expected)}", soft_wrap=True)
    ERR.print(f"  got       {escape(error.got)}", soft_wrap=True)
    ERR.print(f"  [bold]do[/]        {escape(error.fix)}", soft_wrap=True)
    raise SystemExit(1)


def split(values: Sequence[str]) -> list[str]:
    return [part.strip() for value in values for part in value.split(",") if part.strip()]


def quiet_libraries() -> None:
    """No progress bars, warnings or network chatter of the libraries between our own lines."""
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
