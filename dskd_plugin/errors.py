"""The error of a run that cannot work, and which errors need no traceback; ``ValueError`` is for settings and files.

Standard library only: the start-up hook reads it.
"""

import re

PACKAGE = "dskd_plugin"


class DSKDSetupError(RuntimeError):
    """The environment or the model cannot run the recipe."""


def own_message(error: BaseException) -> str | None:
    """The text of an error that this package raised for its user; None for any other, which needs its traceback."""
    if not isinstance(error, ValueError | RuntimeError):
        return None
    text = str(error)
    # Ours say what was expected; a ValueError of Python itself inside our code does not, and is a mistake of ours.
    own = isinstance(error, DSKDSetupError) or ("expected" in text and _raised_here(error))
    return text if own else None


def _raised_here(error: BaseException) -> bool:
    cause = error.__cause__
    if type(cause).__name__ == "RemoteTraceback":
        # A worker process raised it; its frames came back as text.
        files = re.findall(r'File "([^"]+)"', str(cause))
        return bool(files) and f"/{PACKAGE}/" in files[-1].replace("\\", "/")
    trace = error.__traceback__
    if trace is None:
        return False
    while trace.tb_next is not None:
        trace = trace.tb_next
    return str(trace.tb_frame.f_globals.get("__name__", "")).split(".")[0] == PACKAGE
