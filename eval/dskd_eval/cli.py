"""The command line: `dskd-eval` runs benchmarks; `list`, `doctor`, `compare` and `report` are about runs."""

from __future__ import annotations

import io
import json
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click
from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from dskd_eval import shown
from dskd_eval.errors import UserError
from dskd_eval.schema import Comparison, MetricScore, Results, Score, Settings, SuiteScore, TaskScore
from dskd_eval.tasks import planning, selection
from dskd_eval.tasks.spec import STYLES, SUITES

if TYPE_CHECKING:
    from dskd_eval.records import Run

_OUT = Console(highlight=False)
_ERR = Console(stderr=True, highlight=False)
_SUITES = ", ".join(SUITES)


class _Commands(click.Group):
    """A group whose own options run an evaluation, and which prints user errors without a traceback."""

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        name = args[0] if args else ""
        if name and self.get_command(ctx, name) is None:
            from dskd_eval.errors import nearest

            hint = nearest(name, self.list_commands(ctx))
            ctx.fail(f"No command {name!r}. {hint} A model is given with --model.")
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        for stream in (sys.stdout, sys.stderr):
            # A terminal without UTF-8, and names of files that are none, must not end a run.
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")
        try:
            return super().invoke(ctx)
        except UserError as error:
            fail(error)
        except BrokenPipeError:
            sys.exit(1)


def fail(error: UserError) -> NoReturn:
    """Print the four parts of a user error and end with exit code 1."""
    _ERR.print(f"[bold red]Error[/] {escape(error.where)}", soft_wrap=True)
    _ERR.print(f"  expected  {escape(error.expected)}", soft_wrap=True)
    _ERR.print(f"  got       {escape(error.got)}", soft_wrap=True)
    _ERR.print(f"  [bold]do[/]        {escape(error.fix)}", soft_wrap=True)
    raise SystemExit(1)


def _split(values: Sequence[str]) -> list[str]:
    return [part.strip() for value in values for part in value.split(",") if part.strip()]


@click.group(
    cls=_Commands,
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
def main(ctx: click.Context, /, **options: Any) -> None:
    """Instruction-following, maths and code benchmarks for language models, through lm-evaluation-harness.

    \b
      dskd-eval --model out/student --suite instruct,math,code
      dskd-eval --recipe recipe.yaml --suite math --limit 100
      dskd-eval compare eval-results/run-1 eval-results/run-2
    """
    if ctx.invoked_subcommand is None:
        if not any(options[key] for key in ("model", "recipe", "suite", "tasks", "task_file")):
            click.echo(ctx.get_help())
            return
        _evaluate(options)
    elif any(options[key] for key in ("model", "recipe", "suite", "tasks", "task_file")):
        ctx.fail(f"`{ctx.invoked_subcommand}` has options of its own; give them after its name.")


def _evaluate(options: dict[str, Any]) -> None:
    """Prepare, then run or show."""
    _quiet_libraries()
    specs = selection.select(_split(options["suite"]), _split(options["tasks"]), options["task_file"])
    template = _chat_template(options["chat_template"])
    from dskd_eval import data, models, recipe
    from dskd_eval.evaluate import evaluate
    from dskd_eval.prepare import prepare

    refs = [models.parse_model(text) for text in options["model"]]
    if options["recipe"]:
        refs = [*recipe.models_of(options["recipe"]), *refs]
    directory = data.data_directory(options["data_dir"])
    settings = Settings(
        chat_template=template,
        **{
            key: options[key]
            for key in ("limit", "seed", "batch_size", "dtype", "device", "backend", "protocol",
                        "num_fewshot", "samples", "temperature", "unsafe_code", "reasoning", "max_new_tokens")
        },
    )  # fmt: skip
    output = options["output"] or _default_output(refs)
    if options["resume"] and not options["output"]:
        raise UserError("--resume", expected="--output FOLDER of the run", got="no --output", fix="Name the folder.")
    checking = "checking data, packages, sandbox and models"
    if not _ERR.is_terminal:
        _ERR.print(f"[dim]{checking}[/]")
    with _ERR.status(checking):
        prepared = prepare(refs, specs, settings, directory, execute=not options["dry_run"])
    if options["dry_run"]:
        _dry_run(prepared)
        return
    signal.signal(signal.SIGTERM, _stop)
    watcher = Terminal(sum(len(plans) for plans in prepared.plans.values()))
    for note in prepared.notes:
        watcher.note(note)
    place = escape(str(output))
    _ERR.print(f"[dim]output {place} (to go on after a stop: --output {place} --resume)[/]", soft_wrap=True)
    try:
        with watcher:
            results = evaluate(prepared, output, watcher, resume=options["resume"], cache=options["cache"])
    except KeyboardInterrupt:
        _ERR.print(f"\n[yellow]Stopped.[/] Finished tasks are in {escape(str(output))}. Go on with:", soft_wrap=True)
        _ERR.print("  " + escape(_again(output)), soft_wrap=True)
        raise SystemExit(130) from None
    _show_results(results)
    _OUT.print(f"\nReport   {escape(str(output / 'report.html'))}", soft_wrap=True)
    _OUT.print(f"Results  {escape(str(output / 'results.json'))}", soft_wrap=True)
    _OUT.print(f"Samples  {escape(str(output / 'samples.jsonl'))}", soft_wrap=True)
    if not results.complete:
        _OUT.print(f"[red]Some tasks failed[/]; details in {escape(str(output / 'errors.log'))}. After the repair:")
        _OUT.print("  " + escape(_again(output)), soft_wrap=True)
        raise SystemExit(1)


def _stop(*_: object) -> NoReturn:
    """SIGTERM ends a run as Ctrl-C does, also where a shell's background job ignores SIGINT."""
    raise KeyboardInterrupt


def _quiet_libraries() -> None:
    """No progress bars, warnings or network chatter of the libraries between our own lines."""
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    import logging
    import warnings

    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)


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


