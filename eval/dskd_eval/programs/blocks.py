"""Pieces of code in an answer: fenced and indented blocks, code spans, sessions at a prompt, lines between prose."""

from __future__ import annotations

import ast
import codeop
import functools
import itertools
import re
import textwrap
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from markdown_it import MarkdownIt
from markdown_it.token import Token

from dskd_eval.programs.syntax import (
    DEFINITIONS,
    bound,
    first_full_line,
    full_lines,
    imports,
    indent_of,
    names_of,
    parsing_prefix,
    statements_of,
)

_PYTHON = re.compile(r"\{?\s*\.?(?:python|py|ipython|pycon|sage)[\d.]*\b", re.IGNORECASE)
# The prompts of Python and IPython for a new statement, and for one that goes on.
_PROMPT = re.compile(r"[ \t]*(?:>>>|In \[\d+\]:) ?")
_MORE = re.compile(r"[ \t]*\.{3,}:? ?")
_NUMBER = re.compile(r"[ \t]*(\d{1,5})(?:[ \t]*[.:|)│])?(?=\s|$)")
_MOST_ATTEMPTS = 5_000
_MOST_NUMBERED = 500


@dataclass(frozen=True)
class Block:
    """One piece of code of an answer. `code` is its longest part from the start that parses, `rest` what follows.

    `note` says what stood around the code on its own lines: prompts and output, line numbers.
    """

    raw: str
    code: str
    rest: str
    python: bool
    defined: frozenset[str]
    bound: frozenset[str]
    note: str = ""

    @property
    def cut_inside(self) -> bool:
        """Whether the part that does not parse begins within a function or class."""
        return first_full_line(self.rest)[:1].isspace()

    def of_functions(self) -> Block:
        """The block as one that defines functions and classes only."""
        named = {item.name for item in statements_of(self.code) or [] if isinstance(item, DEFINITIONS)}
        return replace(self, defined=self.defined & named)


def block_of(raw: str, *, python: bool = True) -> Block:
    """A piece of code, with what was typed where it is a session, and without line numbers."""
    raw = raw.removeprefix("\ufeff")
    code, note = parsing_prefix(raw), ""
    end = raw[len(code) :]
    if _PROMPT.match(first_full_line(end)):
        typed = [line for line in _session(end.split("\n")) if line is not None]
        raw, note = code + "".join(f"{line}\n" for line in typed), "prompts and output of a session"
        code = parsing_prefix(raw)
    elif not code.strip() and _NUMBER.match(first_full_line(raw)):
        lines = raw.strip("\n").split("\n")
        if len(_numbered(lines)) == len(lines):
            raw, note = _unnumbered(lines), "line numbers"
            code = parsing_prefix(raw)
    statements = statements_of(code) or []
    imported = [names_of(statement).bound for statement in statements if imports(statement)]
    names = bound(code)
    return Block(raw, code, raw[len(code) :], python, names - frozenset().union(*imported), names, note)


# --- what stands before the code on its lines -----------------------------------------------------


def _session(lines: Iterable[str]) -> Iterator[str | None]:
    """For every line of an interactive session what was typed in it, without the prompt; None for output."""
    typed = opened = False
    for line in lines:
        found = _PROMPT.match(line) or (_MORE.match(line) if typed else None)
        if found:
            typed, opened = True, line.rstrip().endswith(":")
            yield line[found.end() :]
        else:
            # IDLE shows no prompt before the lines that go on.
            typed = opened = opened and bool(line.strip()) and line[0].isspace()
            yield line if opened else None


def _numbered(lines: Sequence[str]) -> Sequence[str]:
    """The lines from the start whose numbers go up by one; lines without anything may stand between them."""
    expected = count = 0
    for place, line in enumerate(lines[:_MOST_NUMBERED]):
        found = _NUMBER.match(line)
        if found and (not count or int(found[1]) == expected):
            expected, count = int(found[1]) + 1, place + 1
        elif line.strip():
            break
    return lines[:count] if full_lines("\n".join(lines[:count])) > 1 else []


def _unnumbered(lines: Sequence[str]) -> str:
    """Lines without their numbers. The code begins after each number, or in one column after the longest."""
    ends = [found.end() if (found := _NUMBER.match(line)) else 0 for line in lines]
    after = textwrap.dedent("".join(f"{line[end:]}\n" for line, end in zip(lines, ends, strict=True)))
    if parsing_prefix(after) == after:
        return after
    column = textwrap.dedent("".join(f"{line[max(ends) :]}\n" for line in lines))
    return max(after, column, key=lambda code: len(parsing_prefix(code)))


