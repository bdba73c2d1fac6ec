"""A node that is to stay within its own networks: nothing goes beyond, whoever asks for it.

127.0.0.2 stands for what is beyond: there is a socket, and nothing may reach it.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing

from tests.lab.nodes import anyone, identity
from tunnels import AddressPolicy, Candidate, DialFailed, Endpoint
from tunnels.errors import LinkClosed
from tunnels.network import HostNetwork
from tunnels.offline import FRESH_S, MAX_KNOWN, NearNetwork, NearSocket
from tunnels.tcp_socket import ByteSocket, Listener
from tunnels.udp import DatagramSocket, Unreachable

NEAR, NEAR_TOO, BEYOND = "127.0.0.1", "127.0.0.3", "127.0.0.2"


class Lab(NearNetwork):
    def is_near(self, host: str) -> bool:
        return host != BEYOND


@asynccontextmanager
async def sockets(*networks: tuple[HostNetwork, str]) -> AsyncIterator[list[DatagramSocket]]:
    opened = [network.bind(host, 0) for network, host in networks]
    with trio.fail_after(30):
        try:
            yield opened
        finally:
            for one in opened:
                one.close()


async def test_datagrams_go_to_near_addresses_only() -> None:
    network = HostNetwork()
    async with sockets((Lab(), "0.0.0.0"), (network, NEAR), (network, BEYOND)) as opened:
        ours, near, beyond = opened
        ours.send([b"to one beyond"], beyond.local)
        ours.send([b"to one near"], near.local)
        ((datagram, _),) = await near.receive()
        assert datagram == b"to one near"
        near.send([b"the first that comes there"], beyond.local)
        ((datagram, _),) = await beyond.receive()
        assert datagram == b"the first that comes there"


async def test_datagrams_from_beyond_are_not_heard() -> None:
    network = HostNetwork()
    async with sockets((Lab(), NEAR), (network, NEAR_TOO), (network, BEYOND)) as opened:
        ours, near, beyond = opened
        beyond.send([b"from beyond"], ours.local)
        near.send([b"from near"], ours.local)
        assert [data for data, _ in await ours.receive()] == [b"from near"]


async def test_connections_are_made_and_taken_within() -> None:
    network, outside = Lab(), HostNetwork()
    with trio.fail_after(30):
        beyond = outside.listen(BEYOND, 0)
        with pytest.raises(LinkClosed, match="--offline"):
            await network.connect(beyond.local)

        door = network.listen(NEAR, 0)
        assert door.local[0] == NEAR
        taken: list[ByteSocket] = []

        async def take(listener: Listener) -> None:
            taken.append(await listener.accept())

        async with trio.open_nursery() as nursery:
            nursery.start_soon(take, door)
            with pytest.raises(ConnectionResetError):
                await _knock_from(BEYOND, door.local)
            near = await network.connect(door.local)
        assert [one.remote[0] for one in taken] == [NEAR]
        for socket in (near, *taken):
            socket.close()
        for listener in (door, beyond):
            listener.close()


async def _knock_from(host: str, to: tuple[str, int]) -> None:
    with trio.socket.socket() as socket:
        await socket.bind((host, 0))
        await socket.connect(to)
        await socket.recv(1)


class Silent:
    """A socket that counts."""

    def __init__(self) -> None:
        self.sent = 0
        self.local = (NEAR, 1)
        self.on_unreachable: Unreachable | None = None

    def send(self, datagrams: object, to: object) -> None:
        self.sent += 1

    async def receive(self) -> list[tuple[bytes, tuple[str, int]]]:
        raise NotImplementedError

    async def flush(self) -> None: ...

    def close(self) -> None: ...


async def test_what_is_near_is_remembered_for_a_while_and_not_for_ever(
    autojump_clock: trio.testing.MockClock,
) -> None:
    asked: list[str] = []
    is_near = {"here": True}

    def look(host: str) -> bool:
        asked.append(host)
        return is_near["here"]

    inner = Silent()
    socket = NearSocket(inner, look)
    for _ in range(3):
        socket.send([b"x"], ("192.0.2.1", 9))
    assert (inner.sent, asked) == (3, ["192.0.2.1"])
    is_near["here"] = False
    await trio.sleep(FRESH_S)
    socket.send([b"x"], ("192.0.2.1", 9))
    assert inner.sent == 3, "it lies in another network now"
    for number in range(MAX_KNOWN + 5):
        socket.send([b"x"], (f"11.0.{number >> 8}.{number & 255}", 9))
    assert len(socket._known) <= MAX_KNOWN


async def test_a_dial_beyond_is_refused_in_words() -> None:
    network = Lab()
    node = Endpoint(
        identity("offline"),
        authorize=anyone,
        network=network,
        policy=AddressPolicy(allow_loopback=True, only=network.is_near),
    )
    async with trio.open_nursery() as nursery:
        await nursery.start(node.run, NEAR, 0)
        for kind in ("tcp", "quic"):
            with pytest.raises(DialFailed, match="--offline"):
                await node.connect(identity("other").peer, [Candidate(kind, BEYOND, 9)])
        nursery.cancel_scope.cancel()
