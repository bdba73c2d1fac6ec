"""llama-server for one deployment: its options, its start, its health.

It listens on a private unix socket (upstream: a host that ends in `.sock`), fetches nothing and
places layers exactly as told (`-fit off`).
"""

from __future__ import annotations

import os
import re
import signal
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import trio

from meshnode.config import WireType
from meshnode.crash_points import reached
from meshnode.engine.cache import Engine
from meshnode.engine.children import Child, child_environment, meaningful_lines, open_child
from meshnode.engine.errors import EngineKilled, WeightsAbsent, WeightsUnread
from meshnode.engine.load_report import LoadProgress, LoadReport, ServerLoad
from meshnode.engine.rpc_server import remove_socket
from meshnode.errors import UsageError
from meshnode.paths import check_socket_path

POLL_INTERVAL_S = 0.05
HEALTH_TIMEOUT_S = 2.0
STOP_GRACE_S = 1.0
"""It has nothing to save, and waits for whoever is slow to read an answer, or for ever."""
ROOTS_VARIABLE = "GGML_RPC_MESH_ROOTS"
REPORT_VARIABLE = "GGML_RPC_MESH_REPORT"
OUTPUT_VARIABLE = "GGML_RPC_MESH_OUTPUT"
WIRE_TYPE_VARIABLE = "GGML_RPC_MESH_WIRE_DTYPE"
TRACE_VARIABLE = "GGML_RPC_TRACE"
RING_VARIABLE = "GGML_RPC_MESH_RING"
PRESENCE_VARIABLE = "GGML_RPC_MESH_PRESENCE"

OnProgress = Callable[[LoadProgress], None]

_ABSENT = re.compile(
    r"error loading model: "
    r"(?P<what>(?:.* has no )?tensor (?P<tensor>\S+) .* and this machine does not hold it)$"
)

# Options whose values we decide: llama-server takes the last of two, so ours would be undone.
_OURS = frozenset(
    (
        *("-m", "--model", "--host", "--port", "--rpc", "-ngl", "--gpu-layers", "--n-gpu-layers"),
        *("-ts", "--tensor-split", "-dev", "--device", "-fit", "--fit", "-c", "--ctx-size"),
        *("-sm", "--split-mode", "-mu", "--model-url", "-hf", "-hfr", "--hf-repo"),
        *("--ssl-key-file", "--ssl-cert-file", "--api-key", "--api-key-file", "--api-prefix"),
        *("--log-file", "--log-disable"),
    )
)


@dataclass(frozen=True)
class LlamaServerOptions:
    """`rpc`: endpoints (`unix:/path` or `HOST:PORT`) in the order of RPC0, RPC1, ….

    `gpu_layers` counts every layer that is not on the local CPU, the output layer as one.
    `ring` may come to be while it runs: which servers push to which.
    `devices` in the order of the layers, `tensor_split` a count for each of them; without
    `devices`, llama-server takes every one it finds. `ctx_tokens` is shared by the `slots`.
    `output_device`: of the output layer, if not the last of `devices`.
    `presence`: the text of `meshnode.models.presence`, where files of the model are slices.
    """

    model: Path
    socket_path: Path
    ctx_tokens: int
    slots: int = 1
    rpc: tuple[str, ...] = ()
    gpu_layers: int = 0
    tensor_split: tuple[int, ...] = ()
    devices: tuple[str, ...] = ()
    threads: int | None = None
    alias: str | None = None
    roots: Path | None = None
    report: Path | None = None
    output_device: str = ""
    wire_type: WireType = WireType.EXACT
    ring: Path | None = None
    presence: Path | None = None
    extra: tuple[str, ...] = ()


def llama_server_argv(engine: Engine, options: LlamaServerOptions) -> list[str]:
    """Raises `UsageError` when `extra` holds an option that the plan decides."""
    refuse_planned_options(options.extra)
    argv = [str(engine.program("llama-server")), "--model", str(options.model)]
    argv += ["--host", str(options.socket_path), "--ctx-size", str(options.ctx_tokens)]
    argv += ["--parallel", str(options.slots), "--n-gpu-layers", str(options.gpu_layers)]
    argv += ["-fit", "off", "--offline", "--no-ui", "--log-colors", "off"]
    if options.rpc:
        argv += ["--rpc", ",".join(options.rpc)]
    if options.devices or options.gpu_layers == 0:
        argv += ["--device", ",".join(options.devices) or "none"]
    if options.tensor_split:
        argv += ["--tensor-split", ",".join(str(count) for count in options.tensor_split)]
    if options.threads:
        argv += ["--threads", str(options.threads)]
    if options.alias:
        argv += ["--alias", options.alias]
    return [*argv, *options.extra]


def refuse_planned_options(extra: Sequence[str]) -> None:
    for option in extra:
        name = option.partition("=")[0].replace("_", "-")  # as llama-server reads them
        if name in _OURS:
            raise UsageError(
                f"{name} after -- is mesh's to decide: use mesh's own options (--model, --ctx, "
                "--layers, --tensor-split, --http) instead"
            )