def _default_output(refs: Sequence[Any]) -> Path:
    name = refs[-1].name if refs else "run"
    safe = "".join(letter if letter.isalnum() or letter in "-_." else "_" for letter in name)
    return Path("eval-results") / f"{safe}-{datetime.now():%Y%m%d-%H%M%S}"


def _again(output: Path) -> str:
    arguments = [argument for argument in sys.argv[1:] if argument != "--resume"]
    if "--output" not in arguments and not any(argument.startswith("--output=") for argument in arguments):
        arguments += ["--output", str(output)]
    return shlex.join(["dskd-eval", *arguments, "--resume"])


class Terminal:
    """Progress on a terminal as bars; elsewhere a line per task, and one every half minute within it."""

    every = 30.0

    def __init__(self, total: int) -> None:
        self.bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=_ERR,
            transient=True,
            disable=not _ERR.is_terminal,
        )
        self.all = self.bars.add_task("all tasks", total=total)
        self.current = self.bars.add_task("starting", total=None)
        self.label = ""
        self.state, self.begun = ("", 0, 0), time.monotonic()
        self.over = threading.Event()
        self.speaker = threading.Thread(target=self._speak, daemon=True)

    def __enter__(self) -> Terminal:
        self.bars.start()
        if not _ERR.is_terminal:
            self.speaker.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.over.set()
        self.bars.stop()
        if self.speaker.is_alive():
            self.speaker.join()

    def _speak(self) -> None:
        """Says in which part of a task the run is, also while that part takes long."""
        while not self.over.wait(self.every):
            what, done, total = self.state
            if self.label and what:
                seconds = time.monotonic() - self.begun
                ahead = f", about {seconds / done * (total - done):.0f} s to go" if 0 < done < total else ""
                line = f"  {self.label:<14} {what}: {done} of {total}, {seconds:.0f} s{ahead}"
                _ERR.print(f"[dim]{escape(line)}[/]", soft_wrap=True)

    def model(self, name: str, number: int, total: int) -> None:
        count = f" ({number + 1} of {total})" if total > 1 else ""
        _ERR.print(f"[bold]{escape(name)}[/]{count}", soft_wrap=True)

    def task(self, model: str, task: str, number: int, total: int) -> None:
        self.label, self.state, self.begun = task, ("", 0, 0), time.monotonic()
        self.bars.reset(self.current, description=escape(task), total=None)

    def step(self, what: str, done: int, total: int) -> None:
        if what.split(",")[0] != self.state[0].split(",")[0]:
            self.begun = time.monotonic()
        self.state = (what, done, total)
        self.bars.update(self.current, description=escape(f"{self.label}: {what}"), completed=done, total=total)

    def finished(self, model: str, task: str, score: TaskScore, seconds: float, kept: bool) -> None:
        name, metric = next(iter(score.metrics.items()))
        line = f"  {task:<14} {shown.fixed(metric.value):>6}  ({shown.span(metric.low, metric.high)})"
        line += f"  {name}, n={score.n}"
        facts = score.answers.given()
        extra = [f"{facts[key]} {text}" for key, text in _FACTS.items() if facts.get(key)]
        line += f"  {seconds:.0f} s" + (" (kept)" if kept else "")
        self.state = ("", 0, 0)
        _ERR.print(escape(line) + (f"  [dim]{escape(', '.join(extra))}[/]" if extra else ""), soft_wrap=True)
        self.bars.advance(self.all)

    def failed(self, model: str, task: str, message: str) -> None:
        _ERR.print(f"  {escape(task):<14} [red]failed[/]  {escape(message)}", soft_wrap=True)
        self.bars.advance(self.all)

    def note(self, message: str) -> None:
        _ERR.print(f"[yellow]note[/] {escape(message)}", soft_wrap=True)


