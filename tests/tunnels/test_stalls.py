"""A peer that stops at any step of a tunnel's protocols is dropped within that step's limit."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection
from functools import partial

import pytest
import trio
import trio.testing

from tests.lab.connections import FakeConnection
from tests.lab.nodes import Pair, echo, two_nodes
from tests.lab.strangers import first_initial
from tests.tunnels.test_hostile_peers import raw_channel
from tests.tunnels.test_identity_attacks import Conversation, dialler, raw_link
from tunnels import DialFailed, Stream, quic_transport
from tunnels.dial import GIVE_UP_S
from tunnels.frames import Ack, End, Open, Resume, Stop, encode
from tunnels.link import Channel, Link
from tunnels.linking import ACCEPT_TIMEOUT_S
from tunnels.opening import DRAIN_TIMEOUT_S, HEADER_TIMEOUT_S
from tunnels.quic_channels import QuicChannel
from tunnels.quic_transport import QuicTransport
from tunnels.streams import SEE_OFF_S
from tunnels.tcp_channels import TcpChannel
from tunnels.tcp_transport import TcpTransport

pytestmark = pytest.mark.usefixtures("link_kind")
LATE_S = 1.0


def links_of(transport: object) -> Collection[object]:
    if isinstance(transport, QuicTransport):
        return transport._links
    assert isinstance(transport, TcpTransport)
    return transport._running


def is_told_to_stop(channel: Channel) -> bool:
    if isinstance(channel, QuicChannel):
        return channel._finished
    assert isinstance(channel, TcpChannel)
    socket = channel.connection.socket
    assert isinstance(socket, FakeConnection)
    return socket._was_reset


async def only_the_first_knock(pair: Pair) -> None:
    [place] = pair.bob.endpoint.candidates()
    if place.transport == "quic":
        pair.world.inject(first_initial(), ("11.6.6.6", 6), (place.host, place.port))
    else:
        await pair.world.host("11.6.6.6").connect((place.host, place.port))


async def no_word_after_tls(pair: Pair) -> None:
    await raw_link(pair)


async def half_a_hello(pair: Pair) -> None:
    channel = await (await raw_link(pair)).open_channel()
    channel.send(b"\x01\x00\x00")


async def a_hello_without_proof(pair: Pair) -> None:
    link = await raw_link(pair)
    talk = await Conversation.over(link)
    talk.say(dialler(pair.alice.endpoint.identity, link, pair.bob.endpoint.peer).start()[0])


@pytest.mark.parametrize(
    "until", [only_the_first_knock, no_word_after_tls, half_a_hello, a_hello_without_proof]
)
async def test_a_stranger_that_stops(
    until: Callable[[Pair], Awaitable[None]], autojump_clock: trio.testing.MockClock
) -> None:
    async with two_nodes() as pair:
        [transport] = pair.bob.endpoint._linking.transports.values()
        assert isinstance(transport, QuicTransport | TcpTransport)
        await until(pair)
        await trio.sleep(0.5)
        assert transport._door.half_open == 1
        await trio.sleep(ACCEPT_TIMEOUT_S + LATE_S)
        assert transport._door.half_open == 0
        assert not links_of(transport)
        assert pair.bob.endpoint.sessions() == []


async def say_nothing(_link: Link) -> None:
    await trio.sleep_forever()


async def take_the_channel_only(link: Link) -> None:
    await link.accept_channel()
    await trio.sleep_forever()


async def say_half(link: Link) -> None:
    (await link.accept_channel()).send(b"\x01\x00")
    await trio.sleep_forever()


@pytest.mark.parametrize("listener", [say_nothing, take_the_channel_only, say_half])
async def test_a_listener_that_stops(
    listener: Callable[[Link], Awaitable[None]], autojump_clock: trio.testing.MockClock
) -> None:
    async with two_nodes() as pair:
        [transport] = pair.bob.endpoint._linking.transports.values()
        assert isinstance(transport, QuicTransport | TcpTransport)
        transport._accept = listener
        began_s = trio.current_time()
        with pytest.raises(DialFailed):
            await pair.connect()
        assert trio.current_time() - began_s <= GIVE_UP_S + LATE_S
        assert pair.alice.endpoint.sessions() == []
        [ours] = pair.alice.endpoint._linking.transports.values()
        await trio.sleep(LATE_S)
        assert not links_of(ours)


HEADERS = {
    "half a header": (b"\x20\x00", HEADER_TIMEOUT_S),
    "a refused stream that is not ended": (encode(Open(0, 99, "nothing")), DRAIN_TIMEOUT_S),
    "a RESUME of nothing that is not ended": (encode(Resume(9, 0, 0)), DRAIN_TIMEOUT_S),
    "a stream that is over, on a channel that is not": (
        encode(Open(0, 1 << 20, "short")) + encode(Stop()) + encode(End(0)),
        DRAIN_TIMEOUT_S,
    ),
}


@pytest.mark.parametrize("stall", HEADERS)
async def test_a_channel_that_stops(stall: str, autojump_clock: trio.testing.MockClock) -> None:
    words, limit_s = HEADERS[stall]

    async def short(stream: object) -> None:
        pass

    async with two_nodes() as pair:
        pair.bob.endpoint.serve("short", short)
        pair.bob.endpoint.serve("echo", echo)
        session = await pair.connect()
        channel = await raw_channel(session)
        channel.send(words)
        if "over" in stall:
            await trio.sleep(0.1)
            answer = await channel.receive()
            assert answer
            channel.send(b"\x31\x00\x00\x10" + (1).to_bytes(8, "big") + bytes(8))  # ACK of its END
        reads_no_more = partial(is_told_to_stop, channel)
        await trio.sleep(limit_s - LATE_S)
        assert not reads_no_more()
        await trio.sleep(2 * LATE_S)
        assert reads_no_more(), "bob has told us that he reads no more"
        assert not session.closed.is_set()


async def test_a_proven_peer_that_falls_silent(autojump_clock: trio.testing.MockClock) -> None:
    async with two_nodes(dead_after_s=10) as pair:
        await pair.connect()
        pair.world.unplug("11.0.0.1")
        await trio.sleep(10 + 2 * LATE_S)
        assert pair.bob.endpoint.sessions() == []


async def test_a_proven_peer_that_takes_nothing_of_what_we_say(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with two_nodes(dead_after_s=10) as pair:
        session = await pair.connect()
        [bobs] = pair.bob.endpoint.sessions()

        async def never() -> None:
            await trio.sleep_forever()

        bobs._links[0].control.wait_writable = never  # type: ignore[method-assign]
        with trio.fail_after(12):
            await session.closed.wait()
        assert session.close_reason == "the other side takes nothing of what is sent"


def test_the_limits_are_what_this_page_says() -> None:
    limits_s = (ACCEPT_TIMEOUT_S, HEADER_TIMEOUT_S, DRAIN_TIMEOUT_S, GIVE_UP_S)
    assert limits_s == (5.0, 5.0, 10.0, 7.5)
    assert quic_transport.IDLE_TIMEOUT_S == 120.0


@pytest.mark.parametrize("acknowledges", [True, False])
async def test_a_closed_stream_is_seen_off_as_long_as_it_is_acknowledged(
    acknowledges: bool, autojump_clock: trio.testing.MockClock
) -> None:
    steps = 4

    async def answer_and_close(stream: Stream) -> None:
        for _ in range(steps):
            await stream.send_all(b"x")

    async with two_nodes() as pair:
        pair.bob.endpoint.serve("short", answer_and_close)
        session = await pair.connect()
        [bobs] = pair.bob.endpoint.sessions()
        channel = await raw_channel(session)
        channel.send(encode(Open(0, 1 << 20, "short")))
        await trio.sleep(LATE_S)
        for taken in range(1, steps + 1):
            await trio.sleep(SEE_OFF_S - 2 * LATE_S)
            assert bobs._streams
            if acknowledges:
                channel.send(encode(Ack(taken, 1 << 20)))
            await trio.sleep(2 * LATE_S)
            assert bool(bobs._streams) is acknowledges
            if not acknowledges:
                break
        else:
            channel.send(encode(Ack(steps + 1, 1 << 20)) + encode(End(0)))
            await trio.sleep(LATE_S)
            assert not bobs._streams
        assert not session.closed.is_set()
