"""From an answer to the program that its tests run: the code of a reply, joined, cut and trimmed.

Replies surround a function with prose, drafts, examples and an end that the token limit cut. The program is the last
block that defines what the tests call, with other blocks where names are missing, up to where it stops to parse, and
without statements that only try the function out. `Program.dropped` says what was left out.
"""

from __future__ import annotations

import ast
import builtins
import codeop
import functools
import itertools
import re
import symtable
import sys
import textwrap
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from markdown_it import MarkdownIt
from markdown_it.token import Token

_PYTHON = re.compile(r"\{?\s*\.?(?:python|py|ipython|pycon|sage)[\d.]*\b", re.IGNORECASE)
_BUILTINS = frozenset(dir(builtins)) | {"__name__", "__file__", "__doc__"}
# Code that looks names up by their text: nothing around it can be called unused.
_LOOKUPS = frozenset({"globals", "locals", "vars", "eval", "exec"})
# Calls that wait for a person or end the program before its tests.
_CONSOLE = frozenset(
    {"input", "exit", "quit", "breakpoint", "sys.exit", "os._exit", "unittest.main", "doctest.testmod", "pytest.main"}
)
_FUTURE = re.compile(r"(?m)^from __future__ import .*\n?")
_MOST_CUTS = 500
_MOST_ATTEMPTS = 5_000


@dataclass(frozen=True)
class Program:
    """A program without its tests, and what of the answer it does without."""

    text: str
    dropped: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Block:
    """One piece of code of an answer. `code` is its longest part from the start that parses, `rest` what follows."""

    raw: str
    code: str
    rest: str
    python: bool
    defined: frozenset[str]
    bound: frozenset[str]

    @property
    def cut_inside(self) -> bool:
        """Whether the part that does not parse begins within a function or class."""
        first = next((line for line in self.rest.split("\n") if line.strip()), "")
        return first[:1].isspace()


@dataclass(frozen=True)
class _Names:
    """Names of one top-level statement: those that it gives a value or changes, those that it reads."""

    bound: frozenset[str] = frozenset()
    read: frozenset[str] = frozenset()


@dataclass
class _Choice:
    """Code found in an answer, with notes on what was left."""

    code: str
    notes: list[str] = field(default_factory=list)


def program_of(text: str, parts: Mapping[str, str]) -> Program:
    """The program to test. `parts`: setup, completes, entry_point and tests of the row ('' where absent).

    A reply that is only a body completes the prompt (`completes`); of a reply with the whole function, what precedes
    the function in the prompt (imports, helpers) stays in front.
    """
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    completes, entry_point, setup = parts["completes"], parts["entry_point"], parts["setup"]
    wanted, maybe = _wanted(parts["tests"], setup, entry_point)
    head = ""
    if completes and entry_point:
        head = re.split(rf"(?m)^(?=(?:async )?def\s+{re.escape(entry_point)}\s*\()", completes)[0]
    known = _bound(setup) | _bound(head)
    found = _continued(completes, text) if completes and _begins_indented(text) else None
    if found is None:
        found = _whole_function(text, head, wanted, maybe, known)
    if found is None:
        found = _completed(completes, _body(text, wanted), text)
    try:
        code, examples = _without_examples(found.code, wanted | (maybe & _bound(found.code)), known)
    except (ValueError, RecursionError):
        code, examples = found.code, []
    return Program(_future_first(setup + code), tuple(found.notes + examples))


def parses(code: str) -> bool:
    """Whether Python reads the text as a program."""
    return _statements(code) is not None


def tests_something(tests: str) -> bool:
    """Whether tests call something or assert something of a name when they start, and so can fail."""
    waiting: list[ast.AST] = list(_statements(tests) or [])
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Call) or (isinstance(node, ast.Assert) and _has_name(node.test)):
            return True
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) and node.decorator_list:
            return True
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)):
            waiting += ast.iter_child_nodes(node)
    return False


def _has_name(node: ast.AST) -> bool:
    return any(isinstance(part, ast.Name) for part in ast.walk(node))