_FACTS = {
    "empty": "empty",
    "unfinished": "at the token limit",
    "clamped": "with a lowered limit",
    "prompts_cut": "prompts cut",
    "with_reasoning": "with reasoning",
    "unfinished_reasoning": "with unfinished reasoning",
}


def _show_results(results: Results) -> None:
    labels = [model.name for model in results.models]
    table = Table(title="Scores with 95 % intervals", title_justify="left", header_style="bold")
    table.add_column("task")
    table.add_column("metric", overflow="fold")
    table.add_column("n", justify="right")
    for label in labels:
        table.add_column(escape(label), justify="right", overflow="fold")
    tasks = list(dict.fromkeys(score.task.task for score in results.scores))
    by_place = {(score.task.task, score.model): score for score in results.scores}
    previous = None
    for task in tasks:
        rows = [by_place[task, label] for label in labels]
        suite = rows[0].task.suite
        if previous not in (None, suite):
            _suite_row(table, results, str(previous), labels)
        previous = suite
        sizes = sorted({row.n for row in rows if row.finished})
        cells = [_cell(row) for row in rows]
        table.add_row(task, rows[0].task.primary_metric, "/".join(map(str, sizes)), *cells)
    if previous is not None:
        _suite_row(table, results, str(previous), labels)
    _OUT.print(table)
    _show_comparisons(results.comparisons)
    for note in results.notes:
        _OUT.print(f"[yellow]note[/] {escape(note)}", soft_wrap=True)


def _suite_row(table: Table, results: Results, suite: str, labels: list[str]) -> None:
    values = {item.model: item for item in results.suites if item.suite == suite}
    if values:
        cells = [_interval(values[label]) if label in values else "" for label in labels]
        table.add_row(f"[bold]{suite}[/]", "[dim]mean of the suite[/]", "", *[f"[bold]{cell}[/]" for cell in cells])
        table.add_section()


def _cell(score: Score) -> str:
    if not score.finished:
        return f"[red]{score.status}[/]"
    return _interval(score.primary)


def _interval(item: MetricScore | SuiteScore) -> str:
    if item.low is None or item.high is None:
        return f"{shown.fixed(item.value)} [dim]{shown.UNKNOWN}[/]"
    return f"{shown.fixed(item.value)} [dim]{shown.fixed(item.low)}–{shown.fixed(item.high)}[/]"


def _show_comparisons(found: Comparison) -> None:
    from dskd_eval import comparison

    for gap in found.gaps:
        if not gap.rows:
            continue
        table = Table(title=f"Gap closed by {escape(gap.model)}", title_justify="left", header_style="bold")
        for name in ("task", "base", "student", "teacher", "closed", "95 %", "n"):
            table.add_column(name, justify="left" if name == "task" else "right")
        for share in gap.rows:
            closed = shown.UNKNOWN if share.closed is None else f"{shown.fixed(share.closed, 0)} %"
            numbers = [shown.fixed(score) for score in (share.base, share.student, share.teacher)]
            table.add_row(share.task, *numbers, closed, comparison.gap_span(share), str(share.n))
        _OUT.print(table)
    for pair in found.pairs:
        if not pair.rows:
            continue
        against = found.baseline if pair.against is None else pair.against
        title = f"{escape(pair.model)} against {escape(against)}"
        table = Table(title=title, title_justify="left", header_style="bold")
        for name in ("task", "diff.", "95 %", "p", "p Holm", "win/tie/loss", "n"):
            table.add_column(name, justify="left" if name == "task" else "right", no_wrap=True)
        for row in pair.rows:
            colour = {"second": "green", "first": "red", None: "default"}[row.better]
            size = str(row.n) if row.n == row.of else f"{row.n} of {row.of}"
            cells = [shown.signed_span(row.low, row.high), shown.p_value(row.p), shown.p_value(row.p_holm)]
            cells.append(f"{row.wins}/{row.ties}/{row.losses}")
            table.add_row(row.task, f"[{colour}]{shown.signed(row.difference)}[/]", *cells, size)
        _OUT.print(table)


