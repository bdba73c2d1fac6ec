"""Real engine processes for tests: started, waited for, and ended whatever happens."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

START_LIMIT_S = 60.0
STOP_LIMIT_S = 10.0
POLL_INTERVAL_S = 0.02
PROMPT = "hello w5 w7 w9"
N_TOKENS = 24


class EngineFailed(Exception):
    """The process ended instead of getting ready; `log` is what it said."""

    def __init__(self, returncode: int, log: str) -> None:
        super().__init__(f"exit status {returncode}:\n{log}")
        self.returncode = returncode
        self.log = log


@dataclass(frozen=True)
class Running:
    """A process that is ready, where it listens, and its log so far."""

    process: subprocess.Popen[bytes]
    address: str
    log_path: Path

    @property
    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    @property
    def alive(self) -> bool:
        return self.process.poll() is None


@contextmanager
def _process(
    command: Sequence[str], log_path: Path, env: dict[str, str], pass_fds: Sequence[int] = ()
) -> Iterator[subprocess.Popen[bytes]]:
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, **env},
            pass_fds=pass_fds,
        )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(STOP_LIMIT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_until_ready(process: subprocess.Popen[bytes], log_path: Path, ready: Any) -> None:
    """Asked again and again: neither program says, to a log that it flushes, that it listens."""
    deadline = time.monotonic() + START_LIMIT_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise EngineFailed(process.returncode, log_path.read_text(errors="replace"))
        if ready():
            return
        time.sleep(POLL_INTERVAL_S)
    raise TimeoutError(f"not ready after {START_LIMIT_S:g} s:\n{log_path.read_text()}")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _accepts(address: str) -> bool:
    family = socket.AF_UNIX if address.startswith("unix:") else socket.AF_INET
    host, _, port = address.rpartition(":")
    with socket.socket(family) as probe:
        try:
            probe.connect(
                address.removeprefix("unix:") if family == socket.AF_UNIX else (host, int(port))
            )
        except OSError:
            return False
    return True


@contextmanager
def rpc_server(
    bin_dir: Path,
    folder: Path,
    *arguments: str | Path,
    name: str = "rpc",
    tcp: bool = False,
    wrapper: Sequence[str] = (),
    env: dict[str, str] | None = None,
    pass_fds: Sequence[int] = (),
) -> Iterator[Running]:
    """ggml-rpc-server on a unix socket in `folder` (or a loopback port); raises EngineFailed."""
    if tcp:
        port = free_port()
        address, place = f"127.0.0.1:{port}", ["-H", "127.0.0.1", "-p", str(port)]
    else:
        address = f"unix:{folder / name}.sock"
        place = ["-H", address]
    command = [
        *wrapper,
        str(bin_dir / "ggml-rpc-server"),
        *place,
        "-t",
        "1",
        *(str(argument) for argument in arguments),
    ]
    log_path = folder / f"{name}.log"
    with _process(command, log_path, env or {}, pass_fds) as process:
        _wait_until_ready(process, log_path, lambda: _accepts(address))
        yield Running(process, address, log_path)


@contextmanager
def rpc_servers(bin_dir: Path, folder: Path, model: Path, count: int) -> Iterator[list[Running]]:
    """So many that read the model from its file themselves: `w0`, `w1` and so on."""
    with ExitStack() as stack:
        yield [
            stack.enter_context(rpc_server(bin_dir, folder, "--gguf", model, name=f"w{number}"))
            for number in range(count)
        ]


@contextmanager
def llama_server(
    bin_dir: Path,
    folder: Path,
    model: Path,
    *arguments: str,
    rpc: Sequence[Running] = (),
    name: str = "http",
    wrapper: Sequence[str] = (),
    env: dict[str, str] | None = None,
    pass_fds: Sequence[int] = (),
) -> Iterator[Running]:
    """llama-server on a unix socket, all layers on `rpc` if given; raises EngineFailed."""
    address = folder / f"{name}.sock"
    address.unlink(missing_ok=True)  # llama-server does not replace one left by another
    command = [*wrapper, str(bin_dir / "llama-server")]
    command += ["-m", str(model), "--host", str(address)]
    command += [
        "-fit",
        "off",
        "--no-repack",
        "-t",
        "1",
        "-c",
        "256",
        "-np",
        "1",
        "--no-warmup",
        "--no-webui",
    ]
    if rpc:
        command += ["--rpc", ",".join(server.address for server in rpc), "-ngl", "99"]
    command += arguments
    with answering(command, address, folder / f"{name}.log", env, pass_fds) as running:
        yield running


@contextmanager
def answering(
    command: Sequence[str],
    address: Path,
    log_path: Path,
    env: dict[str, str] | None = None,
    pass_fds: Sequence[int] = (),
) -> Iterator[Running]:
    """A llama-server by its whole command, which says that it listens at the unix socket
    `address`; raises EngineFailed."""
    client = httpx.Client(transport=httpx.HTTPTransport(uds=str(address)))

    def healthy() -> bool:
        try:
            return client.get("http://engine/health").status_code == 200
        except httpx.TransportError:
            return False

    with client, _process(command, log_path, env or {}, pass_fds) as process:
        _wait_until_ready(process, log_path, healthy)
        yield Running(process, str(address), log_path)


def greedy_tokens(server: Running) -> list[int]:
    """The next `N_TOKENS` greedy tokens after `PROMPT`."""
    with httpx.Client(transport=httpx.HTTPTransport(uds=server.address), timeout=60) as client:
        reply = client.post(
            "http://engine/completion",
            json={
                "prompt": PROMPT,
                "n_predict": N_TOKENS,
                "temperature": 0,
                "return_tokens": True,
                "ignore_eos": True,
            },
        )
    reply.raise_for_status()
    tokens: list[int] = reply.json()["tokens"]
    assert len(tokens) == N_TOKENS
    return tokens


def alone(bin_dir: Path, folder: Path, model: Path) -> list[int]:
    """What the engine answers with no server at all."""
    with llama_server(bin_dir, folder, model, name="alone") as server:
        return greedy_tokens(server)


@dataclass(frozen=True)
class Load:
    """One `load` line of the report."""

    server: str
    local_tensors: int
    local_bytes: int
    sent_tensors: int
    sent_bytes: int
    failures: int
    first_failure: dict[str, str] | None


def loads(report: Path) -> list[Load]:
    events = [json.loads(line) for line in report.read_text().splitlines()]
    return [
        Load(**{key: value for key, value in event.items() if key != "event"})
        for event in events
        if event["event"] == "load"
    ]


def mesh_env(folder: Path, roots: Path | None = None) -> dict[str, str]:
    env = {"GGML_RPC_MESH_REPORT": str(folder / "report.jsonl")}
    if roots is not None:
        env["GGML_RPC_MESH_ROOTS"] = str(roots)
    return env
