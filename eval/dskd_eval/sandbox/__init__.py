"""Generated programs, run where they can do no harm.

Three ways, best first: bubblewrap; Landlock with user, network and process namespaces; none. Without the
first two the sandbox refuses, unless unsafe execution was asked for. Inside, both use the same system call
filter (no new processes, no sockets) and limits. A program passes when the nonce of its run comes back
after its tests; leaving early with exit code 0 does not count.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from dskd_eval.errors import UserError
from dskd_eval.schema import SandboxRecord

Backend = Literal["bubblewrap", "landlock", "none"]
_INSIDE = "/python"
# What may be said without the nonce; the pipe is open to the tested program too.
_SAID_INSIDE = ("failed", "syntax error", "memory limit", "confinement failed")
_GUEST = (Path(__file__).parent / "guest.py").read_text(encoding="utf-8")


@dataclass(frozen=True)
class Limits:
    """Limits of one program. wall_seconds counts waiting too; output_bytes covers stdout and stderr
    together.
    """

    wall_seconds: float = 30.0
    cpu_seconds: int = 10
    memory_bytes: int = 1 << 30
    output_bytes: int = 1 << 20
    file_bytes: int = 1 << 24
    processes: int = 32


@dataclass(frozen=True)
class Outcome:
    """status: passed, failed, syntax error, timeout, output limit, memory limit, exited early."""

    status: str
    error: str = ""
    output: str = ""
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        return self.status == "passed"


class Sandbox:
    """Runs programs under one backend.

    Raises UserError when the backend cannot work here; its reason names the missing part.
    """

    def __init__(self, backend: Backend, limits: Limits | None = None) -> None:
        self.backend, self.limits = backend, limits or Limits()
        if reason := unavailable(backend):
            raise UserError(
                "sandbox",
                expected=f"a working {backend}",
                got=reason,
                fix="Install bubblewrap, or allow --unsafe-code on a machine you can lose.",
            )

    def record(self) -> SandboxRecord:
        """Backend, its version and limits, for the results file."""
        return SandboxRecord(backend=self.backend, version=_version(self.backend), limits=asdict(self.limits))

    def run(self, program: str, tests: str = "") -> Outcome:
        """Run a program and then its tests in one interpreter of their own."""
        return _run(self.backend, self.limits, program, tests)

    def run_all(
        self,
        jobs: Sequence[tuple[str, str]],
        *,
        workers: int | None = None,
        on_done: Callable[[int], None] | None = None,
    ) -> list[Outcome]:
        """Outcomes of (program, tests) pairs, in their order, several at a time."""
        workers = workers or max(1, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 2)
        outcomes: list[Outcome] = []
        pool = ThreadPoolExecutor(workers)
        try:
            for outcome in pool.map(lambda job: self.run(*job), jobs):
                outcomes.append(outcome)
                if on_done:
                    on_done(len(outcomes))
        finally:
            pool.shutdown(cancel_futures=True)
        return outcomes


def choose(*, unsafe: bool = False, limits: Limits | None = None) -> Sandbox:
    """The best sandbox of this machine. Raises UserError with every reason when there is none and unsafe is
    False.
    """
    reasons = {}
    for backend in ("bubblewrap", "landlock"):
        reason = unavailable(backend)
        if reason is None:
            return Sandbox(backend, limits)
        reasons[backend] = reason
    if unsafe:
        return Sandbox("none", limits)
    raise UserError(
        "sandbox",
        expected="bubblewrap, or Landlock with user and network namespaces, to run generated programs",
        got="; ".join(f"{backend}: {reason}" for backend, reason in reasons.items()),
        fix="Install bubblewrap (apt install bubblewrap), leave out the code tasks, "
        "or allow --unsafe-code on a machine you can lose.",
    )


_CHECKED: dict[Backend, str | None] = {}


def unavailable(backend: Backend) -> str | None:
    """Why a backend cannot be used here, found by running a program in it; None when it works."""
    if backend not in _CHECKED:
        _CHECKED[backend] = _why_not(backend)
    return _CHECKED[backend]


def _why_not(backend: Backend) -> str | None:
    if backend == "none":
        return None if os.name == "posix" else "needs a POSIX system"
    if sys.platform != "linux":
        return "needs Linux"
    if backend == "bubblewrap" and shutil.which("bwrap") is None:
        return "bwrap is not installed"
    outcome = _run(backend, Limits(wall_seconds=60), "answer = 6 * 7", "assert answer == 42")
    return None if outcome.passed else f"{outcome.status}: {outcome.error or outcome.output.strip()[-200:]}"


def _version(backend: Backend) -> str:
    if backend == "bubblewrap":
        bwrap = shutil.which("bwrap") or "bwrap"
        return subprocess.run([bwrap, "--version"], capture_output=True, text=True, check=False).stdout.strip()
    if backend == "landlock":
        import ctypes

        number = ctypes.CDLL(None).syscall(444, None, ctypes.c_size_t(0), ctypes.c_uint32(1))
        return f"Landlock ABI {number}, user, network and process namespaces, seccomp"
    return "resource limits only"


def _readable() -> list[str]:
    """What an interpreter needs to run: its library folders, the loader's cache and harmless devices."""
    prefix = Path(sys.base_prefix).resolve()
    folders = [
        prefix / "lib",
        prefix / "lib64",
        Path("/usr/lib"),
        Path("/usr/lib64"),
        Path("/lib"),
        Path("/lib64"),
    ]
    files = [Path("/etc/ld.so.cache"), Path("/dev/null"), Path("/dev/zero"), Path("/dev/urandom")]
    return [str(path) for path in dict.fromkeys(folders) if path.is_dir()] + [str(path) for path in files]


