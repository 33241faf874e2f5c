"""The inside of the sandbox: confine this process, then run one program and its tests.

Runs alone (`python -I -S -c <this text>`) with the standard library only. Standard input holds the job as
JSON. The verdict goes to its own pipe: the nonce, which is read from another pipe after the tests have
ended, or a JSON object that says what went wrong.
"""

import contextlib
import ctypes
import json
import os
import platform
import resource
import signal
import struct
import sys
import types
from typing import TypedDict

PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 22, 38
CLONE_NEWUTS, CLONE_NEWIPC, CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = (
    0x04000000, 0x08000000, 0x10000000, 0x20000000, 0x40000000,
)  # fmt: skip
CLONE_THREAD = 0x00010000
EPERM, ENOSYS = 1, 38

# System calls no tested program needs: new processes, sockets, tracing, mounts, keys, kernel interfaces.
_COMMON = {
    "io_uring_setup": 425, "io_uring_enter": 426, "io_uring_register": 427, "pidfd_send_signal": 424,
    "open_tree": 428, "move_mount": 429, "fsopen": 430, "fsconfig": 431, "fsmount": 432, "fspick": 433,
    "pidfd_open": 434, "pidfd_getfd": 438, "mount_setattr": 442,
}  # fmt: skip
DENIED = {
    "x86_64": {
        "fork": 57, "vfork": 58, "execve": 59, "execveat": 322, "socket": 41, "connect": 42, "ptrace": 101,
        "prctl": 157, "mount": 165, "umount2": 166, "pivot_root": 155, "chroot": 161, "unshare": 272,
        "setns": 308, "keyctl": 250, "add_key": 248, "request_key": 249, "bpf": 321, "perf_event_open": 298,
        "userfaultfd": 323, "process_vm_readv": 310, "process_vm_writev": 311, "open_by_handle_at": 304,
        "kexec_load": 246, "init_module": 175, "finit_module": 313, "delete_module": 176, "reboot": 169,
        "swapon": 167, "acct": 163, **_COMMON,
    },
    "aarch64": {
        "execve": 221, "execveat": 281, "socket": 198, "connect": 203, "ptrace": 117, "prctl": 167,
        "mount": 40, "umount2": 39, "pivot_root": 41, "chroot": 51, "unshare": 97, "setns": 268,
        "keyctl": 219, "add_key": 217, "request_key": 218, "bpf": 280, "perf_event_open": 241,
        "userfaultfd": 282, "process_vm_readv": 270, "process_vm_writev": 271, "open_by_handle_at": 265,
        "kexec_load": 104, "init_module": 105, "finit_module": 273, "delete_module": 106, "reboot": 142,
        "swapon": 224, "acct": 89, **_COMMON,
    },
}  # fmt: skip
AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
CLONE = {"x86_64": 56, "aarch64": 220}
CLONE3 = 435


class _CapabilityHeader(ctypes.Structure):
    _fields_ = [("version", ctypes.c_uint32), ("pid", ctypes.c_int)]


class Job(TypedDict):
    """What comes in. mode: which confinement; readable: paths, for landlock; program and tests: their texts."""

    mode: str
    limits: dict[str, int]
    readable: list[str]
    program: str
    tests: str


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _checked(result: int, what: str) -> int:
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, what + ": " + os.strerror(error))
    return result


def enter_namespaces(libc: ctypes.CDLL) -> None:
    """New user, network, process, IPC and host-name namespaces; only this process may have one thread."""
    uid, gid = os.geteuid(), os.getegid()
    flags = CLONE_NEWUSER | CLONE_NEWNET | CLONE_NEWPID | CLONE_NEWIPC | CLONE_NEWUTS
    _checked(libc.unshare(flags), "unshare")
    for name, text in (("setgroups", "deny"), ("uid_map", f"65534 {uid} 1"), ("gid_map", f"65534 {gid} 1")):
        with open("/proc/self/" + name, "w") as file:
            file.write(text)


def drop_capabilities(libc: ctypes.CDLL) -> None:
    header = _CapabilityHeader(0x20080522, 0)
    _checked(libc.capset(ctypes.byref(header), (ctypes.c_uint32 * 6)()), "capset")


def landlock_abi(libc: ctypes.CDLL) -> int:
    return int(libc.syscall(444, None, ctypes.c_size_t(0), ctypes.c_uint32(1)))


def restrict_files(libc: ctypes.CDLL, readable: list[str]) -> None:
    """Landlock: nothing may be read but `readable`, nothing written, no TCP, no signal or socket to the
    outside.
    """
    abi = _checked(landlock_abi(libc), "landlock")
    rights = (1 << 13) - 1
    for least, bit in ((2, 13), (3, 14), (5, 15)):
        if abi >= least:
            rights |= 1 << bit
    attributes = struct.pack("QQQ", rights, 3 if abi >= 4 else 0, 3 if abi >= 6 else 0)
    size = 24 if abi >= 6 else 16 if abi >= 4 else 8
    ruleset = _checked(libc.syscall(444, attributes, ctypes.c_size_t(size), ctypes.c_uint32(0)), "ruleset")
    execute, read_file, read_dir, write_file = 1, 1 << 2, 1 << 3, 1 << 1
    for path in readable:
        try:
            handle = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError:
            continue
        allowed = execute | read_file | (read_dir if os.path.isdir(path) else 0)
        if path == "/dev/null":
            allowed |= write_file
        rule = struct.pack("=Qi", allowed, handle)
        _checked(libc.syscall(445, ruleset, 1, rule, ctypes.c_uint32(0)), "rule for " + path)
        os.close(handle)
    _checked(libc.syscall(446, ruleset, ctypes.c_uint32(0)), "restrict_self")
    os.close(ruleset)


