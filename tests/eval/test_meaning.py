"""Task files that are valid and say something else than was meant: refused or named before a model is loaded."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from dskd_eval import data, doctor, sandbox, task_checks
from dskd_eval.errors import UserError
from dskd_eval.programs import why_untested
from dskd_eval.tasks import load, planning, render, selection
from dskd_eval.tasks import rows as task_rows

Task = Callable[..., Path]
ROWS = [
    {"q": {"text": f"Capital of {land}?"}, "question": f"Capital of {land}?", "answer": city, "answers": [city, "?"],
     "none": None, "n": number, "given": f"['{city}', 'x']", "void": "", "test": f"assert f() == {number}",
     "solution": f"def f():\n    return {number}\n"}
    for number, (land, city) in enumerate([("Austria", "Wien"), ("France", "Paris"), ("Italy", "Roma")])
]  # fmt: skip


def checked(path: Path, *, chat: bool = False) -> list[str]:
    """All that is checked of a task of the user before a model is loaded."""
    spec = load.load_task(path)
    plan, rows = planning.plan(spec, chat=chat), task_rows.load_data(spec, None)
    notes = task_checks.check_task(plan, rows)
    task_checks.check_references(plan, rows)
    return notes


GOOD: dict[str, Any] = {"prompt": "question", "reference": "answer", "scorer": "exact_match"}


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"prompt": "{{question}}", "reference": "{{answer}}"},
        {"prompt": "{{q.text}}", "reference": "{{answers[0]}}"},
        {"reference": "answers"},
        {"prompt": "{{question}} Options: {{answers | join(', ')}}"},
        {"prompt": "{{question}} Put it into \\boxed{answer}, x^{n}, and a set {a, b}."},
        {"scorer": "number", "reference": "n"},
        {"scorer": "math", "reference": "{{n}}/7"},
        {"scorer": "contains"},
        {"scorer": "rouge_l"},
        {"scorer": "number", "reference": "n", "reference_answer": "It is {{n}}."},
    ],
)
def test_what_is_meant_as_it_stands_passes(own_task: Task, keys: dict[str, Any]) -> None:
    assert checked(own_task(ROWS, **GOOD | keys)) == []


@pytest.mark.parametrize("key", ["prompt", "reference"])
@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{q.text}", r"single braces, \{q.text\}, which stay as they are .* Write \{\{q.text\}\}"),
        ("Question: {question}\nAnswer:", r"single braces, \{question\}"),
        ("{ Question }", r"single braces"),
        ("${question}", r"single braces"),
        ("{question!r:>10}", r"single braces"),
        ("q.text", r"a path without braces, which is a constant text. Write \{\{ q.text \}\}"),
        ("Q.text", r"a path without braces"),
        ("answers[0]", r"a path without braces"),
        ("q['text'] | trim", r"a path without braces"),
        ("answer | trim", r"a path without braces"),
        ("question\n", r"none of that name. Write `question` without white space"),
        (" answer ", r"without white space"),
        ("Question", r"Did you mean question"),
    ],
)
def test_fields_that_would_stay_text_are_refused(own_task: Task, key: str, text: str, problem: str) -> None:
    with pytest.raises(UserError, match=problem) as error:
        checked(own_task(ROWS, **GOOD | {key: text}))
    assert "row 1" in str(error.value)


@pytest.mark.parametrize(
    ("keys", "problem"),
    [
        ({"reference": "{{answers}}"}, r"a list, which Python would print as \"\['Wien', '\?'\]\""),
        ({"reference": "The answer is {{q}}."}, r"a dict, which Python would print"),
        ({"reference": "q"}, r"a dict, which Python would print"),
        ({"reference": "{{none}}"}, r"print as 'None'"),
        ({"reference": "none"}, r"a reference answer in every row; got None"),
        ({"reference": "{{answers[0], answers[1]}}"}, r"a tuple"),
        ({"reference_answer": "{{answers}}"}, r"a list"),
        ({"scorer": "number"}, r"row 1: expected a reference that its own `scorer: number` scores 100; got 'Wien'"),
        ({"scorer": "number", "reference": "{{ n if n < 2 else 'two' }}"}, r"row 3: .* got 'two', which scores 0"),
        ({"scorer": "math", "reference": "void"}, r"`scorer: math` scores 100"),
        ({"scorer": "contains", "reference": "void"}, r"`scorer: contains` scores 100; got ''"),
        ({"reference_answer": "I think it is {{answer}}"}, r"got 'I think it is Wien', which scores 0"),
    ],
)
def test_references_that_lost_their_meaning_are_refused(own_task: Task, keys: dict[str, Any], problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        checked(own_task(ROWS, **GOOD | keys))


@pytest.mark.parametrize(("value", "name"), [(float("nan"), "nan"), ([["a"]], "a list"), ([{"t": "a"}], "a dict")])
def test_missing_and_nested_references_are_refused(own_task: Task, value: Any, name: str) -> None:
    rows = [row | {"answer": value} for row in ROWS]
    with pytest.raises(UserError, match=name):
        checked(own_task(rows, **GOOD))


@pytest.mark.parametrize(
    ("keys", "note"),
    [
        ({"prompt": "Answer the question."}, "all 3 prompts are equal: 'Answer the question.'"),
        ({"prompt": "<question>"}, "all 3 prompts are equal"),
        ({"prompt": "{{q}}"}, "3 of 3 prompts hold a value as Python prints it"),
        ({"prompt": "{{question}} {{none}}"}, "3 of 3 prompts hold a value as Python prints it: 'None'"),
        ({"prompt": "{{question}} {answer}"}, "3 of 3 prompts hold single braces around a field"),
        ({"reference": "given"}, "3 of 3 references look like a list or None that Python printed: \"['Wien', 'x']\""),
        ({"reference": "$answer"}, "all 3 references are equal: '$answer'"),
        ({"reference": "void"}, "3 of 3 references are empty"),
        (
            {"reference": "{{answer}}\n!", "stop": "\n"},
            "3 of 3 references hold the stop string '\\n', where an answer ends: 'row 1: Wien",
        ),
        (
            {"reference": "{{answer}} or {{n}}", "stop": [";", " or 2"]},
            "1 of 3 references hold the stop string ' or 2'",
        ),
    ],
)
def test_what_may_be_meant_is_noted(own_task: Task, keys: dict[str, Any], note: str) -> None:
    assert any(note in found for found in checked(own_task(ROWS, **GOOD | keys)))


def test_a_stop_string_at_the_end_of_a_reference_cuts_nothing(own_task: Task) -> None:
    assert checked(own_task(ROWS, **GOOD | {"reference": "{{answer}}\n", "stop": "\n"})) == []


OBJECTS = ["{{q.items}}", "{{answers.index}}", "{{answers | map('upper')}}", "{{question.title}}"]


@pytest.mark.parametrize("text", OBJECTS)
@pytest.mark.parametrize("key", ["prompt", "reference"])
def test_methods_that_python_prints_are_refused(own_task: Task, text: str, key: str) -> None:
    rows = [row | {"q": row["q"] | {"items": "x"}} for row in ROWS]
    with pytest.raises(UserError, match=r"row 1, .*it prints a method or another object of Python"):
        checked(own_task(rows, **GOOD | {key: "So: " + text}))
    plain = checked(own_task(rows, **GOOD | {"prompt": "{{q['items']}} <built-in> {{question}}"}))
    assert plain == [], "a field of that name, and angle brackets of the author"


def test_methods_in_prompts_of_lm_eval_are_refused(own_task: Task) -> None:
    native = {"scorer": None, "metric_list": [{"metric": "exact_match"}], "prompt": None, "reference": None}
    with pytest.raises(UserError, match="the prompt prints a method"):
        checked(own_task(ROWS, **native, doc_to_text="So: {{q.items}}", doc_to_target="{{answer}}"))


@pytest.mark.parametrize(("filters", "state"), [(None, "ok"), ("x", "bad")])
def test_references_of_lm_eval_tasks_go_through_their_own_metric(
    own_task: Task, filters: str | None, state: str
) -> None:
    metric = {"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}
    steps = [{"function": "regex", "regex_pattern": "(Wien|Paris|Roma)"}, {"function": "take_first"}]
    path = own_task(
        ROWS, scorer=None, metric_list=[metric], prompt=None, reference=None, doc_to_text="{{question}}",
        doc_to_target="{{answer}}" + (filters or ""), filter_list=[{"name": "short", "filter": steps}],
    )  # fmt: skip
    found = list(doctor.oracle([load.load_task(path)], None, None))
    assert [check.state for check in found] == [state, state]
    assert all(("100.0 on 3" in check.text) == (state == "ok") for check in found)


@pytest.mark.parametrize("chat", [False, True])
def test_styles_are_checked_like_the_rest(own_task: Task, chat: bool) -> None:
    path = own_task(ROWS, **GOOD, styles={"chat": {"doc_to_text": "{question}"}})
    if chat:
        with pytest.raises(UserError, match="single braces"):
            checked(path, chat=True)
    else:
        assert checked(path) == []


@pytest.mark.parametrize("key", ["doc_to_text", "doc_to_target"])
def test_tasks_that_lm_eval_scores_are_looked_at_too(own_task: Task, key: str) -> None:
    """lm-eval itself takes '{question}' and 'q.text' as constant texts."""
    native = {"scorer": None, "metric_list": [{"metric": "exact_match"}], "prompt": None, "reference": None}
    fields = {"doc_to_text": "{{question}}", "doc_to_target": "{{answer}}"}
    assert checked(own_task(ROWS, **native, **fields)) == []
    for text in ("{question}", "q.text"):
        with pytest.raises(UserError, match="braces"):
            checked(own_task(ROWS, **native, **fields | {key: text}))
    same = checked(own_task(ROWS, **native, **fields | {"doc_to_text": "Say it."}))
    assert same == ["sums: all 3 prompts are equal: 'Say it.'"]


@pytest.mark.parametrize("tests", ["test", "{{test}}", "assert f({{answers}}) == {{n}}", "check(f)"])
def test_parts_of_programs_are_fields_or_templates(own_task: Task, tests: str) -> None:
    """A field alone is filled in, as in `prompt`; a list stands as Python writes it."""
    path = own_task(ROWS, prompt="question", reference=None, scorer="python", code={"tests": tests, "entry_point": "f"})
    assert checked(path) == []
    expected = {"assert f({{answers}}) == {{n}}": "assert f(['Wien', '?']) == 0", "check(f)": "check(f)"}
    assert render.code_parts(load.load_task(path), ROWS[0])["tests"] == expected.get(tests, "assert f() == 0")


@pytest.mark.parametrize(
    "code",
    [
        {"tests": "{test}"}, {"tests": "assert f() == {n}"}, {"tests": "q.text"}, {"tests": "tset"},
        {"tests": "test", "completes": "{question}"}, {"tests": "test", "entry_point": "{n}"},
        {"tests": "test", "setup": "solution.head"},
    ],
)  # fmt: skip
def test_parts_of_programs_that_would_stay_text_are_refused(own_task: Task, code: dict[str, str]) -> None:
    with pytest.raises(UserError, match=r"row 1, (template|field)"):
        checked(own_task(ROWS, prompt="question", reference=None, scorer="python", code=code))


@pytest.mark.parametrize(
    "tests",
    [
        ["assert f() == 0"], "['assert f() == 0', 'assert f() == 1']", '["assert f() == 0"]', "", "  \n", "# f() == 0",
        "None", None, "def check(f):\n    assert f() == 0\n", "import f", "f", "pass", "'assert f() == 0'", "x = 1",
        "class Tests:\n    def test(self):\n        assert f() == 0\n", "if True:\n    def check():\n        f()\n",
        "assert True", "x = lambda: f()", float("nan"), {"inputs": [1]}, "assert f( == 0", "f is right",
    ],
)  # fmt: skip
@pytest.mark.parametrize("template", ["tests", "{{tests}}"])
def test_tests_that_test_nothing_are_refused(own_task: Task, tests: Any, template: str) -> None:
    """They end without an error, whatever the answer is. The first row is fine."""
    rows = [{"question": "f?", "tests": "assert f() == 0"}, {"question": "f?", "tests": tests}]
    path = own_task(rows, prompt="question", reference=None, scorer="python", code={"tests": template})
    with pytest.raises(UserError, match=r"row 2, .*`code\.tests`"):
        checked(path)


@pytest.mark.parametrize(
    "tests",
    [
        "assert f() == 0", "check(f)", "def check(c):\n    assert c() == 0\ncheck(f)", "for i in [f()]:\n    assert i",
        "assert not f.wrong", "x = f()", "def test_f():\n    assert f() == 0\ntest_f()",
        "def test_f():\n    assert f() == 0\nfor n, run in list(globals().items()): n.startswith('test') and run()",
        "import unittest\nclass T(unittest.TestCase):\n    def test(self): f()\nassert unittest.TextTestRunner().run("
        "unittest.defaultTestLoader.loadTestsFromTestCase(T)).wasSuccessful()",
        "import sys\nsys.modules['solution'] = sys.modules['__main__']\nfrom solution import f\nassert f() == 0",
        "try:\n    import numpy\nexcept ImportError:\n    numpy = None\nassert f() == 0",
        "from __main__ import f\nassert f() == 0",
        "import asyncio\nasync def test_f():\n    assert f() == 0\nasyncio.run(test_f())",
        "if f() != 0:\n    raise ValueError", "assert [f() for _ in [1]] == [0]", "with open('/x') as g:\n    f(g)",
        "(lambda: f())()", "@f\ndef g(): pass",
    ],
)  # fmt: skip
def test_tests_that_test_something_pass(own_task: Task, tests: str) -> None:
    rows = [{"question": f"f {n}?", "tests": tests} for n in range(2)]
    path = own_task(rows, prompt="question", reference=None, scorer="python", code={"tests": "tests"})
    assert checked(path) == []


@pytest.mark.parametrize(
    ("tests", "said"),
    [
        ("x = list()\ndef test_f():\n    assert f() == 0", "`def test_f`, which nothing runs.*globals"),
        ("def test_f():\n    assert f() == 0\ndef test_g():\n    assert g() == 0\ntest_f()", "`def test_g`"),
        ("def test_f(case):\n    assert f() == case", "Fixtures of pytest"),
        ("async def test_f():\n    assert f() == 0", r"asyncio\.run"),
        ("async def test_f():\n    assert f() == 0\ntest_f()", r"asyncio\.run"),
        ("def check(c):\n    assert c() == 0", "`def check`"),
        ("class TestF:\n    def test(self):\n        assert f() == 0\nprint()", "`class TestF`"),
        ("import unittest\nclass F(unittest.TestCase):\n    def test(self): f()", "`class F`.*loadTestsFromModule"),
        ("import unittest\nclass F(unittest.TestCase):\n    pass\nunittest.main()", r"unittest\.main\(\)"),
        ("import pytest\n@pytest.mark.parametrize('n', [0])\ndef test_f(n):\n    assert f() == n", "import pytest"),
        ("@pytest.fixture\ndef zero():\n    return 0", "pytest does not run here"),
        ("import numpy as np\nassert np.all(f() == 0)", "Python's own modules only"),
        ("from solution import f\nassert f() == 0", r"sys\.modules"),
        ("def check(c):\n    import numpy\n    assert c() == 0\ncheck(f)", "import numpy"),
    ],
)  # fmt: skip
def test_tests_that_never_run_or_never_pass_are_refused(own_task: Task, tests: str, said: str) -> None:
    rows = [{"question": "f?", "tests": "assert f() == 0"}, {"question": "f?", "tests": tests}]
    path = own_task(rows, prompt="question", reference=None, scorer="python", code={"tests": "tests"})
    with pytest.raises(UserError, match=rf"(?s)row 2, .*`code\.tests`.*{said}"):
        checked(path)


def test_what_the_refusals_advise_works() -> None:
    """The lines that a message tells to add run the tests: a right program passes, a wrong one does not."""
    try:
        box = sandbox.choose()
    except UserError as error:
        pytest.skip(error.got)
    functions = "def test_f():\n    assert f() == 0\n"
    classes = "import unittest\nclass F(unittest.TestCase):\n    def test(self):\n        self.assertEqual(f(), 0)\n"
    for tests in (functions, classes):
        refused = why_untested(tests)
        assert refused is not None
        line = re.search(r"(for name|import unittest;).*?(run\(\)|wasSuccessful\(\))", refused.fix)
        assert line is not None
        assert why_untested(tests + line[0]) is None
        assert box.run("def f(): return 0", tests + line[0]).passed
        assert not box.run("def f(): return 1", tests + line[0]).passed
    assert not box.run("def f(): return 0", classes + "unittest.main()").passed


@pytest.mark.parametrize("template", ["part", "{{part}}"])
@pytest.mark.parametrize("key", ["setup", "completes", "entry_point"])
def test_a_part_of_a_program_without_a_value_is_empty(own_task: Task, key: str, template: str) -> None:
    rows = [{"question": "f?", "tests": "assert f() == 0", "part": part} for part in ("x", None)]
    path = own_task(rows, prompt="question", reference=None, scorer="python", code={"tests": "tests", key: template})
    parts = [render.code_parts(load.load_task(path), row)[key] for row in rows]
    assert parts == ["x", ""]


def test_a_setup_that_does_not_parse_is_refused(own_task: Task) -> None:
    rows = [{"question": "f?", "tests": "assert f() == 0", "head": "['import math']\nimport"}]
    path = own_task(rows, prompt="question", reference=None, scorer="python", code={"tests": "tests", "setup": "head"})
    with pytest.raises(UserError, match=r"row 1, .*`code\.setup`"):
        checked(path)


def test_a_run_is_refused_or_carries_the_note(
    own_task: Task, tiny_model: Path, tmp_path: Path, invoke: Callable[..., Any]
) -> None:
    bad = invoke("--model", tiny_model, "--task-file", own_task(ROWS, **GOOD | {"prompt": "{q.text}"}))
    assert bad.exit_code == 1 and "single braces" in bad.output and "Traceback" not in bad.output
    path = own_task(ROWS, **GOOD | {"prompt": "Say something."}, max_new_tokens=2)
    done = invoke("--model", tiny_model, "--task-file", path, "--output", tmp_path / "o")
    assert done.exit_code == 0, done.output
    assert any(
        "all 3 prompts are equal" in note for note in json.loads((tmp_path / "o/results.json").read_text())["notes"]
    )
    told = invoke("doctor", "--oracle", "--task-file", path)
    assert "all 3 prompts are equal" in told.output


def test_a_function_that_fails_or_gives_nothing(own_task: Task) -> None:
    path = own_task(ROWS, **GOOD | {"prompt": None})
    (path.parent / "help.py").write_text(
        "def fails(row):\n    return row['nothing']\n\ndef nothing(row):\n    return None\n"
    )
    text = path.read_text()
    path.write_text(text + "doc_to_text: !function help.fails\n")
    with pytest.raises(UserError, match=r"row 1, !function fails: expected a value for every row; got KeyError"):
        checked(path)
    path.write_text(text + "doc_to_text: !function help.nothing\n")
    assert any("prints it: 'None'" in note for note in checked(path))


# --- what a scorer needs ---

IFEVAL = {
    "prompt": "Write two sentences.", "instruction_id_list": ["length_constraints:number_sentences"],
    "kwargs": [{"relation": "at least", "num_sentences": 2}], "key": 1,
}  # fmt: skip


def own_ifeval(own_task: Task, row: dict[str, Any] = IFEVAL) -> Path:
    return own_task([row], prompt="prompt", reference=None, scorer="ifeval", max_new_tokens=4)


def test_an_own_ifeval_task_takes_the_sentences_of_the_data_directory(
    own_task: Task, tiny_model: Path, data_dir: Path, tmp_path: Path
) -> None:
    """In a process of its own, with no NLTK data elsewhere, offline, and any use of the network an error."""
    path = own_ifeval(own_task)
    script = (
        "import socket, sys\n"
        "def refuse(*_, **__): raise SystemExit('the network was tried')\n"
        "socket.create_connection = socket.socket.connect = refuse\n"
        "from dskd_eval.cli import main\nmain(sys.argv[1:])\n"
    )
    environment = {name: text for name, text in os.environ.items() if name not in ("NLTK_DATA", "DSKD_DATA")}
    environment |= {"HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", script, "--model", str(tiny_model), "--task-file", str(path)]

    def run(*options: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*command, *options], capture_output=True, text=True, env=environment, check=False)

    done = run("--data-dir", str(data_dir), "--output", str(tmp_path / "o"))
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "o" / "results.json").read_text())["complete"]
    without = run("--output", str(tmp_path / "n"))
    assert without.returncode == 1 and "punkt_tab" in without.stderr and "HF_HUB_OFFLINE is set" in without.stderr
    assert not (tmp_path / "n").exists()


def test_needs_belong_to_the_scorer(own_task: Task) -> None:
    assert load.load_task(own_ifeval(own_task)).needs == ("nltk_punkt",)
    assert selection.builtin_tasks()["ifeval"].needs == ("nltk_punkt",)
    assert selection.builtin_tasks()["gsm8k"].needs == ()
    with pytest.raises(UserError, match=r"`needs`: expected known needs; got 'punkt'"):
        load.load_task(own_task(needs="punkt"))


@pytest.mark.parametrize(
    ("change", "got"),
    [
        ({"instruction_id_list": ["length_constraints:sentences"]}, "KeyError"),
        ({"kwargs": []}, "IndexError"),
        ({"kwargs": [{"sentences": 2}]}, "TypeError"),
        ({"kwargs": None}, "TypeError"),
    ],
)
def test_instructions_that_cannot_be_checked_are_found_first(
    own_task: Task, data_dir: Path, punkt: None, change: dict[str, Any], got: str
) -> None:
    with pytest.raises(UserError, match=rf"row 1, `scorer: ifeval`: expected instructions of IFEval.*got {got}"):
        checked(own_ifeval(own_task, IFEVAL | change))


@pytest.mark.parametrize(("name", "value"), [("HF_HUB_OFFLINE", "true"), ("HF_DATASETS_OFFLINE", "1")])
def test_every_offline_switch_counts(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    for other in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(other, raising=False)
    assert data.offline() is None
    monkeypatch.setenv(name, value)
    assert data.offline() == name
