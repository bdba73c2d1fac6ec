"""What one rpc-server needs of the machine, and so what it gets."""

from __future__ import annotations

import functools
import glob
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from meshnode.engine.sandbox import landlock, seatbelt
from meshnode.engine.sandbox.launch import ENTRY

_SYSTEM_LIBRARIES = ("/usr", "/lib", "/lib64", "/nix/store", "/gnu/store")
_GPU_LIBRARIES = ("/opt/rocm*", "/opt/cuda*", "/opt/nvidia*", "/opt/intel*", "/run/opengl-driver")
_GPU_SETTINGS = ("/etc/vulkan", "/etc/OpenCL", "/etc/nvidia*", "/etc/alternatives", "/proc", "/sys")
_GPU_DEVICES = ("/dev/nvidia*", "/dev/dxg", "/dev/dri", "/dev/kfd")
_ALWAYS_READ = (
    *("/etc/ld.so.cache", "/etc/ld.so.preload", "/etc/localtime"),
    *("/proc/cpuinfo", "/proc/meminfo", "/proc/stat", "/proc/sys/vm/overcommit_memory"),
    *("/sys/devices/system/cpu", "/sys/devices/system/node"),
    "/sys/kernel/mm/transparent_hugepage",
)
_PLAIN_DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")

_LIBRARIES_TIMEOUT_S = 20
_MAX_OPEN_FILES = 4096
_HEAP_RESERVE_BYTES = 1 << 30
_STACK_BYTES = 8 << 20
_BYTES_A_THREAD = 2 * _STACK_BYTES  # its stack counts as heap; it may have as many threads as cores
_LIBRARIES_BYTES = 1 << 30
_ARENA_BYTES = 128 << 20  # of malloc, a thread: while one is made, after that the half of it
_PACKAGES = Path(__file__).parents[3]


@dataclass(frozen=True)
class Policy:
    """A program and all it may touch. `rights`: landlock's, by path. `limits`: RLIMIT_ names."""

    argv: tuple[str, ...]
    folder: Path
    rights: tuple[tuple[str, int], ...]
    limits: tuple[tuple[str, int], ...] = ()
    required: tuple[str, ...] = ()
    profile: str = field(default="", repr=False)
    rehearse: bool = False

    def encode(self) -> bytes:
        """For the launcher's standard input. Paths that are no UTF-8 come back as they were."""
        document = {
            "argv": self.argv,
            "folder": str(self.folder),
            "rights": self.rights,
            "limits": dict(self.limits),
            "required": self.required,
            "profile": self.profile,
            "rehearse": self.rehearse,
        }
        return json.dumps(document).encode()


def launcher_argv() -> list[str]:
    """What runs the launcher: this Python, without the user's settings and packages."""
    return [sys.executable, "-I", "-S", "-c", ENTRY, str(_PACKAGES)]


def server_policy(
    argv: Sequence[str],
    *,
    socket_folder: Path,
    readable: Iterable[Path],
    hidden: Sequence[Path],
    uses_gpu: bool,
    memory_limit_bytes: int | None,
    required: tuple[str, ...],
) -> Policy:
    """The policy for an rpc-server that listens in `socket_folder`, the only place it changes.

    `readable`: its manifest and its model files, each by itself. `hidden`: folders of the node
    that stay closed even where they lie below one that a server may read.
    """
    program = Path(argv[0]).resolve()
    loader, libraries = _libraries(program)
    rights = {
        **dict.fromkeys(_around((program.parent, *_folders(uses_gpu)), hidden), landlock.READ_TREE),
        **dict.fromkeys(map(str, (*libraries, *_ALWAYS_READ, *readable)), landlock.READ_TREE),
        **dict.fromkeys(_PLAIN_DEVICES, landlock.READ | landlock.WRITE_FILE),
        **dict.fromkeys(_found(_GPU_DEVICES) if uses_gpu else (), landlock.USE_DEVICE),
        **dict.fromkeys(map(str, (program, *loader)), landlock.RUN),
        str(socket_folder): landlock.HOLD_SOCKETS,
    }
    return Policy(
        argv=tuple(argv),
        folder=program.parent,
        rights=tuple(rights.items()),
        limits=_limits(uses_gpu, memory_limit_bytes),
        required=required,
        profile=seatbelt.profile(rights),
    )