def llama_server_environment(options: LlamaServerOptions) -> dict[str, str]:
    wire_type = options.wire_type
    trace = os.environ.get(TRACE_VARIABLE)  # the user's wish, for `mesh trace`
    named = {
        ROOTS_VARIABLE: options.roots,
        REPORT_VARIABLE: options.report,
        RING_VARIABLE: options.ring,
        PRESENCE_VARIABLE: options.presence,
        OUTPUT_VARIABLE: options.output_device,
        WIRE_TYPE_VARIABLE: "" if wire_type is WireType.EXACT else wire_type.value,
        TRACE_VARIABLE: trace and Path(trace).absolute(),
    }
    return child_environment(**{key: str(value) for key, value in named.items() if value})


class LlamaServer:
    """A running, ready llama-server."""

    def __init__(self, child: Child, socket_path: Path, loads: tuple[ServerLoad, ...]) -> None:
        self.child = child
        self.socket_path = socket_path
        self.loads = loads

    @property
    def last_lines(self) -> tuple[str, ...]:
        return self.child.last_lines

    async def wait(self) -> int:
        """Its exit status; it ends by itself only when something went wrong."""
        return await self.child.wait()

    def client(self) -> httpx.AsyncClient:
        """An HTTP client of its own connections to it; the caller closes it."""
        return open_client(self.socket_path)


def open_client(socket_path: Path) -> httpx.AsyncClient:
    transport = httpx.AsyncHTTPTransport(uds=str(socket_path))
    # Deadlines are the caller's, as cancel scopes: an answer may take as long as a model thinks.
    forever = httpx.Timeout(None)
    return httpx.AsyncClient(
        transport=transport, base_url="http://llama-server", timeout=forever, trust_env=False
    )


@asynccontextmanager
async def open_llama_server(
    engine: Engine,
    options: LlamaServerOptions,
    *,
    log: Path,
    on_progress: OnProgress = lambda _progress: None,
) -> AsyncIterator[LlamaServer]:
    """Run one until the block ends; the model is loaded when the block begins.

    Loading takes as long as it takes: the caller sets the deadline. If it ends before it is
    ready, raises `EngineFailed` with the first tensor that failed or is nowhere, or else the last
    lines of the log.
    """
    check_socket_path(options.socket_path)
    argv = llama_server_argv(engine, options)
    environment = llama_server_environment(options)
    if options.report is not None:
        options.report.write_bytes(b"")  # what an earlier load said is not about this one
    try:
        async with open_child(
            argv, env=environment, log=log, name="llama-server", stop_grace_s=STOP_GRACE_S
        ) as child:
            reached("load.started")
            loading = _Loading(child, options.report, on_progress)
            await loading.wait_until_ready(options.socket_path)
            reached("load.loaded")
            yield LlamaServer(child, options.socket_path, loading.report.loads)
    finally:
        remove_socket(options.socket_path)


class _Loading:
    """I follow a load: the report file, the health route, an end that comes too soon."""

    def __init__(self, child: Child, report_path: Path | None, on_progress: OnProgress) -> None:
        self._child = child
        self._report_path = report_path
        self._on_progress = on_progress
        self._offset_bytes = 0
        self.report = LoadReport()

    async def wait_until_ready(self, socket_path: Path) -> None:
        async with open_client(socket_path) as client:
            while not self._child.ended.is_set():
                self._read_report()
                if await _is_healthy(client):
                    self._read_report()
                    return
                await trio.sleep(POLL_INTERVAL_S)
        await self._child.wait()
        self._read_report()
        failed = [load for load in self.report.loads if load.first_failure]
        if failed:
            raise WeightsUnread(
                f"the load ended: {failed[0].server} could not read {failed[0].first_failure}"
            )
        absent = next(filter(None, map(_ABSENT.search, self._child.last_lines)), None)
        if absent:
            raise WeightsAbsent(absent["what"], absent["tensor"])
        ended = f"llama-server {self._child.describe_end()} before the model was loaded"
        if self._child.returncode == -signal.SIGKILL:
            remedy = "if that was for want of memory, use a smaller --ctx or add a worker"
            lines = meaningful_lines(self._child.last_lines)
            raise EngineKilled(f"{ended}: {remedy}", lines, self._child.log)
        raise self._child.failure(ended)

    def _read_report(self) -> None:
        if self._report_path is None:
            return
        try:
            with self._report_path.open("rb") as file:
                file.seek(self._offset_bytes)
                data = file.read()
        except OSError:
            return
        self._offset_bytes += len(data)
        progress = self.report.receive(data)
        if progress is not None:
            if progress.done_bytes > 0:
                reached("load.first")
            if 2 * progress.done_bytes >= progress.total_bytes:
                reached("load.half")
            self._on_progress(progress)


async def _is_healthy(client: httpx.AsyncClient) -> bool:
    with trio.move_on_after(HEALTH_TIMEOUT_S):
        try:
            return (await client.get("/health")).status_code == httpx.codes.OK
        except httpx.TransportError:
            pass
    return False