def _wanted(tests: str, setup: str, entry_point: str) -> tuple[frozenset[str], frozenset[str]]:
    """Names that the tests need from the program, and names of builtins that they use, which it may define."""
    named = frozenset({entry_point} - {""})
    statements = _statements(f"{setup}\n{tests}")
    if statements is None:
        return named, frozenset()
    names = [_names(statement) for statement in statements]
    read = frozenset().union(*(item.read for item in names))
    free = read - frozenset().union(*(item.bound for item in names))
    return (free - _BUILTINS) | named, free & _BUILTINS


# --- where the code is ----------------------------------------------------------------------------


def _whole_function(
    text: str, head: str, wanted: frozenset[str], maybe: frozenset[str], known: frozenset[str]
) -> _Choice | None:
    """The code of the first place that defines a wanted name, searched from fences to bare text."""
    fences = _fences(text)
    places = [
        ("code blocks", [block for block in fences if block.python]),
        ("code blocks", fences),
        ("indented blocks", _indented(text)),
        ("code spans", _spans(text)),
        ("pieces of code in the text", _pieces(text)),
    ]
    front = f"{head}\n" if head else ""
    for kind, blocks in places:
        chosen = _chosen(blocks, wanted, maybe, known)
        if chosen:
            code = "\n".join(blocks[place].code for place in chosen)
            notes = [] if len(chosen) == len(blocks) else [f"{len(blocks) - len(chosen)} of {len(blocks)} {kind}"]
            notes += [_shortened_note(blocks[place].rest) for place in chosen if blocks[place].rest.strip()]
            if not fences and _full_lines(code) < _full_lines(text):
                notes.append(f"{_full_lines(text) - _full_lines(code)} lines of text around the code")
            return _Choice(front + code, notes)
    return None


def _chosen(
    blocks: Sequence[_Block], wanted: frozenset[str], maybe: frozenset[str], known: frozenset[str]
) -> list[int]:
    """Places of the blocks that make the program, in order; [] where none defines a wanted name.

    For every wanted name its last definition, a whole one before a cut one; then blocks with names that are missing.
    Where the tests name nothing, the last block with a definition.
    """
    everything = frozenset().union(*(block.defined for block in blocks))
    named = (wanted | maybe) & everything
    names = named or (frozenset() if wanted else everything)
    last: dict[str, int] = {}
    for name in sorted(names):
        places = [place for place, block in enumerate(blocks) if name in block.defined]
        whole = [place for place in places if not blocks[place].cut_inside]
        if places:
            last[name] = (whole or places)[-1]
    if not last:
        return []
    chosen = set(last.values()) if named else {max(last.values())}
    while True:
        code = "\n".join(blocks[place].code for place in sorted(chosen))
        missing = (_free(code) | wanted) - _bound(code) - known
        others = [place for place, block in enumerate(blocks) if place not in chosen and block.python]
        more = {max(found) for name in missing if (found := [p for p in others if name in blocks[p].bound])}
        if not more:
            return sorted(chosen)
        chosen |= more


def _block(raw: str, *, python: bool = True) -> _Block:
    lines = raw.split("\n")
    first = next((line for line in lines if line.strip()), "")
    if first.startswith(">>>"):
        raw = _typed(lines)
    code = parsing_prefix(raw)
    statements = _statements(code) or []
    imports = [_names(statement).bound for statement in statements if _imports(statement)]
    bound = _bound(code)
    return _Block(raw, code, raw[len(code) :], python, bound - frozenset().union(*imports), bound)


def _typed(lines: Iterable[str]) -> str:
    """What was typed in an interactive session, without prompts and output."""
    return "".join(f"{line[4:]}\n" for line in lines if line.startswith((">>>", "...")))


@functools.cache
def _markdown() -> MarkdownIt:
    # Fences within HTML (<details>) hold code too.
    return MarkdownIt("commonmark", {"html": False})


