"""Supervised child processes: logged, noticed when they end, and never left behind.

A child gets the read end of a pipe whose write end only we hold (`MESH_PARENT_FD`). However we end,
`kill -9` included, the pipe closes and the child exits. PR_SET_PDEATHSIG would not do: trio forks
in a worker thread, and that signal comes when the thread ends.
"""

from __future__ import annotations

import os
import signal
import subprocess
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import trio

from meshnode.engine.errors import EngineFailed
from meshnode.nurseries import accompanied_by

PARENT_FD_VARIABLE = "MESH_PARENT_FD"
STOP_GRACE_S = 5.0

Redact = Callable[[str], str]

_DRAIN_S = 1.0
_KEPT_LINES = 200
_SHOWN_LINES = 8
_MAX_LINE_BYTES = 8192
_MAX_LOG_BYTES = 8 << 20

# No core dump: a model's text and a mesh's keys would be in it. The shell sets the limit and is
# replaced by the child; a preexec_fn is not safe in a program with threads.
_NO_CORE = ("/bin/sh", "-c", 'ulimit -c 0; exec "$@"', "sh")

# What a child may know of our environment; tokens and LLAMA_ARG_* options are not among it.
_INHERITED = ("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "USER", "LD_LIBRARY_PATH")
_INHERITED_PREFIXES = ("CUDA_", "NVIDIA_", "HIP_", "ROCR_", "HSA_", "VK_", "OMP_", "GOMP_")

_WAIT_POLICY, _SPIN_COUNT = "OMP_WAIT_POLICY", "GOMP_SPINCOUNT"


def child_environment(**extra: str) -> dict[str, str]:
    """The part of our environment that an engine process needs, and `extra`."""
    kept = {
        key: value
        for key, value in os.environ.items()
        if key in _INHERITED or key.startswith(_INHERITED_PREFIXES)
    }
    # Threads of a batch wait for one another by turning in circles; the longer they do, the longer
    # they keep others from the cores, a tunnel that brings their next input among them. libgomp's
    # own 300,000 turns cost 4/5 of the tokens where a core is shared; 1,000 cost none where not.
    if not {_WAIT_POLICY, _SPIN_COUNT} & set(kept):
        kept[_SPIN_COUNT] = "1000"
    # Without it a crash calls gdb, which may take a minute and outlive us.
    return {**kept, "GGML_NO_BACKTRACE": "1", **extra}


class Child:
    """One running process: its last lines, its end, a stop that always ends it."""

    def __init__(
        self,
        name: str,
        log: Path,
        process: trio.Process,
        parent_fd: int,
        on_line: Callable[[str], None] | None,
        redact: Redact | None,
    ) -> None:
        self.name = name
        self.log = log
        self.ended = trio.Event()
        self._process = process
        self._parent_fd = parent_fd
        self._on_line = on_line
        self._redact = redact
        self._lines: deque[str] = deque(maxlen=_KEPT_LINES)
        self._drained = trio.Event()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        """None while it runs; negative: the signal that ended it."""
        return self._process.returncode

    @property
    def last_lines(self) -> tuple[str, ...]:
        """The last lines of its output, oldest first, blank ones left out."""
        return tuple(self._lines)

    async def wait(self) -> int:
        """Its exit status, once it has ended and its output has been read."""
        status = await self._process.wait()
        with trio.move_on_after(_DRAIN_S):  # a grandchild may hold the pipe open
            await self._drained.wait()
        return status

    async def stop(self, grace_s: float = STOP_GRACE_S) -> None:
        """SIGTERM, a grace, SIGKILL to its whole process group; returns when it is reaped."""
        if self.returncode is None:
            self._signal_group(signal.SIGTERM)
            with trio.move_on_after(grace_s):
                await self._process.wait()
        if self.returncode is None:
            self._signal_group(signal.SIGKILL)
            await self._process.wait()

    def failure(self, sentence: str) -> EngineFailed:
        """An error that ends in what the child last said."""
        return EngineFailed(sentence, meaningful_lines(self.last_lines), self.log)

    def describe_end(self) -> str:
        """`exited with status 1`, `was killed by SIGKILL`."""
        status = self.returncode
        if status is None:
            return "is running"
        if status < 0:
            return f"was killed by {signal.Signals(-status).name}"
        return f"exited with status {status}"

    def _signal_group(self, number: signal.Signals) -> None:
        # It leads a session of its own. macOS answers EPERM where only a zombie is left of it.
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, number)

    async def _feed(self, data: bytes) -> None:
        if self._process.stdin is not None:
            async with self._process.stdin as stdin:
                with suppress(trio.BrokenResourceError):  # it ended without reading it
                    await stdin.send_all(data)

    async def _watch(self) -> None:
        await self._process.wait()
        self.ended.set()

    async def _read_output(self) -> None:
        output = self._process.stdout
        assert output is not None
        pending = b""
        try:
            with _RotatingLog(self.log) as log:
                async for chunk in output:
                    if self._redact is None:
                        log.write(bytes(chunk))
                    *lines, pending = (pending + chunk).split(b"\n")
                    if len(pending) > _MAX_LINE_BYTES:
                        lines, pending = [*lines, pending], b""
                    for line in lines:
                        self._take_line(line, log)
                self._take_line(pending, log)
        finally:
            self._drained.set()

    def _take_line(self, raw: bytes, log: _RotatingLog) -> None:
        line = raw[:_MAX_LINE_BYTES].decode(errors="replace").rstrip()
        if not line:
            return
        shown = line
        if self._redact is not None:
            shown = self._redact(line)
            log.write(shown.encode(errors="replace") + b"\n")
        self._lines.append(shown)
        if self._on_line is not None:
            self._on_line(line)


