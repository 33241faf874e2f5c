"""Scores of answers. A scorer takes all answers of a task at once and returns one `Scored` per answer.

Metric values lie in [0, 1], or are a (numerator, denominator) pair of a ratio over prompts;
`response_words` is a count. Scores read 100 for a reference answer.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal, InvalidOperation
from typing import Any

from dskd_eval import mathematics, rouge
from dskd_eval.data import Row
from dskd_eval.digits import plain_numbers
from dskd_eval.errors import UserError
from dskd_eval.programs import parses, program_of, why_untested
from dskd_eval.programs.row_tests import beginning
from dskd_eval.tasks import render
from dskd_eval.tasks.spec import TaskSpec

Value = float | tuple[float, float]


@dataclass(frozen=True)
class Metric:
    """How to read a metric: unit 'percent' (in [0, 1], shown times 100), 'words' or 'number' (shown as it is).

    graded: a document may score between 0 and 1, so that the mean is no proportion, not even of zeros and ones.
    """

    label: str
    description: str
    unit: str = "percent"
    higher_is_better: bool = True
    graded: bool = False


METRICS: dict[str, Metric] = {
    "rouge_l": Metric(
        "Rouge-L", "F-measure of the longest common subsequence, Porter stemmer, best reference", graded=True
    ),
    "rouge_l_unicode": Metric(
        "Rouge-L, any script", "as Rouge-L, over the words or characters of any script", graded=True
    ),
    "exact_match": Metric("exact match", "answer equals a reference, ignoring case and outer space"),
    "contains": Metric("contains", "a reference occurs in the answer, ignoring case"),
    "response_words": Metric("words", "mean number of words of an answer", "words"),
    "flexible": Metric("last number", "last number of the answer equals the reference"),
    "strict": Metric("#### number", "the number after '####' equals the reference: also measures the format"),
    "math_verify": Metric("math-verify", "answer and reference are the same mathematical object"),
    "boxed": Metric("boxed", "share of answers with a \\boxed{} part"),
    "prompt_strict": Metric("prompt strict", "all instructions of the prompt followed"),
    "prompt_loose": Metric("prompt loose", "as strict, after removing markdown and first or last line"),
    "instruction_strict": Metric("instruction strict", "share of instructions followed"),
    "instruction_loose": Metric("instruction loose", "share of instructions followed, loose"),
    "timeout": Metric("timeout", "programs stopped at a limit", higher_is_better=False),
    "syntax_error": Metric("syntax error", "programs that do not parse", higher_is_better=False),
}


def metric_info(name: str) -> Metric:
    """Description of a metric; pass@k and metrics of user tasks included."""
    if name == "pass@1":
        return Metric(name, "the program passes all tests of its row")
    if name.startswith("pass@"):
        return Metric(name, f"at least one of {name[5:]} programs passes all tests (unbiased estimate)")
    return METRICS.get(name) or Metric(name, "metric of the task file")


def unit_of(name: str, values: Sequence[Any]) -> str:
    """Unit of a metric; one of a user's task is a percentage when all its values lie in [0, 1]."""
    if name in METRICS or name.startswith("pass@"):
        return metric_info(name).unit
    return "percent" if all(0 <= value <= 1 for value in values) else "number"


def is_proportion(name: str, unit: str) -> bool:
    """Whether the score is the share of documents that are right."""
    return unit == "percent" and not metric_info(name).graded


@dataclass(frozen=True)
class Answer:
    """One answer to score. `style` tells completions (base) from chat replies."""

    row: Row
    text: str
    references: list[str]
    style: str = "base"


@dataclass(frozen=True)
class Scored:
    metrics: dict[str, Value]
    details: dict[str, Any] = field(default_factory=dict)


Scorer = Callable[[Sequence[Answer]], list[Scored]]


