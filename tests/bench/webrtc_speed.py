"""WebRTC beside bare aiortc: streams between two nodes, data channels between two bare processes.

    python -m tests.bench.webrtc_speed [--rounds N] [--trips N] [--megabytes N]

Both in two processes on loopback, 10 KB there and back and bulk, in turns; of the rounds the median
counts. Also a part of `./just bench tunnels`.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection

import aioice.ice
import click
import trio
from aiortc import RTCConfiguration, RTCDataChannel, RTCPeerConnection, RTCSessionDescription

from tests.bench.processes import LOOPBACK, MESSAGE, process, said
from tunnels import Candidate, Endpoint, Identity, PeerId, Stream

LOW_BYTES = 256 << 10
PIECE_BYTES = 16 << 10
WARM_UP = 100
P50_ALLOWED = 1.15  # of bare aiortc's
RATE_WANTED = 0.9

Trips = list[float]


@dataclass
class Way:
    """What each round of one of the two gave."""

    name: str
    p50s: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)  # bytes a second

    def add(self, trips: Trips, rate: float) -> None:
        self.p50s.append(statistics.median(trips[WARM_UP:]))
        self.rates.append(rate)

    @property
    def p50_s(self) -> float:
        return statistics.median(self.p50s)

    @property
    def rate(self) -> float:
        return statistics.median(self.rates)


# --- streams of two nodes ------------------------------------------------------------------------


async def echo(stream: Stream) -> None:
    while data := await stream.receive_some():
        await stream.send_all(data)


async def swallow(stream: Stream) -> None:
    total = 0
    while data := await stream.receive_some():
        total += len(data)
    await stream.send_all(total.to_bytes(8, "big"))


def far_node(pipe: Connection) -> None:
    async def main() -> None:
        node = Endpoint(Identity.generate(), authorize=lambda *_: True, transports=("webrtc",))
        node.serve("echo", echo)
        node.serve("swallow", swallow)
        async with trio.open_nursery() as nursery:
            await nursery.start(node.run, LOOPBACK, 0)
            pipe.send((node.peer.key, node.candidates()))

    trio.run(main)


def near_node(pipe: Connection, key: bytes, places: list[Candidate]) -> None:
    async def main() -> None:
        node = Endpoint(Identity.generate(), authorize=lambda *_: False, transports=("webrtc",))
        async with trio.open_nursery() as nursery:
            await nursery.start(node.run, LOOPBACK, 0)
            session = await node.connect(PeerId(key), places)
            pipe.send(None)
            while True:
                trips, bulk_bytes = await trio.to_thread.run_sync(pipe.recv)
                times = await _trips(await session.open("echo"), trips)
                pipe.send((times, await _bulk(await session.open("swallow"), bulk_bytes)))

    async def _trips(stream: Stream, count: int) -> Trips:
        times = []
        for _ in range(count):
            began_s = time.perf_counter()
            await stream.send_all(MESSAGE)
            left = len(MESSAGE)
            while left:
                left -= len(await stream.receive_some())
            times.append(time.perf_counter() - began_s)
        await stream.aclose()
        return times

    async def _bulk(stream: Stream, size: int) -> float:
        began_s = time.perf_counter()
        for _ in range(size // PIECE_BYTES):
            await stream.send_all(bytes(PIECE_BYTES))
        await stream.send_eof()
        assert int.from_bytes(await stream.receive_some(), "big") == size
        return size / (time.perf_counter() - began_s)

    trio.run(main)


# --- bare aiortc ---------------------------------------------------------------------------------


def _only_loopback(use_ipv4: bool, use_ipv6: bool) -> list[str]:
    return [LOOPBACK]


def bare(pipe: Connection, offer: str | None) -> None:
    aioice.ice.get_host_addresses = _only_loopback
    asyncio.run(_answer_bare(pipe, offer) if offer else _offer_bare(pipe))


async def _answer_bare(pipe: Connection, offer: str) -> None:
    """Echoes on one channel; on the other answers a message of 8 bytes once that many came."""
    peer = RTCPeerConnection(RTCConfiguration(iceServers=[]))

    def on_channel(channel: RTCDataChannel) -> None:
        got = wanted = 0

        def on_message(data: bytes) -> None:
            nonlocal got, wanted
            if channel.label == "echo":
                channel.send(data)
            elif not wanted:
                wanted = int.from_bytes(data, "big")
            else:
                got += len(data)
                if got == wanted:
                    channel.send(got.to_bytes(8, "big"))
                    got = wanted = 0

        channel.on("message", on_message)

    peer.on("datachannel", on_channel)
    await peer.setRemoteDescription(RTCSessionDescription(offer, "offer"))
    await peer.setLocalDescription(await peer.createAnswer())
    pipe.send(peer.localDescription.sdp)
    await asyncio.Event().wait()


async def _offer_bare(pipe: Connection) -> None:
    peer = RTCPeerConnection(RTCConfiguration(iceServers=[]))
    answers: asyncio.Queue[bytes] = asyncio.Queue()
    channels = [peer.createDataChannel("echo"), peer.createDataChannel("swallow")]
    opened = asyncio.Event()
    for channel in channels:
        channel.on("message", answers.put_nowait)
    channels[-1].on("open", opened.set)
    await peer.setLocalDescription(await peer.createOffer())
    pipe.send(peer.localDescription.sdp)
    loop = asyncio.get_running_loop()
    answer = await loop.run_in_executor(None, pipe.recv)
    await peer.setRemoteDescription(RTCSessionDescription(answer, "answer"))
    await opened.wait()
    pipe.send(None)
    while True:
        trips, bulk_bytes = await loop.run_in_executor(None, pipe.recv)
        times = []
        for _ in range(trips):
            began_s = time.perf_counter()
            channels[0].send(MESSAGE)
            await answers.get()
            times.append(time.perf_counter() - began_s)
        pipe.send((times, await _bulk_bare(channels[1], answers, bulk_bytes)))


async def _bulk_bare(channel: RTCDataChannel, answers: asyncio.Queue[bytes], size: int) -> float:
    low = asyncio.Event()
    channel.bufferedAmountLowThreshold = LOW_BYTES
    channel.on("bufferedamountlow", low.set)
    channel.send(size.to_bytes(8, "big"))
    began_s = time.perf_counter()
    for _ in range(size // PIECE_BYTES):
        if channel.bufferedAmount > LOW_BYTES:
            low.clear()
            await low.wait()
        channel.send(bytes(PIECE_BYTES))
    assert int.from_bytes(await answers.get(), "big") == size
    return size / (time.perf_counter() - began_s)


# --- measuring -----------------------------------------------------------------------------------


@contextmanager
def both(ways: tuple[Way, Way]) -> Iterator[list[tuple[Way, Connection]]]:
    """Each way with the process that measures it."""
    with process(far_node) as far, process(near_node, *said(far)) as ours:
        said(ours)
        with process(bare, None) as theirs:
            offer = said(theirs)
            with process(bare, offer) as answering:
                theirs.send(said(answering))
                said(theirs)
                yield [(ways[0], ours), (ways[1], theirs)]


def compare(rounds: int, trips: int, bulk_bytes: int) -> tuple[Way, Way]:
    """Ours and bare aiortc, in turns."""
    ways = Way("mesh, webrtc"), Way("bare aiortc")
    with both(ways) as measured:
        for number in range(rounds):
            for way, pipe in measured[:: 1 if number % 2 else -1]:
                pipe.send((WARM_UP + trips, bulk_bytes))
                way.add(*pipe.recv())
    return ways


def report(ours: Way, theirs: Way) -> str:
    rows = ["| | p50 of 10 KB | throughput |", "|---|---|---|"]
    for one in (ours, theirs):
        rows.append(f"| {one.name} | {one.p50_s * 1e3:.2f} ms | {one.rate / 1e6:.1f} MB/s |")
    p50, rate = ours.p50_s / theirs.p50_s, ours.rate / theirs.rate
    rows += [
        "",
        f"webrtc p50 of bare aiortc's: {p50:.2f} (to reach: at most {P50_ALLOWED}) "
        + ("ok" if p50 <= P50_ALLOWED else "MISSED"),
        f"webrtc throughput of bare aiortc's: {rate:.2f} (to reach: at least {RATE_WANTED}) "
        + ("ok" if rate >= RATE_WANTED else "MISSED"),
    ]
    return "\n".join(rows)


@click.command()
@click.option("--rounds", type=click.IntRange(1), default=5)
@click.option("--trips", type=click.IntRange(100), default=500, help="A round, of 10 KB each.")
@click.option("--megabytes", type=click.IntRange(1), default=32, help="A round, in bulk.")
def webrtc(rounds: int, trips: int, megabytes: int) -> None:
    """10 KB there and back, and bulk: WebRTC between nodes, and bare aiortc."""
    click.echo(report(*compare(rounds, trips, megabytes << 20)))


if __name__ == "__main__":
    webrtc()