class _RotatingLog:
    """A log file that is renamed to `.1` when it is full; a full disk never ends a child."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> _RotatingLog:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._open("ab")
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def _open(self, mode: str) -> None:
        descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        self._file = os.fdopen(descriptor, mode, buffering=0)

    def write(self, data: bytes) -> None:
        try:
            self._file.write(data)
            if self._file.tell() > _MAX_LOG_BYTES:
                self._file.close()
                self._path.replace(self._path.with_name(self._path.name + ".1"))
                self._open("wb")
        except OSError:
            pass  # the lines are in memory too


@asynccontextmanager
async def open_child(
    argv: Sequence[str],
    *,
    env: Mapping[str, str],
    log: Path,
    name: str,
    on_line: Callable[[str], None] | None = None,
    redact: Redact | None = None,
    stdin: bytes = b"",
    stop_grace_s: float = STOP_GRACE_S,
) -> AsyncIterator[Child]:
    """Run `argv` for as long as the block lasts. Its argv must hold no secret: all users see it.

    `env` is its whole environment, `stdin` all that it can read. `redact` takes the secrets out of
    a line: the log and the last lines are without them, `on_line` is given the line as it is.
    Raises `EngineFailed` if it cannot be started.
    """
    process, parent_fd = await _start(argv, env, name, piped_input=bool(stdin))
    child = Child(name, log, process, parent_fd, on_line, redact)
    try:
        async with accompanied_by(child._watch, child._read_output):
            try:
                await child._feed(stdin)
                yield child
            finally:
                with trio.CancelScope(shield=True):
                    await child.stop(stop_grace_s)
                    await child.wait()
    finally:
        os.close(child._parent_fd)


async def _start(
    argv: Sequence[str],
    env: Mapping[str, str],
    name: str,
    *,
    piped_input: bool,
) -> tuple[trio.Process, int]:
    """The process, and the end of the pipe that it waits for."""
    check_program(argv[0], name)
    read_fd, write_fd = os.pipe()
    try:
        process = await trio.lowlevel.open_process(
            [*_NO_CORE, *argv],
            stdin=subprocess.PIPE if piped_input else subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**env, PARENT_FD_VARIABLE: str(read_fd)},
            start_new_session=True,
            pass_fds=(read_fd,),
        )
    except BaseException:
        os.close(write_fd)
        raise
    finally:
        os.close(read_fd)
    return process, write_fd


def check_program(program: str, name: str) -> None:
    """Raises `EngineFailed` where it is gone, since the shell's words for that help nobody."""
    if not os.access(program, os.X_OK):
        raise EngineFailed(f"{name}: {program} is missing: run `mesh engine build` again")


def meaningful_lines(lines: Sequence[str]) -> tuple[str, ...]:
    """The lines that say what went wrong, else simply the last ones."""
    signs = ("error", "fail", "cannot", "unable", "invalid", "assert", "out of memory")
    telling = [line for line in lines if any(sign in line.lower() for sign in signs)]
    return tuple((telling or list(lines))[-_SHOWN_LINES:])
