"""From an answer to the program that its tests run: the code of a reply, joined, cut and trimmed.

Replies surround a function with prose, drafts, examples and an end that the token limit cut. The program is the last
block that defines what the tests call, with other blocks where names are missing, up to where it stops to parse, and
without statements that only try the function out. `Program.dropped` says what was left out.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from dskd_eval.programs import blocks
from dskd_eval.programs.blocks import Block
from dskd_eval.programs.completion import Completion, Prompt, completion, read_prompt, under_class
from dskd_eval.programs.examples import without_examples
from dskd_eval.programs.row_tests import why_untested
from dskd_eval.programs.syntax import (
    BUILTINS,
    bound,
    first_full_line,
    foreign,
    free,
    full_lines,
    names_of,
    parses,
    parsing_prefix,
    shortened_note,
    statements_of,
)

__all__ = ["Program", "parses", "parsing_prefix", "program_of", "why_untested"]

_FUTURE = re.compile(r"(?m)^from __future__ import .*\n?")


@dataclass(frozen=True)
class Program:
    """A program without its tests, and what of the answer it does without."""

    text: str
    dropped: tuple[str, ...] = ()


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
    text = text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    prompt, setup = read_prompt(parts["completes"]), parts["setup"]
    wanted, maybe = _wanted(parts["tests"], setup, parts["entry_point"])
    known = bound(setup) | bound(prompt.head)
    found = _body_first(prompt, text)
    places = [] if found else _places(text)
    for functions_only in (True, False) if prompt.text else (False,):
        # A body may give a value to a variable with the function's name: assignments count last.
        found = found or _whole_function(text, places, prompt, wanted, maybe, known, functions_only=functions_only)
        found = found or _body(text, prompt, wanted, returns=functions_only)
    found = found or _unread(text, prompt, wanted)
    try:
        code, examples = without_examples(found.code, wanted | (maybe & bound(found.code)), known)
    except (ValueError, RecursionError):
        code, examples = found.code, []
    return Program(_future_first(setup + code), tuple(found.notes + examples))


def _wanted(tests: str, setup: str, entry_point: str) -> tuple[frozenset[str], frozenset[str]]:
    """Names that the tests need from the program, and names of builtins that they use, which it may define."""
    named = frozenset({entry_point} - {""})
    statements = statements_of(f"{setup}\n{tests}")
    if statements is None:
        return named, frozenset()
    names = [names_of(statement) for statement in statements]
    read = frozenset().union(*(item.read for item in names))
    free_names = read - frozenset().union(*(item.bound for item in names))
    # `from solution import total` names what the program has to define.
    for statement in statements:
        if isinstance(statement, ast.ImportFrom) and foreign(statement):
            named |= {item.name for item in statement.names} - {"*"}
    return (free_names - BUILTINS) | named, free_names & BUILTINS


# --- the whole function ---------------------------------------------------------------------------


def _places(text: str) -> list[tuple[str, list[Block]]]:
    """Where code may be in an answer, from fences to bare text."""
    fences = blocks.fences(text)
    return [
        ("code blocks", [block for block in fences if block.python]),
        ("code blocks", fences),
        ("indented blocks", blocks.indented(text)),
        ("code spans", blocks.spans(text)),
        ("pieces of code in the text", blocks.pieces(text)),
    ]


def _whole_function(
    text: str,
    places: Sequence[tuple[str, list[Block]]],
    prompt: Prompt,
    wanted: frozenset[str],
    maybe: frozenset[str],
    known: frozenset[str],
    *,
    functions_only: bool,
) -> _Choice | None:
    """The code of the first place that defines a wanted name. `places`: those of `_places`."""
    for kind, found in places:
        usable = [block.of_functions() for block in found] if functions_only else found
        chosen = _chosen(usable, wanted, maybe, known)
        if not chosen and prompt.method:
            chosen = _chosen(usable, frozenset({prompt.method}), frozenset(), known)
        if chosen:
            code = "\n".join(usable[place].code for place in chosen)
            notes = [] if len(chosen) == len(usable) else [f"{len(usable) - len(chosen)} of {len(usable)} {kind}"]
            for place in chosen:
                notes += [usable[place].note] if usable[place].note else []
                notes += [shortened_note(usable[place].rest)] if usable[place].rest.strip() else []
            if not places[1][1] and full_lines(code) < full_lines(text):
                notes.append(f"{full_lines(text) - full_lines(code)} lines of text around the code")
            return _Choice(_after_prompt(prompt, code), notes)
    return None


def _after_prompt(prompt: Prompt, code: str) -> str:
    """What a whole function needs of the prompt in front of it: all but the function that it writes anew."""
    defined = bound(code)
    if prompt.method in defined and prompt.names[0] not in defined:
        return under_class(prompt, code)
    kept = prompt.text if prompt.finished and prompt.names[0] not in defined else prompt.head
    return f"{kept}\n{code}" if kept and parses(kept) else code


def _chosen(found: Sequence[Block], wanted: frozenset[str], maybe: frozenset[str], known: frozenset[str]) -> list[int]:
    """Places of the blocks that make the program, in order; [] where none defines a wanted name.

    For every wanted name its last definition, a whole one before a cut one; then blocks with names that are missing.
    Where the tests name nothing, the last block with a definition.
    """
    everything = frozenset().union(*(block.defined for block in found))
    named = (wanted | maybe) & everything
    names = named or (frozenset() if wanted else everything)
    last: dict[str, int] = {}
    for name in sorted(names):
        places = [place for place, block in enumerate(found) if name in block.defined]
        whole = [place for place in places if not found[place].cut_inside]
        if places:
            last[name] = (whole or places)[-1]
    if not last:
        return []
    chosen = set(last.values()) if named else {max(last.values())}
    while True:
        code = "\n".join(found[place].code for place in sorted(chosen))
        missing = (free(code) | wanted) - bound(code) - known
        others = [place for place, block in enumerate(found) if place not in chosen and block.python]
        more = {max(at) for name in missing if (at := [place for place in others if name in found[place].bound])}
        if not more:
            return sorted(chosen)
        chosen |= more


# --- a body for the prompt ------------------------------------------------------------------------


def _body_first(prompt: Prompt, text: str) -> _Choice | None:
    """An answer that begins with white space and goes on from the prompt."""
    first = first_full_line(text)
    if not prompt.text or not first[:1].isspace() or first.strip().startswith(("```", "~~~")):
        return None
    found = completion(prompt, text)
    # With another indentation, words of prose may be a body too.
    as_written = found is not None and found.code.startswith(prompt.text + text[: text.index(first) + len(first)])
    return _completed(found, []) if found and (as_written or found.returns) else None


def _body(text: str, prompt: Prompt, wanted: frozenset[str], *, returns: bool) -> _Choice | None:
    """Of an answer without the whole function: a body under the prompt. returns: only one that ends as bodies do."""
    for raw in _bodies(text, wanted) if prompt.text else ():
        found = completion(prompt, raw)
        if found and (found.returns or not returns):
            return _completed(found, [] if raw == text else ["text around a code block"])
    return None


def _unread(text: str, prompt: Prompt, wanted: frozenset[str]) -> _Choice:
    """What an answer holds in which nothing was found: the sandbox says why it is no program."""
    raw = next(_bodies(text, wanted))
    return _Choice(prompt.text + raw, [] if raw == text else ["text around a code block"])


def _bodies(text: str, wanted: frozenset[str]) -> Iterator[str]:
    """Where a body may be: blocks that try to define the function, bodies, other blocks, the text, after its prose."""
    fences = [block.raw for block in blocks.fences(text)]
    names = "|".join(re.escape(name) for name in sorted(wanted))
    yield from (raw for raw in reversed(fences) if names and re.search(rf"\bdef\s+({names})\s*[(\[]", raw))
    yield from (raw for raw in reversed(fences) if re.match(r"\s*\n?[ \t]+\S", raw) or _returns(raw))
    yield from fences
    yield text
    yield from (block.raw for block in blocks.indented(text))
    yield re.split(r"\n[ \t]*\n", text, maxsplit=1)[-1]


def _returns(raw: str) -> bool:
    """Whether a block without indentation returns, which only a body does."""
    return bool(re.search(r"(?m)^return\b", raw))


def _completed(found: Completion, notes: list[str]) -> _Choice:
    return _Choice(found.code, notes + ([shortened_note(found.rest)] if found.rest.strip() else []))


# --- putting together -----------------------------------------------------------------------------


def _future_first(code: str) -> str:
    """`from __future__` must stand before the setup and the prompt's own lines."""
    found = _FUTURE.findall(code)
    return "".join(line if line.endswith("\n") else f"{line}\n" for line in found) + _FUTURE.sub("", code)
