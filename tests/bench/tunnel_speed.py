"""Round trip of 10 KB and throughput of 64 MiB: our tunnel beside raw loopback TCP, same run.

    python tests/bench/tunnel_speed.py [--datagram BYTES] [--congestion reno|cubic] [--rounds N]

Client and server are two processes, as two nodes are. `--datagram 1350` shows what a network
between two machines gets: nodes on one machine use larger datagrams.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import time
from collections.abc import Awaitable, Callable
from multiprocessing.connection import Connection

import trio

from tunnels import Candidate, Endpoint, Identity, PeerId, Stream, quic_size, quic_transport

MESSAGE = bytes(range(256)) * 40  # 10 KB
BULK_BYTES = 64 << 20
CHUNK = bytes(1 << 20)
Opener = Callable[[str], Awaitable[trio.abc.HalfCloseableStream]]


async def echo(stream: trio.abc.HalfCloseableStream) -> None:
    while data := await stream.receive_some():
        await stream.send_all(data)


async def swallow(stream: trio.abc.HalfCloseableStream) -> None:
    total = 0
    while data := await stream.receive_some():
        total += len(data)
    await stream.send_all(total.to_bytes(8, "big"))


def serve(pipe: Connection, options: argparse.Namespace) -> None:
    configure(options)

    async def main() -> None:
        endpoint = Endpoint(Identity.generate(), authorize=lambda *_: True)
        endpoint.serve("echo", echo)
        endpoint.serve("swallow", swallow)

        async def tcp(stream: trio.SocketStream) -> None:
            handler = echo if await stream.receive_some(1) == b"e" else swallow
            async with stream:
                await handler(stream)

        async with trio.open_nursery() as nursery:
            udp_port = await nursery.start(endpoint.run, "127.0.0.1", 0)
            [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
            nursery.start_soon(trio.serve_listeners, tcp, [listener])
            pipe.send((endpoint.peer.key, udp_port, listener.socket.getsockname()[1]))
            await trio.to_thread.run_sync(pipe.recv)
            nursery.cancel_scope.cancel()

    trio.run(main)


def configure(options: argparse.Namespace) -> None:
    if options.datagram:
        quic_size.SAME_MACHINE_DATAGRAM_BYTES = options.datagram
    quic_transport.CONGESTION_CONTROL = options.congestion


async def measure(name: str, opener: Opener, rounds: int) -> tuple[float, float]:
    """Prints one line; returns (median round trip in s, bytes per s)."""
    stream = await opener("echo")
    trips = []
    for _ in range(rounds):
        began = time.perf_counter()
        await stream.send_all(MESSAGE)
        left = len(MESSAGE)
        while left:
            left -= len(await stream.receive_some())
        trips.append(time.perf_counter() - began)
    await stream.aclose()
    stream = await opener("swallow")
    began = time.perf_counter()
    for _ in range(BULK_BYTES // len(CHUNK)):
        await stream.send_all(CHUNK)
    await stream.send_eof()
    assert int.from_bytes(await stream.receive_some(), "big") == BULK_BYTES
    rate = BULK_BYTES / (time.perf_counter() - began)
    await stream.aclose()
    cuts = statistics.quantiles(trips, n=100)
    print(
        f"{name:<12} 10 KB there and back: p50 {cuts[49] * 1e3:.2f} ms, "
        f"p99 {cuts[98] * 1e3:.2f} ms   64 MiB: {rate / 1e6:.1f} MB/s"
    )
    return cuts[49], rate


async def compare(peer: PeerId, udp_port: int, tcp_port: int, rounds: int) -> None:
    async def open_tcp(service: str) -> trio.abc.HalfCloseableStream:
        stream = await trio.open_tcp_stream("127.0.0.1", tcp_port)
        await stream.send_all(service[:1].encode())
        return stream

    async with trio.open_nursery() as nursery:
        endpoint = Endpoint(Identity.generate(), authorize=lambda *_: False)
        await nursery.start(endpoint.run, "127.0.0.1", 0)
        place = Candidate("quic", "127.0.0.1", udp_port)
        session = await endpoint.connect(peer, [place])

        async def open_tunnel(service: str) -> Stream:
            return await session.open(service)

        tcp_trip, tcp_rate = await measure("raw TCP", open_tcp, rounds)
        trip, rate = await measure("QUIC tunnel", open_tunnel, rounds)
        print(f"ratio        {trip / tcp_trip:.1f} x the time, {rate / tcp_rate:.3f} of the rate")
        nursery.cancel_scope.cancel()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--datagram", type=int, default=0, help="bytes of a datagram")
    parser.add_argument("--congestion", choices=("reno", "cubic"), default="reno")
    parser.add_argument("--rounds", type=int, default=1000)
    options = parser.parse_args()
    configure(options)
    near, far = multiprocessing.Pipe()
    server = multiprocessing.get_context("spawn").Process(target=serve, args=(far, options))
    server.start()
    try:
        key, udp_port, tcp_port = near.recv()
        trio.run(compare, PeerId(key), udp_port, tcp_port, options.rounds)
        near.send(None)
    finally:
        server.join(5)
        if server.is_alive():
            server.kill()


if __name__ == "__main__":
    main()
