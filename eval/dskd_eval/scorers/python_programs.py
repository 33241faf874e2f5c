"""The scorer `python`: the program of an answer passes the tests of its row in the sandbox."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from dskd_eval.data import Row
from dskd_eval.errors import UserError
from dskd_eval.programs import parses, program_of, why_untested
from dskd_eval.programs.row_tests import beginning
from dskd_eval.sandbox import Outcome
from dskd_eval.schema import Free
from dskd_eval.scorers.base import Answer, Scorer
from dskd_eval.scorers.metrics import Judgement, Metric, Value, pass_metric

RunPrograms = Callable[[Sequence[tuple[str, str]]], list[Outcome]]


class Python(Scorer):
    """The tests of the row judge. run_programs: executes (program, tests) pairs; only `score` needs it."""

    name = "python"
    metrics = {
        "pass@1": pass_metric("pass@1"),
        "timeout": Metric("timeout", "programs stopped at a limit", higher_is_better=False),
        "syntax_error": Metric("syntax error", "programs that do not parse", higher_is_better=False),
    }
    executes_code = True
    required_code = ("tests",)
    needs_reference = False
    checked_before_run = False  # That takes a sandbox: `doctor --oracle` does it.

    def __init__(self, run_programs: RunPrograms | None = None) -> None:
        self.run_programs = run_programs

    def check_row(self, row: Row, parts: Mapping[str, str]) -> None:
        """Raises UserError for parts that are no Python, and for tests that cannot fail."""
        for key in ("setup", "tests"):
            if not parses(parts[key]):
                raise UserError(
                    f"`code.{key}`",
                    expected="a Python program",
                    got=beginning(parts[key]),
                    fix="Join a list of lines with {{ " + key + " | join('\\n') }}, or correct the data file.",
                )
        untested = why_untested(parts["tests"], parts["setup"])
        if untested:
            raise UserError(
                "`code.tests`",
                expected="statements that a right program passes and a wrong one fails: an assertion or a call",
                got=untested.got,
                fix=untested.fix,
            )

    def extracted(self, answer: Answer) -> str:
        return f"{program_of(answer.text, answer.parts).text}\n{answer.parts['tests']}".strip()

    def score(self, answers: Sequence[Answer]) -> list[Judgement]:
        """Run every program with its tests in the sandbox; 1 when the tests ran to their end."""
        if self.run_programs is None:
            raise UserError(
                f"`scorer: {self.name}`",
                expected="a sandbox",
                got="none",
                fix="Install bubblewrap (`dskd-eval doctor`).",
            )
        programs = [program_of(answer.text, answer.parts) for answer in answers]
        jobs = [(program.text, answer.parts["tests"]) for program, answer in zip(programs, answers, strict=True)]
        scored = []
        for program, outcome in zip(programs, self.run_programs(jobs), strict=True):
            metrics: dict[str, Value] = {
                "pass@1": float(outcome.passed),
                "timeout": float(outcome.status in ("timeout", "output limit")),
                "syntax_error": float(outcome.status == "syntax error"),
            }
            details: dict[str, Free] = {
                "program": program.text,
                "status": outcome.status,
                "error": outcome.error,
                "dropped": list(program.dropped),
            }
            scored.append(Judgement(metrics, details))
        return scored