def _limits(uses_gpu: bool, memory_limit_bytes: int | None) -> tuple[tuple[str, int], ...]:
    """Of memory, what is written to (RLIMIT_DATA), and, since shared and stack mappings are not
    counted there, all that is mapped (RLIMIT_AS), with more room: for libraries and for what malloc
    reserves a thread and hardly uses. Model files are read, not mapped. A GPU's driver maps what it
    likes; there the server's own limit remains.

    Twice the lease: a tensor is in a message before it is in its buffer.
    """
    limits = {
        "RLIMIT_CORE": 0,
        "RLIMIT_NOFILE": _MAX_OPEN_FILES,
        "RLIMIT_STACK": _STACK_BYTES,
    }
    if not uses_gpu:
        limits["RLIMIT_FSIZE"] = 0  # it writes no file at all; a GPU's driver may
        if memory_limit_bytes is not None:
            threads = os.cpu_count() or 1
            reserve_bytes = _HEAP_RESERVE_BYTES + _BYTES_A_THREAD * threads
            limits["RLIMIT_DATA"] = 2 * memory_limit_bytes + reserve_bytes
            mapped_bytes = _LIBRARIES_BYTES + _ARENA_BYTES * threads
            limits["RLIMIT_AS"] = limits["RLIMIT_DATA"] + mapped_bytes
    return tuple(limits.items())


def _folders(uses_gpu: bool) -> Iterator[Path]:
    named = (*_SYSTEM_LIBRARIES, *((*_GPU_LIBRARIES, *_GPU_SETTINGS) if uses_gpu else ()))
    yield from map(Path, _found(named))
    for text in os.environ.get("LD_LIBRARY_PATH", "").split(":"):
        if text.startswith("/"):
            yield Path(text)


def _found(patterns: Iterable[str]) -> list[str]:
    return [path for pattern in patterns for path in sorted(glob.glob(pattern))]


def _around(folders: Iterable[Path], hidden: Sequence[Path]) -> list[str]:
    """The folders, and where one holds a hidden folder, what it holds beside that."""
    open_ones: list[str] = []
    for folder in folders:
        real = folder.resolve()
        inside = [each for each in hidden if each.resolve().is_relative_to(real)]
        if any(real.is_relative_to(each.resolve()) for each in hidden):
            continue
        if not inside:
            open_ones.append(str(real))
        elif real.is_dir():
            open_ones += _around(sorted(real.iterdir()), inside)
    return open_ones


@functools.cache
def _libraries(program: Path) -> tuple[tuple[Path, ...], tuple[Path, ...]]:
    """The dynamic loader and the libraries it finds for `program`, which need not be the system's.

    The loader says so itself (ld.so(8), LD_TRACE_LOADED_OBJECTS), with the program not yet run.
    """
    if sys.platform != "linux":
        return (), ()
    try:
        run = subprocess.run(
            [str(program)],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_LIBRARIES_TIMEOUT_S,
            env={**os.environ, "LD_TRACE_LOADED_OBJECTS": "1"},
            check=False,
        )
    except (OSError, subprocess.SubprocessError):
        return (), ()  # its start will say why
    loader: list[Path] = []
    libraries: list[Path] = []
    for line in run.stdout.decode(errors="replace").splitlines():
        name, arrow, found = line.strip().partition(" => ")
        path = Path((found if arrow else name).rpartition(" (")[0])
        if path.is_absolute():
            (libraries if arrow else loader).append(path)
    return tuple(loader), tuple(libraries)