def make_scorer(spec: TaskSpec, run_programs: Callable[..., list[Any]] | None = None) -> Scorer:
    """The scorer of a task. `run_programs` executes programs (sandbox.Sandbox.run_all) and is needed for
    code.
    """
    if spec.scorer == "python":
        if run_programs is None:
            raise UserError(
                f"task {spec.name}",
                expected="a sandbox",
                got="none",
                fix="Install bubblewrap (`dskd-eval doctor`).",
            )
        return functools.partial(score_python, spec=spec, run_programs=run_programs)
    single = _SINGLE[str(spec.scorer)]
    return lambda answers: [single(answer) for answer in answers]


def combine(scored: Sequence[Scored], metrics: Sequence[str]) -> dict[str, Value]:
    """One value per metric from the samples of one prompt: means, sums of pairs, pass@k.

    pass@k = 1 - C(n - c, k) / C(n, k) for n samples of which c pass (Chen et al. 2021, eq. 1).
    """
    combined: dict[str, Value] = {}
    for name in metrics:
        if name.startswith("pass@"):
            passed = sum(1 for item in scored if item.metrics["pass@1"] == 1.0)
            combined[name] = pass_at_k(len(scored), passed, int(name[5:]))
            continue
        values = [item.metrics[name] for item in scored]
        if isinstance(values[0], tuple):
            pairs = [value for value in values if isinstance(value, tuple)]
            combined[name] = (sum(pair[0] for pair in pairs), sum(pair[1] for pair in pairs))
        else:
            combined[name] = sum(float(value) for value in values if not isinstance(value, tuple)) / len(values)
    return combined


def pass_at_k(samples: int, passed: int, k: int) -> float:
    """Chance that at least one of k programs drawn without replacement from `samples` passes."""
    if samples - passed < k:
        return 1.0
    return 1.0 - math.comb(samples - passed, k) / math.comb(samples, k)


# --- text -----------------------------------------------------------------------------------------


def score_rouge(answer: Answer) -> Scored:
    ascii_ = max(rouge.rouge_l(answer.text, reference) for reference in answer.references)
    any_script = max(rouge.rouge_l_unicode(answer.text, reference) for reference in answer.references)
    exact = any(rouge.plain(answer.text) == rouge.plain(reference) for reference in answer.references)
    words = float(len(answer.text.split()))
    metrics: dict[str, Value] = {"rouge_l": ascii_, "exact_match": float(exact), "response_words": words}
    notes = [note for reference in answer.references if (note := rouge.unseen(reference))]
    return Scored(metrics | {"rouge_l_unicode": any_script}, {"unseen_by_rouge_l": notes[0]} if notes else {})


def score_exact(answer: Answer) -> Scored:
    exact = any(rouge.plain(answer.text) == rouge.plain(reference) for reference in answer.references)
    return Scored({"exact_match": float(exact)})


def score_contains(answer: Answer) -> Scored:
    text = rouge.plain(answer.text)
    inside = any(rouge.plain(reference) in text for reference in answer.references if reference.strip())
    return Scored({"contains": float(inside), **score_exact(answer).metrics})


# --- numbers and mathematics ----------------------------------------------------------------------

_UNSIGNED = r"(?:\d+(?:,\d{3}(?!\d))*(?:\.\d+)?|\.\d+)"
_NUMBER = re.compile(rf"(?<![\d.])-?\$?{_UNSIGNED}")
_MARKED = re.compile(rf"####\s*(-?\s*\$?{_UNSIGNED})")


def _decimal(text: str) -> Decimal | None:
    try:
        return Decimal(text.replace(",", "").replace("$", ""))
    except InvalidOperation:
        return None


def last_number(text: str) -> Decimal | None:
    r"""The last number of a text; '1,200' and '1{,}200' are one number, '5-3' ends with 3."""
    found = _NUMBER.findall(plain_numbers(text))
    return _decimal(found[-1]) if found else None


def marked_number(text: str) -> Decimal | None:
    """The number after the first '####' (the format of GSM8K's own solutions)."""
    found = _MARKED.search(plain_numbers(text))
    return _decimal("".join(found[1].split())) if found else None


