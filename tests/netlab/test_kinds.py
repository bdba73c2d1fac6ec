"""The lab is what it says: each kind of network, seen by datagrams of its host and of servers.

Of two packets that went the same way the later one tells what became of the earlier: wires keep
their order. So nothing here waits to see that nothing comes.
"""

from __future__ import annotations

import random
import socket
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.conftest import require
from tests.netlab.netns import Namespace
from tests.netlab.servers import can_run, miniupnpd
from tests.netlab.topology import RELAY, SHORT_MAPPING_S, STUN, STUN6, Internet, Site, internet
from tests.netlab.wire import QUEUE_S, Direction, Weather

pytestmark = pytest.mark.netlab

PATIENCE_S = 30.0
DATA = b"x" * 100
NAT_PMP_PORT = 5351
Address = tuple[str, int]


@pytest.fixture(scope="module")
def net() -> Iterator[Internet]:
    with internet() as made:
        yield made


@dataclass
class Outside:
    """Three sockets of the servers: two on one address, one on another."""

    first: socket.socket
    same_host: socket.socket
    other_host: socket.socket


@pytest.fixture
def outside(net: Internet) -> Iterator[Outside]:
    yield from _outside(net.servers, STUN)


@pytest.fixture
def outside6(net: Internet) -> Iterator[Outside]:
    yield from _outside(net.servers, STUN6)


def _outside(servers: Namespace, hosts: tuple[str, str]) -> Iterator[Outside]:
    sockets = [patient(servers.udp(host)) for host in (hosts[0], hosts[0], hosts[1])]
    yield Outside(*sockets)
    for one in sockets:
        one.close()


def patient(one: socket.socket) -> socket.socket:
    one.settimeout(PATIENCE_S)
    return one


def host_socket(host: Namespace, *, ipv6: bool = False) -> socket.socket:
    return patient(host.udp("::" if ipv6 else "0.0.0.0"))


def seen_as(inside: socket.socket, outside: socket.socket) -> Address:
    """Where a datagram of `inside` comes from, at `outside`."""
    inside.sendto(DATA, outside.getsockname())
    sender: tuple[str, int] = outside.recvfrom(2000)[1][:2]
    return sender


def admitted(inside: socket.socket, outside: Outside) -> set[str]:
    """Who gets through to a socket that has sent to `outside.first` alone."""
    mapped = seen_as(inside, outside.first)
    outside.other_host.sendto(b"other host", mapped)
    outside.same_host.sendto(b"same host", mapped)
    outside.first.sendto(b"same socket", mapped)
    heard: set[str] = set()
    while "same socket" not in heard:
        heard.add(inside.recv(2000).decode())
    return heard - {"same socket"}


ALL, ADDRESS, SOCKET = {"other host", "same host"}, {"same host"}, set[str]()


@pytest.mark.parametrize(
    ("kind", "one_mapping", "lets_in"),
    [
        ("open", True, ALL),
        ("full", True, ALL),
        ("addr", True, ADDRESS),
        ("port", True, SOCKET),
        ("home", True, SOCKET),
        ("sym", False, SOCKET),
        ("stealth", True, SOCKET),
        ("cgnat", True, SOCKET),
        ("short", True, SOCKET),
        ("upnp", True, SOCKET),
    ],
)
def test_a_network_maps_and_filters_as_its_kind_does(
    net: Internet, outside: Outside, kind: str, one_mapping: bool, lets_in: set[str]
) -> None:
    site = net.site(kind)
    inside = host_socket(site.host)
    mapped = {seen_as(inside, one) for one in (outside.first, outside.other_host)}
    assert (len(mapped) == 1) == one_mapping
    assert {host for host, _ in mapped} == {site.wan}
    assert admitted(host_socket(site.host), outside) == lets_in


def test_a_port_restricted_router_gives_another_port_the_same_for_all(
    net: Internet, outside: Outside
) -> None:
    inside = host_socket(net.site("port").host)
    mapped = {seen_as(inside, one)[1] for one in (outside.first, outside.other_host)}
    assert len(mapped) == 1
    assert mapped != {inside.getsockname()[1]}


