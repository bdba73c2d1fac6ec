"""Attackers as real programs: each floods one node, over a link as fast as a home's uplink.

An attack is a coroutine that goes on until it is cancelled. What a policed uplink does not carry is
dropped, as a modem would.
"""

from __future__ import annotations

import contextlib
import itertools
import secrets
import socket
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

import trio
import trio.lowlevel
from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.connection import QuicConnection

from tunnels import Candidate, Endpoint, Identity, PeerId, Session, TunnelError
from tunnels.allowance import Bucket, Rate
from tunnels.binding import Address
from tunnels.frames import Ack, Open, Ping, encode, encode_data
from tunnels.link import Channel
from tunnels.network import HostNetwork
from tunnels.quic_transport import QuicTransport
from tunnels.udp import DatagramSocket, Unreachable

UPLINK_BITS_PER_S = 20e6
HEADER_BYTES = 28  # IPv4 and UDP
FRAME_BYTES = 46  # of the least Ethernet frame
SOURCES = 200
PATIENCE_S = 2.0


@dataclass(frozen=True)
class Target:
    """token: the text of an invite that the node has given out."""

    peer: PeerId
    port: int
    token: str

    @property
    def address(self) -> Address:
        return ("127.0.0.1", self.port)

    @property
    def candidates(self) -> list[Candidate]:
        return [Candidate("quic", *self.address)]


class Uplink:
    """I carry UPLINK_BITS_PER_S and drop the rest."""

    def __init__(self) -> None:
        rate = UPLINK_BITS_PER_S / 8
        self._bucket = Bucket(Rate(rate, burst=rate / 20), trio.current_time())

    def takes(self, datagram: bytes) -> bool:
        size = max(len(datagram) + HEADER_BYTES, FRAME_BYTES)
        return self._bucket.take(trio.current_time(), size)


class _PolicedSocket:
    """A tunnels.udp.DatagramSocket behind an uplink."""

    def __init__(self, inner: DatagramSocket, uplink: Uplink) -> None:
        self._inner = inner
        self._uplink = uplink
        self.receive, self.flush, self.close = inner.receive, inner.flush, inner.close
        self.on_unreachable: Unreachable | None = None

    @property
    def local(self) -> Address:
        return self._inner.local

    def send(self, datagrams: Sequence[bytes], to: Address) -> None:
        self._inner.send([one for one in datagrams if self._uplink.takes(one)], to)


class PolicedNetwork(HostNetwork):
    def __init__(self, uplink: Uplink) -> None:
        self._uplink = uplink

    def bind(self, host: str | None, port: int) -> DatagramSocket:
        return _PolicedSocket(super().bind(host, port), self._uplink)

    def interface_addresses(self) -> list[str]:
        return []  # so that datagrams are as small as between two machines


# --- without a key --------------------------------------------------------------------------


async def _blast(target: Target, datagrams: Sequence[bytes]) -> None:
    """The same datagrams over and over, from SOURCES addresses."""
    uplink = Uplink()
    sockets = []
    for number in range(SOURCES):
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        sock.setblocking(False)
        sock.bind((f"127.1.{number}.1", 0))
        sockets.append(sock)
    for sock, datagram in zip(itertools.cycle(sockets), itertools.cycle(datagrams), strict=False):
        while not uplink.takes(datagram):  # noqa: ASYNC110 - time alone refills it
            await trio.sleep(0.001)
        try:
            sock.sendto(datagram, target.address)
        except BlockingIOError:
            await trio.sleep(0.001)


async def initials(target: Target) -> None:
    def first() -> bytes:
        configuration = QuicConfiguration(is_client=True, alpn_protocols=["mesh/1"])
        quic = QuicConnection(configuration=configuration)
        quic.connect(("peer", 0), now=0.0)
        return quic.datagrams_to_send(now=0.0)[0][0]

    await _blast(target, [first() for _ in range(2000)])


async def forged_initials(target: Target) -> None:
    def forged() -> bytes:
        cids = b"\x08" + secrets.token_bytes(8) + b"\x08" + secrets.token_bytes(8)
        return b"\xc0\0\0\0\1" + cids + b"\0\x44\xb0" + secrets.token_bytes(1200)

    await _blast(target, [forged() for _ in range(2000)])


async def noise(target: Target) -> None:
    await _blast(target, [b"\x40" + secrets.token_bytes(29) for _ in range(2000)])


# --- with keys made for the purpose ---------------------------------------------------------


async def start_endpoint(nursery: trio.Nursery, uplink: Uplink) -> Endpoint:
    endpoint = Endpoint(
        Identity.generate(), authorize=lambda *_: False, network=PolicedNetwork(uplink)
    )
    await nursery.start(endpoint.run, "127.0.0.1", 0)
    return endpoint


async def often(attack: Callable[[], Awaitable[None]], tasks: int) -> None:
    """`attack` again and again, in so many tasks."""

    async def again() -> None:
        while True:
            with trio.move_on_after(PATIENCE_S):
                with contextlib.suppress(Exception):  # the node may end anything
                    await attack()
            await trio.sleep(0.001)

    async with trio.open_nursery() as nursery:
        for _ in range(tasks):
            nursery.start_soon(again)


async def half_handshakes(target: Target) -> None:
    """TLS is completed, then nothing is said."""
    async with trio.open_nursery() as nursery:
        endpoint = await start_endpoint(nursery, Uplink())
        transport = endpoint._linking.transports["quic"]
        assert isinstance(transport, QuicTransport)

        async def dial() -> None:
            await transport.dial(target.candidates[0], target.peer)

        await often(dial, tasks=30)