# --- CommonMark -----------------------------------------------------------------------------------


@functools.cache
def _markdown() -> MarkdownIt:
    # Fences within HTML (<details>) hold code too.
    return MarkdownIt("commonmark", {"html": False})


def fences(text: str) -> list[Block]:
    """Fenced blocks as CommonMark has them; an unclosed last fence counts, and a fence closed within a line."""
    blocks = []
    for token in _markdown().parse(text):
        if token.type != "fence":
            continue
        body, after = _closed_in_line(token)
        first = token.info.strip()
        word, _, others = first.partition(" ")
        if _PYTHON.match(word) and _is_code(others.strip()):
            body = f"{others.strip()}\n{body}"
        elif _is_code(first):
            word, body = "", f"{first}\n{body}"
        blocks.append(block_of(body, python=not word or bool(_PYTHON.match(word))))
        blocks += fences(after) if after else []
    return blocks


def _closed_in_line(token: Token) -> tuple[str, str]:
    """A fence's content up to a closing fence that stands at the end of a line of code, and what follows it."""
    marker = re.search(rf"(?m)(?<=\S){re.escape(token.markup)}[ \t]*$", token.content)
    if marker is None or parsing_prefix(token.content) == token.content:
        return token.content, ""
    return token.content[: marker.start()] + "\n", token.content[marker.end() :]


def _is_code(line: str) -> bool:
    """Whether the line after an opening fence is code, not a language and its options."""
    if line.endswith(":"):
        line += " pass"
    try:
        statements = ast.parse(line).body
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return line.startswith("@")
    return bool(statements) and not isinstance(statements[0], (ast.Expr, ast.AnnAssign))


def indented(text: str) -> list[Block]:
    """Indented code blocks of CommonMark, or the fences in them."""
    blocks = []
    for token in _markdown().parse(text):
        if token.type == "code_block":
            blocks += fences(token.content) or [block_of(token.content)]
    return blocks


def spans(text: str) -> list[Block]:
    """Inline code, as in ```python def f(x): return x``` on one line."""
    inline = [token for token in _markdown().parse(text) if token.type == "inline"]
    found = [child.content.strip() for token in inline for child in token.children or () if child.type == "code_inline"]
    return [block_of(re.sub(rf"^{_PYTHON.pattern}\s+", "", span, flags=re.IGNORECASE)) for span in found]


# --- lines between prose --------------------------------------------------------------------------


def pieces(text: str) -> list[Block]:
    """Runs of lines that parse, between lines of prose."""
    lines = text.split("\n")
    blocks, place = [], 0
    attempts = iter(range(_MOST_ATTEMPTS))
    while place < len(lines):
        block, used = _piece(lines[place:], attempts)
        if block:
            blocks.append(block)
        place += used
    return blocks


def _piece(lines: Sequence[str], attempts: Iterator[int]) -> tuple[Block | None, int]:
    """The code that begins with the first line, if any, and the number of lines to go on by."""
    typed = list(itertools.takewhile(lambda line: line is not None, _session(lines)))
    if typed:
        return block_of("".join(f">>> {line}\n" for line in typed)), len(typed)
    numbered = _numbered(lines) if _NUMBER.match(lines[0]) else []
    if numbered:
        code = parsing_prefix(_unnumbered(numbered), attempts)
        if code.strip():
            return replace(block_of(code), note="line numbers"), code.count("\n")
    code = ""
    if _may_begin(lines[0].strip()):
        code = parsing_prefix("\n".join(_dedented(lines, len(indent_of(lines[0])))), attempts)
    return (block_of(code) if code.strip() else None), max(1, code.count("\n"))


def _may_begin(line: str) -> bool:
    """Whether a line is Python, or the beginning of it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            codeop.compile_command(line, "<answer>", "exec")
    except (SyntaxError, ValueError, OverflowError, MemoryError, RecursionError):
        return False
    return bool(line)


def _dedented(lines: Sequence[str], indent: int) -> list[str]:
    """Lines without their common indentation, up to one that has less."""
    found = []
    for line in lines:
        if line.strip() and len(indent_of(line)) < indent:
            break
        found.append(line[indent:])
    return found
