"""What a user did wrong, in words: one exception class and the four parts every message has."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """An input of the user cannot be used; the command line prints it without a traceback."""

    def __init__(self, where: str, *, expected: str, got: str, fix: str) -> None:
        self.where, self.expected, self.got, self.fix = where, expected, got, fix
        super().__init__(f"{where}: expected {expected}; got {got}. {fix}")


def nearest(name: str, known: Iterable[str]) -> str:
    """'Did you mean ...?' for the closest names, or the list of known names."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return f"Did you mean {' or '.join(close)}?" if close else f"Known names: {', '.join(known)}."
