"""The two engines of the benchmark as deployments: bare rpc-servers, links between, llama-server.

Both are started in the same way, on the same model, with the same options and the same delay
lines. What they do not share is said here: stock speaks TCP and is sent its weights; ours speaks
unix sockets, has the model's file beside each worker, and what `switches` turns on.
"""

from __future__ import annotations

import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path

import httpx
import psutil

from meshnode.engine.cache import Engine
from tests.bench.delay_line import Line, Link, delay_line
from tests.bench.engine_model import SMALL
from tests.bench.link_shaper import Way
from tests.engine.page_cache import drop
from tests.engine.processes import Running, llama_server, rpc_server

STOCK, MESH = "stock", "mesh"
URL = "http://engine"
ANSWER_LIMIT_S = 600.0
READ_BYTES = 16 << 20
NO_DELAY = Way()


@dataclass(frozen=True)
class Side:
    name: str
    engine: Engine

    @property
    def is_mesh(self) -> bool:
        return self.name == MESH


@dataclass(frozen=True)
class Setup:
    """What a row wants. `way`: of every link in each direction; None: no delay line at all.
    `counts`: of layers for each worker, the output as one more of the last one's; () evenly.
    `star`: workers send results by way of llama-server though they could do without."""

    model: Path
    layers: int = SMALL.layers
    workers: int = 1
    way: Way | None = NO_DELAY
    slots: int = 1
    ctx_tokens: int = 1024
    extra: tuple[str, ...] = ()
    mesh_extra: tuple[str, ...] = ()
    mesh_environment: tuple[tuple[str, str], ...] = ()
    drops_cache: bool = False
    counts: tuple[int, ...] = ()
    star: bool = False


@dataclass(frozen=True)
class Deployment:
    """A ready llama-server, how long that took, and the links to its workers."""

    client: httpx.Client
    ready_s: float
    line: Line | None
    server: psutil.Process
    log_path: Path


@cache
def _help(binary: Path) -> str:
    shown = subprocess.run([str(binary), "--help"], capture_output=True, text=True, check=False)
    return shown.stdout + shown.stderr


@cache
def _mentions(folder: Path, text: str) -> bool:
    """Whether the client side of an engine knows a variable: it lies in a library or program."""
    return any(text.encode() in path.read_bytes() for path in folder.iterdir() if path.is_file())


def has_ring(engine: Engine) -> bool:
    return "--push-to" in _help(engine.binary("ggml-rpc-server"))


def switches(side: Side, setup: Setup, ring: Path | None) -> dict[str, str]:
    """The environment of our llama-server: all that changes what crosses the wire, in one place."""
    if not side.is_mesh:
        return {}
    wanted = {"GGML_RPC_MESH_OUTPUT": "CPU"}
    if ring is not None:
        wanted["GGML_RPC_MESH_RING"] = str(ring)
    wanted |= dict(setup.mesh_environment)
    return {name: value for name, value in wanted.items() if knows(side.engine, name)}


def knows(engine: Engine, variable: str) -> bool:
    return _mentions(engine.bin_dir, variable)


def prepare_cache(model: Path, *, is_cold: bool) -> None:
    """What both sides read is in memory, or nothing of it."""
    if is_cold:
        drop(model)
        return
    with model.open("rb") as file:
        while file.read(READ_BYTES):
            pass


@contextmanager
def deployment(side: Side, setup: Setup) -> Iterator[Deployment]:
    # A socket's path has 100 bytes.
    with tempfile.TemporaryDirectory(prefix="mesh-b-", dir="/tmp") as name, ExitStack() as stack:
        folder = Path(name)
        prepare_cache(setup.model, is_cold=setup.drops_cache)
        is_ring = side.is_mesh and setup.workers > 1 and not setup.star and has_ring(side.engine)
        workers = [
            stack.enter_context(_worker(side, setup, folder, number, is_ring=is_ring))
            for number in range(setup.workers)
        ]
        line, addresses = _link(stack, side, setup, folder, workers, is_ring=is_ring)
        ring = _ring_file(folder, addresses) if is_ring else None
        started = time.perf_counter()
        server = stack.enter_context(
            llama_server(
                side.engine.bin_dir,
                folder,
                setup.model,
                *_arguments(side, setup, addresses),
                env={"GGML_NO_BACKTRACE": "1", **switches(side, setup, ring)},
            )
        )
        ready_s = time.perf_counter() - started
        transport = httpx.HTTPTransport(uds=server.address)
        client = httpx.Client(transport=transport, base_url=URL, timeout=ANSWER_LIMIT_S)
        stack.enter_context(client)
        process = psutil.Process(server.process.pid)
        yield Deployment(client, ready_s, line, process, server.log_path)


def _worker(
    side: Side, setup: Setup, folder: Path, number: int, *, is_ring: bool
) -> AbstractContextManager[Running]:
    arguments: list[str | Path] = []
    if side.is_mesh:
        arguments += ["--gguf", setup.model]
    if is_ring:
        arguments += ["--push-listen", f"unix:{folder}/take{number}"]
        arguments += ["--push-to", f"unix:{folder}/push{number}"]
    return rpc_server(
        side.engine.bin_dir, folder, *arguments, name=f"worker{number}", tcp=not side.is_mesh
    )


def _link(
    stack: ExitStack,
    side: Side,
    setup: Setup,
    folder: Path,
    workers: list[Running],
    *,
    is_ring: bool,
) -> tuple[Line | None, list[str]]:
    """The addresses by which llama-server reaches the workers."""
    if setup.way is None and not is_ring:
        return None, [worker.address for worker in workers]
    way = setup.way or NO_DELAY
    links = [
        Link(f"unix:{folder}/link{number}" if side.is_mesh else "127.0.0.1:0", worker.address, way)
        for number, worker in enumerate(workers)
    ]
    if is_ring:
        links += [
            Link(f"unix:{folder}/push{here}", f"unix:{folder}/take{here + 1}", way, pushes=True)
            for here in range(len(workers) - 1)
        ]
    line = stack.enter_context(delay_line(*links))
    return line, list(line.addresses)


def _ring_file(folder: Path, addresses: list[str]) -> Path:
    path = folder / "ring"
    pairs = pairwise(addresses)
    path.write_text("".join(f"{here}\t{there}\n" for here, there in pairs))
    return path


def even_counts(layers: int, workers: int) -> list[int]:
    """Of layers for each worker; the output counts as one more of the last one's."""
    counts = [layers // workers + (number < layers % workers) for number in range(workers)]
    counts[-1] += 1
    return counts


def _arguments(side: Side, setup: Setup, addresses: list[str]) -> list[str]:
    """All layers and the output on the workers, evenly; the warm-up as users have it."""
    devices = [f"RPC{number}" for number in range(len(addresses))]
    counts = setup.counts or even_counts(setup.layers, setup.workers)
    return [
        *("--rpc", ",".join(addresses), "--device", ",".join(devices)),
        *("-ngl", str(sum(counts)), "--tensor-split", ",".join(map(str, counts)), "--warmup"),
        *("-c", str(setup.ctx_tokens), "-np", str(setup.slots), "--offline"),
        *setup.extra,
        *(setup.mesh_extra if side.is_mesh else ()),
    ]