def test_on_ipv6_nothing_is_translated_and_the_router_lets_in_what_was_asked_for(
    net: Internet, outside6: Outside
) -> None:
    site = net.site("ipv6")
    inside = host_socket(site.host, ipv6=True)
    assert seen_as(inside, outside6.first)[0].startswith(f"2600:11:{site.number}:1::")
    assert admitted(host_socket(site.host, ipv6=True), outside6) == SOCKET
    assert "inet 11.0" not in site.host.run("ip", "addr")


def test_where_ipv4_leads_nowhere_ipv6_is_open(
    net: Internet, outside: Outside, outside6: Outside
) -> None:
    site = net.site("broken4")
    host_socket(site.host).sendto(b"lost", outside.first.getsockname())
    inside = host_socket(site.host, ipv6=True)
    assert admitted(inside, outside6) == ALL  # and what was sent before on IPv4 would be here
    outside.first.setblocking(False)
    with pytest.raises(BlockingIOError):
        outside.first.recv(2000)


@pytest.mark.parametrize("family", [4, 6])
def test_a_stealth_host_admits_on_neither_family_what_it_did_not_ask_for(
    net: Internet, outside: Outside, outside6: Outside, family: int
) -> None:
    inside = host_socket(net.site("stealth").host, ipv6=family == 6)
    assert admitted(inside, outside6 if family == 6 else outside) == SOCKET


def test_a_blocked_network_lets_out_tcp_to_port_443_and_nothing_else(
    net: Internet, outside: Outside
) -> None:
    host = net.site("blocked").host
    with net.servers.entered():
        web, other = (socket.create_server((STUN[0], port)) for port in (443, 444))
    with host.entered():
        refused, let_out = socket.socket(), socket.socket()
    host_socket(host).sendto(b"lost", outside.first.getsockname())
    refused.setblocking(False)
    with pytest.raises(BlockingIOError):
        refused.connect((STUN[0], 444))
    patient(let_out).connect((STUN[0], 443))
    web.accept()[0].close()
    for one, listen in ((outside.first, outside.first.recvfrom), (other, lambda _: other.accept())):
        one.setblocking(False)
        with pytest.raises(BlockingIOError):
            listen(2000)
    for opened in (web, other, refused, let_out):
        opened.close()


def test_short_mappings_are_soon_forgotten(net: Internet, outside: Outside) -> None:
    site = net.site("short")
    inside = host_socket(site.host)
    mapped = seen_as(inside, outside.first)
    outside.first.sendto(DATA, mapped)
    inside.recv(2000)
    rows = site.routers[0].run("conntrack", "-L", "-p", "udp").splitlines()
    assert [int(row.split()[2]) <= SHORT_MAPPING_S for row in rows] == [True]


@pytest.mark.parametrize(
    ("kind", "turned"), [("lan", False), ("lan-hairpin", True), ("guest", False)]
)
def test_two_hosts_behind_one_router(
    net: Internet, outside: Outside, kind: str, turned: bool
) -> None:
    hairpins(net.site(kind), outside, turned)


def test_a_hairpin_reaches_a_network_that_is_kept_apart(net: Internet, outside: Outside) -> None:
    site = net.site("guest-hairpin")
    hairpins(site, outside, True)
    one, other = (host_socket(host) for host in site.hosts)
    seen_as(one, outside.first)
    other.sendto(b"straight", ("192.168.1.11", one.getsockname()[1]))
    other.sendto(b"turned", seen_as(one, outside.first))
    assert one.recv(2000) == b"turned"


def hairpins(site: Site, outside: Outside, turned: bool) -> None:
    one, other = (host_socket(host) for host in site.hosts)
    mapped = seen_as(one, outside.first)
    mapped_other = seen_as(other, outside.first)
    other.sendto(b"turned", mapped)
    seen_as(other, outside.first)  # by now, what turns has turned
    outside.first.sendto(b"fence", mapped)
    heard, sender = one.recvfrom(2000)
    assert heard == (b"turned" if turned else b"fence")
    assert not turned or sender == mapped_other


