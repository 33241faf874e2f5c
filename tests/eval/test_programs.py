"""Answers to code tasks: the right function passes whatever surrounds it, a wrong one fails. The sandbox judges."""

from __future__ import annotations

import gzip
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from dskd_eval import programs, sandbox
from dskd_eval.errors import UserError
from dskd_eval.sandbox import Sandbox
from dskd_eval.scorers import registry
from dskd_eval.scorers.base import Answer
from dskd_eval.tasks import render, selection

PARTS = {"setup": "", "completes": "", "entry_point": "", "tests": ""}
TESTS = "assert total([1, 2, 3]) == 6\nassert total([]) == 0"
RIGHT = "def total(xs):\n    return sum(xs)\n"
WRONG = "def total(xs):\n    return len(xs)\n"
PROMPT = 'import math\n\ndef helper(x):\n    return x\n\ndef total(xs):\n    """Sum of xs.\n    """\n'


@pytest.fixture(scope="module")
def box() -> Sandbox:
    try:
        return sandbox.choose()
    except UserError as error:
        pytest.skip(error.got)


def outcome(box: Sandbox, text: str, **parts: str) -> tuple[sandbox.Outcome, programs.Program]:
    given = PARTS | {"tests": TESTS} | parts
    program = programs.program_of(text, given)
    return box.run(program.text, given["tests"]), program


