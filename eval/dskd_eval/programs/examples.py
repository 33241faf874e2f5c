"""Statements of an answer that only try its function out, and the program without them."""

from __future__ import annotations

import ast
import itertools
from collections.abc import Iterable, Sequence

from dskd_eval.programs.syntax import (
    BUILTINS,
    DEFINITIONS,
    LOOKUPS,
    Names,
    calls,
    first_line,
    foreign,
    imports,
    lines_of,
    names_of,
    shown,
    statements_of,
)

# Calls that wait for a person or end the program before its tests.
_CONSOLE = frozenset(
    {"input", "exit", "quit", "breakpoint", "sys.exit", "os._exit", "unittest.main", "doctest.testmod", "pytest.main"}
)


def without_examples(code: str, wanted: frozenset[str], known: frozenset[str]) -> tuple[str, list[str]]:
    """The program without assertions, example calls and what only they use; the wanted names keep all they need."""
    statements = statements_of(code)
    if not statements or not wanted:
        return code, []
    names = [names_of(statement) for statement in statements]
    needed = _closure(wanted, names)
    if needed & LOOKUPS:
        needed = _closure(needed.union(*(item.bound for item in names if not item.read & wanted)), names)
    examples = _examples(statements, names, wanted, needed, known)
    stays = [place not in examples and _acts(statement, needed) for place, statement in enumerate(statements)]
    needed = _closure(needed.union(*(item.read for item, stay in zip(names, stays, strict=True) if stay)), names)
    unused = {
        place
        for place, statement in enumerate(statements)
        if not _runs(statement) and not stays[place] and _is_unused(statement, names[place], needed, wanted, names)
    }
    dropped = sorted(examples | unused)
    if not dropped:
        return code, []
    texts = [shown(statements[place]) for place in dropped]
    note = f"{len(dropped)} statements beside the tested code: " + "; ".join(texts[:3])
    return _less(code, statements, dropped), [note + ("; ..." if len(texts) > 3 else "")]


def _closure(wanted: frozenset[str], names: Sequence[Names]) -> frozenset[str]:
    """The wanted names and all names that the statements which bind them read, and so on."""
    needed = set(wanted)
    while more := {name for item in names if item.bound & needed for name in item.read | item.bound} - needed:
        needed |= more
    return frozenset(needed)


def _runs(statement: ast.stmt) -> bool:
    """Whether a statement does something when the program starts, other than to define or import."""
    return not isinstance(statement, (*DEFINITIONS, ast.Import, ast.ImportFrom))


def _examples(
    statements: Sequence[ast.stmt],
    names: Sequence[Names],
    wanted: frozenset[str],
    needed: frozenset[str],
    known: frozenset[str],
) -> set[int]:
    """Places of statements that run the wanted names, or what was made with them, without being needed by them."""
    star = any(isinstance(item, ast.ImportFrom) and item.names[0].name == "*" for item in statements)
    defined = BUILTINS.union(known, *(item.bound for item in names))
    spoilt, places = set(wanted), set()
    for place, (statement, item) in enumerate(zip(statements, names, strict=True)):
        if not _runs(statement):
            if (item.read & spoilt or foreign(statement)) and not item.bound & needed:
                spoilt |= item.bound
            continue
        if item.bound & needed and not _is_main_guard(statement):
            continue
        unknown = not star and bool(item.read - defined)
        if _is_check(statement) or item.read & spoilt or unknown or calls(statement) & _CONSOLE:
            places.add(place)
            spoilt |= item.bound - needed
    return places


def _is_check(statement: ast.stmt) -> bool:
    """An assertion, the `__main__` part, or an expression that only shows a value."""
    if isinstance(statement, ast.Expr):
        return not isinstance(statement.value, (ast.Call, ast.Constant))
    return isinstance(statement, ast.Assert) or _is_main_guard(statement)


def _is_main_guard(statement: ast.stmt) -> bool:
    tested = ast.walk(statement.test) if isinstance(statement, ast.If) else ()
    return any(isinstance(node, ast.Constant) and node.value == "__main__" for node in tested)


def _acts(statement: ast.stmt, needed: frozenset[str]) -> bool:
    """Whether a statement does more than bind names: it runs, is decorated, or extends a needed class."""
    if imports(statement):
        return False
    if isinstance(statement, ast.ClassDef) and not statement.decorator_list:
        bases = frozenset().union(*(names_of(ast.Expr(base)).read for base in statement.bases))
        return bool((bases - BUILTINS) & needed)
    return _runs(statement) or bool(getattr(statement, "decorator_list", []))


def _is_unused(
    statement: ast.stmt, item: Names, needed: frozenset[str], wanted: frozenset[str], names: Sequence[Names]
) -> bool:
    """Whether nothing that stays reads a definition or import, or the program itself defines what is imported."""
    if isinstance(statement, ast.ImportFrom) and (statement.module == "__future__" or statement.names[0].name == "*"):
        return False
    if imports(statement) and any(other is not item and item.bound & wanted & other.bound for other in names):
        return True
    return not item.bound & needed


def _less(code: str, statements: Sequence[ast.stmt], dropped: Iterable[int]) -> str:
    """The code without the lines of some statements. ValueError or RecursionError for what Python cannot write."""
    gone = set(dropped)
    spans = [(first_line(statement), statement.end_lineno or statement.lineno) for statement in statements]
    if any(before[1] >= after[0] for before, after in itertools.pairwise(spans)):
        kept = [statement for place, statement in enumerate(statements) if place not in gone]
        return "".join(f"{ast.unparse(statement)}\n" for statement in kept)
    lines = {line for place in gone for line in range(spans[place][0], spans[place][1] + 1)}
    return "".join(line for number, line in enumerate(lines_of(code), 1) if number not in lines)
