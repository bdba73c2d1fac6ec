"""What a node can say of its links: how far, how steady, what was lost, since when."""

from __future__ import annotations

import socket

import pytest
import trio
import trio.testing

from tests.lab.datagrams import Weather
from tests.lab.nodes import anyone, echo, exchange, identity, two_nodes
from tests.tunnels.conftest import over_quic, over_tcp
from tunnels import Endpoint, LinkStats
from tunnels.stats import Losses, kernel_losses

pytestmark = pytest.mark.usefixtures("link_kind")
Clock = trio.testing.MockClock
HELLO = bytes(300_000)


async def test_a_link_says_how_far_its_end_is_and_since_when(
    autojump_clock: Clock, link_kind: str
) -> None:
    async with two_nodes(Weather(delay_s=0.03)) as pair:
        session = await pair.connect()
        began_s = trio.current_time()
        await trio.sleep(10)
        [link] = session.links()
        assert (link.kind, link.in_use, link.relayed) == (link_kind, True, False)
        assert link.remote.startswith("11.0.0.2:")
        assert link.rtt_s == pytest.approx(0.06, abs=0.005)
        assert link.smoothed_rtt_s == pytest.approx(0.06, abs=0.005)
        assert link.jitter_s == pytest.approx(0, abs=0.002)
        assert link.since_s == session.since_s == pytest.approx(began_s, abs=0.1)
        [theirs] = pair.bob.endpoint.sessions()[0].links()
        assert (link.dialled_here, theirs.dialled_here) == (True, False)


async def test_a_network_that_wavers_shows_as_jitter(autojump_clock: Clock) -> None:
    async with two_nodes(Weather(delay_s=0.03, jitter_s=0.05), seed=3) as pair:
        session = await pair.connect()
        await trio.sleep(60)
        [link] = session.links()
        assert link.jitter_s is not None
        assert 0.005 < link.jitter_s < 0.1


async def test_pings_are_answered_over_each_link(autojump_clock: Clock, link_kind: str) -> None:
    async with two_nodes(Weather(delay_s=0.03)) as pair:
        session = await pair.connect()
        took: list[tuple[LinkStats, float]] = []
        await session.ping(lambda link, seconds: took.append((link, seconds)))
        [(link, seconds)] = took
        assert link.kind == link_kind
        assert seconds == pytest.approx(0.06, abs=0.005)


async def test_a_ping_that_nothing_answers_is_given_up_by_who_asked(
    autojump_clock: Clock,
) -> None:
    async with two_nodes() as pair:
        session = await pair.connect()
        pair.world.cut = True
        with trio.move_on_after(3) as patience:
            await session.ping(lambda _link, _seconds: pytest.fail("an answer out of nowhere"))
        assert patience.cancelled_caught
        pair.world.cut = False
        await trio.sleep(2)
        answers: list[float] = []
        await session.ping(lambda _link, seconds: answers.append(seconds))
        assert answers, "one a link: after the outage there may be a second"


@over_quic
async def test_what_the_network_loses_is_counted(autojump_clock: Clock) -> None:
    async with two_nodes(Weather(loss=0.05), seed=1) as pair:
        pair.bob.endpoint.serve("echo", echo)
        session = await pair.connect()
        async with await session.open("echo") as stream:
            assert await exchange(stream, HELLO) == HELLO
        [link] = session.links()
        assert link.loss is not None
        assert 0.01 < link.loss < 0.15


@over_quic
async def test_where_nothing_is_lost_none_is_counted(autojump_clock: Clock) -> None:
    async with two_nodes() as pair:
        pair.bob.endpoint.serve("echo", echo)
        session = await pair.connect()
        async with await session.open("echo") as stream:
            assert await exchange(stream, HELLO) == HELLO
        [link] = session.links()
        assert link.loss == 0


@over_tcp
async def test_over_the_kernels_tcp_losses_are_known() -> None:
    """On loopback, by the kernel's own counters."""
    alice = Endpoint(identity("alice"), authorize=anyone, transports=("tcp",))
    bob = Endpoint(identity("bob"), authorize=anyone, transports=("tcp",))
    async with trio.open_nursery() as nursery:
        for endpoint in (alice, bob):
            await nursery.start(endpoint.run, "127.0.0.1", 0)
        session = await alice.connect(bob.peer, bob.candidates())
        [link] = session.links()
        assert link.loss is not None
        assert link.loss < 0.5  # a busy machine may be late, and a segment sent twice for that
        nursery.cancel_scope.cancel()


def test_a_connection_that_the_kernel_says_nothing_of_has_no_losses() -> None:
    assert kernel_losses([None]) is None
    with socket.socket() as closed:
        pass
    assert kernel_losses([closed]) is None
    assert Losses().share is None
    assert Losses(sent=8, lost=2).share == 0.25