RIGHT_ANSWERS = {
    "plain": RIGHT,
    "python fence": f"Sure!\n```python\n{RIGHT}```\nIt sums.",
    "imports in an earlier block": (
        "First:\n```python\nfrom functools import reduce\n```\nThen:\n"
        "```python\ndef total(xs):\n    return reduce(lambda a, b: a + b, xs, 0)\n```"
    ),
    "imports in a later block": (
        "```python\ndef total(xs):\n    return reduce(lambda a, b: a + b, xs, 0)\n```\n"
        "It needs:\n```python\nfrom functools import reduce\n```"
    ),
    "helper of a helper in other blocks": (
        "```python\nSTART = 0\n```\n```python\ndef add(a, b):\n    return a + b + START\n```\n"
        "```python\ndef total(xs):\n    s = START\n    for x in xs:\n        s = add(s, x)\n    return s\n```"
    ),
    "draft, then corrected": f"```python\n{WRONG}```\nOops, that counts. Corrected:\n```python\n{RIGHT}```",
    "draft with the helper, corrected without": (
        "```python\ndef add(a, b):\n    return a + b\n\ndef total(xs):\n    return add(len(xs), 0)\n```\nCorrected:\n"
        "```python\ndef total(xs):\n    s = 0\n    for x in xs:\n        s = add(s, x)\n    return s\n```"
    ),
    "tests in a block after": (
        f"```python\n{RIGHT}```\n```python\nfrom solution import total\nassert total([1]) == 2\n```"
    ),
    "usage after, output last": f"```python\n{RIGHT}```\n```python\nprint(total([1]))\n```\nOutput:\n```\n1\n```",
    "shell before": f"```bash\npip install total\n```\n```python\n{RIGHT}```",
    "no fence, prose before": f"Here is the function:\n\n{RIGHT}",
    "no fence, prose around": f"Here is the function:\n{RIGHT}\nThis function adds all numbers.\n",
    "no fence, one word before and after": f"Solution\n\n{RIGHT}\nExplanation\n\nIt adds.",
    "no fence, helper apart": (
        "A helper first:\n\ndef add(a, b):\n    return a + b\n\nand now the function:\n\n"
        "def total(xs):\n    s = 0\n    for x in xs:\n        s = add(s, x)\n    return s\n\nDone."
    ),
    "no fence, indented": "The function:\n\n    def total(xs):\n        return sum(xs)\n\nIt adds.",
    "no fence, slightly indented": "The function:\n\n  def total(xs):\n      return sum(xs)\nIt adds.",
    "draft and corrected without fence": f"Try:\n\n{WRONG}\nNo, that counts. So:\n\n{RIGHT}\nBetter!",
    "tildes": f"Here:\n~~~python\n{RIGHT}~~~\n",
    "four ticks": f"Here:\n````python\n{RIGHT}````\n",
    "four ticks around three": (
        "````python\ndef total(xs):\n    '''Markdown:\n```\ncode\n```\n'''\n    return sum(xs)\n````"
    ),
    "five tildes, attributes": f"~~~~~ {{.python .numberLines}}\n{RIGHT}~~~~~",
    "fence in a list": "1. The code:\n\n   ```python\n   def total(xs):\n       return sum(xs)\n   ```\n2. Done.",
    "fence in a quote": "> ```python\n> def total(xs):\n>     return sum(xs)\n> ```",
    "indented fence": "  ```python\n  def total(xs):\n      return sum(xs)\n  ```",
    "fence in html": f"<details>\n<summary>Code</summary>\n```python\n{RIGHT}```\n</details>",
    "info with options": f'```python title="total.py" linenums="1"\n{RIGHT}```',
    "capital language": f"```Python3\n{RIGHT}```",
    "wrong language": f"```java\n{RIGHT}```",
    "code on the fence's line": f"```{RIGHT}```",
    "language and code on the fence's line": f"```python {RIGHT}```",
    "fence after words": f"Here it is: ```python\n{RIGHT}```",
    "fence closed at the end of a line": f"```python\n{RIGHT.rstrip()}```\nIt sums.\n```\n3\n```",
    "everything on one line": "```python def total(xs): return sum(xs)```",
    "code span": "Use `total = lambda xs: sum(xs)` here.",
    "unclosed fence": f"```python\n{RIGHT}",
    "unclosed fence, prose after": f"```python\n{RIGHT}\nThis function uses the builtin. It's fast.",
    "carriage returns": f"```python\n{RIGHT}```".replace("\n", "\r\n"),
    "interactive session": (
        "```pycon\n>>> def total(xs):\n...     return sum(xs)\n...\n>>> total([1])\n1\n```"
    ),
    "session whose lines go on without space": "```\n>>>def total(xs):\n...    return sum(xs)\n```",
    "session with indentation": "```\n  >>> def total(xs):\n  ...     return sum(xs)\n  >>> total([1])\n  1\n```",
    "session of IDLE": "```\n>>> def total(xs):\n        s = 0\n        return s + sum(xs)\n\n>>> total([1])\n1\n```",
    "session of IPython": (
        "```\nIn [1]: def total(xs):\n   ...:     return sum(xs)\n   ...:\n\nIn [2]: total([1])\nOut[2]: 1\n```"
    ),
    "session with an empty line in the function": (
        "```\n>>> def total(xs):\n...     s = 0\n...\n...     return s + sum(xs)\n...\n```"
    ),
    "session after a banner": (
        '```\nPython 3.11.7 on linux\nType "help" for more.\n>>> def total(xs):\n...     return sum(xs)\n'
        ">>> total([1])\n1\n```"
    ),
    "session after an import": (
        "```python\nfrom functools import reduce\n>>> def total(xs):\n...     return reduce(int.__add__, xs, 0)\n"
        ">>> total([1])\n1\n```"
    ),
    "session without fence": (
        "Like this:\n>>> def total(xs):\n...     return sum(xs)\n...\n>>> total([1])\n1\nThat adds them."
    ),
    "session after the function": f"```python\n{RIGHT}\n>>> total([1])\n1\n```",
    "function with doctests, cut example": (
        "```python\ndef total(xs):\n    '''Sum.\n\n    >>> total([1])\n    1\n    '''\n    return sum(xs)\nprint((\n```"
    ),
    "line numbers": "```python\n1 def total(xs):\n2     return sum(xs)\n```",
    "line numbers with dots": "```python\n1. def total(xs):\n2.     return sum(xs)\n```",
    "line numbers with bars": "```\n 9 | def total(xs):\n10 |\n11 |     return sum(xs)\n```",
    "line numbers on the left": "```\n9 def total(xs):\n10     return sum(xs)\n```",
    "line numbers in a column": "```\n9   def total(xs):\n\n10      return sum(xs)\n```",
    "line numbers before tabs": "```\n1\tdef total(xs):\n2\t    return sum(xs)\n```",
    "line numbers without fence": "So:\n\n1: def total(xs):\n2:     return sum(xs)\n\nThat adds them.",
    "byte order mark": f"\ufeff{RIGHT}",
    "byte order mark in a fence": f"```python\n\ufeff{RIGHT}```",
    "prose within the fence": f"```python\nHere is the function:\n\n{RIGHT}\nThis function adds.\n```",
    "prose right after, no fence": f"{RIGHT}This function adds all numbers.",
    "prose that begins with a keyword": f"{RIGHT}\nreturn the sum of everything",
    "prose that is indented": f"{RIGHT}    This adds.",
    "output and arrows in the fence": f"```python\n{RIGHT}\ntotal([1]) => 1\nOutput: 1\n```",
    "old print after": f"```python\n{RIGHT}\nprint total([1])\n```",
    "commands before": f"```python\n!pip install numpy\n%matplotlib inline\n{RIGHT}```",
    "draft that does not parse in the same fence": f"```python\ndef total(xs):\n    return su(\n\n{RIGHT}```",
    "fence in a fence": f"````markdown\nHere:\n\n```python\n{RIGHT}```\nDone.\n````",
    "fence in a fence of the same length": f"```markdown\n# Title\n```python\n{RIGHT}```\n```",
    "decorated": (
        "```python\ndef plain(f):\n    return f\n```\n```python\n@plain\ndef total(xs):\n    return sum(xs)\n```"
    ),
    "decorated, no fence": "Here:\ndef plain(f):\n    return f\n\n@plain\ndef total(xs):\n    return sum(xs)\nDone.",
    "whole function indented": "    def total(xs):\n        return sum(xs)\n\nThat adds them.",
    "whole decorated function indented": (
        "    import functools\n\n    @functools.cache\n    def zero():\n        return 0\n\n"
        "    def total(xs):\n        return zero() + sum(xs)\n"
    ),
    "square tags": f"[PYTHON]\n{RIGHT}[/PYTHON]\n[TESTS]\nassert total([1]) == 1\n[/TESTS]",
    "wrong example assert": f"```python\n{RIGHT}\nassert total([1, 1]) == 3\n```",
    "wrong example assert without fence": f"{RIGHT}\nassert total([1, 1]) == 3\n",
    "wrong example call": f"```python\n{RIGHT}\nresult = total(5)\nprint(result)\n```",
    "example in a loop": f"```python\n{RIGHT}\nfor case, want in [([1], 7)]:\n    assert total(case) == want\n```",
    "example in a function": (
        f"```python\n{RIGHT}\ndef test_total():\n    assert total([1]) == 9\n\ntest_total()\nprint('passed')\n```"
    ),
    "reads input": f"```python\n{RIGHT}\nxs = list(map(int, input().split()))\nprint(total(xs))\n```",
    "main": (
        f"```python\nimport sys\n{RIGHT}\ndef main():\n    print(total([int(x) for x in sys.argv[1]]))\n\n"
        'if __name__ == "__main__":\n    main()\n```'
    ),
    "unittest": (
        f"```python\nimport unittest\n{RIGHT}\nclass TestTotal(unittest.TestCase):\n    def test(self):\n"
        "        self.assertEqual(total([1]), 9)\n\nunittest.main()\n```"
    ),
    "unittest without import": (
        f"```python\n{RIGHT}\nclass TestTotal(unittest.TestCase):\n    def test(self):\n        pass\n```"
    ),
    "package that only the example uses": (
        f"```python\nimport matplotlib.pyplot as plt\n{RIGHT}\nplt.plot([total([1])])\nplt.show()\n```"
    ),
    "exit after an example": f"```python\nimport sys\n{RIGHT}\nif total([1]) != 2:\n    sys.exit(1)\n```",
    "end cut in a print": f"```python\n{RIGHT}\nprint(total([1, 2]))\nprint(total([1, 2, 3, 4, 5, 6, 7, 8",
    "end cut in a string": f"```python\n{RIGHT}\nprint('The total of the",
    "end cut in a name": f"```python\n{RIGHT}\nprint(total([1]))\npri",
    "end cut in a docstring": f'```python\n{RIGHT}\ndef other(x):\n    """This does\n    nothing',
    "end cut in a nested block": f"```python\n{RIGHT}\nif True:\n    for x in [1]:\n        if x",
    "a second version that is cut": (
        f"```python\n{RIGHT}```\nOr longer:\n```python\ndef total(xs):\n    s = 0\n    for x in xs:\n        if x"
    ),
    "future import": f"```python\nfrom __future__ import annotations\n{RIGHT}```",
    "module settings": f"```python\nimport sys\nsys.setrecursionlimit(5000)\n{RIGHT}```",
    "global state": (
        "```python\nmemo = {}\nmemo['start'] = 0\n\ndef reset():\n    global memo\n    memo = {'start': 0}\n\nreset()\n"
        "def total(xs):\n    s = memo['start']\n    for x in xs:\n        s += x\n    return s\n```"
    ),
    "wrapped": f"```python\nfrom functools import wraps\n{RIGHT}\ntotal = (lambda f: lambda xs: f(xs))(total)\n```",
    "attribute of the function": (
        "```python\ndef total(xs):\n    return sum(xs) + total.zero\n\ntotal.zero = 0\nprint(total([1]) / 0)\n```"
    ),
    "registered by a decorator": (
        "```python\nrules = []\n\ndef rule(f):\n    rules.append(f)\n    return f\n\n"
        "@rule\ndef add(a, b):\n    return a + b\n\n"
        "def total(xs):\n    s = 0\n    for x in xs:\n        s = rules[0](s, x)\n    return s\n```"
    ),
    "looked up by text": (
        "```python\ndef _add(a, b):\n    return a + b\n\ndef total(xs):\n    s = 0\n    for x in xs:\n"
        "        s = globals()['_add'](s, x)\n    return s\n\n"
        "assert total([1]) == 9\n```"
    ),
    "example with a long chain": f"```python\n{RIGHT}\nassert total([1]) == 1{' + 1' * 335}\nprint(total([1]))\n```",
    "example with a long number": f"```python\n{RIGHT}\nassert total([1]) == 0x{'f' * 4000}\n```",
    "main guard after a long condition": (
        f"```python\n{RIGHT}\nif 0{' + 1' * 335} == 335 and __name__ == '__main__':\n    print(total(1))\n```"
    ),
    "call of what a long chain gives": f"```python\n{RIGHT}\nprint(total)\nx = abs(0{' - 1' * 335})\n```",
    "function with a long chain": f"```python\ndef total(xs):\n    return sum(xs) + 0{' + 0' * 335}\n```\n```\n6\n```",
    "function with a long number": (
        f"```python\nTOP = 0x{'f' * 4000}\n\ndef total(xs):\n    return min(sum(xs), TOP, 0x{'f' * 4001})\n```\nGood."
    ),
    "long chain on one line with an example": f"```python\n{RIGHT}x = 0{' + 1' * 335}; assert total([1]) == 1\n```",
    "statements on one line": f"```python\n{RIGHT}x = 1; assert total([1]) == x + 1; y = 2\n```",
}  # fmt: skip