def filter_system_calls(libc: ctypes.CDLL) -> None:
    """seccomp: no new processes (threads are allowed), no program starts, no sockets but pairs."""
    machine = platform.machine()
    if machine not in AUDIT_ARCH or struct.calcsize("P") != 8:
        raise OSError(ENOSYS, "no system call filter for " + machine)
    load, jump_equal, jump_greater, jump_set, give = 0x20, 0x15, 0x35, 0x45, 0x06
    allow, deny, unknown, kill = 0x7FFF0000, 0x00050000 | EPERM, 0x00050000 | ENOSYS, 0x80000000
    program = [
        (load, 0, 0, 4),
        (jump_equal, 1, 0, AUDIT_ARCH[machine]),
        (give, 0, 0, kill),
        (load, 0, 0, 0),
        (jump_greater, 0, 1, 0x40000000),
        (give, 0, 0, deny),
        (jump_equal, 0, 1, CLONE3),
        (give, 0, 0, unknown),
    ]
    for number in sorted(DENIED[machine].values()):
        program += [(jump_equal, 0, 1, number), (give, 0, 0, deny)]
    program += [
        (jump_equal, 0, 3, CLONE[machine]),
        (load, 0, 0, 16),
        (jump_set, 1, 0, CLONE_THREAD),
        (give, 0, 0, deny),
        (give, 0, 0, allow),
    ]
    code = b"".join(struct.pack("=HBBI", *line) for line in program)
    buffer = ctypes.create_string_buffer(code, len(code))
    header = struct.pack("HxxxxxxP", len(program), ctypes.addressof(buffer))
    _checked(libc.prctl(PR_SET_SECCOMP, 2, header, 0, 0), "seccomp")


def set_limits(limits: dict[str, int]) -> None:
    """Limits of this process and its children: bytes, seconds, number of processes."""

    def limit(kind: int, soft: int, hard: int | None = None) -> None:
        current = resource.getrlimit(kind)[1]
        hard = soft if hard is None else hard
        if current != resource.RLIM_INFINITY:
            soft, hard = min(soft, current), min(hard, current)
        resource.setrlimit(kind, (soft, hard))

    limit(resource.RLIMIT_CORE, 0)
    limit(resource.RLIMIT_NOFILE, 64)
    limit(resource.RLIMIT_FSIZE, limits["file_bytes"])
    limit(resource.RLIMIT_CPU, limits["cpu_seconds"], limits["cpu_seconds"] + 1)
    limit(resource.RLIMIT_AS, limits["memory_bytes"])
    if hasattr(resource, "RLIMIT_NPROC") and not limits.get("host_processes"):
        limit(resource.RLIMIT_NPROC, limits["processes"])


def confine(job: Job) -> None:
    """Shut this process in, as the job says; ``OSError`` where a part of that cannot be had."""
    mode = job["mode"]
    libc = _libc() if sys.platform == "linux" else None
    if mode == "landlock" and libc is not None:
        enter_namespaces(libc)
        _stay_as_parent()
        _checked(libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0), "prctl")
        _stay_as_parent()
    set_limits(job["limits"])
    if libc is None or mode == "none":
        return
    _checked(libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")
    if mode == "landlock":
        drop_capabilities(libc)
        restrict_files(libc, job["readable"])
    filter_system_calls(libc)


def _stay_as_parent() -> None:
    """Fork; the parent waits for the child and ends as it ends, the child goes on."""
    child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        code = os.waitstatus_to_exitcode(status)
        os._exit(code if code >= 0 else 128 - code)


def _line_of_tests(error: BaseException, tests: str) -> str:
    place = error.__traceback__
    found = ""
    while place is not None:
        if place.tb_frame.f_code.co_filename == "<tests>":
            lines = tests.splitlines()
            found = lines[place.tb_lineno - 1].strip() if place.tb_lineno <= len(lines) else ""
        place = place.tb_next
    return found


def main(nonce_handle: int, verdict_handle: int) -> None:
    """Run the job on standard input; the verdict goes into the pipe."""
    job: Job = json.loads(sys.stdin.buffer.read())
    read, write, leave = os.read, os.write, os._exit

    def say(kind: str, error: str) -> None:
        write(verdict_handle, json.dumps({"kind": kind, "error": error[:400]}).encode())
        leave(1)

    try:
        null = os.open("/dev/null", os.O_RDONLY)
        os.dup2(null, 0)
        os.environ.clear()
        confine(job)
    except BaseException as error:
        say("confinement failed", f"{type(error).__name__}: {error}")
    module = types.ModuleType("__main__")
    sys.modules["__main__"] = module
    sys.argv = [""]
    try:
        program = compile(job["program"], "<answer>", "exec", dont_inherit=True)
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        say("syntax error", f"{type(error).__name__}: {error}")
    try:
        exec(program, module.__dict__)
        exec(compile(job["tests"], "<tests>", "exec", dont_inherit=True), module.__dict__)
    except MemoryError:
        say("memory limit", "MemoryError")
    except BaseException as error:
        text = f"{type(error).__name__}: {error}".rstrip(": ")
        line = _line_of_tests(error, job["tests"])
        say("failed", f"{text} at: {line}" if line else text)
    with contextlib.suppress(BaseException):
        sys.stdout.flush()
    write(verdict_handle, read(nonce_handle, 64))
    leave(0)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