def test_a_router_forwards_a_port_when_it_is_asked(
    net: Internet, outside: Outside, tmp_path: Path
) -> None:
    require("miniupnpd", can_run("miniupnpd"), "needs miniupnpd (./just setup)")
    site = net.site("upnp")
    inside = host_socket(site.host)
    port = inside.getsockname()[1]
    ask_for_udp = struct.pack(">BBHHHI", 0, 1, 0, port, port, 3600)  # RFC 6886 section 3.3
    router = miniupnpd(site.routers[0], tmp_path)
    try:
        inside.sendto(ask_for_udp, ("192.168.1.1", NAT_PMP_PORT))
        assert inside.recv(2000)[1:4] == b"\x81\0\0"  # success
        outside.other_host.sendto(b"let in", (site.wan, port))
        assert inside.recv(2000) == b"let in"
    finally:
        router.close()


def test_hosts_of_one_lan_reach_each_other(net: Internet) -> None:
    one, other = (host_socket(host) for host in net.site("lan").hosts)
    other.sendto(b"near", ("192.168.1.11", one.getsockname()[1]))
    assert one.recv(2000) == b"near"


def test_a_symmetric_router_that_forgot_gives_another_port(net: Internet, outside: Outside) -> None:
    site = net.site("sym")
    inside = host_socket(site.host)
    before = seen_as(inside, outside.first)
    assert seen_as(inside, outside.first) == before
    site.forget_mappings()
    assert seen_as(inside, outside.first) != before


@pytest.mark.parametrize("kind", ["home", "open"])
def test_a_black_hole_swallows_what_is_large(net: Internet, outside: Outside, kind: str) -> None:
    site = net.site(kind)
    inside = host_socket(site.host)
    mapped = seen_as(inside, outside.first)
    site.swallow_above(1300)
    sizes = (1300, 1272)  # of UDP's payload: 28 more are headers
    for size in sizes:
        inside.sendto(bytes(size), outside.first.getsockname())
        outside.first.sendto(bytes(size), mapped)
    assert len(outside.first.recv(2000)) == len(inside.recv(2000)) == sizes[1]
    site.heal()
    inside.sendto(bytes(1300), outside.first.getsockname())
    assert len(outside.first.recv(2000)) == 1300


def test_a_way_takes_as_long_as_its_wires_do(net: Internet) -> None:
    site = net.site("open")
    inside, server = host_socket(site.host), patient(net.relay.udp(RELAY))
    site.weather(delay_s=0.05)
    before_s = time.monotonic()
    seen_as(inside, server)
    assert time.monotonic() - before_s >= 0.05
    site.weather(delay_s=0.0, cut=True)
    inside.sendto(b"lost", server.getsockname())
    site.weather(cut=False)
    inside.sendto(b"there", server.getsockname())
    assert server.recv(2000) == b"there"


def test_a_packet_is_lost_as_the_dice_say() -> None:
    way = Direction(lambda: Weather(loss=0.2), random.Random(5).random)
    lost = sum(way.arrival(100, 0.0) is None for _ in range(10_000))
    assert lost == pytest.approx(2000, rel=0.1)


def test_packets_wait_for_those_before_them_and_a_full_queue_drops() -> None:
    way = Direction(lambda: Weather(delay_s=1.0, bytes_per_s=1000), lambda: 0.5)
    assert way.arrival(100, 10.0) == pytest.approx(11.1)
    assert way.arrival(100, 10.0) == pytest.approx(11.2)
    assert way.arrival(10, 10.0) == pytest.approx(10.0 + QUEUE_S + 0.01 + 1.0)
    assert way.arrival(100, 10.0) is None
    assert way.arrival(100, 20.0) == pytest.approx(21.1)


def test_jitter_puts_packets_out_of_order() -> None:
    way = Direction(lambda: Weather(delay_s=0.1, jitter_s=0.1), random.Random(5).random)
    arrivals = [way.arrival(100, number / 1000) or 0.0 for number in range(100)]
    assert arrivals != sorted(arrivals)