@pytest.mark.parametrize("name", RIGHT_ANSWERS)
@pytest.mark.parametrize("entry_point", ["total", ""])
def test_a_right_function_passes(box: Sandbox, name: str, entry_point: str) -> None:
    """With a named entry point, and without one, where the tests name the function."""
    found, program = outcome(box, RIGHT_ANSWERS[name], entry_point=entry_point)
    assert found.passed, f"{found.status}: {found.error}\n{program.text}"


@pytest.mark.parametrize("name", RIGHT_ANSWERS)
def test_a_right_function_passes_after_a_prompt(box: Sandbox, name: str) -> None:
    found, program = outcome(box, RIGHT_ANSWERS[name], entry_point="total", completes=PROMPT)
    assert found.passed, f"{found.status}: {found.error}\n{program.text}"


@pytest.mark.parametrize("name", [name for name, text in RIGHT_ANSWERS.items() if RIGHT in text and WRONG not in text])
def test_a_wrong_function_fails(box: Sandbox, name: str) -> None:
    found, _ = outcome(box, RIGHT_ANSWERS[name].replace(RIGHT, WRONG), entry_point="total")
    assert not found.passed


WRONG_ANSWERS = {
    "correct draft, wrong correction": f"```python\n{RIGHT}```\nBetter:\n```python\n{WRONG}```",
    "prose": "I cannot write that function, sorry.",
    "empty": "",
    "only examples": "```python\nassert total([1]) == 1\n```",
    "defines the expected value": "```python\nclass Any:\n    def __eq__(self, other): return True\n```",
    "import that is missing": "```python\ndef total(xs):\n    return reduce(lambda a, b: a + b, xs, 0)\n```",
    "cut in the function": "```python\ndef total(xs):\n    s = 0\n    for x in xs:\n        s +=",
}


