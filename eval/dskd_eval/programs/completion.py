"""A prompt that ends inside a function, and an answer that goes on from there."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeGuard

from dskd_eval.programs.syntax import (
    DEFINITIONS,
    first_line,
    full_lines,
    indent_of,
    lines_of,
    parsing_prefix,
    statements_of,
)

_Function = ast.FunctionDef | ast.AsyncFunctionDef
_Definition = _Function | ast.ClassDef
_DEFINITION = re.compile(r"(?m)^(?:@.*\n)*(?:async[ \t]+def|def|class)\b")


@dataclass(frozen=True)
class Prompt:
    """What the answer goes on from.

    `head`: the lines before the last function or class of the module. `names`: of that one and those within it that the
    prompt ends in. `finished`: whether it holds more than a docstring. `indent`: that of the body, None where unknown.
    `before_last`: the lines before the innermost function, `method_indent` its indentation.
    """

    text: str
    head: str = ""
    names: tuple[str, ...] = ()
    finished: bool = False
    indent: str | None = None
    before_last: str = ""
    method_indent: str = ""

    @property
    def method(self) -> str:
        """The method that is asked for; '' where the prompt ends in no class."""
        return self.names[-1] if self.method_indent else ""


@dataclass(frozen=True)
class Completion:
    """The prompt with an answer as its body. `kept`: lines of the answer that parse. `rest`: what follows them."""

    code: str
    kept: int
    rest: str
    returns: bool


def read_prompt(text: str) -> Prompt:
    """Where a prompt ends."""
    for indent in _endings(text):
        closed = text if indent is None else f"{_on_a_new_line(text)}{indent}pass\n"
        statements = statements_of(closed)
        if statements is not None:
            return _prompt(text, closed, statements)
    starts = [found.start() for found in _DEFINITION.finditer(text)]
    return Prompt(text, head=text[: starts[-1]] if starts else "")


def _endings(text: str) -> Iterator[str | None]:
    """Indentations of a statement that may follow the prompt; None for a prompt that parses without one."""
    yield None
    lines = [line for line in text.split("\n") if line.strip()]
    last = indent_of(lines[-1]) if lines else ""
    unit = next((indent_of(line) for line in lines if line[0].isspace()), "    ")
    # After a comment in the body, and after the function's own line.
    yield from (last, last + unit, last + "    ")


def _prompt(text: str, closed: str, statements: Sequence[ast.stmt]) -> Prompt:
    path: list[_Definition] = []
    inside: Sequence[ast.stmt] = statements
    while inside and _is_definition(inside[-1]):
        path.append(inside[-1])
        inside = inside[-1].body
    if not path:
        return Prompt(text, head=text)
    lines = lines_of(closed)
    before = ["".join(lines[: first_line(node) - 1]) for node in path]
    own = path[-1].body
    is_method = len(path) > 1 and isinstance(path[-2], ast.ClassDef)
    return Prompt(
        text,
        head=before[0],
        names=tuple(node.name for node in path),
        finished=not all(_is_stub(statement) for statement in own),
        indent=indent_of(lines[own[0].lineno - 1]),
        before_last=before[-1],
        method_indent=indent_of(lines[path[-1].lineno - 1]) if is_method else "",
    )


def _is_definition(node: ast.AST) -> TypeGuard[_Definition]:
    return isinstance(node, DEFINITIONS)


def _is_stub(statement: ast.stmt) -> bool:
    """A docstring, `pass` or `...`."""
    is_constant = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
    return is_constant or isinstance(statement, ast.Pass)


def completion(prompt: Prompt, answer: str) -> Completion | None:
    """The prompt with the answer as its body, indented so that most of it parses; None where nothing does.

    None too for a function that is written anew, with an indentation: within itself it would never be called.
    """
    best: Completion | None = None
    for front, body in _written(prompt, answer):
        code = parsing_prefix(front + body)
        kept = full_lines(code[len(front) :])
        if kept > (best.kept if best else 0):
            best = Completion(code, kept, (front + body)[len(code) :], False)
    if best is None or not prompt.names:
        return best
    function = _named(best.code, prompt.names)
    returns = function is not None and _leaves(function)
    written_anew = (
        function is not None
        and not returns
        and any(_is_definition(node) and node.name == function.name for node in function.body)
    )
    return None if written_anew else Completion(best.code, best.kept, best.rest, returns)


def _written(prompt: Prompt, answer: str) -> Iterator[tuple[str, str]]:
    """The prompt and ways to write an answer under it, the likeliest first."""
    as_it_is = (prompt.text, answer)
    indent, lines = prompt.indent, lines_of(answer)
    first = next((place for place, line in enumerate(lines) if _is_code_line(line)), None)
    if indent is None or first is None:
        yield as_it_is
        return
    margin = indent_of(lines[first])
    on_the_same_line = not prompt.text.endswith("\n")
    if margin or on_the_same_line:
        yield as_it_is
    front = _on_a_new_line(prompt.text)
    head = [line.lstrip(" \t") for line in lines[:first]]
    if margin:
        yield front, "".join(_shifted(lines, margin, indent))
    else:
        yield front, _indented_whole(front, lines, prompt)
    # Often only the first line has lost its indentation, because the answer was stripped.
    start = "".join(f"{indent}{line}" for line in [*head, lines[first].lstrip(" \t")])
    others = lines[first + 1 :]
    yield front, start + "".join(others)
    inner = [indent_of(line) for line in others if _is_code_line(line)]
    # Up to code of the module that follows the body.
    inner = inner[: inner.index("")] if "" in inner else inner
    if inner:
        yield front, start + "".join(_shifted(others, min(inner, key=len), indent))
    yield as_it_is


def _is_code_line(line: str) -> bool:
    return bool(line.strip()) and not line.lstrip().startswith("#")


def _on_a_new_line(text: str) -> str:
    """A prompt up to the start of a line; an indentation at its end is left out."""
    text = text.rstrip(" \t")
    return text if not text or text.endswith("\n") else f"{text}\n"


def _shifted(lines: Sequence[str], margin: str, indent: str) -> list[str]:
    """Lines with another indentation, up to code that has less: what follows the function stays."""
    shifted = []
    for place, line in enumerate(lines):
        if line.startswith(margin):
            shifted.append(indent + line[len(margin) :])
        elif _is_code_line(line):
            return shifted + list(lines[place:])
        else:
            shifted.append(indent + line.lstrip(" \t"))
    return shifted


def _indented_whole(front: str, lines: Sequence[str], prompt: Prompt) -> str:
    """A body that was written without indentation. Strings over several lines keep their own white space."""
    moved = [f"{prompt.indent}{line}" if line.strip() else line for line in lines]
    code = parsing_prefix(front + "".join(moved))
    start = len(lines_of(front))
    for number in _lines_in_strings(code):
        if number > start:
            moved[number - start - 1] = lines[number - start - 1]
    function = _named(code, prompt.names)
    after = _after_return(function) if function else 0
    # What follows a `return` of the body itself would never run there: it is code of the module.
    place = after - start - 1 if after > start else len(lines)
    return "".join([*moved[:place], *lines[place:]])


def _lines_in_strings(code: str) -> set[int]:
    """Numbers of the lines that begin within a string; their white space belongs to it."""
    inside: set[int] = set()
    for node in ast.walk(ast.Module(statements_of(code) or [], [])):
        if isinstance(node, (ast.JoinedStr, ast.Constant)) and node.end_lineno:
            inside.update(range(node.lineno + 1, node.end_lineno + 1))
    return inside


def _after_return(function: _Definition) -> int:
    """The line of the first statement after a `return` of a function's own body; 0 where there is none."""
    for statement, following in zip(function.body, function.body[1:], strict=False):
        if isinstance(statement, (ast.Return, ast.Raise)):
            return first_line(following)
    return 0