def _dry_run(prepared: Any) -> None:
    """Plans, one prompt per task and reference; weights are not loaded."""
    from dskd_eval.backends import hf
    from dskd_eval.lmeval.model import EvalLM
    from dskd_eval.lmeval.preview import preview
    from dskd_eval.scorers import registry
    from dskd_eval.tasks.rows import choose_documents

    for folder in prepared.folders:
        tokenizer = hf.load_tokenizer(folder, prepared.templates[folder.name])
        lm = EvalLM(_TokenizerOnly(folder.name, tokenizer, dict(folder.ref.template_options)))
        _OUT.rule(f"[bold]{escape(folder.name)}[/]")
        for start, end in prepared.markers[folder.name]:
            _OUT.print(escape(f"reasoning from {start} to {end} is not scored"), soft_wrap=True)
        for plan in prepared.plans[folder.name]:
            rows = prepared.data[plan.spec.name]
            total = len(rows.test.rows) if rows.test else 0
            chosen = choose_documents(total, prepared.settings.limit, prepared.settings.seed) if total else [0]
            shown = preview(lm, plan, rows, chosen[0])
            stop = ", ".join(repr(text) for text in plan.generation["until"]) or "the end token"
            drawn = f"{len(plan.seeds)} samples, seeds {plan.seeds}" if plan.generation.get("do_sample") else "greedy"
            facts = [
                f"{plan.spec.suite}/{plan.spec.name} v{plan.spec.version:g}: {plan.spec.summary}",
                f"documents {len(chosen)} of {total or '?'}   shots {plan.shots}   style {plan.style}   "
                f"protocol {plan.protocol}",
                f"primary metric {plan.primary}: {registry.metric_info(plan.primary).description}",
                f"answers: {drawn}, at most {plan.generation['max_gen_toks']} tokens, until {stop}",
                f"data {rows.test.source}   digest {rows.test.digest}" if rows.test else "data loaded by lm-eval",
            ]
            _OUT.print("\n" + escape("\n".join(facts)), soft_wrap=True)
            title = f"prompt of document {chosen[0]}" + (f", {shown.tokens} tokens" if shown.tokens is not None else "")
            _OUT.print(Panel(escape(shown.prompt), title=title, title_align="left"))
            if shown.reference:
                _OUT.print(Panel(escape(shown.reference), title="reference (scores 100)", title_align="left"))
            if shown.extracted:
                what = "program that is run for it" if plan.spec.executes_code else "extracted from it"
                _OUT.print(Panel(escape(shown.extracted), title=what, title_align="left"))
    for note in prepared.notes:
        _OUT.print(f"[yellow]note[/] {escape(note)}", soft_wrap=True)
    _OUT.print("\nNothing was generated (--dry-run).")