@pytest.mark.parametrize("completes", ["", PROMPT], ids=["alone", "prompt"])
@pytest.mark.parametrize("name", WRONG_ANSWERS)
def test_a_wrong_answer_fails(box: Sandbox, name: str, completes: str) -> None:
    found, _ = outcome(box, WRONG_ANSWERS[name], entry_point="total", completes=completes)
    assert not found.passed


BODIES = {
    "body": "    return sum(xs)\n",
    "body, cut example": "    return sum(xs)\n\nprint(total([1,",
    "body, prose": "    return sum(xs)\n\nThis returns the sum.\n",
    "body, closing fence": "    return sum(xs)\n```\nThis returns the sum.\n",
    "body, wrong example": "    return sum(xs)\n\nassert total([1]) == 2\n",
    "body in a fence": "```python\n    return sum(xs)\n```",
    "body without indentation in a fence": "```python\nreturn sum(xs)\n```",
    "body of two blocks, the second corrected": (
        "```python\n    return len(xs)\n```\nNo:\n```python\n    return sum(xs)\n```"
    ),
    "body in a fence, example after": (
        "```python\n    return sum(xs)\n```\nFor example:\n```python\nprint(total([1]))\n```"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BODIES)
def test_a_body_completes_the_prompt(box: Sandbox, name: str) -> None:
    found, program = outcome(box, BODIES[name], entry_point="total", completes=PROMPT)
    assert found.passed, f"{found.status}: {found.error}\n{program.text}"


LOOP = "s = 0\nfor x in xs:\n    s += x\nreturn s\n"
NESTED = "def add(a, b):\n    return a + b\ns = 0\nfor x in xs:\n    s = add(s, x)\nreturn s\n"
IF = "if not xs:\n    return 0\nelse:\n    return sum(xs)\n"
STRING = "s = '''\na\n  b'''\nassert s == '\\na\\n  b'\nreturn sum(xs)\n"
SAME_NAME = "total = 0\nfor x in xs:\n    total += x\nreturn total\n"
BODY_CODE = {"loop": LOOP, "nested": NESTED, "if": IF, "string": STRING, "same name": SAME_NAME}


def indented(code: str, indent: str, step: str = "    ") -> str:
    """Code under an indentation, with another step of its own; lines within a string stay."""
    lines, inside = [], False
    for line in code.splitlines(keepends=True):
        depth = (len(line) - len(line.lstrip(" "))) // 4
        lines.append(line if inside else indent + step * depth + line.lstrip(" "))
        inside ^= line.count("'''") % 2 == 1
    return "".join(lines)


LAYOUTS: dict[str, Callable[[str], str]] = {
    "4 spaces": lambda code: indented(code, "    "),
    "2 spaces": lambda code: indented(code, "  ", "  "),
    "3 spaces": lambda code: indented(code, "   ", "   "),
    "8 spaces": lambda code: indented(code, " " * 8),
    "tabs": lambda code: indented(code, "\t", "\t"),
    "none": lambda code: code,
    "none, tabs": lambda code: indented(code, "", "\t"),
    "first line stripped": lambda code: indented(code, "    ").lstrip(),
    "first line stripped, 2 spaces": lambda code: indented(code, "  ", "  ").lstrip(),
    "first line stripped, tabs": lambda code: indented(code, "\t", "\t").lstrip(),
    "one space left": lambda code: " " + indented(code, "    ").lstrip(),
    "one space more": lambda code: " " + indented(code, "    "),
    "empty line before": lambda code: "\n" + code,
    "comment before": lambda code: "# Add.\n" + indented(code, "    "),
    "docstring again": lambda code: '"""Sum."""\n' + indented(code, "    "),
    "fence": lambda code: f"```python\n{code}```\nUsage:\n```python\nprint(total([1]))\n```",
    "fence, 2 spaces": lambda code: f"```python\n{indented(code, '  ', '  ')}```",
    "fence, first line stripped": lambda code: f"```python\n{indented(code, '    ').lstrip()}```",
    "prose after": lambda code: f"{indented(code, '    ').lstrip()}\nThis adds all.\n",
    "no indentation, prose after": lambda code: f"{code}This adds all.\n",
    "prose before": lambda code: f"Here is the body:\n\n{indented(code, '    ')}",
    "prose before, no indentation": lambda code: f"Here is the body:\n\n{code}",
    "example in a fence after": lambda code: f"{code}\nFor example:\n```python\nprint(total([1]))\n```",
    "other function after": lambda code: f"{indented(code, '  ', '  ')}\n\ndef other(x):\n  return x\n",
}
PROMPTS = {
    "docstring": PROMPT,
    "tabs": PROMPT.replace("    ", "\t"),
    "2 spaces": PROMPT.replace("    ", "  "),
    "header": "def total(xs):\n",
    "comment": "def total(xs):\n    # Sum of xs.\n",
    "no new line": PROMPT.rstrip(),
    "indentation at the end": PROMPT + "    ",
    "async helper": "async def wait():\n    pass\n\n" + PROMPT,
}


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_body_with_any_indentation_completes_the_prompt(layout: str, prompt: str) -> None:
    """Every body under every prompt; `total` is called here, in this process, because the bodies are ours."""
    for name, code in BODY_CODE.items():
        if name == "string" and layout not in ("none", "fence"):
            continue
        parts = PARTS | {"tests": TESTS, "entry_point": "total", "completes": PROMPTS[prompt]}
        program = programs.program_of(LAYOUTS[layout](code), parts)
        space: dict[str, Any] = {}
        try:
            exec(program.text, space)
            found = (space["total"]([1, 2, 3]), space["total"]([]))
        except (SyntaxError, NameError, AssertionError) as error:
            found = error
        assert found == (6, 0), f"{name}: {found!r}\n{program.text}"


@pytest.mark.parametrize("layout", ["4 spaces", "2 spaces", "none", "tabs", "first line stripped", "8 spaces"])
def test_a_function_after_the_body_is_one_of_the_module(box: Sandbox, layout: str) -> None:
    text = LAYOUTS[layout]("return add(xs)\n") + "\n\ndef add(xs):\n    return sum(xs)\n"
    found, program = outcome(box, text, entry_point="total", completes=PROMPT)
    assert found.passed, f"{found.error}\n{program.text}"


HEADS = {
    "helper": (
        'def helper(xs):\n    return list(xs)\n\n\ndef total(xs):\n    """Sum."""\n',
        "def total(xs):\n    return sum(helper(xs))\n",
    ),
    "import": ("import math\n\ndef total(xs):\n", "def total(xs):\n    return int(math.fsum(xs))\n"),
    "finished helper last": (
        "import math\n\ndef helper(xs):\n    return list(xs)\n\n# Now write total.\n",
        "def total(xs):\n    return int(math.fsum(helper(xs)))\n",
    ),
    "constant after the helper": (
        "def helper(xs):\n    return xs\n\nSTART = 0\n\n",
        "def total(xs):\n    return sum(helper(xs), START)\n",
    ),
    "helper of its own": (
        "def helper(xs):\n    return 1 / 0\n\ndef total(xs):\n",
        "def helper(xs):\n    return xs\n\ndef total(xs):\n    return sum(helper(xs))\n",
    ),
    "decorated": (
        'def plain(f):\n    return f\n\n@plain\ndef total(xs):\n    """Sum."""\n',
        "@plain\ndef total(xs):\n    return sum(xs)\n",
    ),
    "class before": (
        "class Start:\n    value = 0\n\ndef total(xs):\n",
        "def total(xs):\n    return sum(xs, Start.value)\n",
    ),
    "other name than the prompt's": (
        "def helper(xs):\n    return xs\n\ndef f(xs):\n",
        "def total(xs):\n    return sum(helper(xs))\n",
    ),
    "prompt that is no program": ("Write this function.\n\ndef total(xs):\n", RIGHT),
}


@pytest.mark.parametrize("entry_point", ["total", ""])
@pytest.mark.parametrize("fence", ["{}", "```python\n{}```"])
@pytest.mark.parametrize("name", HEADS)
def test_the_prompt_stays_in_front_of_a_whole_function(box: Sandbox, name: str, fence: str, entry_point: str) -> None:
    completes, code = HEADS[name]
    found, program = outcome(box, fence.format(code), entry_point=entry_point, completes=completes)
    assert found.passed, f"{found.error}\n{program.text}"


CLASS = (
    "import math\n\nclass Bag:\n    def __init__(self, xs):\n        self.xs = xs\n\n"
    '    def total(self):\n        """Sum."""\n'
)
METHOD = "def total(self):\n    return int(math.fsum(self.xs))\n"
METHODS = {
    "body": "        return int(math.fsum(self.xs))\n",
    "body without indentation": "return int(math.fsum(self.xs))\n",
    "method": METHOD,
    "method in a fence": f"```python\n{METHOD}```",
    "method indented": indented(METHOD, "    "),
    "method indented in a fence": f"```python\n{indented(METHOD, '    ')}```",
    "method and an import": (
        "```python\nfrom math import fsum\n\ndef total(self):\n    return int(fsum(self.xs))\n```"
    ),
    "two methods": (
        "```python\ndef _add(self):\n    return sum(self.xs)\n\ndef total(self):\n    return int(self._add())\n```"
    ),
    "method with a string": (
        "def total(self):\n    s = '''\n  a\'''\n    assert s == '\\n  a'\n    return int(sum(self.xs))\n"
    ),
    "whole class": (
        "```python\nclass Bag:\n    def __init__(self, xs):\n        self.xs = xs\n\n"
        + indented(METHOD, "    ")
        + "```"
    ),
}  # fmt: skip


@pytest.mark.parametrize("entry_point", ["total", "Bag", ""])
@pytest.mark.parametrize("name", METHODS)
def test_a_method_completes_the_class_of_the_prompt(box: Sandbox, name: str, entry_point: str) -> None:
    tests = "assert Bag([1, 2, 3]).total() == 6\nassert Bag([]).total() == 0"
    found, program = outcome(box, METHODS[name], tests=tests, entry_point=entry_point, completes=CLASS)
    assert found.passed, f"{found.error}\n{program.text}"
    wrong = METHODS[name].replace("int(", "1 + int(")
    assert not outcome(box, wrong, tests=tests, entry_point=entry_point, completes=CLASS)[0].passed


@pytest.mark.parametrize("task", ["HumanEval/32", "HumanEval/38", "HumanEval/50"])
def test_helpers_in_prompts_of_humaneval(box: Sandbox, data_dir: Path, task: str) -> None:
    """A chat answer holds the asked function only; its tests call the helper of the prompt."""
    with gzip.open(data_dir / "humaneval" / "HumanEval.jsonl.gz", "rt", encoding="utf-8") as file:
        row = next(row for line in file if (row := json.loads(line))["task_id"] == task)
    header = row["prompt"][row["prompt"].rindex("\ndef ") + 1 :]
    parts = render.code_parts(selection.builtin_tasks()["humaneval"], row)
    for given in (parts, parts | {"entry_point": ""}):
        program = programs.program_of(f"```python\n{header}{row['canonical_solution']}```", given)
        found = box.run(program.text, parts["tests"])
        assert found.passed, f"{found.error}\n{program.text}"


def test_an_async_function(box: Sandbox) -> None:
    tests = "import asyncio\nassert asyncio.run(total([1, 2])) == 3"
    right = "async def total(xs):\n    return sum(xs)\n"
    prompt = "async def total(xs):\n    '''Sum.'''\n"
    for text, completes in [(right, ""), (f"```python\n{right}```", prompt), ("return sum(xs)", prompt)]:
        found, program = outcome(box, text, tests=tests, completes=completes)
        assert found.passed, f"{found.error}\n{program.text}"


def test_tests_that_import_the_answer_name_what_it_defines(box: Sandbox) -> None:
    setup = "import sys; sys.modules['solution'] = sys.modules['__main__']\n"
    text = f"```python\n{RIGHT}```\n```python\ndef other():\n    return 5\n```"
    found, program = outcome(box, text, setup=setup, tests=f"from solution import total\n{TESTS}")
    assert found.passed, f"{found.error}\n{program.text}"


@pytest.mark.parametrize(
    ("text", "note"),
    [
        (
            "```\n>>> def total(xs):\n...     return sum(xs)\n>>> total([1])\n1\n```",
            "prompts and output of a session",
        ),
        ("```\n1 def total(xs):\n2     return sum(xs)\n```", "line numbers"),
        ("1 def total(xs):\n2     return sum(xs)\n", "line numbers"),
    ],
)
def test_the_record_says_what_stood_before_the_code(text: str, note: str) -> None:
    assert note in programs.program_of(text, PARTS | {"tests": TESTS}).dropped


def test_a_future_import_stands_before_setup_and_prompt(box: Sandbox) -> None:
    text = f"```python\nfrom __future__ import annotations\n{RIGHT}```"
    found, _ = outcome(box, text, entry_point="total", completes=PROMPT, setup="LIMIT = 3\n")
    assert found.passed, found.error


def test_several_names_of_the_tests(box: Sandbox) -> None:
    """A class in one block, corrected functions in others."""
    text = (
        "```python\nclass Pair:\n    def __init__(self, a, b):\n        self.a, self.b = a, b\n\n"
        "def swap(p):\n    return p\n```\nCorrected:\n```python\ndef swap(p):\n    return Pair(p.b, p.a)\n```\n"
        "```python\ndef width(p):\n    return abs(p.a - p.b)\n```"
    )
    tests = "assert swap(Pair(1, 2)).a == 2\nassert width(Pair(1, 3)) == 2"
    found, program = outcome(box, text, tests=tests)
    assert found.passed, found.error
    assert program.dropped == ()


def test_a_builtin_that_the_answer_defines_anew(box: Sandbox) -> None:
    text = "```python\ndef sum(a, b):\n    return a + b\n```\n```python\nprint(sum(1, 2))\n```"
    assert outcome(box, text, tests="assert sum(1, 2) == 3")[0].passed


def test_the_record_says_what_was_dropped(box: Sandbox) -> None:
    text = f"```python\n{WRONG}```\nBetter:\n```python\n{RIGHT}\nassert total([1]) == 2\nprint(total([1, 2, 3, 4, 5,"
    answer = Answer({"question": "total"}, text, [], "chat", PARTS | {"tests": TESTS})
    scored = registry.make("python", box.run_all).score([answer])[0]
    assert scored.metrics == {"pass@1": 1.0, "timeout": 0.0, "syntax_error": 0.0}
    assert scored.details["dropped"] == [
        "1 of 2 code blocks",
        "an end of 1 line that does not parse, from: print(total([1, 2, 3, 4, 5,",
        "1 statements beside the tested code: assert total([1]) == 2",
    ]


def test_nothing_is_dropped_of_a_plain_function() -> None:
    assert programs.program_of(RIGHT, PARTS | {"tests": TESTS}) == programs.Program(RIGHT)


def test_an_answer_without_any_program_is_a_syntax_error(box: Sandbox) -> None:
    for text in ("I cannot do that.", "def total(xs):\n    return (", "```python\ndef total(xs) return 1\n```"):
        assert outcome(box, text)[0].status == "syntax error"
        assert outcome(box, text, entry_point="total", completes=PROMPT)[0].status == "syntax error"


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("```python\ndef f():\n    return 1\n```", "def f():\n    return 1\n"),
        ("```import math\ndef f(): return math.pi\n```", "import math\ndef f(): return math.pi\n"),
        ("Sure!\n```py\ndef f(): return 1", "def f(): return 1"),
        ("```python\nx\n```\nand\n```python\ndef f(): return 1\n```", "def f(): return 1\n"),
        ("def f(): return 1", "def f(): return 1"),
    ],
)
def test_code_is_left_as_it_is_written(text: str, code: str) -> None:
    assert programs.program_of(text, PARTS | {"entry_point": "f"}).text == code


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("    return a\n", "import math\ndef f(a):\n    return a\n"),
        ("```python\ndef f(a):\n    return math.pi\n```", "import math\n\ndef f(a):\n    return math.pi\n"),
        ("```python\n    return a\n```", "import math\ndef f(a):\n    return a\n"),
    ],
)
def test_what_precedes_the_function_in_the_prompt_is_kept(text: str, expected: str) -> None:
    parts = PARTS | {"completes": "import math\ndef f(a):\n", "entry_point": "f"}
    found = programs.program_of(text, parts).text
    assert found in (expected, expected.replace("import math\n", ""))
    assert ("math.pi" in found) <= ("import math" in found)


