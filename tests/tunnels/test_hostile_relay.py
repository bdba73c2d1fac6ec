"""A relay that alters, drops, repeats or reorders what it carries, or joins us to somebody else."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable

import pytest
import trio
import trio.testing

from tests.lab.nodes import Pair, echo, identity, reach_through, start_node, two_nodes
from tests.lab.relays import relay_of, takes
from tests.tunnels.conftest import over_a_relay
from tunnels import DialFailed, Stream, TunnelError
from tunnels.relay import JOINING, RELAY, RELAYED, RESERVE, RESERVING, Relay
from tunnels.relay_caps import MIB, Carriage
from tunnels.relay_transport import AGREES_WITHIN_S

pytestmark = [pytest.mark.usefixtures("link_kind"), over_a_relay]


async def alter(data: bytes, sink: Stream) -> None:
    place = len(data) // 2
    await sink.send_all(data[:place] + bytes((data[place] ^ 1,)) + data[place + 1 :])


async def drop(data: bytes, sink: Stream) -> None:
    await sink.send_all(data[: len(data) // 2] + data[len(data) // 2 + 7 :])


async def repeat(data: bytes, sink: Stream) -> None:
    await sink.send_all(data + data[-64:])


async def reorder(data: bytes, sink: Stream) -> None:
    half = len(data) // 2
    await sink.send_all(data[half:] + data[:half])


class HostileRelay(Relay):
    """Does something to the first bytes beyond `after` that it carries for alice."""

    after_bytes = 0.0
    harm = staticmethod(alter)
    done = 0
    carried = 0

    async def _carry(self, near: Stream, far: Stream, carriage: Carriage) -> None:
        self.carried += 1
        await super()._carry(near, far, carriage)

    async def _copy(self, source: Stream, sink: Stream, carriage: Carriage) -> None:
        while data := await source.receive_some():
            carriage.carried_bytes += len(data)
            if carriage.carried_bytes > self.after_bytes and self._is_meant(source, sink):
                self.done += 1
                await self.harm(data, sink)
            else:
                await sink.send_all(data)
        await sink.send_eof()

    def _is_meant(self, source: Stream, sink: Stream) -> bool:
        alice = str(identity("alice").peer)
        return str(source.peer) == alice or str(sink.peer) == alice


def make_hostile(pair: Pair) -> HostileRelay:
    assert pair.rita is not None
    endpoint, honest = pair.rita.endpoint, relay_of(pair)
    hostile = HostileRelay(
        is_member=lambda _: True, session=endpoint.session, carries=honest.carries
    )
    hostile._reserved = honest._reserved
    endpoint.serve(RELAY, hostile.join, JOINING)
    return hostile


@pytest.mark.parametrize("after_bytes", [0, 100_000], ids=["at once", "in the middle"])
@pytest.mark.parametrize("harm", [alter, drop, repeat, reorder])
async def test_what_a_relay_does_to_the_bytes_ends_the_link_and_no_more(
    harm: Callable[[bytes, Stream], object],
    after_bytes: int,
    caplog: pytest.LogCaptureFixture,
    clock: object,
) -> None:
    caplog.set_level(logging.WARNING)
    async with two_nodes() as pair:
        assert pair.rita is not None
        pair.bob.endpoint.serve("echo", echo)
        carol = await start_node(
            pair.nursery, pair.world.host("11.0.0.3"), "carol", transports=("relay",)
        )
        await reach_through(pair.rita, carol)
        hostile = make_hostile(pair)
        hostile.harm = harm  # type: ignore[assignment]
        hostile.after_bytes = after_bytes
        for _ in range(5):
            with contextlib.suppress(DialFailed):
                assert await takes(await pair.connect(), MIB) < MIB
            await trio.sleep(1)
        assert hostile.done > 0
        assert hostile.carried < 20, "not tried again and again"
        warnings = [one for one in caplog.records if one.levelno >= logging.WARNING]
        assert len(warnings) <= 2, [one.getMessage() for one in warnings]
        # The others go on.
        session = await carol.endpoint.connect(
            pair.bob.endpoint.peer, pair.bob.endpoint.candidates()
        )
        assert await takes(session, MIB) == MIB


async def test_a_relay_that_joins_us_to_somebody_else_is_told_of_and_not_believed(
    caplog: pytest.LogCaptureFixture,
    clock: object,
) -> None:
    class Confused(Relay):
        async def _reach(self, near: Stream) -> Stream:
            session = self._session(identity("carol").peer)
            assert session is not None
            return await session.open(f"{RELAYED}{near.peer}")

    async with two_nodes() as pair:
        assert pair.rita is not None
        carol = await start_node(
            pair.nursery, pair.world.host("11.0.0.3"), "carol", transports=("relay",)
        )
        await reach_through(pair.rita, carol)
        honest = relay_of(pair)
        liar = Confused(
            is_member=lambda _: True, session=pair.rita.endpoint.session, carries=honest.carries
        )
        pair.rita.endpoint.serve(RELAY, liar.join, JOINING)
        with pytest.raises(DialFailed, match=f"{identity('carol').peer.short} answers there"):
            await pair.connect()
        with pytest.raises(DialFailed, match="altered"):
            await pair.connect()
        assert pair.guests() == []
        assert identity("rita").peer.short in caplog.text


async def test_a_relay_that_does_not_say_whether_it_agrees_is_not_waited_for(
    clock: object,
) -> None:
    async def say_nothing(stream: Stream) -> None:
        await trio.sleep_forever()

    async with two_nodes() as pair:
        assert pair.rita is not None
        rita = pair.rita.endpoint
        rita.serve(RESERVE, say_nothing, RESERVING)
        alice = pair.alice.endpoint
        session = alice.session(rita.peer)
        assert session is not None
        began_s = trio.current_time()
        with pytest.raises(TunnelError, match="does not say whether"):
            await alice.relaying.reserve(session, rita.candidates())
        assert trio.current_time() - began_s <= AGREES_WITHIN_S + 1
        assert not session.closed.is_set()
