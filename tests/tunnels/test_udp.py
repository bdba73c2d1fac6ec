"""The real socket: batches, both families, and what the kernel says when nobody listens."""

from __future__ import annotations

import errno
import os
import socket
import sys
from unittest.mock import Mock

import psutil
import pytest
import trio

from tests.lab.nodes import anyone, echo, exchange, identity
from tunnels import Candidate, DialFailed, Endpoint, ListenFailed
from tunnels.binding import Address
from tunnels.dial import ranked
from tunnels.network import HostNetwork
from tunnels.udp import DatagramSocket, UdpSocket, _equal_runs

LOOPBACK = "127.0.0.1"


def bind(host: str | None = LOOPBACK, port: int = 0) -> DatagramSocket:
    return HostNetwork().bind(host, port)


async def collect(sock: DatagramSocket, count: int) -> list[tuple[bytes, Address]]:
    got: list[tuple[bytes, Address]] = []
    with trio.fail_after(5):
        while len(got) < count:
            got += await sock.receive()
    return got


async def test_datagrams_of_many_sizes_arrive_whole_and_in_order() -> None:
    one, two = bind(), bind()
    sizes = [1350] * 100 + [7] + [1350] * 3 + [20, 30, 30, 10, 1200, 1200]
    sent = [bytes((i % 256,)) * size for i, size in enumerate(sizes)]
    one.send(sent, two.local)
    got = await collect(two, len(sent))
    assert [data for data, _ in got] == sent
    assert {sender for _, sender in got} == {one.local}
    one.close()
    two.close()


def test_runs_are_cut_where_the_kernel_needs_it() -> None:
    sizes = [3, 3, 2, 3, 4, 4, 1]
    runs = _equal_runs([bytes(size) for size in sizes])
    assert [[len(d) for d in run] for run in runs] == [[3, 3, 2], [3], [4, 4, 1]]
    assert _equal_runs([]) == []
    assert [len(run) for run in _equal_runs([bytes(1350)] * 100)] == [44, 44, 12]


async def test_a_socket_on_every_interface_speaks_both_families() -> None:
    everywhere = bind(None)
    port = everywhere.local[1]
    hosts = [LOOPBACK, "::1"] if ":" in everywhere.local[0] else [LOOPBACK]
    for host in hosts:
        one = bind(host)
        one.send([b"hello"], (host, port))
        [(data, sender)] = await collect(everywhere, 1)
        assert (data, sender) == (b"hello", one.local)
        everywhere.send([b"back"], sender)
        assert await collect(one, 1) == [(b"back", (host, port))]
        one.close()
    everywhere.close()


async def test_a_machine_without_ipv6_listens_on_ipv4(monkeypatch: pytest.MonkeyPatch) -> None:
    real = socket.socket

    def no_ipv6(family: int, *rest: int) -> socket.socket:
        if family == socket.AF_INET6:
            raise OSError(errno.EAFNOSUPPORT, "no IPv6 here")
        return real(family, *rest)

    monkeypatch.setattr("tunnels.udp.socket.socket", no_ipv6)
    sock = bind(None)
    assert sock.local[0] == "0.0.0.0"
    sock.close()


async def test_what_cannot_be_bound_is_a_sentence() -> None:
    taken = bind()
    everywhere = bind(None)
    for host, port, why in (
        (LOOPBACK, taken.local[1], "port is in use"),
        (None, everywhere.local[1], "port is in use"),
        ("203.0.113.77", 0, "no such address"),
        ("example.org", 0, "give an IP address"),
    ):
        with pytest.raises(ListenFailed, match=why):
            bind(host, port)
    taken.close()
    everywhere.close()


async def test_closing_wakes_the_reader() -> None:
    sock = bind()

    async def read() -> None:
        with pytest.raises(trio.ClosedResourceError):
            await sock.receive()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(read)
        await trio.testing.wait_all_tasks_blocked()
        sock.close()
    sock.close()
    sock.send([b"into the void"], (LOOPBACK, 9))