def _fences(text: str) -> list[_Block]:
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
        blocks.append(_block(body, python=not word or bool(_PYTHON.match(word))))
        blocks += _fences(after) if after else []
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


def _indented(text: str) -> list[_Block]:
    blocks = []
    for token in _markdown().parse(text):
        if token.type == "code_block":
            blocks += _fences(token.content) or [_block(token.content)]
    return blocks


def _spans(text: str) -> list[_Block]:
    """Inline code, as in ```python def f(x): return x``` on one line."""
    inline = [token for token in _markdown().parse(text) if token.type == "inline"]
    spans = [child.content.strip() for token in inline for child in token.children or () if child.type == "code_inline"]
    return [_block(re.sub(rf"^{_PYTHON.pattern}\s+", "", span, flags=re.IGNORECASE)) for span in spans]


def _pieces(text: str) -> list[_Block]:
    """Runs of lines that parse, between lines of prose."""
    lines = text.split("\n")
    blocks, place = [], 0
    attempts = iter(range(_MOST_ATTEMPTS))
    while place < len(lines):
        indent = len(lines[place]) - len(lines[place].lstrip())
        code = ""
        if _may_begin(lines[place].strip()):
            code = parsing_prefix("\n".join(_dedented(lines[place:], indent)), attempts)
        if code.strip():
            blocks.append(_block(code))
        place += max(1, code.count("\n"))
    return blocks


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
        if line.strip() and len(line) - len(line.lstrip()) < indent:
            break
        found.append(line[indent:])
    return found


# --- a body for the prompt ------------------------------------------------------------------------


def _begins_indented(text: str) -> bool:
    first = next((line for line in text.split("\n") if line.strip()), "")
    return first[:1].isspace() and not first.strip().startswith(("```", "~~~"))


def _continued(completes: str, text: str) -> _Choice | None:
    """The prompt with the answer as its body, if at least the answer's first line fits."""
    code = parsing_prefix(completes + text)
    if not code[len(completes) :].strip():
        return None
    rest = (completes + text)[len(code) :]
    return _Choice(code, [_shortened_note(rest)] if rest.strip() else [])


def _body(text: str, wanted: frozenset[str]) -> str:
    """Of an answer without the whole function: a block that tries to define it, a body, the first block, the text."""
    blocks = [block.raw for block in _fences(text)]
    names = "|".join(re.escape(name) for name in sorted(wanted))
    tries = [block for block in blocks if names and re.search(rf"\bdef\s+({names})\s*\(", block)]
    bodies = [block for block in blocks if _begins_indented(block)]
    return (tries[-1:] or bodies[-1:] or blocks[:1] or [text])[0]


def _completed(completes: str, body: str, text: str) -> _Choice:
    notes = [] if body == text else ["text around a code block"]
    for fitting in (body, _indented_like(completes, body)) if completes else ():
        found = _continued(completes, fitting)
        if found is not None:
            return _Choice(found.code, notes + found.notes)
    return _Choice(completes + body, notes)


def _indented_like(completes: str, body: str) -> str:
    """A body that was written without indentation, under the last line of the prompt."""
    last = next((line for line in reversed(completes.split("\n")) if line.strip()), "")
    return textwrap.indent(body, last[: len(last) - len(last.lstrip())])


# --- parsing --------------------------------------------------------------------------------------


def parsing_prefix(code: str, attempts: Iterator[int] | None = None) -> str:
    """The longest run of whole lines from the start that Python compiles; '' where there is none.

    attempts: ends when several calls together have tried often enough.
    """
    lines = _lines(code)
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


def _lines(code: str) -> list[str]:
    # splitlines also splits where Python sees no new line.
    return re.findall(r".*\n|.+", code)


def _statements(code: str) -> list[ast.stmt] | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return ast.parse(code).body
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return None


def _names(statement: ast.stmt) -> _Names:
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
    if not isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        bound |= {base for node in ast.walk(statement) if (base := _changed(node))}
    return _Names(frozenset(bound), frozenset(read))


