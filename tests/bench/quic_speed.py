"""A part of `./just bench tunnels`: our QUIC link beside aioquic's own asyncio driver.

Both with datagrams of 1452 bytes (what Ethernet and IPv6 leave), although nodes on one machine use
larger ones; client and server are processes of their own; measured is what a program gets that
reads and writes a stream. Every subject is measured in every round; the median of them counts.
"""

from __future__ import annotations

import asyncio
import ssl
import statistics
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any, Protocol

import click
import trio
from aioquic.asyncio.client import connect
from aioquic.asyncio.server import serve as serve_quic
from aioquic.quic.configuration import QuicConfiguration

from tests.bench.processes import LOOPBACK, MESSAGE, process, said, verdict
from tunnels import Candidate, Endpoint, Identity, PeerId, quic_size

DATAGRAM_BYTES = 1452
WARM_UP = 100
ALPN = "bench"
CHUNK = bytes(64 << 10)
THROUGHPUT_TO_REACH = 1.8
P50_TO_REACH = 0.6


class Pipe(Protocol):
    """A stream, of either library."""

    async def write(self, data: bytes) -> None: ...

    async def read(self) -> bytes: ...


async def answer(stream: Pipe) -> None:
    """Echoes after an `e`; after an `s` and a length swallows so much, and says so."""
    data = await stream.read()
    kind, data = data[:1], data[1:]
    if kind == b"e":
        while data := data or await stream.read():
            await stream.write(data)
            data = b""
        return
    left = int.from_bytes(data[:8], "big") - len(data[8:])
    while left:
        left -= len(await stream.read())
    await stream.write(b"!")


async def measure(
    open_stream: Callable[[], Awaitable[Pipe]],
    pipe: Connection,
    in_thread: Callable[[Callable[[], Any]], Awaitable[Any]],
) -> None:
    """Does what it is asked for, `trips` or `bulk`, and tells how long it took."""
    pipe.send("ready")
    while True:
        what, count = await in_thread(pipe.recv)
        stream = await open_stream()
        pipe.send(await (_trips if what == "trips" else _bulk)(stream, count))


async def _trips(stream: Pipe, count: int) -> list[float]:
    await stream.write(b"e")
    took_s = []
    for _ in range(WARM_UP + count):
        began_s = time.perf_counter()
        await stream.write(MESSAGE)
        left = len(MESSAGE)
        while left:
            left -= len(await stream.read())
        took_s.append(time.perf_counter() - began_s)
    return took_s[WARM_UP:]