@pytest.mark.skipif(sys.platform != "linux", reason="IP_RECVERR is Linux's")
@pytest.mark.parametrize("host", [LOOPBACK, None])
async def test_a_closed_port_is_told(host: str | None) -> None:
    gone = bind()
    target = gone.local
    gone.close()
    sock = bind(host)
    told: list[tuple[Address, str]] = []
    sock.on_unreachable = lambda address, reason: told.append((address, reason))
    sock.send([b"anyone?"], target)
    with trio.move_on_after(0.5):
        await sock.receive()
    assert told == [(target, "refused: no node listens on that port")]
    sock.close()


async def test_a_full_kernel_queue_is_flushed_later(monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = bind(), bind()
    assert isinstance(one, UdpSocket)
    real, blocked = one._socket, True

    class Congested:
        def sendmsg(self, *arguments: object) -> int:
            if blocked:
                raise BlockingIOError
            return real.sendmsg(*arguments)  # type: ignore[arg-type]

        def fileno(self) -> int:
            return real.fileno()

    monkeypatch.setattr(one, "_socket", Congested())
    one.send([b"first", b"second"], two.local)
    blocked = False
    one.send([b"third"], two.local)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(one.flush)
        got = await collect(two, 3)
        nursery.cancel_scope.cancel()
    assert [data for data, _ in got] == [b"first", b"second", b"third"]
    real.close()
    two.close()


def test_own_addresses_are_literals_without_link_local() -> None:
    addresses = HostNetwork().interface_addresses()
    assert LOOPBACK in addresses
    assert not [one for one in addresses if one.startswith("fe80") or "%" in one]


def test_addresses_are_as_last_seen_when_there_is_no_descriptor_to_ask_with(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def none_left() -> dict[str, object]:
        raise OSError(24, "Too many open files")

    network = HostNetwork()
    before = network.interface_addresses()
    monkeypatch.setattr("psutil.net_if_addrs", none_left)
    monkeypatch.setattr(network, "_known_until_s", 0.0)
    assert network.interface_addresses() == before
    assert network.is_near(LOOPBACK)
    assert HostNetwork().interface_addresses() == []


def test_many_addresses_are_told_near_from_far_by_one_look(monkeypatch: pytest.MonkeyPatch) -> None:
    look = Mock(wraps=psutil.net_if_addrs)
    monkeypatch.setattr("psutil.net_if_addrs", look)
    monkeypatch.setattr("time.monotonic", lambda: 1000.0)
    far = [Candidate("tcp", f"11.0.0.{n}", 9) for n in range(1, 40)]
    near = Candidate("tcp", LOOPBACK, 9)
    assert ranked([*far, near], HostNetwork().is_near)[0] == near
    assert look.call_count == 1


async def test_two_endpoints_talk_over_the_real_network() -> None:
    data = os.urandom(3 << 20)
    async with trio.open_nursery() as nursery:
        alice = Endpoint(identity("alice"), authorize=anyone, transports=("quic",))
        bob = Endpoint(identity("bob"), authorize=anyone, transports=("quic",))
        bob.serve("echo", echo)
        await nursery.start(alice.run, LOOPBACK, 0)
        port = await nursery.start(bob.run, LOOPBACK, 0)
        assert bob.candidates() == [Candidate("quic", LOOPBACK, port)]
        with trio.fail_after(20):
            session = await alice.connect(bob.peer, bob.candidates())
            stream = await session.open("echo")
            assert await exchange(stream, data) == data
        with pytest.raises(DialFailed, match="no node listens"), trio.fail_after(5):
            await alice.connect(identity("nobody").peer, [Candidate("quic", LOOPBACK, 9)])
        nursery.cancel_scope.cancel()
    with pytest.raises(RuntimeError, match="does not run"):
        alice.candidates()


async def test_an_endpoint_everywhere_names_no_loopback_address() -> None:
    async with trio.open_nursery() as nursery:
        alice = Endpoint(identity("alice"), authorize=anyone)
        port = await nursery.start(alice.run, None, 0)
        for place in alice.candidates():
            assert place.port == port
            assert not place.host.startswith("127.")
            assert place.host != "::1"
        nursery.cancel_scope.cancel()
