"""Forty short programming tasks from a seeded generator, about half of which a 135M model solves before training.

Wording, solutions and tests are the project's own. The expected values are computed by the solution, so a row cannot
disagree with itself.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from benchmarks.study.data import Row, write

SEED = 7
EACH = 2  # rows of a family
NAME = "easy_functions"
WORDS = ("lantern", "river", "copper", "meadow", "anchor", "willow", "basket", "harbour", "pepper", "candle")


@dataclass(frozen=True)
class Family:
    """name, ask, body: templates over `k`; inputs: "int", "pair", "text", "ints", "words": what the tests pass."""

    name: str
    ask: str
    body: str
    inputs: str


FAMILIES = (
    Family("add_{k}", "takes a number x and returns x plus {k}", "return x + {k}", "int"),
    Family("scaled_{k}", "takes a number x and returns {k} times x, minus 1", "return {k} * x - 1", "int"),
    Family("divides_{k}", "takes an integer x and returns True if {k} divides x", "return x % {k} == 0", "int"),
    Family("capped_{k}", "takes a number x and returns the smaller of x and {k}", "return min(x, {k})", "int"),
    Family("powers_{k}", "takes a number x and returns x to the power of {k}", "return x ** {k}", "int"),
    Family(
        "multiples_{k}",
        "takes an integer x and returns a list of the first x positive multiples of {k}",
        "return [{k} * i for i in range(1, x + 1)]",
        "int",
    ),
    Family(
        "digits_plus_{k}",
        "takes an integer x and returns the sum of its digits plus {k}",
        "return sum(int(c) for c in str(x)) + {k}",
        "int",
    ),
    Family(
        "gap_{k}",
        "takes two numbers x and y and returns {k} times the absolute value of their difference",
        "return {k} * abs(x - y)",
        "pair",
    ),
    Family("larger_{k}", "takes two numbers x and y and returns the larger plus {k}", "return max(x, y) + {k}", "pair"),
    Family(
        "rectangle_{k}",
        "takes a width x and a height y and returns the area of {k} such rectangles",
        "return {k} * x * y",
        "pair",
    ),
    Family("total_{k}", "takes a list x of numbers and returns their sum plus {k}", "return sum(x) + {k}", "ints"),
    Family(
        "above_{k}",
        "takes a list x of numbers and returns a list of those that are greater than {k}",
        "return [n for n in x if n > {k}]",
        "ints",
    ),
    Family("count_{k}", "takes a list x of numbers and returns how many equal {k}", "return x.count({k})", "ints"),
    Family("first_{k}", "takes a list x and returns its first {k} items", "return x[:{k}]", "ints"),
    Family(
        "shifted_{k}",
        "takes a list x of numbers and returns a new list with {k} added to each of them",
        "return [n + {k} for n in x]",
        "ints",
    ),
    Family(
        "spread_{k}",
        "takes a list x of numbers and returns {k} times the largest minus the smallest",
        "return {k} * max(x) - min(x)",
        "ints",
    ),
    Family("repeated_{k}", "takes a string x and returns it repeated {k} times", "return x * {k}", "text"),
    Family(
        "backwards_{k}",
        "takes a string x and returns the reverse of its first {k} characters",
        "return x[:{k}][::-1]",
        "text",
    ),
    Family(
        "vowels_plus_{k}",
        "takes a string x and returns the number of its vowels plus {k}",
        "return sum(c in 'aeiou' for c in x) + {k}",
        "text",
    ),
    Family(
        "long_words_{k}",
        "takes a list x of words and returns a list of the words with more than {k} letters",
        "return [w for w in x if len(w) > {k}]",
        "words",
    ),
)


def _arguments(kind: str, k: int, rng: random.Random) -> tuple[Any, ...]:
    if kind == "pair":
        return rng.randrange(1, 30), rng.randrange(1, 30)
    if kind == "text":
        return (rng.choice(WORDS),)
    if kind == "words":
        return (rng.sample(WORDS, 4),)
    if kind == "ints":
        return ([rng.randrange(1, 15) for _ in range(5)] + [k],)
    return (rng.randrange(1, 12),)


def task(family: Family, k: int, rng: random.Random) -> Row:
    """One row: question, solution, name of the function and the tests with their expected values."""
    name, ask, body = (text.format(k=k) for text in (family.name, family.ask, family.body))
    arguments = "x, y" if family.inputs == "pair" else "x"
    solution = f"def {name}({arguments}):\n    {body}"
    space: dict[str, Any] = {}
    exec(solution, space)  # the project's own text
    calls = [_arguments(family.inputs, k, rng) for _ in range(4)]
    tests = [f"assert {name}({', '.join(map(repr, call))}) == {space[name](*call)!r}" for call in calls]
    question = f"Write a Python function `{name}({arguments})` that {ask}."
    return {"question": question, "name": name, "solution": solution, "tests": "\n".join(tests)}


def tasks() -> Iterator[Row]:
    rng = random.Random(SEED)
    for family in FAMILIES:
        for k in rng.sample(range(2, 8), EACH):
            yield task(family, k, rng)


def write_task(folder: Path) -> Path:
    """The task file of `dskd-eval` and its rows."""
    folder.mkdir(parents=True, exist_ok=True)
    write(list(tasks()), folder / f"{NAME}.jsonl")
    made = {
        "task": NAME,
        "data": f"{NAME}.jsonl",
        "prompt": "{{question}} Answer with one ```python code block.",
        "reference": "```python\n{{solution}}\n```",
        "scorer": "python",
        "code": {"tests": "{{tests}}\n", "entry_point": "{{name}}"},
        "max_new_tokens": 128,
    }
    file = folder / f"{NAME}.yaml"
    file.write_text(yaml.safe_dump(made, sort_keys=False), encoding="utf-8")
    return file
