"""Two nodes sound the link between them: what is found, told, bounded, and put off."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import cbor2
import pytest
import trio

from meshnode.errors import BadMessage
from meshnode.messages import MessageStream
from meshnode.pipeline import probing as module
from meshnode.pipeline import sounding
from meshnode.pipeline.probing import PROBE_SERVICE, Probing, parse_probe_untrusted
from meshnode.pipeline.sounding import BURSTS_BYTES, MOST_BYTES
from tunnels import Endpoint, Identity, Session, Stream, StreamError

SOON_S = 20


@dataclass
class Side:
    """One node, reduced to its soundings."""

    endpoint: Endpoint
    sessions: list[Session] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.probing = Probing(lambda: self.sessions)

    async def rate(self) -> float | None:
        """What is known of the other's way to here, once what can be is."""
        with trio.fail_after(SOON_S):
            await self.probing.settle()
        (way,) = self.probing.ways()
        return way.bytes_per_s


@asynccontextmanager
async def two(*, offers: bool = True) -> AsyncIterator[tuple[Side, Side]]:
    sides = [
        Side(Endpoint(Identity.generate(), authorize=lambda _peer, _service: True))
        for _ in range(2)
    ]
    one, other = sides
    async with trio.open_nursery() as nursery:
        for side in sides:
            await nursery.start(side.endpoint.run, "127.0.0.1", 0)
            nursery.start_soon(side.probing.run)
            side.endpoint.serve("talk", swallow)
            if offers:
                side.probing.offer(side.endpoint)
        session = await one.endpoint.connect(other.endpoint.peer, other.endpoint.candidates())
        back = other.endpoint.session(one.endpoint.peer)
        assert back is not None
        one.sessions, other.sessions = [session], [back]
        with trio.fail_after(SOON_S):
            while session.rtt_s is None or back.rtt_s is None:  # noqa: ASYNC110 - nothing tells
                await trio.sleep(0.01)
        yield one, other
        nursery.cancel_scope.cancel()


async def swallow(stream: Stream) -> None:
    async for _ in stream:
        pass


async def test_both_ends_ask_at_once_and_each_knows_what_comes_in() -> None:
    async with two() as (one, other):
        assert [way.bytes_per_s for way in one.probing.ways()] == [None]
        found = dict[str, float | None]()

        async def ask(name: str, side: Side) -> None:
            found[name] = await side.rate()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask, "one", one)
            nursery.start_soon(ask, "other", other)
        for rate in found.values():
            assert rate is not None
            assert rate > 1e6, "loopback is no slower than that"
        (way,) = one.probing.ways()
        assert way.peer == other.endpoint.peer
        assert way.rtt_s == one.sessions[0].rtt_s
        assert way.age_s < SOON_S


async def test_what_was_found_is_asked_for_again_only_once_it_is_old(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with two() as (one, _other):
        await one.rate()
        moved = one.sessions[0].stats.bytes_in
        await one.rate()
        one.probing.want()
        assert one.sessions[0].stats.bytes_in - moved < BURSTS_BYTES[0]
        monkeypatch.setattr(sounding, "FRESH_S", 0.0)
        with trio.fail_after(SOON_S):
            await one.probing.settle()
        assert one.sessions[0].stats.bytes_in - moved > BURSTS_BYTES[0]


async def test_while_something_goes_over_a_link_of_either_nothing_is_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "ATTEMPTS", 2)
    async with two() as (one, other):
        async with trio.open_nursery() as nursery:

            async def talk() -> None:
                async with await other.sessions[0].open("talk") as stream:
                    while True:
                        await stream.send_all(bytes(8192))
                        await trio.sleep(0.02)

            nursery.start_soon(talk)
            await trio.sleep(0.5)
            assert await one.rate() is None
            nursery.cancel_scope.cancel()
        await trio.sleep(0.5)
        assert await one.rate() is not None, "it was put off, not given up"


async def test_a_member_of_before_gives_none_and_is_not_asked_again_at_once() -> None:
    async with two(offers=False) as (one, _other):
        assert await one.rate() is None
        moved = one.sessions[0].stats.bytes_out
        assert await one.rate() is None
        assert one.sessions[0].stats.bytes_out - moved < 1000


async def test_nobody_gets_more_than_a_sounding() -> None:
    async with two() as (one, _other):
        stream = await one.sessions[0].open(PROBE_SERVICE)
        got = list[int]()

        async def take() -> None:
            async for data in stream:
                got.append(len(data))

        with trio.fail_after(SOON_S):
            for _ in range(5):
                await MessageStream(stream).send({"give": BURSTS_BYTES[-1]})
            with pytest.raises(StreamError, match="more than a sounding"):
                await take()
        assert sum(got) <= 1.1 * MOST_BYTES


async def test_a_peer_that_is_far_is_sounded_over_several_lines(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "FAR_S", 0.0)
    opened = list[str]()
    async with two() as (one, _other):
        really = one.sessions[0].open

        async def open_told(service: str) -> Stream:
            opened.append(service)
            return await really(service)

        monkeypatch.setattr(one.sessions[0], "open", open_told)
        rate = await one.rate()
        assert rate is not None
        assert rate > 1e6
        assert opened.count(PROBE_SERVICE) >= module.FAR_LINES


async def test_an_asker_that_stops_holds_up_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SOUNDING_LIMIT_S", 0.5)
    async with two() as (one, other):
        stream = await one.sessions[0].open(PROBE_SERVICE)
        await MessageStream(stream).send({"give": 1})
        assert await stream.receive_some(1)
        assert await other.rate() is not None


@pytest.mark.parametrize(
    "give", [0, -1, BURSTS_BYTES[-1] + 1, 2**64, 1.5, True, "much", None, [1]], ids=repr
)
def test_bursts_of_other_sizes_are_refused(give: Any) -> None:
    with pytest.raises(BadMessage):
        parse_probe_untrusted(cbor2.loads(cbor2.dumps({"give": give})))
    with pytest.raises(BadMessage):
        parse_probe_untrusted({})
