"""The command `dskd-eval` with its own options: an evaluation."""

from __future__ import annotations

import shlex
import signal
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import NoReturn, TypedDict, Unpack

import click
from click.core import ParameterSource
from rich.markup import escape

from dskd_eval.cli.commands import compare, doctor, list_tasks, report
from dskd_eval.cli.console import ERR, OUT, Commands, quiet_libraries, split
from dskd_eval.cli.progress import TerminalProgress
from dskd_eval.errors import UserError
from dskd_eval.models import ModelRef
from dskd_eval.report.terminal import show_results
from dskd_eval.schema import Settings
from dskd_eval.tasks import selection
from dskd_eval.tasks.spec import SUITES

_SUITES = ", ".join(SUITES)


class Options(TypedDict):
    """The options below. Those with a name of `Settings` shape the scores."""

    model: tuple[str, ...]
    recipe: Path | None
    suite: tuple[str, ...]
    tasks: tuple[str, ...]
    task_file: tuple[Path, ...]
    data_dir: str | None
    output: Path | None
    resume: bool
    limit: int | None
    seed: int
    num_fewshot: int | None
    protocol: str
    samples: int
    temperature: float | None
    chat_template: str
    reasoning: str
    max_new_tokens: int | None
    backend: str
    batch_size: int | None
    dtype: str
    device: str
    cache: Path | None
    unsafe_code: bool
    dry_run: bool


@click.group(
    cls=Commands,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
@click.option(
    "--model",
    "model",
    multiple=True,
    metavar="[NAME=]PATH_OR_ID",
    help="Model or PEFT folder, or hub id. Repeatable.",
)
@click.option(
    "--recipe",
    type=click.Path(path_type=Path),
    help="Take teacher, base, sft and student from an Axolotl recipe.",
)
@click.option("--suite", multiple=True, metavar="NAMES", help=f"Suites, with commas: {_SUITES}.")
@click.option("--tasks", multiple=True, metavar="NAMES", help="Single tasks, with commas (see `dskd-eval list`).")
@click.option(
    "--task-file",
    multiple=True,
    type=click.Path(path_type=Path),
    help="A task of your own as YAML. Repeatable.",
)
@click.option("--data-dir", metavar="DIR", help="Benchmark files; else DSKD_DATA, else the hub.")
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    help="Folder of this run. [default: eval-results/<model>-<time>]",
)
@click.option("--resume", is_flag=True, help="Go on with the run in --output.")
@click.option("--limit", type=click.IntRange(min=1), help="A seeded random subset of N documents per task.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Seed of subsets and sampling.")
@click.option("--num-fewshot", type=click.IntRange(min=0), help="Shots of tasks that have rows for them.")
@click.option(
    "--protocol",
    type=click.Choice(["default", "paper"]),
    default="default",
    show_default=True,
    help="paper: sampling, five seeds and prompts as published for the instruction sets.",
)
@click.option(
    "--samples",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Programs per code task (pass@k).",
)
@click.option("--temperature", type=click.FloatRange(min=0, min_open=True), help="With --samples. [default: 0.8]")
@click.option(
    "--chat-template",
    default="auto",
    show_default=True,
    metavar="auto|on|off|FILE",
    help="auto: the tokenizer's template where it has one. FILE: a Jinja template for all models.",
)
@click.option(
    "--reasoning",
    default="auto",
    show_default=True,
    metavar="auto|off|START,END",
    help="Markers of reasoning before an answer, which is not scored. auto: those that the chat template knows.",
)
@click.option("--max-new-tokens", type=click.IntRange(min=1), help="Limit of an answer. [default: the task's]")
@click.option("--backend", type=click.Choice(["hf", "vllm"]), default="hf", show_default=True)
@click.option("--batch-size", type=click.IntRange(min=1), help="[default: 8 on a CPU, 32 on a GPU]")
@click.option(
    "--dtype",
    type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
    default="auto",
    show_default=True,
)
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:N or mps.")
@click.option("--cache", type=click.Path(path_type=Path), help="Share finished generations between runs in this file.")
@click.option("--unsafe-code", is_flag=True, help="Run generated programs without a sandbox where there is none.")
@click.option("--dry-run", is_flag=True, help="Check everything and show a prompt of every task; generate nothing.")
@click.version_option(package_name="dskd", prog_name="dskd-eval")
@click.pass_context
def main(ctx: click.Context, /, **options: Unpack[Options]) -> None:
    """Instruction-following, maths and code benchmarks for language models, through lm-evaluation-harness.

    \b
      dskd-eval --model out/student --suite instruct,math,code
      dskd-eval --recipe recipe.yaml --suite math --limit 100
      dskd-eval compare eval-results/run-1 eval-results/run-2
    """
    asked = (options["model"], options["recipe"], options["suite"], options["tasks"], options["task_file"])
    given = any(ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE for name in options)
    if ctx.invoked_subcommand is not None:
        if given:
            ctx.fail(f"`{ctx.invoked_subcommand}` has options of its own; give them after its name.")
    elif any(asked):
        _evaluate(options)
    elif given:
        ctx.fail("Nothing to evaluate: give --model or --recipe, and --suite, --tasks or --task-file.")
    else:
        click.echo(ctx.get_help())


