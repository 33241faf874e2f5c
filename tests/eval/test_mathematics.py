"""Final answers of texts against references: what is the same object, and what is not."""

from __future__ import annotations

import itertools
import threading
from fractions import Fraction

import pytest
from dskd_eval.scorers import mathematics

LONG = "9" * 5000
SAME = [
    (r"First \boxed{3}, no wait, \boxed{4}.", "4", True),
    (r"First \boxed{3}, no wait, \boxed{4}.", "3", False),
    (r"First \boxed{4}, no wait, \boxed{3}.", "4", False),
    (r"$\boxed{3}$. Check: that fails. So $\boxed{4}$ it is.", "4", True),
    (r"\boxed{1}, then \boxed{2}, finally \boxed{3} and \boxed{4}", "3, 4", True),
    (r"The solutions are $\boxed{3}$ and $\boxed{4}$.", "3,4", True),
    (r"The solutions are $\boxed{3}$, $\boxed{4}$, or $\boxed{5}$.", r"\{3,4,5\}", True),
    (r"\boxed{3}\text{ and }\boxed{4}", "3,4", True),
    (r"\boxed{4}, and then \boxed{", "4", True),
    (r"\boxed{3} so far; hence \fbox{4}", "4", True),
    (r"\boxed{\boxed{4}}", "4", True),
    (r"so \boxed{\frac{1}{2}}", "0.5", True),
    # Bases.
    (r"\boxed{101_2}", "101_2", True), (r"\boxed{101_{2}}", "101_2", True), (r"\boxed{101_3}", "101_2", False),
    (r"\boxed{101}", "101_2", True), (r"\boxed{101_2}", "5", True), (r"\boxed{5}", "101_2", False),
    (r"\boxed{101_{\text{two}}}", "101_2", True), (r"\boxed{101_{\text{three}}}", "101_2", False),
    (r"\boxed{0101_2}", "101_2", True), (r"\boxed{110_2}", "101_2", False), (r"\boxed{2A_{16}}", "2A_{16}", True),
    (r"\boxed{2B_{16}}", "2A_{16}", False), (r"It is $101_3$.", "101_2", False), (r"\boxed{12_8}", "10", True),
    (r"\boxed{x_2}", "x_2", True), (r"\boxed{x_2}", "x_3", False),
    # Ratios.
    (r"\boxed{2:3}", "2:3", True), (r"\boxed{4:6}", "2:3", True), (r"\boxed{3:2}", "2:3", False),
    (r"\boxed{2 : 3}", "2:3", True), (r"\boxed{2\colon 3}", "2:3", True), (r"\boxed{\frac{2}{3}}", "2:3", True),
    (r"\boxed{4:6:8}", "2:3:4", True), (r"\boxed{2:3:5}", "2:3:4", False), (r"\boxed{\frac16}", "2:3:4", False),
    (r"\boxed{2:3}", "2:3:4", False), ("The ratio is 2:3.", "2:3", True), ("The ratio is 3:2.", "2:3", False),
    (r"\boxed{11:00}", "11:00", True), (r"\boxed{12:00}", "11:00", False), ("The answer is 12, at 12:30.", "12", True),
    # Mixed numbers.
    (r"\boxed{1\frac{1}{2}}", r"\frac{3}{2}", True), (r"\boxed{1 1/2}", "3/2", True), (r"\boxed{1\ 1/2}", "1.5", True),
    (r"\boxed{-1 1/2}", "-1.5", True), ("It is 1 1/2.", "3/2", True), ("It is 1 1/2.", "1", False),
    (r"\boxed{137 1/2}", r"137 \frac{1}{2}", True), (r"\boxed{1 1/2}", "1/2", False),
    # Scientific notation.
    (r"\boxed{1.2e3}", "1200", True), (r"\boxed{1.2E-3}", "0.0012", True), (r"\boxed{1.2e+3}", "1200", True),
    (r"\boxed{1.2 x 10^3}", "1200", True), (r"\boxed{1.2 × 10^{-3}}", "0.0012", True), ("It is 1.2e3.", "1200", True),
    ("The answer is 1.2 x 10^3", "1200", True), (r"\boxed{1200}", "1.2e3", True), (r"\boxed{1.2e4}", "1200", False),
    (r"\boxed{2e}", "2e", True), (r"\boxed{2e}", "2", False),
    # Inequalities.
    (r"\boxed{3>x>1}", "1<x<3", True), (r"\boxed{3\ge x>1}", r"1<x\le 3", True), (r"\boxed{3>x>1}", "1<x<4", False),
    (r"\boxed{3\geq x\geq 1}", "1<x<3", False), (r"\boxed{1<x<3}", "3>x>1", True), (r"\boxed{1<x<3}", "(1,3)", True),
    (r"\boxed{1\le x<3}", "(1,3)", False), (r"\boxed{x>3}", r"(3,\infty)", True),
    (r"\boxed{x>4}", r"(3,\infty)", False),
    (r"\boxed{1<x<2}", r"\{1,2\}", False), (r"\boxed{(1,3)}", "1<x<3", True),
    # Groups of digits and signs.
    (r"\boxed{10\,000}", "10000", True), (r"\boxed{10{,}000}", "10000", True), (r"\boxed{−5}", "-5", True),
    (r"\boxed{10\,000}", "10", False), (r"\boxed{1\text{,}000}", "1000", True), (r"\boxed{1.234.567}", "1234567", True),
    ("\\boxed{\u2212\u00a05}", "-5", True), (r"\boxed{１２}", "12", True), (r"\boxed{(3,\,400)}", "(3,400)", True),
    (r"\boxed{12,34,567}", "567,34,12", True),
    # The end of a sentence within the box.
    (r"\boxed{4.}", "4", True), (r"\boxed{4,}", "4", True), (r"\boxed{4\,.}", "4", True), (r"\boxed{4.}", "5", False),
    (r"\boxed{\frac{1}{2}.}", "0.5", True), (r"\boxed{4}", "4.", True), (r"\boxed{4.5}", "4", False),
    # More mixed numbers, bases with a sign, powers of ten.
    (r"\boxed{3\dfrac12}", "7/2", True), (r"\boxed{3~\tfrac{1}{2}}", "7/2", True), (r"\boxed{3½}", "3.5", True),
    (r"\boxed{½}", "0.5", True), (r"\boxed{½}", "2", False), (r"\boxed{-3\frac{1}{2}}", "-7/2", True),
    (r"\boxed{-101_2}", "-5", True), (r"\boxed{-101_2}", "-101_2", True), (r"\boxed{101_2}", "-101_2", False),
    (r"\boxed{-101_3}", "-101_2", False), (r"\boxed{(101)_2}", "101_2", True),
    (r"\boxed{1.5\times10^3}", "1500", True), (r"\boxed{1500}", r"1.5\cdot 10^{3}", True),
    # More digits than Python turns into an int.
    (rf"\boxed{{{LONG}}}", LONG, True), (rf"\boxed{{{LONG[:-1]}8}}", LONG, False), (rf"\boxed{{-{LONG}}}", LONG, False),
    (rf"\boxed{{{LONG}}}", "4", False), (r"\boxed{4}", LONG, False), (rf"\boxed{{00{LONG}}}", LONG, True),
    (rf"\boxed{{{LONG}:2}}", "2:3", False), (rf"\boxed{{{LONG}_{{16}}}}", "5", False),
]  # fmt: skip