def _named(code: str, names: Sequence[str]) -> _Definition | None:
    """The last definition of a name, of the next name within it, and so on."""
    found: _Definition | None = None
    inside: Sequence[ast.stmt] = statements_of(code) or []
    for name in names:
        found = next((node for node in reversed(inside) if _is_definition(node) and node.name == name), None)
        inside = found.body if found else []
    return found


def _leaves(function: _Definition) -> bool:
    """Whether a function returns, yields or raises by itself, not only in functions within it."""
    waiting: list[ast.AST] = list(function.body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, (ast.Return, ast.Yield, ast.YieldFrom, ast.Raise)):
            return True
        if not _is_definition(node) and not isinstance(node, ast.Lambda):
            waiting += ast.iter_child_nodes(node)
    return False


def under_class(prompt: Prompt, code: str) -> str:
    """Methods of a half class in the prompt, written without it: put into the class, other code before it."""
    lines = lines_of(f"{code}\n")
    in_strings = _lines_in_strings(code)
    before = inside = ""
    for node in statements_of(code) or []:
        first = first_line(node)
        for number in range(first, (node.end_lineno or first) + 1):
            line = lines[number - 1]
            if not _is_method(node, prompt.method):
                before += line
            else:
                inside += line if number in in_strings or not line.strip() else prompt.method_indent + line
    return before + prompt.before_last + inside


def _is_method(node: ast.stmt, wanted: str) -> bool:
    """Whether a function belongs in a class: the wanted one, and those whose first argument or decorator says so."""
    if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
        return False
    arguments = [*node.args.posonlyargs, *node.args.args]
    if node.name == wanted or (arguments and arguments[0].arg in ("self", "cls")):
        return True
    decorators = {item.id for item in node.decorator_list if isinstance(item, ast.Name)}
    return bool(decorators & {"staticmethod", "classmethod", "property"})