def _command(backend: Backend, handles: tuple[int, int]) -> list[str]:
    python = os.path.realpath(sys.executable)
    guest = [python, "-I", "-S", "-B", "-X", "utf8", "-c", _GUEST, *(str(handle) for handle in handles)]
    if backend != "bubblewrap":
        return guest
    command = [
        shutil.which("bwrap") or "bwrap",
        "--unshare-all",
        "--unshare-user",
        "--die-with-parent",
        "--new-session",
        "--clearenv",
    ]
    command += ["--uid", "65534", "--gid", "65534", "--hostname", "sandbox", "--cap-drop", "ALL"]
    command += ["--size", str(1 << 26), "--tmpfs", "/tmp", "--dev", "/dev"]
    prefix = str(Path(sys.base_prefix).resolve())
    for path in [*_readable(), python]:
        if path.startswith("/dev/") or not os.path.exists(path):
            continue
        # An interpreter in someone's home moves, so that no folder of the home exists inside.
        inside = path if prefix == "/usr" else path.replace(prefix, _INSIDE, 1)
        command += ["--ro-bind", path, inside]
    if prefix != "/usr":
        command += ["--setenv", "LD_LIBRARY_PATH", f"{_INSIDE}/lib"]
        guest[0] = python.replace(prefix, _INSIDE, 1)
    return [*command, "--remount-ro", "/", "--chdir", "/tmp", *guest]


def _run(backend: Backend, limits: Limits, program: str, tests: str) -> Outcome:
    nonce = secrets.token_hex(16)
    job = {
        "mode": {"bubblewrap": "bubblewrap", "landlock": "landlock", "none": "none"}[backend],
        "limits": asdict(limits) | {"host_processes": backend == "none"},
        "readable": _readable(),
        "program": program,
        "tests": tests,
    }
    nonce_read, nonce_write = os.pipe()
    verdict_read, verdict_write = os.pipe()
    output_read, output_write = os.pipe()
    started = time.monotonic()
    with contextlib.ExitStack() as stack:
        for handle in (nonce_read, verdict_read, output_read):
            stack.callback(os.close, handle)
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="dskd-eval-")) if backend == "none" else "/"
        stdin = stack.enter_context(tempfile.TemporaryFile())
        stdin.write(json.dumps(job).encode("utf-8", "surrogatepass"))
        stdin.seek(0)
        os.write(nonce_write, nonce.encode())
        os.close(nonce_write)
        try:
            process = subprocess.Popen(
                _command(backend, (nonce_read, verdict_write)),
                stdin=stdin,
                stdout=output_write,
                stderr=output_write,
                pass_fds=(nonce_read, verdict_write),
                env={},
                cwd=folder,
                start_new_session=True,
            )
        finally:
            os.close(verdict_write)
            os.close(output_write)
        try:
            output, verdict, stopped = _watch(process, output_read, verdict_read, limits)
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            process.wait()
    seconds = time.monotonic() - started
    text = output[-2000:].decode("utf-8", "replace")
    if verdict == nonce.encode() and stopped is None:
        return Outcome("passed", output=text, seconds=seconds)
    return _failure(verdict, stopped, process.returncode, limits, text, seconds)


def _failure(verdict: bytes, stopped: str | None, code: int, limits: Limits, text: str, seconds: float) -> Outcome:
    """Why a program did not pass. verdict: what it wrote into the pipe for it; stopped: the limit that it met."""
    if stopped is not None:
        return Outcome(stopped, error=_limit_text(stopped, limits), output=text, seconds=seconds)
    try:
        said = json.loads(verdict)
        if said["kind"] in _SAID_INSIDE:
            return Outcome(said["kind"], str(said["error"]), text, seconds)
    except (ValueError, KeyError, TypeError):
        pass
    if code in (-signal.SIGXCPU, 128 + signal.SIGXCPU, -signal.SIGKILL, 128 + signal.SIGKILL):
        return Outcome("timeout", _limit_text("timeout", limits), text, seconds)
    return Outcome("exited early", f"ended with code {code} before its tests did", text, seconds)


def _limit_text(status: str, limits: Limits) -> str:
    if status == "output limit":
        return f"more than {limits.output_bytes} bytes of output"
    return f"more than {limits.cpu_seconds} s of processor time or {limits.wall_seconds:g} s"


def _watch(
    process: subprocess.Popen[bytes], output_handle: int, verdict_handle: int, limits: Limits
) -> tuple[bytes, bytes, str | None]:
    """Read both pipes until the process ends, a limit is met, or the deadline passes."""
    deadline = time.monotonic() + limits.wall_seconds
    received = {output_handle: bytearray(), verdict_handle: bytearray()}
    total = 0
    open_handles = [output_handle, verdict_handle]
    while True:
        now = time.monotonic()
        if now > deadline:
            return bytes(received[output_handle]), bytes(received[verdict_handle]), "timeout"
        # Asked before the pipes are read: what a program wrote before its end is in them by now.
        ended = process.poll() is not None
        wait = 0.0 if ended else min(0.25, deadline - now)
        ready = select.select(open_handles, [], [], wait)[0] if open_handles else []
        for handle in ready:
            block = os.read(handle, 1 << 16)
            if not block:
                open_handles.remove(handle)
                continue
            total += len(block)
            kept = received[handle]
            kept += block
            if handle == output_handle:
                del kept[:-4096]
        if total > limits.output_bytes:
            return bytes(received[output_handle]), bytes(received[verdict_handle]), "output limit"
        # A background child may hold the pipes open: that nothing more is in them is enough.
        if ended and not ready:
            return bytes(received[output_handle]), bytes(received[verdict_handle]), None
        if not open_handles and not ended:
            time.sleep(0.005)