def _evaluate(options: Options) -> None:
    """Prepare, then run or show."""
    quiet_libraries()
    specs = selection.select(split(options["suite"]), split(options["tasks"]), options["task_file"])
    template = _chat_template(options["chat_template"])
    from dskd_eval import data, models, recipe
    from dskd_eval.evaluate import evaluate
    from dskd_eval.prepare import prepare

    refs = [models.parse_model(text) for text in options["model"]]
    if options["recipe"]:
        refs = [*recipe.models_of(options["recipe"]), *refs]
    directory = data.data_directory(options["data_dir"])
    shaping = {key: value for key, value in options.items() if key in Settings.model_fields}
    settings = Settings.model_validate({**shaping, "chat_template": template})
    output = options["output"] or _default_output(refs)
    if options["resume"] and not options["output"]:
        raise UserError("--resume", expected="--output FOLDER of the run", got="no --output", fix="Name the folder.")
    checking = "checking data, packages, sandbox and models"
    if not ERR.is_terminal:
        ERR.print(f"[dim]{checking}[/]")
    with ERR.status(checking):
        prepared = prepare(refs, specs, settings, directory, execute=not options["dry_run"])
    if options["dry_run"]:
        from dskd_eval.cli.dry_run import dry_run

        dry_run(prepared)
        return
    signal.signal(signal.SIGTERM, _stop)
    watcher = TerminalProgress(sum(len(plans) for plans in prepared.plans.values()))
    for note in prepared.notes:
        watcher.note(note)
    place = escape(str(output))
    ERR.print(f"[dim]output {place} (to go on after a stop: --output {place} --resume)[/]", soft_wrap=True)
    try:
        with watcher:
            results = evaluate(prepared, output, watcher, resume=options["resume"], cache=options["cache"])
    except KeyboardInterrupt:
        ERR.print(f"\n[yellow]Stopped.[/] Finished tasks are in {escape(str(output))}. Go on with:", soft_wrap=True)
        ERR.print("  " + escape(_again(output)), soft_wrap=True)
        raise SystemExit(130) from None
    show_results(results, OUT)
    OUT.print(f"\nReport   {escape(str(output / 'report.html'))}", soft_wrap=True)
    OUT.print(f"Results  {escape(str(output / 'results.json'))}", soft_wrap=True)
    OUT.print(f"Samples  {escape(str(output / 'samples.jsonl'))}", soft_wrap=True)
    if not results.complete:
        OUT.print(f"[red]Some tasks failed[/]; details in {escape(str(output / 'errors.log'))}. After the repair:")
        OUT.print("  " + escape(_again(output)), soft_wrap=True)
        raise SystemExit(1)


def _stop(*_: object) -> NoReturn:
    """SIGTERM ends a run as Ctrl-C does, also where a shell's background job ignores SIGINT."""
    raise KeyboardInterrupt


def _chat_template(option: str) -> str:
    if option in ("auto", "on", "off"):
        return option
    path = Path(option).expanduser()
    if not path.is_file():
        raise UserError(
            "--chat-template",
            expected="auto, on, off or a template file",
            got=repr(option),
            fix="Check the path.",
        )
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError("--chat-template", expected="a UTF-8 text", got=str(error), fix="Check the file.") from error


def _default_output(refs: Sequence[ModelRef]) -> Path:
    name = refs[-1].name if refs else "run"
    safe = "".join(letter if letter.isalnum() or letter in "-_." else "_" for letter in name)
    return Path("eval-results") / f"{safe}-{datetime.now():%Y%m%d-%H%M%S}"


def _again(output: Path) -> str:
    arguments = [argument for argument in sys.argv[1:] if argument != "--resume"]
    if "--output" not in arguments and not any(argument.startswith("--output=") for argument in arguments):
        arguments += ["--output", str(output)]
    return shlex.join(["dskd-eval", *arguments, "--resume"])


for command in (list_tasks, doctor, compare, report):
    main.add_command(command)
