"""`probe.c`, compiled: what an attacker would try, one thing a run; and the sandbox's launcher, to
run it in."""

from __future__ import annotations

import errno
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from meshnode.engine.sandbox import launch
from meshnode.engine.sandbox.policy import Policy, launcher_argv
from tests.conftest import require

SOURCE = Path(__file__).with_name("probe.c")
TIMEOUT_S = 60
NOBODY = 65534
PACKAGES = Path(launch.__file__).parents[3]

# The launcher under another user, whose Python may be closed to that user.
AS_USER = """
import ctypes, os, sys
sys.path.append(sys.argv[1])
from meshnode.engine.sandbox import launch
user = int(sys.argv[2])
os.setgroups([]); os.setresgid(user, user, user); os.setresuid(user, user, user)
ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)  # dumpable, as after an exec: /proc/self is its own
launch.main()
"""

# A kernel without landlock: its first call is answered ENOSYS, to this process and all it starts.
WITHOUT_LANDLOCK = """
import ctypes, runpy, sys
sys.path.append(sys.argv[1])
from meshnode.engine.sandbox import kernel, seccomp, syscalls
kernel.no_new_privileges()
machine = syscalls.machine()
seccomp.install([(0x20, 0, 0, 0), (0x15, 0, 1, 444), (6, 0, 0, 0x50000 | 38),
                 (6, 0, 0, 0x7FFF0000)], machine)
del sys.argv[0:2]
if sys.argv:
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
else:
    from meshnode.engine.sandbox import launch
    launch.main()
"""


@dataclass(frozen=True)
class Outcome:
    """How an attempt ended. `error`: the name of its errno, empty when it went well."""

    error: str
    result: int
    said: str

    @property
    def ok(self) -> bool:
        return not self.error


def compile_probe(folder: Path) -> Path:
    compiler = shutil.which("cc")
    require("compiler", compiler is not None, "no cc: install a C compiler")
    assert compiler is not None
    program = folder / "probe"
    subprocess.run(
        [compiler, "-Wall", "-Wextra", "-Werror", "-pthread", "-o", program, SOURCE], check=True
    )
    program.chmod(0o755)
    return program


def attempt(program: Path, action: str, target: object, *, user: int | None = None) -> Outcome:
    """As it is without any sandbox, as us or as another user."""
    run = subprocess.run(
        [program, action, str(target)],
        capture_output=True,
        timeout=TIMEOUT_S,
        user=user,
        group=user,
        extra_groups=None if user is None else [],
        check=False,
    )
    return outcome(run)


def outcome(run: subprocess.CompletedProcess[bytes]) -> Outcome:
    said = (run.stdout + run.stderr).decode()
    word, _, number = said.strip().rpartition("\n")[2].partition(" ")
    assert word in ("ok", "refused"), (run.returncode, said)
    if word == "ok":
        return Outcome("", int(number), said)
    return Outcome(errno.errorcode[int(number)], -1, said)


def run_launcher(policy: Policy, *, user: int | None = None) -> subprocess.CompletedProcess[bytes]:
    argv = launcher_argv()
    if user is not None:
        argv = [sys.executable, "-I", "-S", "-c", AS_USER, str(PACKAGES), str(user)]
    return run_with(argv, policy.encode())


def run_with(argv: list[str], text: bytes) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(argv, input=text, capture_output=True, timeout=TIMEOUT_S, check=False)
