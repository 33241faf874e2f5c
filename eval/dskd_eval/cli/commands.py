"""The commands beside an evaluation: list, doctor, compare, report."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import click
from pydantic import JsonValue
from rich.markup import escape

from dskd_eval.cli.console import ERR, OUT, quiet_libraries, split
from dskd_eval.errors import UserError
from dskd_eval.report.terminal import show_comparison, show_notes
from dskd_eval.tasks import planning, selection
from dskd_eval.tasks.spec import STYLES, SUITES, TaskSpec

if TYPE_CHECKING:
    from dskd_eval.run_folder import SavedRun

_SUITES = ", ".join(SUITES)
Decorated = TypeVar("Decorated", bound=Callable[..., object])


@click.command("list")
@click.option("--json", "as_json", is_flag=True, help="Machine-readable.")
def list_tasks(as_json: bool) -> None:
    """Suites and tasks, with metric, shots, stop rules and data."""
    specs = selection.builtin_tasks().values()
    if as_json:
        click.echo(json.dumps([_listed(spec) for spec in specs], indent=1))
        return
    previous = None
    for spec in specs:
        base, chat = (planning.plan(spec, chat=style == "chat") for style in STYLES)
        if previous != base.spec.suite:
            OUT.print(f"\n[bold]{base.spec.suite}[/]")
        previous = base.spec.suite
        tokens = "/".join(dict.fromkeys(str(plan.generation["max_gen_toks"]) for plan in (base, chat)))
        shots = "/".join(dict.fromkeys(str(plan.shots) for plan in (base, chat)))
        protocols = "".join(f", protocol {name}" for name in base.spec.protocols)
        OUT.print(f"  [bold]{base.spec.name:<14}[/] {base.primary:<14} {shots}-shot, {tokens} tokens{protocols}")
        OUT.print(f"  {'':<14} [dim]{escape(base.spec.summary)}[/]", soft_wrap=True)
    OUT.print("\n[dim]a/b: base style/chat style. All prompts, stop rules and metrics: dskd-eval list --json[/]")
    OUT.print("[dim]A task of your own: --task-file my.yaml (docs/eval.md).[/]")


def _listed(spec: TaskSpec) -> dict[str, JsonValue]:
    """A task with its plan in both styles."""
    plans = {style: planning.plan(spec, chat=style == "chat").record().plain() for style in STYLES}
    files: list[JsonValue] = [source.file for source in spec.data["test"]]
    return {**plans["base"], "styles": {**plans}, "protocols": [*sorted(spec.protocols)], "data": files}


@click.command()
@click.option("--data-dir", metavar="DIR", help="Benchmark files; else DSKD_DATA, else the hub.")
@click.option("--suite", multiple=True, metavar="NAMES", help=f"Only these suites: {_SUITES}.")
@click.option("--oracle", is_flag=True, help="Also feed every task its reference answers: all must score 100.")
@click.option("--limit", type=click.IntRange(min=1), help="With --oracle: documents per task.")
@click.option(
    "--task-file",
    multiple=True,
    type=click.Path(path_type=Path),
    help="A task of your own, alone or beside --suite. Repeatable.",
)
def doctor(
    data_dir: str | None, suite: tuple[str, ...], oracle: bool, limit: int | None, task_file: tuple[Path, ...]
) -> None:
    """Check data files, packages, sandbox and devices; name what is missing."""
    if limit and not oracle:
        raise click.UsageError("--limit is of the reference answers: give it with --oracle.")
    quiet_libraries()
    from dskd_eval import doctor as checks

    suites = split(suite) or (() if task_file else SUITES)
    specs = selection.select(suites, (), task_file)
    bad = 0
    with ERR.status("checking"):
        found = list(checks.run(specs, data_dir))
    for check in itertools.chain(found, checks.oracle(specs, data_dir, limit) if oracle else ()):
        mark = {"ok": "[green]ok  [/]", "warn": "[yellow]warn[/]", "bad": "[red]bad [/]"}[check.state]
        OUT.print(f"{mark} {escape(check.what):<26} {escape(check.text)}", soft_wrap=True)
        bad += check.state == "bad"
    if bad:
        OUT.print(f"\n[red]{bad} problems.[/]")
        raise SystemExit(1)
    OUT.print("\n[green]Ready.[/]")


def _roles(command: Decorated) -> Decorated:
    """The options that name models for a comparison."""
    options = [
        click.option(
            "--baseline",
            metavar="MODEL",
            help="Model the others are compared with. [default: --base, else base of a recipe, else the first]",
        ),
        click.option("--teacher", metavar="MODEL", help="For the closed gap, beside --base."),
        click.option("--base", metavar="MODEL", help="The untouched student: the others are compared with it."),
        click.option(
            "--student",
            multiple=True,
            metavar="MODEL",
            help="For the closed gap. Repeatable. [default: all trained ones]",
        ),
    ]
    for option in reversed(options):
        command = option(command)
    return command


@click.command()
@click.argument("runs", nargs=-1, required=True, metavar="RUN[:MODEL]...")
@_roles
@click.option("--skip-different", is_flag=True, help="Leave out tasks whose prompts differ instead of refusing.")
@click.option("--json", "as_json", is_flag=True, help="Machine-readable.")
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    metavar="PATH",
    help="Also write it: a .json or .md file, or a folder for both.",
)
def compare(
    runs: tuple[str, ...],
    baseline: str | None,
    teacher: str | None,
    base: str | None,
    student: tuple[str, ...],
    skip_different: bool,
    as_json: bool,
    output: Path | None,
) -> None:
    """Paired differences between models of one or several runs."""
    from dskd_eval import comparison
    from dskd_eval import report as writer
    from dskd_eval.entries import entries_of

    found = comparison.compare(
        entries_of([_open(text) for text in runs]),
        baseline=baseline,
        teacher=teacher,
        base=base,
        students=student,
        strict=not skip_different,
    )
    written = writer.write_comparison(found, output) if output else []
    if as_json:
        click.echo(json.dumps(found.plain(), indent=1))
        return
    show_comparison(found, OUT)
    show_notes(found.notes, OUT)
    OUT.print(
        "[dim]Paired on the same documents; difference in points; p: exact McNemar, or sign-flip permutation "
        "for graded scores; Holm over the tasks of a pair. –: unknown.[/]"
    )
    for path in written:
        OUT.print(escape(str(path)), soft_wrap=True)


@click.command()
@click.argument("runs", nargs=-1, required=True, metavar="RUN[:MODEL]...")
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    help="Folder for report.md and report.html. [default: the first run]",
)
@_roles
def report(
    runs: tuple[str, ...],
    output: Path | None,
    baseline: str | None,
    teacher: str | None,
    base: str | None,
    student: tuple[str, ...],
) -> None:
    """Write report.md and report.html of one run, or of several side by side."""
    from dskd_eval import report as writer
    from dskd_eval.entries import Roles

    opened = [_open(text) for text in runs]
    if len(opened) > 1 and output is None:
        raise UserError("report", expected="--output for a report of several runs", got="none", fix="Add --output DIR.")
    roles = Roles(baseline, teacher, base, student)
    for path in writer.write(opened, output or opened[0].folder, roles):
        OUT.print(escape(str(path)), soft_wrap=True)


def _open(text: str) -> SavedRun:
    from dskd_eval.run_folder import SavedRun

    if Path(text).exists() or ":" not in text:
        return SavedRun(Path(text))
    path, _, model = text.rpartition(":")
    return SavedRun(Path(path), model)
