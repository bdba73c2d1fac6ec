"""A session that nobody uses costs little, and is as watchful as ever once somebody does."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from tests.lab.crowd import CALM_BYTES_PER_S, STREAM_BYTES
from tests.lab.nodes import Pair, echo, exchange, two_nodes
from tunnels import Session
from tunnels import streams as streams_module
from tunnels.heartbeat import CALM_INTERVAL_S, PING_INTERVAL_S, SUSPECT_S
from tunnels.relay import RESERVE

pytestmark = pytest.mark.usefixtures("link_kind")
Clock = trio.testing.MockClock
WHILE_S = 100
WARM_UP_S = 20.0
STREAMS, SAID_BYTES = 20, 100
HEADER_BYTES = {"quic": 28, "tcp": 52}  # IPv4 and UDP; IPv4 and TCP with timestamps


async def wire_bytes(pair: Pair, link_kind: str, for_s: float) -> float:
    """What both ends of the session of `pair` send in a second, headers included."""
    sessions = [*pair.alice.endpoint.sessions(), *pair.bob.endpoint.sessions()]
    sent, packets = sum(one.stats.bytes_out for one in sessions), pair.world.sent
    await trio.sleep(for_s)
    sent = sum(one.stats.bytes_out for one in sessions) - sent
    return (sent + HEADER_BYTES[link_kind] * (pair.world.sent - packets)) / for_s


async def calm_session(pair: Pair) -> Session:
    pair.bob.endpoint.serve("echo", echo)
    session = await pair.connect()
    await trio.sleep(WARM_UP_S)
    return session


async def test_a_session_that_nobody_uses_costs_a_few_bytes_a_second(
    autojump_clock: Clock, link_kind: str
) -> None:
    async with two_nodes() as pair:
        await calm_session(pair)
        calm = await wire_bytes(pair, link_kind, WHILE_S) / 2
        async with await pair.alice.endpoint.sessions()[0].open("echo"):
            busy = await wire_bytes(pair, link_kind, WHILE_S) / 2
        assert calm < CALM_BYTES_PER_S
        assert busy > 5 * calm


async def test_a_short_conversation_costs_what_the_simulated_crowd_takes_it_to(
    autojump_clock: Clock, link_kind: str
) -> None:
    async with two_nodes() as pair:
        session = await calm_session(pair)

        async def converse() -> None:
            for _ in range(STREAMS):
                async with await session.open("echo") as stream:
                    assert await exchange(stream, bytes(SAID_BYTES)) == bytes(SAID_BYTES)
                await trio.sleep(WHILE_S / STREAMS / 2)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(converse)
            rate = await wire_bytes(pair, link_kind, WHILE_S) / 2 - CALM_BYTES_PER_S
        assert rate * WHILE_S / STREAMS - SAID_BYTES < STREAM_BYTES


async def test_a_calm_peer_is_not_suspected_and_its_distance_is_known(
    autojump_clock: Clock,
) -> None:
    async with two_nodes() as pair:
        session = await calm_session(pair)
        for _ in range(100):
            await trio.sleep(0.7)
            assert not session.suspected
        assert session.rtt_s == pytest.approx(0.02, abs=0.005)


async def test_a_peer_that_vanishes_from_a_calm_session_is_given_up_all_the_same(
    autojump_clock: Clock,
) -> None:
    async with two_nodes(dead_after_s=10) as pair:
        session = await calm_session(pair)
        pair.bob.kill()
        with trio.fail_after(CALM_INTERVAL_S + 10 + 2 * PING_INTERVAL_S):
            await session.closed.wait()


async def test_from_the_first_stream_on_silence_is_noticed_as_soon_as_ever(
    autojump_clock: Clock,
) -> None:
    async with two_nodes(dead_after_s=60) as pair:
        session = await calm_session(pair)
        async with await session.open("echo") as stream:
            await stream.send_all(b"x")
            await trio.sleep(0.5)
            pair.world.cut = True
            await trio.sleep(SUSPECT_S + 2 * PING_INTERVAL_S)
            [bobs] = pair.bob.endpoint.sessions()
            assert session.suspected
            assert bobs.suspected
            pair.world.cut = False


async def test_a_stream_that_is_only_held_open_keeps_nobody_awake(
    autojump_clock: Clock, link_kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reservation at a relay lasts for days."""
    assert {RESERVE} == streams_module.QUIET_SERVICES
    monkeypatch.setattr(streams_module, "QUIET_SERVICES", frozenset({"echo"}))
    async with two_nodes() as pair:
        session = await calm_session(pair)
        async with await session.open("echo"):
            await trio.sleep(WARM_UP_S)
            assert await wire_bytes(pair, link_kind, WHILE_S) / 2 < CALM_BYTES_PER_S
