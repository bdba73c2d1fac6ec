"""Members that give away a model, each a process; and bytes over links with nothing behind."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

import trio

from meshnode.models.fetching import Fetcher
from meshnode.models.peers.offers import Offers
from meshnode.models.peers.service import StoreService
from meshnode.models.pull.threads import in_thread
from meshnode.models.store.store import Store
from tests.bench.processes import process, said
from tests.engine.synthetic import make_model_of_size
from tests.lab.sources import FileSource
from tests.netlab import netns
from tunnels import BlockingEnd, Endpoint, Identity, Session, Stream, as_socket

REFERENCE = "https://example.org/model.gguf"
_PIECE = bytes(1 << 20)


@dataclass(frozen=True)
class Giver:
    """How to reach one."""

    key: bytes
    host: str
    port: int


async def fill_store(folder: Path, size_bytes: int) -> str:
    """A store with a whole model; its provisional identity."""
    source = FileSource(make_model_of_size(folder / "model.gguf", size_bytes=size_bytes))
    fetcher = Fetcher(Store(folder / "store"), source.open)
    part = await fetcher.obtain(REFERENCE)
    names = [tensor.name for tensor in part.facts.tensors]
    await fetcher.fetch(part, names, {}, lambda _done, _total: None)
    source.path.unlink()
    return part.identity.provisional


def give(pipe: Connection, store: Path, host: str, upload_bytes_per_s: float | None) -> None:
    async def main() -> None:
        endpoint = Endpoint(Identity.generate(), authorize=lambda *_: True, transports=("tcp",))
        endpoint.serve("bare/", give_bare)
        StoreService(Offers(Store(store)), upload_bytes_per_s).offer(endpoint)
        async with trio.open_nursery() as nursery:
            await nursery.start(endpoint.run, host, 0)
            (place,) = endpoint.candidates()
            pipe.send((endpoint.peer.key, host, place.port))

    trio.run(main)


@contextmanager
def givers(
    store: Path, host: str, uploads_bytes_per_s: Sequence[float | None] = (None,)
) -> Iterator[list[Giver]]:
    """One for each limit, in the namespace that the calling thread is in."""
    with ExitStack() as stack:
        pipes = [
            stack.enter_context(process(give, store, host, limit)) for limit in uploads_bytes_per_s
        ]
        yield [Giver(*said(pipe)) for pipe in pipes]


@contextmanager
def line(mbit_per_s: int) -> Iterator[tuple[netns.Namespace, netns.Namespace]]:
    """Two hosts, 10.78.0.1 and 10.78.0.2, on a cable that carries so much each way."""
    ends = netns.make(f"mesh-bench-{side}-{os.getpid()}" for side in "ab")
    try:
        netns.cable(ends[0], "e0", ends[1], "e0")
        for number, end in enumerate(ends, 1):
            end.ip(f"addr add 10.78.0.{number}/24 dev e0")
            shape = f"qdisc add dev e0 root tbf rate {mbit_per_s}mbit burst 256kb latency 20ms"
            end.run("tc", *shape.split())
        yield ends[0], ends[1]
    finally:
        netns.delete(ends)


# --- the link alone ------------------------------------------------------------------------


async def give_bare(stream: Stream) -> None:
    """Bytes out of memory, in the way that the service's name has."""
    _, way, size = stream.service.split("/")
    pieces = [_PIECE[: int(size) - at] for at in range(0, int(size), len(_PIECE))]
    if way == "loop":
        for piece in pieces:
            await stream.send_all(piece)
        await stream.send_eof()
        return

    def send(end: BlockingEnd) -> None:
        for piece in pieces:
            end.socket.sendall(piece)

    async with as_socket(stream) as end:
        await in_thread(end, partial(send, end))
        await end.finish()


async def take_bare(session: Session, way: str, size_bytes: int) -> None:
    room, left = bytearray(len(_PIECE)), size_bytes

    def receive(end: BlockingEnd) -> int:
        return sum(iter(partial(end.socket.recv_into, room), 0))

    async with await session.open(f"bare/{way}/{size_bytes}") as stream:
        if way == "loop":
            while data := await stream.receive_some(len(_PIECE)):
                left -= len(data)
        else:
            async with as_socket(stream) as end:
                left -= await in_thread(end, partial(receive, end))
    assert left == 0


async def bare_s(session: Session, way: str, size_bytes: int, connections: int) -> float:
    began = time.monotonic()
    async with trio.open_nursery() as nursery:
        for _ in range(connections):
            nursery.start_soon(take_bare, session, way, size_bytes // connections)
    return time.monotonic() - began
