"""Progress of a run: bars on a terminal, lines elsewhere."""

from __future__ import annotations

import threading
import time

from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from dskd_eval import number_text
from dskd_eval.cli.console import ERR
from dskd_eval.schema import TaskScore


class TerminalProgress:
    """Progress on a terminal as bars; elsewhere a line per task, and one every half minute within it."""

    every = 30.0

    def __init__(self, total: int) -> None:
        self.bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=ERR,
            transient=True,
            disable=not ERR.is_terminal,
        )
        self.all = self.bars.add_task("all tasks", total=total)
        self.current = self.bars.add_task("starting", total=None)
        self.label = ""
        self.state, self.begun = ("", 0, 0), time.monotonic()
        self.over = threading.Event()
        self.speaker = threading.Thread(target=self._speak, daemon=True)

    def __enter__(self) -> TerminalProgress:
        self.bars.start()
        if not ERR.is_terminal:
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
                ERR.print(f"[dim]{escape(line)}[/]", soft_wrap=True)

    def model(self, name: str, number: int, total: int) -> None:
        count = f" ({number + 1} of {total})" if total > 1 else ""
        ERR.print(f"[bold]{escape(name)}[/]{count}", soft_wrap=True)

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
        line = f"  {task:<14} {number_text.fixed(metric.value):>6}  ({number_text.span(metric.low, metric.high)})"
        line += f"  {name}, n={score.n}"
        facts = score.answers.given()
        extra = [f"{facts[key]} {text}" for key, text in _FACTS.items() if facts.get(key)]
        line += f"  {seconds:.0f} s" + (" (kept)" if kept else "")
        self.state = ("", 0, 0)
        ERR.print(escape(line) + (f"  [dim]{escape(', '.join(extra))}[/]" if extra else ""), soft_wrap=True)
        self.bars.advance(self.all)

    def failed(self, model: str, task: str, message: str) -> None:
        ERR.print(f"  {escape(task):<14} [red]failed[/]  {escape(message)}", soft_wrap=True)
        self.bars.advance(self.all)

    def note(self, message: str) -> None:
        ERR.print(f"[yellow]note[/] {escape(message)}", soft_wrap=True)


_FACTS = {
    "empty": "empty",
    "unfinished": "at the token limit",
    "clamped": "with a lowered limit",
    "prompts_cut": "prompts cut",
    "with_reasoning": "with reasoning",
    "unfinished_reasoning": "with unfinished reasoning",
}
