"""Scorers against answers whose score is known."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path

import pytest
from dskd_eval import task_checks
from dskd_eval.backends.oracle import OracleBackend
from dskd_eval.errors import UserError
from dskd_eval.lmeval import run_task
from dskd_eval.lmeval.eval_lm import EvalLM
from dskd_eval.scorers import mathematics, registry
from dskd_eval.scorers.base import Answer, AnswerScorer
from dskd_eval.scorers.ifeval import IFEval
from dskd_eval.scorers.metrics import EXACT_MATCH, Judgement, Metric, combine, pass_at_k
from dskd_eval.scorers.number import Number, last_number, marked_number
from dskd_eval.scorers.text import Contains, ExactMatch
from dskd_eval.tasks import load, planning
from dskd_eval.tasks import rows as task_rows


def answer(text: str, *references: str, style: str = "base", **row: object) -> Answer:
    return Answer(dict(row), text, list(references), style)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so it is 18.", "18"), ("1,200 eggs", "1200"), ("$3.50", "3.50"), ("5-3", "3"), ("-4", "-4"),
        ("about 1,2 or", "2"), ("none", None), ("x = .5", ".5"), ("18 in 7 days", "7"),
        ("12,345.6!", "12345.6"),
    ],
)  # fmt: skip
def test_last_number(text: str, number: str | None) -> None:
    assert last_number(text) == (None if number is None else Decimal(number))


def typeset(value: Decimal, separator: str, minus: str, currency: str = "") -> str:
    """A number with groups of three, written digit by digit from the right."""
    whole, _, part = f"{abs(value):f}".partition(".")
    written = ""
    for place, digit in enumerate(reversed(whole)):
        written = digit + (separator if place and place % 3 == 0 else "") + written
    return (minus if value < 0 else "") + currency + written + (f".{part}" if part else "")


SEPARATORS = [
    "", ",", "，", "\\text{,}", "{,\\!}", "\\!,\\!", ",\\,", "\\,\\,",
    "{,}", ",\\!", "{,}\\!", "\\,", "{\\,}", "\\;", "\\:", "\\ ", "~", "\\thinspace ", "'", "\u2019",
    "\u00a0", "\u202f", "\u2009", "\u2007", "\u2006", "\u2008", "\u200a", "\u205f", "\u02bc",
]  # fmt: skip
MINUSES = [
    "-",
    "\u2212",
    "\u2013",
    "\u2012",
    "\u2011",
    "\ufe63",
    "\uff0d",
    "{-}",
    "{\u2212}",
    "\\text{\u2212}",
    "\\textminus ",
    "\u207b",
    "\u2212\u00a0",
    "\u2212\u202f",
    "-\\,",
]


@pytest.mark.parametrize("separator", SEPARATORS)
@pytest.mark.parametrize("minus", MINUSES)
def test_numbers_as_latex_and_typography_write_them(separator: str, minus: str) -> None:
    numbers = ["9500", "-5", "12400", "-10080", "1234567.25", "-0.5", "999", "1000", "-1000000000"]
    for number in map(Decimal, numbers):
        for currency in ("", "$", "\\$", "€"):
            text = typeset(number, separator, minus, currency)
            assert last_number(f"There are 3 of 7, so x = {text}.") == number, text
            assert last_number(f"It is ${text}$") == number, text
            assert marked_number(f"so\n#### {text}") == number, text
            found = Number().score_one(answer(f"The answer is {number}", f"... #### {text}")).metrics
            assert found["flexible"] == 1.0, text


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("pages 3\u20135", "5"), ("1990\u20131995", "1995"), ("9 \u2212 5 = 4", "4"), ("2024\u00a0400", "400"),
        ("3\u00a050", "50"), ("1\u00a02345", "2345"), ("0.5\u202f123", "123"), ("3.141\\,592", "3.141592"),
        ("5\u221212", "12"), ("(3\\,400)", "3400"), ("3, 400", "400"), ("rooms 12 400", "400"),
        ("1, 2, 3", "3"), ("f(1,000)", "1000"), ("(3,\\,400)", "400"), ("(12,34,567)", "34567"), ("1,2345", "2345"),
        ("3.5", "3.5"), ("2024-05-13", "13"), ("13/5/2024", "2024"), ("1.234", "1.234"), ("1.234.56", "1.234"),
        ("x - 5", "5"), ("x \u2212\u00a05", "5"), ("9\\,-\\,5", "5"), ("(9) - 5", "5"), ("- 5 apples", "5"),
        ("eggs:\n- 3\n- 5", "5"), ("1\\,234\\,5678", "5678"), ("x-5", "-5"),
    ],
)  # fmt: skip
def test_what_is_no_group_of_digits(text: str, number: str) -> None:
    assert last_number(text) == Decimal(number)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("12,34,567", "1234567"), ("1,00,000.5", "100000.5"), ("₹12{,}34{,}567", "1234567"),
        ("1.234.567", "1234567"), ("1.234.567,89", "1234567.89"), ("-1.234.567", "-1234567"),
        ("１２，３４５．６", "12345.6"), ("＄１２", "12"), ("1\u200b000", "1000"), ("\u200e-5", "-5"),
        ("x = - 5", "-5"), ("- 5", "-5"), ("The answer is - 5.", "-5"), ("Answer: - 5", "-5"), ("$- 5$", "-5"),
        ("**- 5**", "-5"), ("\\boxed{- 5}", "-5"), ("(3, - 5)", "-5"), ("x \\approx - 5", "-5"),
        ("It is \u2212\u00a05", "-5"),
    ],
)  # fmt: skip
def test_other_groups_and_signs(text: str, number: str) -> None:
    assert last_number(text) == Decimal(number)
    assert Number().score_one(answer(number, text)).metrics["flexible"] == 1.0, "as a reference"


@pytest.mark.parametrize(("text", "number"), [("#### 3, 5", "3"), ("#### - 5", "-5"), ("#### 1,200", "1200")])
def test_marked_numbers_are_read_like_others(text: str, number: str) -> None:
    assert marked_number(text) == Decimal(number)


@pytest.mark.parametrize("unit", ["1\\,", "1,", "- ", "1.111", "\\!", "1~~~", "-" + " " * 300, "{-", "1'"])
def test_long_rows_of_separators_take_no_long_time(unit: str) -> None:
    begun = time.process_time()
    last_number(unit * (200_000 // len(unit)) + " x")
    assert time.process_time() - begun < 5


@pytest.mark.parametrize(
    ("text", "flexible", "strict"),
    [
        ("... #### 18", 1, 1), ("The answer is 18.00", 1, 0), ("#### 17\nso 18", 1, 0), ("18 or 19", 0, 0),
        ("", 0, 0), ("#### $18", 1, 1), ("####18", 1, 1),
    ],
)  # fmt: skip
def test_number_scorer(text: str, flexible: int, strict: int) -> None:
    found = Number().score_one(answer(text, "9 * 2 = <<9*2=18>>18\n#### 18")).metrics
    assert found == {"flexible": flexible, "strict": strict}


@pytest.mark.parametrize(
    ("text", "reference", "same"),
    [
        (r"so \boxed{\frac{1}{2}}", "0.5", True), (r"\boxed{x+1}", "1+x", True), (r"\boxed{3}", "4", False),
        ("The final answer is $\\frac{3}{4}$.", "3/4", True), ("no idea", "3", False),
        (r"\boxed{(3, \pi/2)}", r"\left( 3, \frac{\pi}{2} \right)", True),
    ],
)  # fmt: skip
def test_mathematics(text: str, reference: str, same: bool) -> None:
    assert mathematics.Math().score_one(answer(text, reference)).metrics["math_verify"] == float(same)


def test_boxed_balances_braces() -> None:
    assert mathematics.boxed(r"\boxed{1} then \boxed{\frac{a}{b}}.") == r"\frac{a}{b}"
    assert mathematics.boxed(r"\boxed{open") is None


@pytest.mark.parametrize(("samples", "passed", "k"), [(5, 2, 1), (5, 2, 3), (10, 0, 5), (4, 4, 2), (6, 1, 6)])
def test_pass_at_k_counts_draws(samples: int, passed: int, k: int) -> None:
    draws = list(itertools.combinations([True] * passed + [False] * (samples - passed), k))
    assert pass_at_k(samples, passed, k) == pytest.approx(sum(any(d) for d in draws) / len(draws))
    assert math.comb(samples, k) == len(draws)


def test_combine_means_pairs_and_pass_at_k() -> None:
    scored = [
        Judgement({"pass@1": value, "timeout": 1 - value, "part": (value, 2.0)}) for value in (1.0, 0.0, 0.0, 1.0)
    ]
    found = combine(scored, ["pass@1", "pass@2", "timeout", "part"])
    assert found == {"pass@1": 0.5, "pass@2": pytest.approx(5 / 6), "timeout": 0.5, "part": (2.0, 8.0)}


def test_ifeval_counts_instructions(punkt: None) -> None:
    pytest.importorskip("langdetect")
    row = {
        "key": 1, "prompt": "p",
        "instruction_id_list": ["punctuation:no_comma", "length_constraints:number_words"],
        "kwargs": [{}, {"relation": "at least", "num_words": 5, "unused": None}],
    }  # fmt: skip
    found = IFEval().score_one(Answer(row, "no comma here", [""])).metrics
    assert found["prompt_strict"] == 0.0
    assert found["instruction_strict"] == (1.0, 2.0)


def test_exact_and_contains_ignore_case_and_space() -> None:
    assert ExactMatch().score_one(answer("  Paris\n", "paris")).metrics == {"exact_match": 1.0}
    assert Contains().score_one(answer("It is PARIS.", "paris")).metrics == {
        "contains": 1.0,
        "exact_match": 0.0,
    }
    assert Contains().score_one(answer("anything", "")).metrics["contains"] == 0.0


class Shouting(AnswerScorer):
    """A scorer of a test: capital letters are right."""

    name = "shouting"
    metrics = {"loud": Metric("loud", "share of answers in capital letters"), "exact_match": EXACT_MATCH}
    modules = ("json",)
    most_checked = 3

    def score_one(self, answer: Answer) -> Judgement:
        return Judgement({"loud": float(answer.text.isupper()), "exact_match": float(answer.text in answer.references)})


def test_a_new_scorer_is_one_class(own_task: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Its metrics, checks and scores follow from the class, whatever else there is."""
    monkeypatch.setitem(registry.SCORERS, "shouting", Shouting)
    rows = [{"question": "q", "answer": text} for text in ("A", "B", "C", "d")]
    spec = load.load_task(own_task(rows, scorer="shouting", reference="answer"))
    assert spec.metrics == ("loud", "exact_match") and not spec.executes_code
    plan, data = planning.plan(spec, chat=False), task_rows.load_data(spec, None)
    task_checks.check_references(plan, data)  # of four, three are enough
    score = run_task.evaluate_task(EvalLM(OracleBackend(plan)), plan, data).score
    assert (score.metrics["loud"].value, score.metrics["exact_match"].value) == (75.0, 100.0)
    monkeypatch.setattr(Shouting, "most_checked", None)
    with pytest.raises(UserError, match=r"row 4: expected a reference that its own `scorer: shouting` scores 100"):
        task_checks.check_references(plan, data)


def test_a_scorer_that_lacks_a_module_says_so_before_a_run(
    own_task: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(registry.SCORERS, "shouting", Shouting)
    monkeypatch.setattr(Shouting, "modules", ("a_missing_module",))
    spec = load.load_task(own_task(scorer="shouting"))
    with pytest.raises(UserError, match=r"task sums: expected the package a_missing_module"):
        task_checks.check_needs(spec, None)