def _all_names(statement: ast.stmt) -> _Names:
    """The same for a statement that Python compiles and cannot write: with the names of its functions, too many."""
    nodes = list(ast.walk(statement))
    names = [node for node in nodes if isinstance(node, ast.Name)]
    read = frozenset(node.id for node in names if isinstance(node.ctx, ast.Load))
    if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        inside = {node.id for node in names if not isinstance(node.ctx, ast.Load)}
        inside |= {node.arg for node in nodes if isinstance(node, ast.arg)}
        return _Names(frozenset({statement.name}), read - inside)
    return _Names(frozenset(node.id for node in names if not isinstance(node.ctx, ast.Load)), read)


def _changed(node: ast.AST) -> str:
    """The name whose item or attribute an assignment or deletion changes; '' for another node."""
    if not isinstance(node, (ast.Attribute, ast.Subscript)) or isinstance(node.ctx, ast.Load):
        return ""
    place: ast.AST = node
    while isinstance(place, (ast.Attribute, ast.Subscript, ast.Call)):
        place = place.func if isinstance(place, ast.Call) else place.value
    return place.id if isinstance(place, ast.Name) else ""


def _bound(code: str) -> frozenset[str]:
    return frozenset().union(*(_names(statement).bound for statement in _statements(code) or []))


def _free(code: str) -> frozenset[str]:
    """Names that the code reads and neither it nor Python defines."""
    names = [_names(statement) for statement in _statements(code) or []]
    read = frozenset().union(*(item.read for item in names))
    return read - frozenset().union(*(item.bound for item in names)) - _BUILTINS


def _imports(statement: ast.stmt) -> bool:
    return isinstance(statement, (ast.Import, ast.ImportFrom))


# --- statements that only try the function out ----------------------------------------------------


def _without_examples(code: str, wanted: frozenset[str], known: frozenset[str]) -> tuple[str, list[str]]:
    """The program without assertions, example calls and what only they use; the wanted names keep all they need."""
    statements = _statements(code)
    if not statements or not wanted:
        return code, []
    names = [_names(statement) for statement in statements]
    needed = _closure(wanted, names)
    if needed & _LOOKUPS:
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
    shown = [_shown(statements[place]) for place in dropped]
    note = f"{len(dropped)} statements beside the tested code: " + "; ".join(shown[:3])
    return _less(code, statements, dropped), [note + ("; ..." if len(shown) > 3 else "")]


def _closure(wanted: frozenset[str], names: Sequence[_Names]) -> frozenset[str]:
    """The wanted names and all names that the statements which bind them read, and so on."""
    needed = set(wanted)
    while more := {name for item in names if item.bound & needed for name in item.read | item.bound} - needed:
        needed |= more
    return frozenset(needed)


def _runs(statement: ast.stmt) -> bool:
    """Whether a statement does something when the program starts, other than to define or import."""
    return not isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Import, ast.ImportFrom))


def _examples(
    statements: Sequence[ast.stmt],
    names: Sequence[_Names],
    wanted: frozenset[str],
    needed: frozenset[str],
    known: frozenset[str],
) -> set[int]:
    """Places of statements that run the wanted names, or what was made with them, without being needed by them."""
    star = any(isinstance(item, ast.ImportFrom) and item.names[0].name == "*" for item in statements)
    defined = _BUILTINS.union(known, *(item.bound for item in names))
    spoilt, places = set(wanted), set()
    for place, (statement, item) in enumerate(zip(statements, names, strict=True)):
        if not _runs(statement):
            if (item.read & spoilt or _foreign(statement)) and not item.bound & needed:
                spoilt |= item.bound
            continue
        if item.bound & needed and not _is_main_guard(statement):
            continue
        unknown = not star and bool(item.read - defined)
        if _is_check(statement) or item.read & spoilt or unknown or _calls(statement) & _CONSOLE:
            places.add(place)
            spoilt |= item.bound - needed
    return places


