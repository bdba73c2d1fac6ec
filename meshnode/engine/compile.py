"""cmake and ninja: configure, compile, count the steps, and say what failed."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from meshnode.engine.cache import BINARIES
from meshnode.engine.cuda import what_cuda_lacks
from meshnode.engine.errors import BuildFailed, NoCompiler, NoRoomToBuild
from meshnode.engine.toolchain import Backend, Toolchain, tool_paths

TAIL_LINES = 20
_MAX_LINE_CHARACTERS = 300  # a compiler's command line says less than the error below it
_STEP = re.compile(r"\[(\d+)/(\d+)\] (.*)")

FLAGS = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DBUILD_SHARED_LIBS=OFF",
    "-DGGML_NATIVE=ON",
    "-DGGML_RPC=ON",
    "-DGGML_CCACHE=OFF",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-DLLAMA_BUILD_APP=OFF",
    "-DLLAMA_BUILD_NUMBER=0",
    # Nothing is fetched during a build, and the engine itself fetches nothing either.
    "-DLLAMA_BUILD_UI=OFF",
    "-DLLAMA_USE_PREBUILT_UI=OFF",
    "-DLLAMA_OPENSSL=OFF",
    "-DFETCHCONTENT_FULLY_DISCONNECTED=ON",
)
# Metal is on by default on a Mac, so CPU says no to it.
BACKEND_FLAGS = {
    Backend.CPU: ("-DGGML_METAL=OFF",),
    # NCCL would be taken where it happens to lie about; it opens sockets, which no worker may.
    Backend.CUDA: ("-DGGML_CUDA=ON", "-DGGML_CUDA_NCCL=OFF"),
    Backend.METAL: ("-DGGML_METAL=ON", "-DGGML_METAL_EMBED_LIBRARY=ON"),
    Backend.VULKAN: ("-DGGML_VULKAN=ON",),
    Backend.HIP: ("-DGGML_HIP=ON",),
}


@dataclass(frozen=True)
class CompileJob:
    """`lock_fd` is inherited by every process of the build, see `cache.build_lock`."""

    source: Path
    build: Path
    log: Path
    backend: Backend
    toolchain: Toolchain
    commit: str
    jobs: int
    lock_fd: int


def run_cmake(job: CompileJob, progress: Callable[[int, int, str], None]) -> None:
    """Configure and compile. Raises `BuildFailed`, or `NoRoomToBuild` if that is why."""
    job.log.parent.mkdir(parents=True, exist_ok=True)
    progress(0, 0, "configuring")
    with job.log.open("wb") as log:
        _configure(job, log)
        steps = _Steps(progress)
        _run(job, _compile_command(job), log, steps.read, "the engine did not compile")


def _configure(job: CompileJob, log: IO[bytes]) -> None:
    fresh = not (job.build / "CMakeCache.txt").exists()
    try:
        _run_configure(job, log)
    except BuildFailed:
        if fresh:
            raise
        # A folder that was moved, or cut off in the middle of a write: begin again without it.
        shutil.rmtree(job.build)
        _run_configure(job, log)


def _run_configure(job: CompileJob, log: IO[bytes]) -> None:
    command, begin = _configure_command(job), log.tell()
    try:
        _run(job, command, log, lambda _line: None, "cmake could not configure the engine")
    except BuildFailed as error:
        said = job.log.read_bytes()[begin:].decode(errors="replace")
        lacking = what_cuda_lacks(said) if job.backend is Backend.CUDA else None
        if lacking is None:
            raise
        raise NoCompiler(f"{lacking}\nThe whole log: {job.log}") from error


def _configure_command(job: CompileJob) -> list[str]:
    cmake, ninja = tool_paths()
    command = [str(cmake), "-S", str(job.source), "-B", str(job.build), "-G", "Ninja"]
    command += [f"-DCMAKE_MAKE_PROGRAM={ninja}", f"-DLLAMA_BUILD_COMMIT={job.commit}"]
    command += [*FLAGS, *BACKEND_FLAGS[job.backend]]
    # A compiler named in the environment may have arguments, which only cmake knows to take apart.
    if not os.environ.get("CC"):
        command.append(f"-DCMAKE_C_COMPILER={job.toolchain.cc}")
    if not os.environ.get("CXX"):
        command.append(f"-DCMAKE_CXX_COMPILER={job.toolchain.cxx}")
    return [*command, *job.toolchain.accelerator]


def _compile_command(job: CompileJob) -> list[str]:
    _, ninja = tool_paths()
    return [str(ninja), "-C", str(job.build), "-j", str(job.jobs), *BINARIES]


def _run(
    job: CompileJob,
    command: list[str],
    log: IO[bytes],
    on_line: Callable[[str], None],
    failure: str,
) -> None:
    environment = {**os.environ, "NINJA_STATUS": "[%f/%t] ", "LC_ALL": "C"}
    lines: deque[str] = deque(maxlen=TAIL_LINES * 4)
    process = subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        pass_fds=(job.lock_fd,),
    )
    assert process.stdout is not None
    try:
        for raw in process.stdout:
            log.write(raw)
            line = raw.decode(errors="replace").rstrip()
            lines.append(line)
            on_line(line)
        status = process.wait()
    finally:
        if process.poll() is None:
            process.terminate()  # ninja ends its compilers, and keeps what is done
            process.wait()
        process.stdout.close()
    if status != 0:
        log.flush()
        if any("No space left on device" in line for line in lines):
            raise NoRoomToBuild(job.build)
        raise BuildFailed(failure, _tail(lines), job.log)


def _tail(lines: deque[str]) -> tuple[str, ...]:
    """The lines from the failure on, without the steps and commands between."""
    listed = list(lines)
    failures = [index for index, line in enumerate(listed) if line.startswith("FAILED: ")]
    listed = listed[failures[-1] + 1 :] if failures else listed
    meaningful = [
        line
        for line in listed
        if line.strip() and not _STEP.match(line) and not line.startswith("ninja: build stopped")
    ]
    short = [line for line in meaningful if len(line) <= _MAX_LINE_CHARACTERS] or meaningful
    return tuple(line[:_MAX_LINE_CHARACTERS] for line in short[-TAIL_LINES:])


class _Steps:
    """I turn ninja's `[n/m] what` lines into progress."""

    def __init__(self, progress: Callable[[int, int, str], None]) -> None:
        self._progress = progress

    def read(self, line: str) -> None:
        if step := _STEP.match(line):
            self._progress(int(step[1]), int(step[2]), step[3])