async def _bulk(stream: Pipe, count: int) -> list[float]:
    await stream.write(b"s" + count.to_bytes(8, "big"))
    began_s = time.perf_counter()
    for _ in range(count // len(CHUNK)):
        await stream.write(CHUNK)
    await stream.read()
    return [time.perf_counter() - began_s]


# --- ours ----------------------------------------------------------------------------------


class _OurPipe:
    def __init__(self, stream: trio.abc.HalfCloseableStream) -> None:
        self._stream = stream

    async def write(self, data: bytes) -> None:
        await self._stream.send_all(data)

    async def read(self) -> bytes:
        return bytes(await self._stream.receive_some())


def our_server(pipe: Connection) -> None:
    quic_size.SAME_MACHINE_DATAGRAM_BYTES = DATAGRAM_BYTES

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            node = Endpoint(Identity.generate(), authorize=lambda *_: True, transports=("quic",))
            node.serve("bench", lambda stream: answer(_OurPipe(stream)))
            port = await nursery.start(node.run, LOOPBACK, 0)
            pipe.send((node.peer.key, port))

    trio.run(main)


def our_client(pipe: Connection, key: bytes, port: int) -> None:
    quic_size.SAME_MACHINE_DATAGRAM_BYTES = DATAGRAM_BYTES

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            node = Endpoint(Identity.generate(), authorize=lambda *_: True, transports=("quic",))
            await nursery.start(node.run, LOOPBACK, 0)
            session = await node.connect(PeerId(key), [Candidate("quic", LOOPBACK, port)])

            async def open_stream() -> Pipe:
                return _OurPipe(await session.open("bench"))

            await measure(open_stream, pipe, trio.to_thread.run_sync)

    trio.run(main)


# --- aioquic's driver ----------------------------------------------------------------------


class _TheirPipe:
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    async def write(self, data: bytes) -> None:
        self._writer.write(data)
        await self._writer.drain()

    async def read(self) -> bytes:
        return await self._reader.read(256 << 10)


def _configuration(*, is_client: bool) -> QuicConfiguration:
    configuration = QuicConfiguration(
        alpn_protocols=[ALPN], is_client=is_client, max_datagram_size=DATAGRAM_BYTES
    )
    configuration.verify_mode = ssl.CERT_NONE
    if not is_client:
        identity = Identity.generate()
        configuration.certificate = identity.certificate
        configuration.private_key = identity.tls_key
    return configuration


def their_server(pipe: Connection) -> None:
    tasks: set[asyncio.Task[None]] = set()

    def take(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.get_running_loop().create_task(answer(_TheirPipe(reader, writer)))
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    async def main() -> None:
        configuration = _configuration(is_client=False)
        server = await serve_quic(LOOPBACK, 0, configuration=configuration, stream_handler=take)
        transport = server._transport
        assert transport is not None
        pipe.send(transport.get_extra_info("sockname")[1])
        await asyncio.Event().wait()

    asyncio.run(main())


def their_client(pipe: Connection, port: int) -> None:
    async def main() -> None:
        configuration = _configuration(is_client=True)
        async with connect(LOOPBACK, port, configuration=configuration) as link:

            async def open_stream() -> Pipe:
                return _TheirPipe(*await link.create_stream())

            await measure(open_stream, pipe, asyncio.to_thread)

    asyncio.run(main())


# --- measuring -----------------------------------------------------------------------------


@dataclass
class Driver:
    name: str
    client: Connection
    p50s: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)  # bytes a second

    @property
    def p50_s(self) -> float:
        return statistics.median(self.p50s)

    @property
    def rate(self) -> float:
        return statistics.median(self.rates)

    def measure(self, trips: int, bulk_bytes: int) -> None:
        self.p50s.append(statistics.median(self._ask("trips", trips)))
        self.rates.append(bulk_bytes / self._ask("bulk", bulk_bytes)[0])

    def _ask(self, what: str, count: int) -> list[float]:
        self.client.send((what, count))
        return list(self.client.recv())


@contextmanager
def drivers() -> Iterator[tuple[Driver, Driver]]:
    with ExitStack() as stack:
        ours = stack.enter_context(process(our_server))
        client = stack.enter_context(process(our_client, *said(ours)))
        theirs = stack.enter_context(process(their_server))
        other = stack.enter_context(process(their_client, said(theirs)))
        said(client)
        said(other)
        yield Driver("mesh, quic", client), Driver("aioquic, asyncio", other)


def quic_rows(rounds: int, trips: int, megabytes: int) -> list[str]:
    """The table and its verdicts."""
    with drivers() as (mesh, asyncio_driver):
        for _ in range(rounds):
            for one in (asyncio_driver, mesh):
                one.measure(trips, megabytes << 20)
    lines = [f"| {DATAGRAM_BYTES}-byte datagrams | 10 KB, p50 | throughput |", "|---|---|---|"]
    lines += [
        f"| {one.name} | {one.p50_s * 1e3:.2f} ms | {one.rate / 1e6:.1f} MB/s |"
        for one in (asyncio_driver, mesh)
    ]
    faster, quicker = mesh.rate / asyncio_driver.rate, mesh.p50_s / asyncio_driver.p50_s
    name = "of aioquic's asyncio driver"
    lines += ["", verdict(f"quic throughput {name}", faster, at_least=THROUGHPUT_TO_REACH)]
    lines += [verdict(f"quic p50 {name}", quicker, at_most=P50_TO_REACH)]
    return lines


@click.command()
@click.option("--rounds", type=click.IntRange(1), default=5)
@click.option("--trips", type=click.IntRange(100), default=1000, help="A round, of 10 KB each.")
@click.option("--megabytes", type=click.IntRange(1), default=64, help="A round, in bulk.")
def quic(rounds: int, trips: int, megabytes: int) -> None:
    """QUIC with datagrams as on Ethernet: ours beside aioquic's own asyncio driver."""
    click.echo("\n".join(quic_rows(rounds, trips, megabytes)))


if __name__ == "__main__":
    quic()