def _foreign(statement: ast.stmt) -> bool:
    """Whether a statement imports what the sandbox does not have: packages other than Python's own."""
    if isinstance(statement, ast.ImportFrom):
        modules = [statement.module or ""]
    else:
        modules = [item.name for item in statement.names] if isinstance(statement, ast.Import) else []
    return any(module.partition(".")[0] not in sys.stdlib_module_names for module in modules)


def _is_check(statement: ast.stmt) -> bool:
    """An assertion, the `__main__` part, or an expression that only shows a value."""
    if isinstance(statement, ast.Expr):
        return not isinstance(statement.value, (ast.Call, ast.Constant))
    return isinstance(statement, ast.Assert) or _is_main_guard(statement)


def _is_main_guard(statement: ast.stmt) -> bool:
    tested = ast.walk(statement.test) if isinstance(statement, ast.If) else ()
    return any(isinstance(node, ast.Constant) and node.value == "__main__" for node in tested)


def _calls(statement: ast.stmt) -> set[str]:
    return {_dotted(node.func) for node in ast.walk(statement) if isinstance(node, ast.Call)}


def _dotted(node: ast.expr) -> str:
    """A name with the names before its dots; '' for what is no such name."""
    parts = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join([node.id, *reversed(parts)]) if isinstance(node, ast.Name) else ""


def _acts(statement: ast.stmt, needed: frozenset[str]) -> bool:
    """Whether a statement does more than bind names: it runs, is decorated, or extends a needed class."""
    if _imports(statement):
        return False
    if isinstance(statement, ast.ClassDef) and not statement.decorator_list:
        bases = frozenset().union(*(_names(ast.Expr(base)).read for base in statement.bases))
        return bool((bases - _BUILTINS) & needed)
    return _runs(statement) or bool(getattr(statement, "decorator_list", []))


def _is_unused(
    statement: ast.stmt, item: _Names, needed: frozenset[str], wanted: frozenset[str], names: Sequence[_Names]
) -> bool:
    """Whether nothing that stays reads a definition or import, or the program itself defines what is imported."""
    if isinstance(statement, ast.ImportFrom) and (statement.module == "__future__" or statement.names[0].name == "*"):
        return False
    if _imports(statement) and any(other is not item and item.bound & wanted & other.bound for other in names):
        return True
    return not item.bound & needed


def _less(code: str, statements: Sequence[ast.stmt], dropped: Iterable[int]) -> str:
    """The code without the lines of some statements. ValueError or RecursionError for what Python cannot write."""
    gone = set(dropped)
    spans = [_lines_of(statement) for statement in statements]
    if any(before[1] >= after[0] for before, after in itertools.pairwise(spans)):
        kept = [statement for place, statement in enumerate(statements) if place not in gone]
        return "".join(f"{ast.unparse(statement)}\n" for statement in kept)
    lines = {line for place in gone for line in range(spans[place][0], spans[place][1] + 1)}
    return "".join(line for number, line in enumerate(_lines(code), 1) if number not in lines)


def _lines_of(statement: ast.stmt) -> tuple[int, int]:
    decorators = getattr(statement, "decorator_list", [])
    first = min([statement.lineno, *(decorator.lineno for decorator in decorators)])
    return first, statement.end_lineno or statement.lineno


# --- putting together and telling -----------------------------------------------------------------


def _future_first(code: str) -> str:
    """`from __future__` must stand before the setup and the prompt's own lines."""
    found = _FUTURE.findall(code)
    return "".join(line if line.endswith("\n") else f"{line}\n" for line in found) + _FUTURE.sub("", code)


def _full_lines(text: str) -> int:
    return sum(1 for line in text.split("\n") if line.strip())


def _shortened_note(rest: str) -> str:
    lines = [line.strip() for line in rest.split("\n") if line.strip()]
    return f"an end of {len(lines)} lines that does not parse, from: {_short(lines[0])}"


def _shown(statement: ast.stmt) -> str:
    try:
        return _short(ast.unparse(statement))
    except (ValueError, RecursionError):
        return f"line {statement.lineno}, which is too long to show"


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 80 else line[:77] + "..."