class _TokenizerOnly:
    """A backend that renders and counts, for dry runs."""

    kind = "none"
    pads = True
    told: Any = None
    default_batch_size = 1
    max_length = 1 << 30

    def __init__(self, name: str, tokenizer: Any, template_options: Mapping[str, Any]) -> None:
        self.name, self.tokenizer, self.template_options = name, tokenizer, template_options
        self.identity: Mapping[str, Any] = {"fingerprint": ""}

    def encode(self, text: str, *, special_tokens: bool) -> list[int]:
        from dskd_eval.backends.hf import encode

        return encode(self.tokenizer, text, special_tokens=special_tokens)

    def render(self, messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
        from dskd_eval.backends.hf import render_chat

        return render_chat(self.tokenizer, messages, add_generation_prompt, self.template_options)

    def template(self) -> str | None:
        found: str | None = self.tokenizer.chat_template
        return found

    def generate(self, prompts: Any, settings: Any) -> list[Any]:
        raise NotImplementedError("a dry run generates nothing")

    def likelihood_model(self, batch_size: int) -> Any:
        raise NotImplementedError("a dry run generates nothing")


@main.command("list")
@click.option("--json", "as_json", is_flag=True, help="Machine-readable.")
def list_tasks(as_json: bool) -> None:
    """Suites and tasks, with metric, shots, stop rules and data."""
    plans = [
        {style: planning.plan(spec, chat=style == "chat") for style in STYLES}
        for spec in selection.builtin_tasks().values()
    ]
    if as_json:
        rows = [
            {
                **pair["base"].record().plain(),
                "styles": {style: plan.record().plain() for style, plan in pair.items()},
                "protocols": sorted(pair["base"].spec.protocols),
                "data": [source.file for source in pair["base"].spec.data["test"]],
            }
            for pair in plans
        ]
        click.echo(json.dumps(rows, indent=1))
        return
    previous = None
    for pair in plans:
        base, chat = pair["base"], pair["chat"]
        if previous != base.spec.suite:
            _OUT.print(f"\n[bold]{base.spec.suite}[/]")
        previous = base.spec.suite
        tokens = "/".join(dict.fromkeys(str(plan.generation["max_gen_toks"]) for plan in (base, chat)))
        shots = "/".join(dict.fromkeys(str(plan.shots) for plan in (base, chat)))
        protocols = "".join(f", protocol {name}" for name in base.spec.protocols)
        _OUT.print(f"  [bold]{base.spec.name:<14}[/] {base.primary:<14} {shots}-shot, {tokens} tokens{protocols}")
        _OUT.print(f"  {'':<14} [dim]{escape(base.spec.summary)}[/]", soft_wrap=True)
    _OUT.print("\n[dim]a/b: base style/chat style. All prompts, stop rules and metrics: dskd-eval list --json[/]")
    _OUT.print("[dim]A task of your own: --task-file my.yaml (docs/eval.md).[/]")


@main.command()
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
    _quiet_libraries()
    from dskd_eval import doctor as checks

    suites = _split(suite) or (() if task_file else SUITES)
    specs = selection.select(suites, (), task_file)
    bad = 0
    with _ERR.status("checking"):
        found = list(checks.run(specs, data_dir))
    for check in found:
        mark = {"ok": "[green]ok  [/]", "warn": "[yellow]warn[/]", "bad": "[red]bad [/]"}[check.state]
        _OUT.print(f"{mark} {escape(check.what):<26} {escape(check.text)}", soft_wrap=True)
        bad += check.state == "bad"
    if oracle:
        for result in checks.oracle(specs, data_dir, limit):
            mark = "[green]ok  [/]" if result.state == "ok" else "[red]bad [/]"
            _OUT.print(f"{mark} {escape(result.what):<26} {escape(result.text)}", soft_wrap=True)
            bad += result.state == "bad"
    if bad:
        _OUT.print(f"\n[red]{bad} problems.[/]")
        raise SystemExit(1)
    _OUT.print("\n[green]Ready.[/]")


def _roles(command: Any) -> Any:
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


@main.command()
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

    found = comparison.compare(
        comparison.entries([_open(text) for text in runs]),
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
    _show_comparisons(found)
    for note in found.notes:
        _OUT.print(f"[yellow]note[/] {escape(note)}", soft_wrap=True)
    _OUT.print(
        "[dim]Paired on the same documents; difference in points; p: exact McNemar, or sign-flip permutation "
        "for graded scores; Holm over the tasks of a pair. –: unknown.[/]"
    )
    for path in written:
        _OUT.print(escape(str(path)), soft_wrap=True)


@main.command()
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
    from dskd_eval.comparison import Roles

    opened = [_open(text) for text in runs]
    if len(opened) > 1 and output is None:
        raise UserError("report", expected="--output for a report of several runs", got="none", fix="Add --output DIR.")
    roles = Roles(baseline, teacher, base, student)
    for path in writer.write(opened, output or opened[0].folder, roles):
        _OUT.print(escape(str(path)), soft_wrap=True)


def _open(text: str) -> Run:
    from dskd_eval.records import Run

    if Path(text).exists() or ":" not in text:
        return Run(Path(text))
    path, _, model = text.rpartition(":")
    return Run(Path(path), model)


if __name__ == "__main__":
    main()