@pytest.mark.parametrize(("text", "reference", "same"), SAME)
def test_final_answers(text: str, reference: str, same: bool) -> None:
    assert mathematics.same(text, reference) is same


BLIND = [
    (r"\boxed{5\text{ cm}}", "5", True), (r"\boxed{5\text{ m}}", r"5\text{ cm}", True),
    (r"\boxed{50\text{ mm}}", r"5\text{ cm}", False), (r"\boxed{50\%}", "50", True), (r"\boxed{50\%}", "0.5", True),
    (r"\boxed{30^\circ}", "30", True), (r"\boxed{x<1 \text{ or } x>3}", r"(-\infty,1)\cup(3,\infty)", False),
    (r"First \boxed{3}. Then $x=4$.", "4", False),
    ("The final answer is $3$. But then it is $4$.", "4", False), (r"\boxed{1,\,000}", "1000", False),
    (f"It is {LONG}.", LONG, False), (r"\boxed{10^{5000}}", "1" + "0" * 5000, False),
]  # fmt: skip


@pytest.mark.parametrize(("text", "reference", "same"), BLIND)
def test_blind_spots_are_as_documented(text: str, reference: str, same: bool) -> None:
    assert mathematics.same(text, reference) is same


def test_numbers_with_a_base_are_compared_by_value() -> None:
    numbers = [(digits, base) for base in (2, 3, 8, 10) for digits in ("1", "10", "11", "101", "0110")]

    def value(digits: str, base: int) -> int:
        return sum(int(digit) * base**place for place, digit in enumerate(reversed(digits)))

    for (a, i), (b, j) in itertools.product(numbers, numbers):
        assert mathematics.same(rf"\boxed{{{a}_{{{i}}}}}", f"{b}_{j}") == (value(a, i) == value(b, j)), (a, i, b, j)


def test_ratios_are_compared_by_proportion() -> None:
    ratios = list(itertools.product((1, 2, 4), (1, 2, 6), (2, 3)))
    for one, two in itertools.product(ratios, ratios):
        parts = [Fraction(a, b) for a, b in zip(one, two, strict=True)]
        found = mathematics.same(rf"\boxed{{{':'.join(map(str, one))}}}", ":".join(map(str, two)))
        assert found == (len(set(parts)) == 1), (one, two)


def test_other_threads_have_no_time_limit_and_the_same_answers() -> None:
    found: list[bool] = []
    thread = threading.Thread(target=lambda: found.append(mathematics.same(r"\boxed{x+1}", "1+x")))
    thread.start()
    thread.join()
    assert found == [True]