def score_number(answer: Answer) -> Scored:
    golds = [marked_number(reference) for reference in answer.references]
    golds = [
        last_number(reference) if gold is None else gold
        for gold, reference in zip(golds, answer.references, strict=True)
    ]
    strict, flexible = marked_number(answer.text), last_number(answer.text)
    return Scored(
        {
            "flexible": float(flexible is not None and flexible in golds),
            "strict": float(strict is not None and strict in golds),
        },
        {"extracted": None if flexible is None else str(flexible)},
    )


def score_math(answer: Answer) -> Scored:
    inside = mathematics.boxed(answer.text)
    exact = inside is not None and any(
        "".join(inside.split()) == "".join(reference.split()) for reference in answer.references
    )
    verified = any(mathematics.same(answer.text, reference) for reference in answer.references)
    return Scored(
        {"math_verify": float(verified), "exact_match": float(exact), "boxed": float(inside is not None)},
        {"extracted": inside},
    )


# --- verifiable instructions ----------------------------------------------------------------------


@functools.cache
def _ifeval() -> Any:
    import langdetect
    from lm_eval.tasks.ifeval import utils

    langdetect.DetectorFactory.seed = 0
    return utils


def check_row(spec: TaskSpec, row: Row) -> None:
    """Raises UserError when a row lacks what its scorer reads: a field, tests that can fail."""
    if spec.executes_code:
        _check_parts(render.code_parts(spec, row))
    for name in ("prompt", "instruction_id_list", "kwargs") if spec.scorer == "ifeval" else ():
        if name not in row:
            raise UserError(
                "`scorer: ifeval`",
                expected=f"the field {name!r}, as in IFEval",
                got=", ".join(sorted(row)),
                fix="Add it, or choose another scorer.",
            )


def _check_parts(parts: Mapping[str, str]) -> None:
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


def score_ifeval(answer: Answer) -> Scored:
    utils = _ifeval()
    row = answer.row
    kwargs = [{key: value for key, value in item.items() if value is not None} for item in row["kwargs"]]
    example = utils.InputExample(
        key=row.get("key", 0), instruction_id_list=row["instruction_id_list"], prompt=row["prompt"], kwargs=kwargs
    )
    strict = utils.test_instruction_following_strict(example, answer.text)
    loose = utils.test_instruction_following_loose(example, answer.text)
    count = float(len(row["instruction_id_list"]))
    failed = [
        name
        for name, followed in zip(row["instruction_id_list"], strict.follow_instruction_list, strict=True)
        if not followed
    ]
    return Scored(
        {
            "prompt_strict": float(strict.follow_all_instructions),
            "prompt_loose": float(loose.follow_all_instructions),
            "instruction_strict": (float(sum(strict.follow_instruction_list)), count),
            "instruction_loose": (float(sum(loose.follow_instruction_list)), count),
        },
        {"not_followed": failed},
    )


# --- programs -------------------------------------------------------------------------------------


def score_python(answers: Sequence[Answer], *, spec: TaskSpec, run_programs: Callable[..., list[Any]]) -> list[Scored]:
    """Run every program with its tests in the sandbox; 1 when the tests ran to their end."""
    parts = [render.code_parts(spec, answer.row) for answer in answers]
    programs = [program_of(answer.text, part) for answer, part in zip(answers, parts, strict=True)]
    outcomes = run_programs([(program.text, part["tests"]) for program, part in zip(programs, parts, strict=True)])
    return [
        Scored(
            {
                "pass@1": float(outcome.passed),
                "timeout": float(outcome.status in ("timeout", "output limit")),
                "syntax_error": float(outcome.status == "syntax error"),
            },
            {
                "program": program.text,
                "status": outcome.status,
                "error": outcome.error,
                "dropped": list(program.dropped),
            },
        )
        for program, outcome in zip(programs, outcomes, strict=True)
    ]


_SINGLE: dict[str, Callable[[Answer], Scored]] = {
    "rouge_l": score_rouge,
    "exact_match": score_exact,
    "contains": score_contains,
    "number": score_number,
    "math": score_math,
    "ifeval": score_ifeval,
}