@pytest.mark.parametrize("text", ["def total(xs):\n    return 1\n\nx = 1\n", "x = 1\ny =\n", "", "(", "\x00", "\ud800"])
def test_prefix_is_the_longest_that_compiles(text: str) -> None:
    lines = text.splitlines(keepends=True)
    longest = ""
    for count in range(len(lines) + 1):
        try:
            compile("".join(lines[:count]), "x", "exec")
        except (SyntaxError, ValueError):
            continue
        longest = "".join(lines[:count])
    assert programs.parsing_prefix(text) == longest


def test_a_cut_end_at_every_character() -> None:
    """Every prefix of a program: the longest run of lines that compiles, by trying them all."""
    code = RIGHT + "\n@property\ndef g(self, *, a=(1,\n    2)):\n    '''x\n    y'''\n    try:\n        return a[0]\n"
    code += "    except KeyError:\n        pass\n    else:\n        raise\n\nprint(f'{g}',\n  g)\n"
    for end in range(len(code) + 1):
        test_prefix_is_the_longest_that_compiles(code[:end])


def test_an_answer_of_humaneval_94_that_the_limit_cut(box: Sandbox, data_dir: Path) -> None:
    """The shape of a real answer: the whole function, then the prompt's examples as prints, until a line is cut."""
    with gzip.open(data_dir / "humaneval" / "HumanEval.jsonl.gz", "rt", encoding="utf-8") as file:
        row = next(row for line in file if (row := json.loads(line))["task_id"] == "HumanEval/94")
    examples = "".join(
        f"print(skjkasdkd({numbers}))  # Output: {total}\n"
        for numbers, total in [
            ("[0,3,2,1,3,5,7,4,5,5,5,2,181,32,4,32,3,2,32,324,4,3]", 10),
            ("[1,0,1,8,2,4597,2,1,3,40,1,2,1,2,4,2,5,1]", 25),
        ]
    )
    text = f"```python\n{row['prompt'].strip()}\n{row['canonical_solution']}\n# Example usage:\n{examples}"
    text += "print(skjkasdkd([1,3,1,32,5107,34,83278,109,163,23,2323,32,30,"
    spec = selection.builtin_tasks()["humaneval"]
    parts = render.code_parts(spec, row)
    program = programs.program_of(text, parts)
    assert box.run(program.text, parts["tests"]).passed
    assert "an end of 1 line that does not parse" in program.dropped[0]


@pytest.mark.parametrize(
    "text",
    [
        "(\n" * 2000,
        "it is (a) so\n" * 6000,
        "    a = [\n" * 1500,
        "`a " * 7000,
        ">>> a\nis it\n" * 3000,
        "1. a b\n2. c\n" * 3000,
    ],
)
def test_strange_answers_end_soon(text: str) -> None:
    begun = time.monotonic()
    programs.program_of(text, PARTS | {"tests": TESTS, "completes": PROMPT})
    assert time.monotonic() - begun < 30


def test_long_answers_take_no_long_time() -> None:
    prose = "The list of all of these, and (more) words: it's long.\n" * 2000
    code = RIGHT + "".join(f"print(total([{n}]))\n" for n in range(2000)) + "print(total(["
    found = programs.program_of(f"{prose}\n{code}", PARTS | {"tests": TESTS})
    assert found.text.strip() == RIGHT.strip()