async def fresh_keys(target: Target) -> None:
    """A new key for each session, and a stream to a service that is not for it."""
    uplink = Uplink()

    async def come_and_go() -> None:
        async with trio.open_nursery() as nursery:
            endpoint = await start_endpoint(nursery, uplink)
            session = await endpoint.connect(target.peer, target.candidates)
            await (await session.open("forbidden")).send_all(b"x")
            nursery.cancel_scope.cancel()

    await often(come_and_go, tasks=20)


async def with_session(target: Target, attack: Callable[[Session], Awaitable[None]]) -> None:
    """Run an attack over a session, and over the next one when the node ends it."""
    async with trio.open_nursery() as nursery:
        endpoint = await start_endpoint(nursery, Uplink())
        while True:
            try:
                await attack(await endpoint.connect(target.peer, target.candidates))
            except TunnelError:
                await trio.sleep(0.01)


async def _channel(session: Session) -> Channel:
    if session.best_link is None:
        raise TunnelError("over")
    return await session.best_link.open_channel()


async def _pour(session: Session, channel: Channel, words: Callable[[], bytes]) -> None:
    while not session.closed.is_set():
        await channel.wait_writable()
        channel.send(words())
        await trio.lowlevel.checkpoint()


async def one_byte_records(target: Target) -> None:
    async def attack(session: Session) -> None:
        channel = await _channel(session)
        channel.send(encode(Open(1 << 40, 0, "swallow")))
        offsets = itertools.count()

        def words() -> bytes:
            return b"".join(encode_data(next(offsets), b"x") for _ in range(1000))

        await _pour(session, channel, words)

    await with_session(target, attack)


async def small_frames(target: Target) -> None:
    """Every datagram holds a byte of each of many channels."""

    async def attack(session: Session) -> None:
        channels = [await _channel(session) for _ in range(90)]
        for number, channel in enumerate(channels):
            channel.send(encode(Open(1 << 41 | number, 0, "swallow")))
        link = session.best_link
        zero = encode_data(0, b"x")
        for offset in itertools.count():
            piece = encode_data(offset, b"x") if offset else zero
            for index in range(len(piece)):
                for channel in channels:
                    link.quic.send_stream_data(channel._id, piece[index : index + 1])  # type: ignore[union-attr, attr-defined]
                link.pump()  # type: ignore[union-attr]
                await trio.sleep(0.0005)
            if session.closed.is_set():
                return

    await with_session(target, attack)


async def pings(target: Target) -> None:
    async def attack(session: Session) -> None:
        await _pour(session, session._links[0].control, lambda: encode(Ping(7)) * 200)

    await with_session(target, attack)


async def acks(target: Target) -> None:
    async def attack(session: Session) -> None:
        channel = await _channel(session)
        channel.send(encode(Open(1 << 42, 0, "swallow")))
        await _pour(session, channel, lambda: encode(Ack(0, 2**62)) * 200)

    await with_session(target, attack)


async def reset_storm(target: Target) -> None:
    async def attack(session: Session) -> None:
        for number in itertools.count(1 << 43):
            channel = await _channel(session)
            channel.send(encode(Open(number, 1 << 20, "swallow")))
            await trio.lowlevel.checkpoint()
            channel.reset()
            if session.closed.is_set():
                return

    await with_session(target, attack)


async def repeated_service(target: Target) -> None:
    async def attack(session: Session) -> None:
        while True:
            stream = await session.open("talk")
            await stream.send_all(b"hello")
            await stream.aclose()

    await with_session(target, attack)


async def hoard(target: Target) -> None:
    """A hundred streams to a service that does not read, filled as far as they go."""

    async def attack(session: Session) -> None:
        async with trio.open_nursery() as nursery:
            for _ in range(100):
                stream = await session.open("deaf")
                nursery.start_soon(stream.send_all, bytes(8 << 20))

    await with_session(target, attack)


async def never_acknowledge(target: Target) -> None:
    """Streams that the node fills: all credit is granted, nothing is ever acknowledged."""

    async def attack(session: Session) -> None:
        for number in range(90):
            channel = await _channel(session)
            channel.send(encode(Open(1 << 44 | number, 2**62, "source")))
        await session.closed.wait()

    await with_session(target, attack)


@dataclass(frozen=True)
class Attack:
    """`settle_s`: until it shows what it does for ever. Bursts are let through at first, and one
    that only takes bytes is a peer as any other until the node's pools for it are full."""

    what: str
    run: Callable[[Target], Awaitable[None]]
    settle_s: float = 2.5


ATTACKS = {
    "initials": Attack("well-formed first datagrams, 200 addresses", initials),
    "forged": Attack("first datagrams of garbage, 200 addresses", forged_initials),
    "noise": Attack("30-byte datagrams of noise", noise),
    "half": Attack("TLS handshakes, then silence", half_handshakes),
    "keys": Attack("a new key and session each time", fresh_keys),
    "records": Attack("DATA records of 1 byte", one_byte_records),
    "frames": Attack("QUIC frames of 1 byte on 90 channels", small_frames),
    "pings": Attack("PING records", pings),
    "acks": Attack("ACK records that lie", acks),
    "resets": Attack("channels opened and reset", reset_storm),
    "service": Attack("one service asked again and again", repeated_service),
    "hoard": Attack("100 streams filled, none read", hoard),
    "deaf": Attack("90 streams that the node fills, no ACK", never_acknowledge, settle_s=4.0),
}
