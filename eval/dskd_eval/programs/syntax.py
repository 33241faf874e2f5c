"""What Python makes of code: the part that parses, its statements, the names that they bind and read."""

from __future__ import annotations

import ast
import builtins
import itertools
import re
import symtable
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

BUILTINS = frozenset(dir(builtins)) | {"__name__", "__file__", "__doc__"}
# Code that looks names up by their text: nothing around it can be called unused.
LOOKUPS = frozenset({"globals", "locals", "vars", "eval", "exec"})
DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
_MOST_CUTS = 500


@dataclass(frozen=True)
class Names:
    """Names of one top-level statement: those that it gives a value or changes, those that it reads."""

    bound: frozenset[str] = frozenset()
    read: frozenset[str] = frozenset()


def parses(code: str) -> bool:
    """Whether Python reads the text as a program."""
    return statements_of(code) is not None


def parsing_prefix(code: str, attempts: Iterator[int] | None = None) -> str:
    """The longest run of whole lines from the start that Python compiles; '' where there is none.

    attempts: ends when several calls together have tried often enough.
    """
    lines = lines_of(code)
    count = len(lines)
    for _ in itertools.islice(itertools.count() if attempts is None else attempts, _MOST_CUTS):
        prefix = "".join(lines[:count])
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                compile(prefix, "<answer>", "exec", dont_inherit=True)
        except SyntaxError as error:
            # No shorter run that still holds the line of the error can parse.
            count = min(count, error.lineno or count) - 1
        except (ValueError, MemoryError, RecursionError):
            return ""
        else:
            return prefix
        if count <= 0:
            return ""
    return ""


def lines_of(code: str) -> list[str]:
    # splitlines also splits where Python sees no new line.
    return re.findall(r".*\n|.+", code)


def statements_of(code: str) -> list[ast.stmt] | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return ast.parse(code).body
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return None


def first_line(statement: ast.stmt) -> int:
    """The number of a statement's first line, that of its first decorator where it has one."""
    decorators: list[ast.expr] = getattr(statement, "decorator_list", [])
    return min([statement.lineno, *(decorator.lineno for decorator in decorators)])


def names_of(statement: ast.stmt) -> Names:
    """Names of the module that a statement binds and reads, also within the functions that it defines."""
    try:
        table = symtable.symtable(ast.unparse(statement), "<answer>", "exec")
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return _all_names(statement)
    bound, read = set(), set()
    for symbol in table.get_symbols():
        if symbol.is_assigned() or symbol.is_imported():
            bound.add(symbol.get_name())
        if symbol.is_referenced():
            read.add(symbol.get_name())
    waiting = list(table.get_children())
    while waiting:
        scope = waiting.pop()
        waiting += scope.get_children()
        for symbol in scope.get_symbols():
            if symbol.is_global():
                read.add(symbol.get_name())
                if symbol.is_declared_global() and symbol.is_assigned():
                    bound.add(symbol.get_name())
    if not isinstance(statement, DEFINITIONS):
        bound |= {base for node in ast.walk(statement) if (base := _changed(node))}
    return Names(frozenset(bound), frozenset(read))


def _all_names(statement: ast.stmt) -> Names:
    """The same for a statement that Python compiles and cannot write: with the names of its functions, too many."""
    nodes = list(ast.walk(statement))
    names = [node for node in nodes if isinstance(node, ast.Name)]
    read = frozenset(node.id for node in names if isinstance(node.ctx, ast.Load))
    if isinstance(statement, DEFINITIONS):
        inside = {node.id for node in names if not isinstance(node.ctx, ast.Load)}
        inside |= {node.arg for node in nodes if isinstance(node, ast.arg)}
        return Names(frozenset({statement.name}), read - inside)
    return Names(frozenset(node.id for node in names if not isinstance(node.ctx, ast.Load)), read)


def _changed(node: ast.AST) -> str:
    """The name whose item or attribute an assignment or deletion changes; '' for another node."""
    if not isinstance(node, (ast.Attribute, ast.Subscript)) or isinstance(node.ctx, ast.Load):
        return ""
    place: ast.AST = node
    while isinstance(place, (ast.Attribute, ast.Subscript, ast.Call)):
        place = place.func if isinstance(place, ast.Call) else place.value
    return place.id if isinstance(place, ast.Name) else ""


def bound(code: str) -> frozenset[str]:
    return frozenset().union(*(names_of(statement).bound for statement in statements_of(code) or []))


def free(code: str) -> frozenset[str]:
    """Names that the code reads and neither it nor Python defines."""
    names = [names_of(statement) for statement in statements_of(code) or []]
    read = frozenset().union(*(item.read for item in names))
    return read - frozenset().union(*(item.bound for item in names)) - BUILTINS


def imports(statement: ast.stmt) -> bool:
    return isinstance(statement, (ast.Import, ast.ImportFrom))


def foreign(statement: ast.stmt) -> bool:
    """Whether a statement imports what the sandbox does not have: packages other than Python's own."""
    if isinstance(statement, ast.ImportFrom):
        modules = [statement.module or ""]
    else:
        modules = [item.name for item in statement.names] if isinstance(statement, ast.Import) else []
    own = sys.stdlib_module_names | {"__main__"}
    return any(module.partition(".")[0] not in own for module in modules)


def calls(statement: ast.stmt) -> set[str]:
    return {dotted(node.func) for node in ast.walk(statement) if isinstance(node, ast.Call)}


def dotted(node: ast.expr) -> str:
    """A name with the names before its dots; '' for what is no such name."""
    parts = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join([node.id, *reversed(parts)]) if isinstance(node, ast.Name) else ""


def full_lines(text: str) -> int:
    """The number of lines that hold something."""
    return sum(1 for line in text.split("\n") if line.strip())


def first_full_line(text: str) -> str:
    """The first line that holds something; '' where there is none."""
    return next((line for line in text.split("\n") if line.strip()), "")


def indent_of(line: str) -> str:
    """The white space that a line begins with."""
    return line[: len(line) - len(line.lstrip())]


def shortened_note(rest: str) -> str:
    """What the record says of an end that does not parse."""
    lines = full_lines(rest)
    said = f"an end of {lines} line{'s' * (lines != 1)} that does not parse"
    return f"{said}, from: {short(first_full_line(rest).strip())}"


def shown(statement: ast.stmt) -> str:
    """A statement on one line, for the record."""
    try:
        return short(ast.unparse(statement))
    except (ValueError, RecursionError):
        return f"line {statement.lineno}, which is too long to show"


def short(text: str) -> str:
    """The beginning of a text on one line."""
    line = " ".join(text.split())
    return line if len(line) <= 80 else line[:77] + "..."
