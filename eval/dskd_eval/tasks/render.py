"""Templates filled with a row: prompts, references and parts of programs, and signs that one says something else."""

from __future__ import annotations

import functools
import math
import re
from typing import TYPE_CHECKING

from dskd_eval.data import Row
from dskd_eval.errors import UserError, nearest
from dskd_eval.tasks.spec import CODE_PARTS, TaskSpec

if TYPE_CHECKING:
    import jinja2


def render(template: object, row: Row) -> str:
    """A template filled with a row: a field name, a Jinja template or a function of the row."""
    if not isinstance(template, str):
        return str(_called(template, row))
    if template in row:
        return str(row[template])
    check_literal(template, row)
    return _template(template, row)


def render_text(template: object, row: Row) -> str:
    """As `render`, for a text that answers are compared with. Raises UserError when Python would have to print a
    list, a mapping or None for it.
    """
    if (value := printed_value(template, row)) is not None:
        raise _printed(template, value)
    return render(template, row)


def _called(template: object, row: Row) -> object:
    """The value of a function of the task file, or a constant."""
    if not callable(template):
        return template
    try:
        return template(row)
    except UserError:
        raise
    except Exception as error:
        name = getattr(template, "__name__", "function")
        got = f"{type(error).__name__}: {str(error)[:200]}"
        raise UserError(f"!function {name}", expected="a value for every row", got=got, fix="Correct it.") from error


# Jinja's paths to a part of a field: q.text, answers[0], answer | trim.
_PATH = re.compile(r"([^\W\d]\w*)(?:\s*(?:\.\s*\w+|\[[^\[\]]*\]))+(?:\s*\|.*)?")
_FILTERED = re.compile(r"([^\W\d]\w*)\s*\|.*")
# What Python prints for an object that has no text of its own.
_OBJECT = re.compile(
    r"<(?:(?:built-in|bound|class|function|generator|method|module|Macro)\b|[\w.]+ object\b).*>", re.DOTALL
)
METHOD_NAMES = "Where a field has the name of a method, write {{ q['items'] }} for {{ q.items }}"
# {name} of Python's format strings; not the argument of a LaTeX command, a power or an index.
_SINGLE_BRACES = re.compile(r"(\\[A-Za-z]+\s*|[_^])?(?<!\{)\{\s*([^\W\d]\w*)\s*(?:[.\[|:!][^{}]*)?\}(?!\})")


def printed_object(text: str, row: Row) -> str | None:
    """What a prompt of lm-eval's own templates shows of an object of Python, unless the row holds that text itself."""
    found = re.search(r"<(?:built-in|bound) method [^<>\n]*>|<[\w. ]+ object[^<>\n]* at 0x[0-9a-f]+>", text)
    return found[0] if found and found[0] not in str(row) else None


def check_literal(template: str, row: Row) -> None:
    """Raises UserError for a text without Jinja's braces that can only be meant as a field: it would stand in every
    prompt, or be every reference, letter by letter.
    """
    if "{{" in template or "{%" in template:
        return
    name = template.strip()
    constant = f"A constant text is written {{{{ {template!r} }}}}."
    if name.isidentifier():
        hint = f"Write `{name}` without white space." if name in row else nearest(name, row)
        raise UserError(
            f"field {template!r}",
            expected="a field of the row: " + ", ".join(sorted(row)),
            got="none of that name",
            fix=f"{hint} {constant}",
        )
    filtered = _FILTERED.fullmatch(name)
    if _PATH.fullmatch(name) or (filtered and filtered[1] in row):
        raise UserError(
            f"template {template!r}",
            expected="a field of the row, or a template with {{ }}",
            got="a path without braces, which is a constant text",
            fix=f"Write {{{{ {name} }}}}. {constant}",
        )
    if found := single_braces(template, row):
        raise UserError(
            f"template {template[:80]!r}",
            expected="Jinja's double braces around a field",
            got=f"single braces, {found}, which stay as they are in every row",
            fix=f"Write {{{found}}}. {constant}",
        )


def single_braces(template: str, row: Row) -> str | None:
    """The first {field} with single braces, which is no part of LaTeX; None: there is none."""
    names = {name.casefold() for name in row}
    for found in _SINGLE_BRACES.finditer(template):
        if not found[1] and found[2].casefold() in names:
            return found[0]
    return None


