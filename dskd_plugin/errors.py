"""The errors that this package raises for its user: four parts, put together here, and printed without a traceback.

Standard library only: the start-up hook reads it.
"""

import contextlib
import re

TYPE_CHECKING = False  # the start-up hook loads no typing
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any


class _ForUser(Exception):
    """An error whose text is all that its reader needs.

    where: the setting or file; expected, got: what belongs there and what came; do: what to do, as one or more
    sentences with their full stops.
    """

    def __init__(self, where: object, expected: object, got: object, do: object) -> None:
        super().__init__(f"{where}: expected {expected}, got {got}. {do}")
        self.parts = (str(where), str(expected), str(got), str(do))

    def __reduce__(self) -> "Any":
        # Worker processes hand their errors over pickled; an exception would be rebuilt from its text alone.
        return type(self), self.parts


class SettingError(_ForUser, ValueError):
    """What the user wrote, in the recipe, in a file or on the command line, cannot be used."""


class DSKDSetupError(_ForUser, RuntimeError):
    """The environment or the model cannot run the recipe."""


class Mistakes(ValueError):
    """Several errors of one kind, each on a line of its own."""

    def __init__(self, errors: "list[Any]") -> None:
        super().__init__("\n".join(str(error) for error in errors))
        self.errors = errors

    def __reduce__(self) -> "Any":
        return type(self), (self.errors,)


@contextlib.contextmanager
def naming(place: int, teachers: int) -> "Iterator[None]":
    """Inside, errors about ``dskd.teacher`` name the item of ``dskd.teachers``, where there are several teachers."""
    if teachers == 1:
        yield
        return
    try:
        yield
    except (_ForUser, Mistakes) as error:
        raise _of_item(error, place) from error


def _of_item(error: "Any", place: int) -> "Any":
    if isinstance(error, Mistakes):
        return Mistakes([_of_item(one, place) for one in error.errors])
    item = f"dskd.teachers[{place}]"
    where, *rest = (re.sub(r"\bdskd\.teacher\b", item, part) for part in error.parts)
    if where.startswith("dskd.") and where == error.parts[0]:
        where = f"{where} beside {item}"  # a setting of all that does not fit this one
    return type(error)(where, *rest)


def own_message(error: BaseException) -> "str | None":
    """The text of an error that this package raised for its user; None for any other, which needs its traceback."""
    return str(error) if isinstance(error, _ForUser | Mistakes) else None
