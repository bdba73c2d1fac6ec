"""The launcher: it reads a policy, takes away from itself what the policy does not name, and
becomes the program.

It runs between the node and the engine because nothing may run between fork and exec in a program
with threads. The node starts it with `ENTRY`, and writes one JSON object to its standard input:

======== ==========================================================================================
argv     the program and its arguments
folder   its working folder
rights   [path, landlock's rights] pairs: all it may touch
limits   {resource: number}: RLIMIT_ names, soft and hard
required the measures that must stand, or nothing is started
profile  macOS: a profile for sandbox-exec
rehearse true: start nothing; say as JSON which measures stand, each of them tried from inside
======== ==========================================================================================

Exit statuses: 124 a required measure cannot be had, 125 the policy makes no sense, 126 the program
cannot be started. Anything else is the program's own. It says one line in each case.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import resource
import signal
import sys
from contextlib import suppress
from typing import Any, NoReturn

from meshnode.engine.sandbox import kernel, landlock, seccomp, syscalls

ENTRY = (
    "import sys; sys.path.append(sys.argv[1]); "
    "from meshnode.engine.sandbox.launch import main; main()"
)
"""For `python -I -S -c`, followed by the folder that holds our packages."""

MEASURE_MISSING, POLICY_BROKEN, PROGRAM_BROKEN = 124, 125, 126

FILES, CALLS, NETWORK, SEATBELT = "files", "calls", "network", "seatbelt"

_KEPT_VARIABLE = "MESH_PARENT_FD"
_SANDBOX_EXEC = "/usr/bin/sandbox-exec"
_MOST_DESCRIPTORS = 65536


def main() -> NoReturn:
    try:
        policy = json.loads(sys.stdin.buffer.read())
        _tidy_descriptors()
        _limit(policy.get("limits", {}))
        os.umask(0o077)
        os.chdir(policy.get("folder", "/"))
        steps = _MacOS(policy) if sys.platform == "darwin" else _Linux(policy)
        standing = steps.confine()
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        _end(POLICY_BROKEN, f"the sandbox's policy cannot be applied: {error}")
    if policy.get("rehearse"):
        _say(json.dumps(standing))
        os._exit(0)
    for name in policy.get("required", ()):
        held, reason = standing.get(name, (False, "it is unknown here"))
        if not held:
            _end(MEASURE_MISSING, f"the sandbox lacks a required measure: {reason}")
    _say("in the sandbox: " + ", ".join(text for held, text in standing.values() if held))
    try:
        steps.become([os.fsencode(each) for each in policy["argv"]])
    except OSError as error:
        _end(PROGRAM_BROKEN, f"{policy['argv'][0]} cannot be started: {error.strerror}")


class _Linux:
    """Landlock for files, seccomp for system calls, a namespace for the network."""

    def __init__(self, policy: dict[str, Any]) -> None:
        self._rights = [(path, int(rights)) for path, rights in policy["rights"]]
        self._rehearse = bool(policy.get("rehearse"))
        self._architecture = syscalls.machine()
        # Random, and never written anywhere: execve's only key.
        self._pass_word = tuple(int.from_bytes(os.urandom(8), "little") for _ in range(2))
        self._filtered = False

    def confine(self) -> dict[str, tuple[bool, str]]:
        """Measure to (whether it stands, its name or why it does not). The order matters: each
        step needs what the later ones take away."""
        standing = {FILES: (False, ""), CALLS: (False, ""), NETWORK: (False, "")}
        try:
            kernel.leave_network()
            standing[NETWORK] = (True, "a network namespace")
        except kernel.Unavailable as error:
            standing[NETWORK] = (False, str(error))
        kernel.no_new_privileges()
        kernel.drop_capabilities()
        try:
            version = landlock.restrict(self._rights)
            standing[FILES] = self._tried(FILES, f"landlock (ABI {version})")
        except kernel.Unavailable as error:
            standing[FILES] = (False, str(error))
        try:
            seccomp.check_available(self._architecture)
            if self._rehearse:
                self._filter()
            standing[CALLS] = self._tried(CALLS, "seccomp")
        except kernel.Unavailable as error:
            standing[CALLS] = (False, str(error))
        self._filtered = standing[CALLS][0]
        return standing

    def become(self, argv: list[bytes]) -> NoReturn:
        """The program, in this very process. Raises `OSError`."""
        _restore_signals()
        if not self._filtered:
            os.execve(argv[0], argv, os.environb)  # noqa: S606
        environment = [name + b"=" + value for name, value in os.environb.items()]
        self._filter()
        kernel.system_call(
            syscalls.numbers(self._architecture)["execve"],
            ctypes.c_char_p(argv[0]),
            _strings(argv),
            _strings(environment),
            *(ctypes.c_uint64(half) for half in self._pass_word),
        )
        raise AssertionError("execve returned without an error")

    def _filter(self) -> None:
        first, second = self._pass_word
        rules = seccomp.program(self._architecture, os.getpid(), (first, second))
        seccomp.install(rules, self._architecture)

    def _tried(self, measure: str, name: str) -> tuple[bool, str]:
        """In a rehearsal, what the measure should deny is tried."""
        if not self._rehearse:
            return True, name
        escaped = _read_foreign_file() if measure == FILES else _make_forbidden_calls()
        return not escaped, f"{name} does not hold here: {escaped}" if escaped else name


class _MacOS:
    """The whole of it is one profile, which sandbox-exec applies."""

    def __init__(self, policy: dict[str, Any]) -> None:
        self._profile: str = policy["profile"]
        self._rehearse = bool(policy.get("rehearse"))

    def confine(self) -> dict[str, tuple[bool, str]]:
        if not os.access(_SANDBOX_EXEC, os.X_OK):
            return {SEATBELT: (False, "there is no sandbox-exec")}
        if self._rehearse and not self._runs("/usr/bin/true"):
            return {SEATBELT: (False, "sandbox-exec runs nothing with mesh's profile")}
        if self._rehearse and self._runs("/bin/cat", "/etc/passwd"):
            return {SEATBELT: (False, "sandbox-exec does not hold here: /etc/passwd can be read")}
        return {SEATBELT: (True, "sandbox-exec")}

    def _runs(self, *command: str) -> bool:
        argv = [_SANDBOX_EXEC, "-p", self._profile, *command]
        silent = [(os.POSIX_SPAWN_OPEN, fd, os.devnull, os.O_WRONLY, 0) for fd in (1, 2)]
        child = os.posix_spawn(_SANDBOX_EXEC, argv, os.environ, file_actions=silent)
        return os.waitpid(child, 0)[1] == 0

    def become(self, argv: list[bytes]) -> NoReturn:
        _restore_signals()
        tool = os.fsencode(_SANDBOX_EXEC)
        arguments = [tool, b"-p", os.fsencode(self._profile), *argv]
        os.execve(tool, arguments, os.environb)  # noqa: S606


def _tidy_descriptors() -> None:
    """Nothing stays open but an empty input, the log, and the pipe that ends us with the node."""
    empty = os.open(os.devnull, os.O_RDONLY)
    os.dup2(empty, 0)
    kept = os.environ.get(_KEPT_VARIABLE, "")
    kept_fd = int(kept) if kept.isdecimal() else -1
    most = min(resource.getrlimit(resource.RLIMIT_NOFILE)[0], _MOST_DESCRIPTORS)
    for fd in (int(name) for name in _open_descriptors() or map(str, range(most))):
        if fd > 2 and fd != kept_fd:
            with suppress(OSError):
                os.close(fd)


def _open_descriptors() -> list[str]:
    try:
        return os.listdir("/dev/fd")
    except OSError:
        return []


def _limit(limits: dict[str, int]) -> None:
    for name, wanted in limits.items():
        kind = getattr(resource, name, None)
        if kind is None:
            continue  # not on this system
        _, hard = resource.getrlimit(kind)
        most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(kind, (most, most))


def _restore_signals() -> None:
    """Python ignores these, and what is ignored stays so over an exec."""
    for number in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(number, signal.SIG_DFL)


def _read_foreign_file() -> str:
    """What could be read that no policy names, empty when nothing could."""
    try:
        os.close(os.open("/etc/passwd", os.O_RDONLY))
    except OSError as error:
        return "" if error.errno in (errno.EACCES, errno.EPERM) else str(error)
    return "/etc/passwd can be read"


def _make_forbidden_calls() -> str:
    """Which call was made that the filter denies, empty when there was none."""
    number = syscalls.numbers(syscalls.machine())
    internet, datagrams, nobody = ctypes.c_long(2), ctypes.c_long(2), ctypes.c_long(-1)
    for name, arguments in (
        ("socket", (internet, datagrams, ctypes.c_long(0))),
        ("connect", (nobody, None, ctypes.c_long(0))),
        ("execve", (ctypes.c_char_p(b"/bin/true"), _strings([b"true"]), _strings([]))),
        ("kill", (ctypes.c_long(os.getppid()), ctypes.c_long(0))),
        ("ptrace", (ctypes.c_long(0), None, None, None)),
    ):
        try:
            kernel.system_call(number[name], *arguments)
        except OSError as error:
            if error.errno == errno.EPERM:
                continue
        return f"{name} is not denied"
    return ""


def _strings(values: list[bytes]) -> ctypes.Array[ctypes.c_char_p]:
    return (ctypes.c_char_p * (len(values) + 1))(*values, None)


def _say(line: str) -> None:
    os.write(1, f"{line}\n".encode(errors="replace"))


def _end(status: int, line: str) -> NoReturn:
    _say(f"error: {line}")
    os._exit(status)
