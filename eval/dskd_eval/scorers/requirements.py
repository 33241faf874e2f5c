"""What scoring needs besides this package: modules, and files such as NLTK's. Checked before a run."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from dskd_eval import data
from dskd_eval.errors import UserError


@dataclass(frozen=True)
class Requirement:
    """label: its name in `doctor`. check: takes the task and the data directory; UserError where it is missing."""

    label: str
    check: Callable[[str, Path | None], None]


def check_modules(task: str, modules: Iterable[str]) -> None:
    """Raises UserError for the first module that cannot be imported."""
    for module in modules:
        try:
            import_module(module)
        except ImportError as error:
            raise UserError(
                f"task {task}",
                expected=f"the package {module}",
                got=str(error),
                fix="Install dskd[eval].",
            ) from error


def check_punkt(task: str, directory: Path | None) -> None:
    """NLTK's sentence splitter, from the data directory or where NLTK looks; else downloaded, unless that is
    forbidden. lm-eval would fetch it by itself, in the middle of a run.
    """
    check_modules(task, ("nltk",))
    import nltk
    from nltk.tokenize.punkt import PunktTokenizer

    if directory is not None and str(directory / "nltk_data") not in nltk.data.path:
        nltk.data.path.insert(0, str(directory / "nltk_data"))
    got = "none in NLTK_DATA or <data-dir>/nltk_data"
    try:
        PunktTokenizer("english")
        return
    except (LookupError, OSError, ValueError) as error:
        if not isinstance(error, LookupError):
            got = f"an unreadable one: {error}"
    switch = data.offline()
    if directory is None and switch is None and nltk.download("punkt_tab", quiet=True):
        return
    raise UserError(
        f"task {task}",
        expected="NLTK's punkt_tab sentence splitter",
        got=got + (f", and {switch} is set" if switch else ""),
        fix="Run `python -m nltk.downloader punkt_tab`, or copy nltk_data/ into the data directory (--data-dir).",
    )


REQUIREMENTS = {"nltk_punkt": Requirement("nltk punkt_tab", check_punkt)}
