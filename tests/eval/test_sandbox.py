"""Programs that attack the sandbox, under every backend of this machine."""

from __future__ import annotations

import ctypes
import os
import select
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from dskd_eval import sandbox
from dskd_eval.errors import UserError
from dskd_eval.sandbox import Limits, Sandbox

LIMITS = Limits(wall_seconds=20, cpu_seconds=10, memory_bytes=1 << 29, output_bytes=1 << 18)
TESTS = "assert answer == 42"


@pytest.fixture(scope="module", params=["bubblewrap", "landlock"])
def box(request: pytest.FixtureRequest) -> Sandbox:
    if reason := sandbox.unavailable(request.param):
        pytest.skip(f"{request.param}: {reason}")
    return Sandbox(request.param, LIMITS)


def test_right_and_wrong_programs(box: Sandbox) -> None:
    assert box.run("answer = 42", TESTS).passed
    wrong = box.run("answer = 41", TESTS)
    assert (wrong.status, wrong.error) == ("failed", "AssertionError at: assert answer == 42")
    assert box.run("answer = (", TESTS).status == "syntax error"
    assert box.run("import math, re, json, collections, itertools, heapq, typing\nanswer = 42", TESTS).passed


def test_a_verdict_just_before_the_end_is_read(box: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    """The program writes its verdict and ends between a look into empty pipes and the look whether it has ended."""
    look = select.select

    def late(handles: list[int], *others: list[int]) -> Any:
        found = look(handles, [], [], 0.0)
        if not found[0]:
            time.sleep(1.0)
        return found

    monkeypatch.setattr(sandbox, "select", SimpleNamespace(select=late))
    assert box.run("answer = 42", TESTS).passed


# Leaving before the tests, in every way Python has, must not count as a pass.
LEAVING = {
    "exit": "import sys; sys.exit(0)",
    "os exit": "import os; os._exit(0)",
    "system exit": "raise SystemExit(0)",
    "forged verdict": "print('passed'); import os; os.write(1, b'ok'); os._exit(0)",
    "writes to every handle": """
import os
for handle in range(3, 64):
    try: os.write(handle, b'0' * 32)
    except OSError: pass
os._exit(0)
""",
    "a verdict of its own": """
import os
for handle in range(3, 64):
    try: os.write(handle, b'{"kind": "passed", "error": ""}')
    except OSError: pass
os._exit(0)
""",
    "own signal": "import os, signal; os.kill(os.getpid(), signal.SIGTERM)",
    "crash": "import ctypes; ctypes.string_at(0)",
    "exit at exit": "import atexit, os; atexit.register(os._exit, 0); raise KeyboardInterrupt",
    "closes handles": """
import os
for handle in range(3, 64):
    try: os.close(handle)
    except OSError: pass
answer = 42
""",
    "exit in a thread": """
import threading, os
t = threading.Thread(target=os._exit, args=(0,))
t.start()
t.join()
""",
    "deep recursion": "import sys; sys.setrecursionlimit(10**9)\ndef f(): f()\nf()",
}


@pytest.mark.parametrize("name", LEAVING)
def test_leaving_early_is_no_pass(box: Sandbox, name: str) -> None:
    hurried = Sandbox(box.backend, replace(LIMITS, wall_seconds=3))
    assert not hurried.run(LEAVING[name], TESTS).passed


# (program, how it must end)
LIMITED = {
    "endless loop": ("while True: pass", "timeout"),
    "sleep": ("import time; time.sleep(60)", "timeout"),
    "ignores signals": (
        """
import signal
for number in range(1, 32):
    try: signal.signal(number, signal.SIG_IGN)
    except (OSError, ValueError): pass
while True: pass
""",
        "timeout",
    ),
    "memory": ("x = bytearray(4 << 30)", "memory limit"),
    "memory in steps": ("x = []\nwhile True: x.append(bytearray(1 << 24))", "memory limit"),
    "output": ("while True: print('x' * 100000)", "output limit"),
    "a gigabyte of output": (
        "import os\nfor _ in range(1024): os.write(1, b'x' * (1 << 20))",
        "output limit",
    ),
    "errors as output": ("import os\nwhile True: os.write(2, b'e' * 65536)", "output limit"),
    "reads input": ("input()", "failed"),
}


@pytest.mark.parametrize("name", LIMITED)
def test_limits(box: Sandbox, name: str) -> None:
    program, status = LIMITED[name]
    hurried = Sandbox(box.backend, replace(LIMITS, wall_seconds=1.5, cpu_seconds=1))
    begun = time.monotonic()
    assert (hurried if status == "timeout" else box).run(program, TESTS).status == status
    assert time.monotonic() - begun < 30


# Every one of these must raise inside the sandbox; the assertion after it would pass if it were allowed.
FORBIDDEN = {
    "fork": "import os; os.fork()",
    "subprocess": "import subprocess; subprocess.run(['/bin/true'])",
    "system": "import os; assert os.system('true') == 0",
    "exec": "import os; os.execv('/bin/sh', ['sh'])",
    "multiprocessing": "import multiprocessing as m\nm.get_context('fork').Process(target=print).start()",
    "tcp": "import socket; socket.create_connection(('127.0.0.1', PORT), 2)",
    "udp": "import socket; socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', PORT))",
    "unix socket": "import socket; socket.socket(socket.AF_UNIX).connect('/run/dbus/system_bus_socket')",
    "listens": "import socket; socket.socket().bind(('0.0.0.0', 0))",
    "home folder": "import os; os.listdir(HOME)",
    "reads a secret": "open(SECRET).read()",
    "writes beside a secret": "open(SECRET + '.new', 'w').write('x')",
    "removes a secret": "import os; os.remove(SECRET)",
    "passwords": "open('/etc/passwd').read()",
    "processes": "import os; [open(f'/proc/{p}/environ').read() for p in os.listdir('/proc') if p.isdigit()]",
    "own memory": "open('/proc/self/mem', 'rb')",
    "removes a library": "import os, json; os.remove(json.__file__)",
    "signals the parent": "import os; os.kill(PARENT, 9)",
    "signals its group": "import os; os.kill(-GROUP, 9)",
    "traces": "import ctypes; assert ctypes.CDLL(None, use_errno=True).ptrace(16, PARENT, 0, 0) == 0",
    "mounts": "import ctypes; assert ctypes.CDLL(None).mount(b'none', b'/tmp', b'tmpfs', 0, 0) == 0",
    "new user namespace": "import ctypes; assert ctypes.CDLL(None).unshare(0x10000000) == 0",
    "raises its limits": "import resource as r; r.setrlimit(r.RLIMIT_AS, (r.RLIM_INFINITY, r.RLIM_INFINITY))",
    "disk device": "open('/dev/vda', 'rb').read(1)",
    "kernel settings": "open('/sys/kernel/uevent_helper', 'w')",
}  # fmt: skip


@pytest.mark.parametrize("name", FORBIDDEN)
def test_forbidden_acts_fail(box: Sandbox, name: str, tmp_path: Path) -> None:
    secret = tmp_path / "secret.txt"
    secret.write_text("hidden")
    with socket.create_server(("127.0.0.1", 0)) as server:
        names = {
            "HOME": repr(str(Path.home())), "SECRET": repr(str(secret)), "PARENT": str(os.getpid()),
            "GROUP": str(os.getpgrp()), "PORT": str(server.getsockname()[1]),
        }  # fmt: skip
        program = FORBIDDEN[name]
        for word, value in names.items():
            program = program.replace(word, value)
        outcome = box.run(program + "\nanswer = 42", TESTS)
    assert not outcome.passed, outcome
    assert secret.read_text() == "hidden"
    assert list(tmp_path.iterdir()) == [secret]


def test_the_environment_is_empty(box: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    outcome = box.run("import os, sys\nprint(dict(os.environ), sys.argv)\nanswer = 42", TESTS)
    assert outcome.passed and "hf_secret" not in outcome.output
    assert outcome.output.startswith("{} ['']")


def test_source_and_frames_hold_no_nonce(box: Sandbox) -> None:
    """The nonce lies in a pipe until the tests are over: neither frames, modules nor the heap have it."""
    program = """
import gc, re, sys
texts = []
frame = sys._getframe()
while frame:
    texts += [repr(frame.f_locals), repr(frame.f_code.co_consts)]
    frame = frame.f_back
texts += [repr(item) for item in gc.get_objects() if isinstance(item, (dict, list, tuple))]
found = re.findall(r"(?<![0-9a-f])[0-9a-f]{32}(?![0-9a-f])", " ".join(texts))
print("FOUND", found)
answer = 42
"""
    outcome = box.run(program, TESTS)
    assert outcome.passed and "FOUND []" in outcome.output


def test_nothing_survives(box: Sandbox) -> None:
    """Threads and whatever else a program leaves behind end with it."""
    begun = time.monotonic()
    program = "import threading, time\nthreading.Thread(target=time.sleep, args=(60,)).start()\nanswer = 42"
    assert box.run(program, TESTS).passed
    assert time.monotonic() - begun < 15
    listing = subprocess.run(
        ["ps", "--ppid", str(os.getpid()), "-o", "args"], capture_output=True, text=True, check=False
    ).stdout
    assert "bwrap" not in listing and "-I -S -B" not in listing


def test_ordinary_library_use_is_allowed(box: Sandbox) -> None:
    program = (
        "import asyncio, threading, random, tempfile\n"
        "async def give(): return 40\n"
        "found = []\nt = threading.Thread(target=found.append, args=(2,)); t.start(); t.join()\n"
        "answer = asyncio.run(give()) + found[0]\n"
    )
    assert box.run(program, TESTS).passed


def test_many_programs_keep_their_order(box: Sandbox) -> None:
    seen: list[int] = []
    jobs = [(f"answer = {40 + n % 4}", TESTS) for n in range(12)]
    outcomes = box.run_all(jobs, workers=3, on_done=seen.append)
    assert [outcome.passed for outcome in outcomes] == [n % 4 == 2 for n in range(12)]
    assert seen == list(range(1, 13))


def test_runs_in_a_thread(box: Sandbox) -> None:
    found: list[bool] = []
    thread = threading.Thread(target=lambda: found.append(box.run("answer = 42", TESTS).passed))
    thread.start()
    thread.join()
    assert found == [True]


def test_record_names_the_backend(box: Sandbox) -> None:
    record = box.record()
    assert record.backend == box.backend and record.version
    assert record.limits["memory_bytes"] == LIMITS.memory_bytes


@pytest.mark.skipif(sys.platform != "linux", reason="Landlock is a Linux interface")
def test_landlock_runs_where_the_kernel_has_it() -> None:
    version = ctypes.CDLL(None).syscall(444, None, ctypes.c_size_t(0), ctypes.c_uint32(1))
    namespaces = subprocess.run(["unshare", "--user", "--net", "--pid", "--fork", "true"], check=False)
    if version < 1 or namespaces.returncode:
        pytest.skip(f"Landlock ABI {version}, unshare ended with {namespaces.returncode}")
    assert sandbox.unavailable("landlock") is None


def test_without_a_sandbox_programs_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "unavailable", lambda backend: None if backend == "none" else "not on this machine")
    with pytest.raises(UserError, match=r"bubblewrap: not on this.*landlock: not on this.*--unsafe-code"):
        sandbox.choose()
    assert sandbox.choose(unsafe=True).backend == "none"


@pytest.mark.parametrize("name", ["exit", "os exit", "forged verdict", "crash"])
def test_unsafe_mode_still_needs_the_nonce(name: str) -> None:
    loose = Sandbox("none", LIMITS)
    assert not loose.run(LEAVING[name], TESTS).passed
    assert loose.run("answer = 42", TESTS).passed
    assert loose.run("while True: print('x' * 100000)").status == "output limit"