def references(template: object, row: Row) -> list[str]:
    """Accepted answers of a row; a field or function may hold a list. Raises UserError when there is none.

    A task without a template (programs that only have to pass tests) has no reference answers.
    """
    if template is None:
        return []
    if isinstance(template, str) and template not in row:
        return [render_text(template, row)]
    value = row[template] if isinstance(template, str) else _called(template, row)
    values = list(value) if isinstance(value, (list, tuple)) else [value]
    if not values or any(_is_missing(item) for item in values):
        raise UserError(
            f"reference {template if isinstance(template, str) else 'function'!r}",
            expected="a reference answer in every row",
            got=repr(value),
            fix="Correct or remove the row.",
        )
    for item in values:
        if _has_parts(item):
            raise _printed(template, item)
    return [str(item) for item in values]


def _is_missing(value: object) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def _has_parts(value: object) -> bool:
    return isinstance(value, (list, tuple, dict, set))


def _printed(template: object, value: object) -> UserError:
    shown = f"template {template[:80]!r}" if isinstance(template, str) else "function"
    return UserError(
        shown,
        expected="texts or numbers",
        got=f"a {type(value).__name__}, which Python would print as {str(value)[:80]!r}",
        fix="Name the part that is meant, as in {{ answers[0] }} or {{ answers | join(', ') }}; `reference: answers` "
        "accepts every text of a list.",
    )


class _PrintedValue(Exception):
    """A template came to a value that is neither a text nor a number."""

    def __init__(self, value: object) -> None:
        self.value = value


def printed_value(template: object, row: Row) -> object:
    """What Python would have to print for a template: a list, a mapping, or 'None' for a missing value; else None."""
    if isinstance(template, str) and template not in row:
        try:
            _template(template, row, texts=True)
        except _PrintedValue as found:
            return found.value
        return None
    value = row[template] if isinstance(template, str) else _called(template, row)
    return str(value) if _is_missing(value) else value if _has_parts(value) else None


def _no_object(value: object) -> object:
    """Raises UserError for a value that prints as `<built-in method ...>` or alike: `{{ q.items }}` of a mapping."""
    import jinja2

    if not isinstance(value, (str, jinja2.Undefined)) and _OBJECT.fullmatch(text := str(value)):
        raise UserError(
            "template",
            expected="texts or numbers",
            got=f"{text[:80]!r}: it prints a method or another object of Python",
            fix=f"{METHOD_NAMES}; call a method with (); end a generator with | list or | join.",
        )
    return value


def _finalized(value: object) -> object:
    _no_object(value)
    if _is_missing(value) or _has_parts(value):
        raise _PrintedValue(str(value) if _is_missing(value) else value)
    return value


@functools.cache
def _environment(texts: bool) -> jinja2.Environment:
    import jinja2

    return jinja2.Environment(
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
        autoescape=False,
        finalize=_finalized if texts else _no_object,
    )


@functools.cache
def _compiled(template: str, texts: bool) -> jinja2.Template:
    return _environment(texts).from_string(template)


def _template(template: str, row: Row, *, texts: bool = False) -> str:
    """texts: raise _PrintedValue for a value that is neither a text nor a number."""
    import jinja2

    try:
        return str(_compiled(template, texts).render(**row))
    except (_PrintedValue, UserError):
        raise
    except Exception as error:
        if not isinstance(error, (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError)):
            raise
        raise UserError(
            f"template {template[:80]!r}",
            expected="only fields of the rows: " + ", ".join(sorted(row)),
            got=str(error),
            fix="Correct the template or the data file.",
        ) from error


def code_parts(spec: TaskSpec, row: Row) -> dict[str, str]:
    """The `code:` block of a row: setup, completes, entry_point, tests ('' where absent), each a field or a template.

    A list in a template stands as Python writes it: `assert f({{arguments}})`. A part without a value is empty.
    """
    parts = {}
    for key in CODE_PARTS:
        template = str(spec.code.get(key) or "")
        if template and template not in row:
            _check_program(key, template, row)
        text = str(row[template]) if template in row else _template(template, row)
        parts[key] = "" if text.strip() in ("None", "nan") else text
    return parts


def _check_program(key: str, template: str, row: Row) -> None:
    """As `check_literal`, for a part of a program: the name of a function may be the same for all rows, and helper
    code may hold the braces of sets and format strings.
    """
    constant_name = key == "entry_point" and template.isidentifier()
    helpers = key == "setup" and single_braces(template, row)
    if not constant_name and not helpers:
        check_literal(template, row)
