"""Racing addresses, and which of them may be tried at all."""

from __future__ import annotations

import ipaddress

import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from tests.lab.nodes import identity
from tunnels.dial import AddressPolicy, race
from tunnels.errors import DialFailed, LinkClosed
from tunnels.peer import Candidate

PEER = identity("bob").peer
PLACES = [Candidate("quic", f"11.0.0.{number}", 4000) for number in range(1, 6)]
PUBLIC, LAN = "11.0.0.1", "192.168.1.2"


def refusal(host: str, *, policy: AddressPolicy | None = None, own: str = PUBLIC) -> str | None:
    """own: our addresses, spaces between."""
    policy = policy or AddressPolicy()
    return policy.refusal(host, bound_host="0.0.0.0", own_addresses=own.split())


@pytest.mark.parametrize(
    "host",
    [
        "0.0.0.0",
        "0.1.2.3",
        "255.255.255.255",
        "224.0.0.1",
        "239.255.255.250",
        "240.0.0.1",
        "169.254.169.254",
        "100.100.100.200",
        "192.0.0.192",
        "::",
        "fe80::1",
        "fec0::1",
        "ff02::1",
        "168.63.129.16",
        "fd00:ec2::254",
        "fd00:ec2::23",
        "fd00:c1::a9fe:a9fe",
        "fd20:ce::254",
        "::ffff:169.254.169.254",
        "::ffff:224.0.0.1",
        "64:ff9b::a9fe:a9fe",
        "2002:a9fe:a9fe::1",
        "::169.254.169.254",
        "64:ff9b:1::7f00:1",
        "64:ff9b:1:a9fe:a9:fe00::",
        "::ffff:0:127.0.0.1",
        "2001:0:cb00:7101:8000:63bf:3fff:fdd2",
    ],
)
def test_some_addresses_are_never_tried(host: str) -> None:
    everything = AddressPolicy(allow_private=True, allow_loopback=True)
    assert refusal(host, policy=everything, own=LAN) is not None


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "::ffff:127.0.0.1"])
def test_loopback_is_for_nodes_on_loopback(host: str) -> None:
    assert "loopback" in (refusal(host, own=LAN) or "")
    for bound in ("127.0.0.1", "::1"):
        assert AddressPolicy().refusal(host, bound_host=bound, own_addresses=[]) is None
    assert refusal(host, policy=AddressPolicy(allow_loopback=True)) is None


PRIVATE = ["10.1.2.3", "172.31.0.1", "192.168.7.7", "100.64.0.9", "fd12::1", "::ffff:10.1.2.3"]


@pytest.mark.parametrize("host", PRIVATE)
def test_private_addresses_are_for_nodes_in_private_networks(host: str) -> None:
    assert "private" in (refusal(host, own=PUBLIC) or "")
    assert "private" in (refusal(host, own="2001:db8::7 11.0.0.1 127.0.0.1 ::1") or "")
    assert refusal(host, own=f"{LAN} fd99::2 127.0.0.1 ::1") is None
    assert refusal(host, policy=AddressPolicy(allow_private=True)) is None


def test_behind_one_router_others_have_blocks_of_their_own() -> None:
    at_home_with_ipv6 = f"{LAN} 2001:db8::7 127.0.0.1"
    assert refusal("10.1.2.3", own=at_home_with_ipv6) is None
    assert "private" in (refusal("fd12::1", own=at_home_with_ipv6) or "")


def test_containers_on_a_public_machine_make_no_neighbours_of_other_private_networks() -> None:
    with_containers = "11.0.0.1 172.17.0.1 127.0.0.1"
    for host in ("10.1.2.3", "192.168.7.7", "100.64.0.9", "fd12::1", "::ffff:10.1.2.3"):
        assert "private" in (refusal(host, own=with_containers) or "")
    assert refusal("172.17.0.2", own=with_containers) is None


def test_a_node_that_stays_within_dials_nothing_beyond() -> None:
    within = AddressPolicy(only=lambda host: host.startswith("192.168.1."))
    assert "--offline" in (refusal(PUBLIC, policy=within, own=LAN) or "")
    assert refusal("192.168.1.9", policy=within, own=LAN) is None
    assert "multicast" in (refusal("224.0.0.1", policy=within, own=LAN) or "")


@pytest.mark.parametrize("host", ["11.0.0.1", "203.0.113.9", "2001:db8::1", "172.32.0.1"])
def test_public_addresses_are_welcome(host: str) -> None:
    assert refusal(host) is None


@given(st.ip_addresses())
def test_every_address_has_an_answer(address: ipaddress.IPv4Address) -> None:
    assert refusal(str(address), own=LAN) in (None, refusal(str(address), own=LAN))


async def test_the_winner_is_kept_and_the_others_are_cancelled(
    autojump_clock: trio.testing.MockClock,
) -> None:
    began: list[tuple[str, float]] = []
    cancelled: list[str] = []

    async def attempt(place: Candidate) -> str:
        began.append((place.host, round(trio.current_time() - start_s, 3)))
        try:
            await trio.sleep(0.6 if place is PLACES[1] else 60)
        except trio.Cancelled:
            cancelled.append(place.host)
            raise
        return place.host

    start_s = trio.current_time()
    assert await race(PEER, PLACES, attempt, lambda _: None) == PLACES[1].host
    assert began == [(p.host, 0.25 * i) for i, p in enumerate(PLACES[:4])]
    assert sorted(cancelled) == [PLACES[0].host, PLACES[2].host, PLACES[3].host]


async def test_a_failure_starts_the_next_at_once_and_all_reasons_are_kept(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async def attempt(place: Candidate) -> str:
        raise LinkClosed(f"no luck at {place.host}")

    start_s = trio.current_time()
    with pytest.raises(DialFailed) as failure:
        await race(PEER, [*PLACES, PLACES[0]], attempt, lambda _: None)
    assert trio.current_time() == start_s
    assert failure.value.failures == tuple((p, f"no luck at {p.host}") for p in PLACES)


async def test_two_winners_leave_one_to_discard(
    autojump_clock: trio.testing.MockClock,
) -> None:
    discarded: list[str] = []

    async def attempt(place: Candidate) -> str:
        with trio.CancelScope(shield=True):
            await trio.sleep(0.5 if place is PLACES[0] else 0.25)
        return place.host

    winner = await race(PEER, PLACES[:2], attempt, discarded.append)
    assert {winner, *discarded} == {PLACES[0].host, PLACES[1].host}


async def test_a_bug_in_an_attempt_is_not_swallowed() -> None:
    async def attempt(place: Candidate) -> str:
        raise ZeroDivisionError

    with pytest.raises(ExceptionGroup):
        await race(PEER, PLACES, attempt, lambda _: None)
