"""What stands last in the output of a run: an error of ours without a traceback, and how to go on.

``axolotl train`` starts a launcher, which starts the training. Whoever writes last wins the reader, and that is the
launcher, with a traceback about an exit code. So the processes below hand their words up, in a file, to the process
that the user started, and that one writes them when it ends. Standard library only: the start-up hook imports it.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import shlex
import signal
import sys
import tempfile
import time

from dskd_plugin.errors import own_message

TYPE_CHECKING = False  # the start-up hook loads no typing
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

# "<process id of the command>:<file that takes its last words>"
RUN = "DSKD_RUN"
# The words after `axolotl`, as JSON.
COMMAND = "DSKD_COMMAND"
TRACEBACK = "DSKD_TRACEBACK"
ERROR, STOP, ADVICE = "error", "stop", "advice"
SIGNALS: dict[int, str] = {signal.SIGINT: "Ctrl-C (SIGINT)", signal.SIGTERM: "SIGTERM"}
# A terminal signals every process of a run, and its launcher hands the same signal down.
ECHO_SECONDS = 2.0
RESUMING = ("--resume-from-checkpoint", "--auto-resume-from-checkpoints", "--no-auto-resume-from-checkpoints")
# Errors of launchers that say no more than that the process below them failed.
OF_LAUNCHERS = ("CalledProcessError", "ChildFailedError", "SignalException")

_own: list[tuple[str, str]] = []
_following = False
_stopped: float | None = None


def begin() -> None:
    """Called in the command that the user started, when its recipe distils."""
    folder = tempfile.gettempdir()
    os.environ[RUN] = f"{os.getpid()}:{os.path.join(folder, f'dskd-{os.getpid()}-{os.urandom(4).hex()}.jsonl')}"
    os.environ[COMMAND] = json.dumps(sys.argv[1:])
    follow()


def listen() -> None:
    """Called in that command before it loads its libraries: until a training takes over, a signal ends it quietly."""
    if _is_command() and os.environ.get(RUN):
        _listen(_stop)


def command(recipe: str, *more: str) -> str:
    """The command that the user started, for a shell: with its own options and with more, without resuming."""
    words = json.loads(os.environ.get(COMMAND, "null")) or ["train", recipe]
    kept: list[str] = []
    for before, word in zip(["", *words], words, strict=False):
        name = word.replace("_", "-")
        if not name.startswith(RESUMING) and before.replace("_", "-") != RESUMING[0]:
            kept.append(word)
    end = kept.index("--") if "--" in kept else len(kept)  # what follows is the launcher's
    return shlex.join(["axolotl", *kept[:end], *more, *kept[end:]])


def follow() -> None:
    """Called in every process of a run. Idempotent."""
    global _following
    if not _following:
        _following = True
        sys.excepthook = _hook(sys.excepthook)
        atexit.register(_write)


def follow_launcher() -> None:
    """Called at the start of an interpreter inside a run: the command itself goes on as the launcher, by exec."""
    follow()
    if not helps():
        _listen(_hand_down if _is_command() else _stop)


def helps() -> bool:
    """Whether this interpreter only helps another process, as the workers do that prepare rows: it has no words."""
    for word in sys.orig_argv[1:]:
        if word == "-c":
            return True  # so multiprocessing starts them; a command or a rank is a script or a module
        if word == "-m" or not word.startswith("-"):
            return False
    return False


def _listen(handler: Callable[[int, object], None]) -> None:
    pid = os.getpid()

    def handle(number: int, frame: object) -> None:
        if os.getpid() != pid:
            os._exit(128 + number)  # a fork that prepares rows: the process that it helps has the word
        handler(number, frame)

    for number in SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:  # as a shell starts what runs in its background
            signal.signal(number, handle)


def _stop(number: int, frame: object) -> None:
    """Until a training takes the signals over there is nothing to save: one line, and the end."""
    global _stopped
    now = time.monotonic()
    if _stopped is not None:
        if now - _stopped > ECHO_SECONDS:
            os._exit(128 + number)
        return
    _stopped = now
    words = json.loads(os.environ.get(COMMAND, "[]"))
    when = " before the training began" if words[:1] == ["train"] else ""
    say(STOP, f"dskd: stopped by {SIGNALS[number]}{when}. Start again: {shlex.join(['axolotl', *words])}")
    raise SystemExit(128 + number)


def say(kind: str, text: str) -> None:
    """Keep ``text`` for the end of the output."""
    if _is_command():
        _own.append((kind, text))
    else:
        with open(_file(), "a", encoding="utf-8") as stream:
            stream.write(json.dumps([kind, text]) + "\n")


def _owner() -> str:
    return os.environ.get(RUN, "").partition(":")[0]


def _file() -> str:
    return os.environ.get(RUN, "").partition(":")[2]


def _is_command() -> bool:
    return _owner() in ("", str(os.getpid()))


def _hand_down(number: int, frame: object) -> None:
    """The training decides how to stop; a launcher that died first would leave it alone, or talk over it."""
    import psutil

    for child in psutil.Process().children():
        with contextlib.suppress(psutil.Error):
            child.send_signal(number)


def _words() -> list[tuple[str, str]]:
    found = list(_own)
    if _file() and os.path.exists(_file()):
        with open(_file(), encoding="utf-8") as stream:
            found += [tuple(json.loads(line)) for line in stream]
    unique = list(dict.fromkeys(found))  # every rank may say the same
    return sorted(unique, key=lambda word: (ERROR, STOP, ADVICE).index(word[0]))


def _hook(previous: Callable[..., object]) -> Callable[..., object]:
    def excepthook(kind: Any, error: BaseException, trace: Any) -> None:
        text = own_message(error)
        if text is not None:
            say(ERROR, text)
        told = text is not None or (
            _is_command() and kind.__name__ in OF_LAUNCHERS and any(word[0] in (ERROR, STOP) for word in _words())
        )
        if not told or os.environ.get(TRACEBACK):
            previous(kind, error, trace)

    return excepthook


def _write() -> None:
    if not _is_command():
        return
    words = _words()
    if words:
        sys.stdout.flush()
        sys.stderr.write("\n" + "\n".join(text for _, text in words) + "\n")
        sys.stderr.flush()
    if _owner() and os.path.exists(_file()):
        os.unlink(_file())
