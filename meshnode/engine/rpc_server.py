"""One ggml-rpc-server for one lease, on a private unix socket, in the sandbox there is."""

from __future__ import annotations

import subprocess
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import psutil
import trio

from meshnode.engine.cache import Engine
from meshnode.engine.children import Child, check_program, child_environment, open_child
from meshnode.engine.sandbox.check import UNCONFINED, Sandbox
from meshnode.engine.sandbox.policy import launcher_argv, server_policy
from meshnode.paths import check_socket_path

START_TIMEOUT_S = 60.0  # CUDA takes seconds to wake its cards
POLL_INTERVAL_S = 0.02
HELP_TIMEOUT_S = 20.0
PUSH_OPTION = "--push-listen"


@dataclass(frozen=True)
class PushSockets:
    """Where an rpc-server listens for the ring. `inward`: for what its predecessor pushes;
    `outward`: for whoever carries to its successor what it pushes.

    It connects to neither: in the sandbox it cannot connect to anything.
    """

    inward: Path
    outward: Path


def can_push(engine: Engine) -> bool:
    """Whether its rpc-servers know the ring: those of an older engine do not. Blocks for about
    20 ms. Raises `EngineChanged`."""
    try:
        run = subprocess.run(
            [str(engine.program("ggml-rpc-server")), "--help"],
            env=child_environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=HELP_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.SubprocessError):
        return False  # a server's start will say why
    return PUSH_OPTION in (run.stdout + run.stderr).decode(errors="replace")


def rpc_server_argv(
    engine: Engine,
    socket_path: Path,
    *,
    manifest: Path | None,
    memory_limit_bytes: int | None,
    devices: Sequence[str],
    threads: int | None,
    pushes: PushSockets | None = None,
) -> list[str]:
    argv = [str(engine.program("ggml-rpc-server")), "-H", f"unix:{socket_path}"]
    if manifest is not None:
        argv += ["--gguf-manifest", str(manifest)]
    if memory_limit_bytes is not None:
        argv += ["--memory-limit", str(memory_limit_bytes)]
    if devices:
        argv += ["--device", ",".join(devices)]
    if pushes is not None:
        argv += [PUSH_OPTION, f"unix:{pushes.inward}", "--push-to", f"unix:{pushes.outward}"]
    return [*argv, "--threads", str(threads or default_threads())]


def default_threads() -> int:
    """One a physical core, as llama-server has it; rpc-server's own default is half of that."""
    return psutil.cpu_count(logical=False) or psutil.cpu_count() or 1


@asynccontextmanager
async def open_rpc_server(
    engine: Engine,
    socket_path: Path,
    *,
    manifest: Path | None,
    memory_limit_bytes: int | None,
    devices: Sequence[str] = (),
    threads: int | None = None,
    pushes: PushSockets | None = None,
    log: Path,
    sandbox: Sandbox = UNCONFINED,
    model_files: Sequence[Path] = (),
) -> AsyncIterator[Child]:
    """Run one until the block ends; it accepts connections when the block begins.

    In a sandbox the folder of its sockets must be its own, and it can read the manifest and
    `model_files` alone. Its socket is removed afterwards. Raises `EngineFailed`, or `HomeError` for
    a path too long.
    """
    check_socket_path(socket_path)
    argv = rpc_server_argv(
        engine,
        socket_path,
        manifest=manifest,
        memory_limit_bytes=memory_limit_bytes,
        devices=devices,
        threads=threads,
        pushes=pushes,
    )
    env, policy = child_environment(), b""
    if sandbox.standing:
        check_program(argv[0], "rpc-server")
        make_policy = partial(
            server_policy,
            argv,
            socket_folder=socket_path.parent,
            readable=(*model_files, *((manifest,) if manifest else ())),
            hidden=sandbox.hidden,
            uses_gpu=engine.backend != "cpu",
            memory_limit_bytes=memory_limit_bytes,
            required=sandbox.required,
        )
        policy = (await trio.to_thread.run_sync(make_policy)).encode()
        argv, env = launcher_argv(), env | _homes_in(socket_path.parent)
    try:
        async with open_child(argv, env=env, log=log, name="rpc-server", stdin=policy) as child:
            await _wait_until_it_accepts(child, socket_path)
            yield child
    finally:
        remove_socket(socket_path)


def remove_socket(path: Path) -> None:
    """A server that is killed leaves its socket behind."""
    path.unlink(missing_ok=True)


def _homes_in(folder: Path) -> dict[str, str]:
    """Of a program that shall see no folder of its user."""
    cache = {"CUDA_CACHE_DISABLE": "1"}  # it would lie in the user's home
    return {"HOME": str(folder), "TMPDIR": str(folder)} | cache


async def _wait_until_it_accepts(child: Child, socket_path: Path) -> None:
    with trio.move_on_after(START_TIMEOUT_S):
        while not child.ended.is_set():
            try:
                stream = await trio.open_unix_socket(str(socket_path))
            except OSError:
                await trio.sleep(POLL_INTERVAL_S)
            else:
                await stream.aclose()
                return
        await child.wait()
        raise child.failure(f"the rpc-server {child.describe_end()} before it was ready")
    raise child.failure(f"the rpc-server did not listen within {START_TIMEOUT_S:.0f} s")
