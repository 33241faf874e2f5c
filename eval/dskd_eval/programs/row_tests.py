"""The tests of a row, before any model is asked: whether they can fail for a wrong answer and pass for a right one."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from dskd_eval.programs.syntax import DEFINITIONS, LOOKUPS, calls, dotted, foreign, names_of, statements_of

_RUN_FUNCTIONS = "for name, run in list(globals().items()): name.startswith('test') and run()"
_RUN_CLASSES = (
    "import unittest; assert unittest.TextTestRunner().run("
    "unittest.defaultTestLoader.loadTestsFromModule(__import__('__main__'))).wasSuccessful()"
)


@dataclass(frozen=True)
class Untested:
    """Why tests do not test: what they are, and what to do."""

    got: str
    fix: str


def why_untested(tests: str, setup: str = "") -> Untested | None:
    """Why tests cannot fail for a wrong answer, or cannot pass for a right one; None where they can do both."""
    statements = statements_of(tests) or []
    for statement in statements:
        if found := _cannot_run(statement, setup + tests):
            return found
    if found := _never_called(statements):
        return found
    if any(_tests_something(statement) for statement in statements):
        return None
    fix = "Join a list of tests with {{ tests | join('\\n') }}; call a function of tests, as in check(f)."
    return Untested(beginning(tests), fix)


def beginning(text: str) -> str:
    """The first characters of a part of a row, for a message."""
    return repr(text[:80]) if text.strip() else "no code"


def _tests_something(statement: ast.stmt) -> bool:
    """Whether a statement calls something or asserts something of a name when the tests start."""
    waiting: list[ast.AST] = [statement]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Call) or (isinstance(node, ast.Assert) and _has_name(node.test)):
            return True
        if isinstance(node, DEFINITIONS) and node.decorator_list:
            return True
        if not isinstance(node, (*DEFINITIONS, ast.Lambda)):
            waiting += ast.iter_child_nodes(node)
    return False


def _has_name(node: ast.AST) -> bool:
    return any(isinstance(part, ast.Name) for part in ast.walk(node))


def _cannot_run(statement: ast.stmt, everything: str) -> Untested | None:
    """Whether a right program would fail too: the sandbox has no packages, and a test runner ends the program."""
    for node in _certain(statement):
        if "sys.modules" not in everything and isinstance(node, ast.stmt) and foreign(node):
            return Untested(
                f"{ast.unparse(node)!r}: the sandbox has Python's own modules only",
                "Write the tests without it: plain assertions for pytest; the names of the program are there without "
                "an import. `setup: \"import sys; sys.modules['solution'] = sys.modules['__main__']\"` makes "
                "`from solution import f` work.",
            )
        for decorator in getattr(node, "decorator_list", []):
            name = dotted(decorator.func if isinstance(decorator, ast.Call) else decorator)
            if name.startswith("pytest."):
                return Untested(f"@{name}: pytest does not run here", "Write plain assertions, one for every case.")
    if "unittest.main" in calls(statement):
        return Untested("unittest.main(), which ends the program or hides failures", f"Write instead: {_RUN_CLASSES}")
    return None


def _certain(statement: ast.AST) -> Iterator[ast.AST]:
    """The parts of a statement that do not depend on a condition or on an import that may fail."""
    yield statement
    if not isinstance(statement, (ast.Try, ast.If)):
        for child in ast.iter_child_nodes(statement):
            yield from _certain(child)


def _never_called(statements: Sequence[ast.stmt]) -> Untested | None:
    """A function or class of tests that nothing uses."""
    names = [names_of(statement) for statement in statements]
    called = set().union(*(calls(statement) for statement in statements))
    loaded = any(name.rpartition(".")[2].startswith(("loadTests", "discover")) for name in called)
    if frozenset().union(*(item.read for item in names)) & LOOKUPS:
        return None
    for statement in statements:
        if not isinstance(statement, DEFINITIONS) or statement.decorator_list or not _is_test(statement):
            continue
        others = [
            item.read
            for other, item in zip(statements, names, strict=True)
            if other is not statement and not _forgets(other, statement)
        ]
        if statement.name in frozenset().union(*others) or (loaded and isinstance(statement, ast.ClassDef)):
            continue
        kind = "class" if isinstance(statement, ast.ClassDef) else "def"
        return Untested(f"`{kind} {statement.name}`, which nothing runs", _how_to_call(statement))
    return None


def _forgets(statement: ast.stmt, function: ast.stmt) -> bool:
    """Whether a statement calls an async function without awaiting it, which runs nothing."""
    called = statement.value if isinstance(statement, ast.Expr) else None
    name = called.func if isinstance(called, ast.Call) else None
    return isinstance(function, ast.AsyncFunctionDef) and isinstance(name, ast.Name) and name.id == function.name


def _is_test(statement: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> bool:
    if isinstance(statement, ast.ClassDef):
        is_case = any(dotted(base).endswith("TestCase") for base in statement.bases)
        return is_case or re.match(r"Tests?([A-Z_]|$)", statement.name) is not None
    return re.match(r"(test|check)(_|s?$|[A-Z0-9])", statement.name) is not None


def _how_to_call(statement: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> str:
    if isinstance(statement, ast.ClassDef):
        return f"End the tests with: {_RUN_CLASSES} (classes of unittest), or write plain assertions."
    if isinstance(statement, ast.AsyncFunctionDef):
        return f"End the tests with: import asyncio; asyncio.run({statement.name}())"
    arguments = statement.args.posonlyargs + statement.args.args
    if len(arguments) > len(statement.args.defaults):
        return f"Call it under its definition, as in {statement.name}(f). Fixtures of pytest do not exist here."
    return f"Call it under its definition; for all rows: {_RUN_FUNCTIONS}"
