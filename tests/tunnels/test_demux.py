"""Datagrams of one socket, and whose they are."""

from __future__ import annotations

import trio
import trio.testing

from tests.lab.datagrams import FakeHost, World
from tunnels.binding import Address
from tunnels.demux import MAX_ADOPTED, PROBE_BYTE, Batch, SharedSocket
from tunnels.udp import bind

STUN = bytes.fromhex("0001 0000 2112a442") + bytes(12)
QUIC = b"\x40 a short header"
PROBE = bytes([PROBE_BYTE]) + b" sealed"
THERE: Address = ("192.0.2.9", 7)


class _Heard:
    """What arrived, by whom it was for."""

    def __init__(self, socket: SharedSocket) -> None:
        self.all: list[tuple[str, bytes, Address]] = []
        self._news = trio.Event()
        socket.on_quic = self._add_batch
        socket.on_stun = lambda datagram, sender: self._add("stun", datagram, sender)
        socket.on_probe = lambda datagram, sender: self._add("probe", datagram, sender)

    def _add_batch(self, batch: Batch) -> None:
        for datagram, sender in batch:
            self._add("quic", datagram, sender)

    def _add(self, whose: str, datagram: bytes, sender: Address) -> None:
        self.all.append((whose, datagram, sender))
        self._news.set()

    async def until(self, count: int) -> list[tuple[str, bytes, Address]]:
        while len(self.all) < count:
            self._news = trio.Event()
            await self._news.wait()
        return self.all


def _world() -> tuple[World, FakeHost, SharedSocket]:
    world = World()
    host = world.host("192.0.2.1")
    return world, host, SharedSocket(host.bind(None, 5000))


async def test_each_datagram_goes_to_whom_its_first_byte_names(
    autojump_clock: trio.testing.MockClock,
    nursery: trio.Nursery,
) -> None:
    world, _, shared = _world()
    heard = _Heard(shared)
    nursery.start_soon(world.run)
    nursery.start_soon(shared.run)
    for datagram in (b"", b"\x00", STUN[:19], b"\x16 DTLS", STUN, b"\x80" + STUN, QUIC, PROBE):
        world.inject(datagram, THERE, shared.local)
    found = await heard.until(3)
    await trio.testing.wait_all_tasks_blocked()
    assert sorted((whose, datagram) for whose, datagram, _ in found) == [
        ("probe", PROBE),
        ("quic", QUIC),
        ("stun", STUN),
    ]


async def test_a_peer_behind_an_adopted_socket_is_talked_to_through_it_both_ways(
    autojump_clock: trio.testing.MockClock,
    nursery: trio.Nursery,
) -> None:
    world, host, shared = _world()
    heard = _Heard(shared)
    there = world.host(THERE[0]).bind(None, THERE[1])
    nursery.start_soon(world.run)
    nursery.start_soon(shared.run)
    other = host.bind(None, 6000)
    shared.adopt(other, THERE)
    shared.send([QUIC], THERE)
    assert await there.receive() == [(QUIC, other.local)]
    there.send([QUIC], other.local)
    assert await heard.until(1) == [("quic", QUIC, THERE)]


async def test_adopted_sockets_are_bounded_and_closed_with_the_rest(
    autojump_clock: trio.testing.MockClock,
    nursery: trio.Nursery,
) -> None:
    world, host, shared = _world()
    nursery.start_soon(world.run)
    for number in range(MAX_ADOPTED + 1):
        shared.adopt(host.bind(None, 6000 + number), (THERE[0], 1 + number))
    host.bind(None, 6000).close()  # the oldest is closed: its port is free again
    shared.adopt(host.bind(None, 7000), (THERE[0], 2))
    host.bind(None, 6001).close()  # one in another's place closes it
    shared.close()
    for port in (5000, 7000, 6002, 6000 + MAX_ADOPTED):
        host.bind(None, port).close()


async def test_a_real_socket_that_gives_way_to_another_does_no_harm(nursery: trio.Nursery) -> None:
    """The way to a peer is found again, while the socket of the last time is still listened to."""
    shared = SharedSocket(bind("127.0.0.1", 0))
    heard = _Heard(shared)
    there = bind("127.0.0.1", 0)
    nursery.start_soon(shared.run)
    for count in (1, 2):
        ours = bind("127.0.0.1", 0)
        shared.adopt(ours, there.local)
        there.send([QUIC], ours.local)
        assert await heard.until(count) == [("quic", QUIC, there.local)] * count
        await trio.testing.wait_all_tasks_blocked()
    nursery.cancel_scope.cancel()
    there.close()
    shared.close()
