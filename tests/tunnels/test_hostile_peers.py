"""Peers that hold a valid key and break the rules: they lose their session, we lose nothing."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from tests.lab.nodes import Pair, echo, exchange, two_nodes
from tests.tunnels.conftest import over_every_kind
from tunnels import Session, StreamRefused, TunnelError
from tunnels.errors import SessionClosed
from tunnels.frames import (
    Ack,
    Data,
    Open,
    Ping,
    Pong,
    RecordDecoder,
    Reset,
    Resume,
    encode,
    encode_data,
    parse_record_untrusted,
)
from tunnels.link import Channel
from tunnels.streams import MAX_STREAMS

pytestmark = [pytest.mark.usefixtures("link_kind"), over_every_kind]


async def raw_channel(session: Session) -> Channel:
    """A channel below the session's own protocol."""
    assert session.best_link is not None
    return await session.best_link.open_channel()


async def ends_the_session(pair: Pair, session: Session) -> None:
    with trio.fail_after(2):
        await session.closed.wait()
    await trio.sleep(0.1)
    assert pair.bob.endpoint.sessions() == []
    again = await pair.connect()
    assert await exchange(await again.open("echo"), b"still here") == b"still here"


@pytest.mark.parametrize(
    "wire",
    [
        pytest.param(b"GET / HTTP/1.1\r\n\r\n", id="another protocol"),
        pytest.param(encode(Ping(1)), id="a control record"),
        pytest.param(encode(Open(0, 99, "echo")) + encode_data(5, b"x"), id="a gap"),
        pytest.param(encode(Open(0, 99, "echo")) + encode(Pong(5)), id="a pong in a stream"),
        pytest.param(encode(Open(0, 99, "echo")) + encode(Ack(1, 9)), id="an unearned ACK"),
        pytest.param(
            encode(Open(0, 99, "echo"))
            + b"".join(encode_data(i << 16, bytes(1 << 16)) for i in range(17)),
            id="more than the window",
        ),
    ],
)
async def test_a_broken_channel_ends_the_session(
    wire: bytes, autojump_clock: trio.testing.MockClock
) -> None:
    async def never_read(_: object) -> None:
        await trio.sleep_forever()

    async with two_nodes() as pair:
        pair.bob.endpoint.serve("echo", never_read)
        session = await pair.connect()
        (await raw_channel(session)).send(wire)
        with trio.fail_after(2):
            await session.closed.wait()
        pair.bob.endpoint.serve("echo", echo)
        await ends_the_session(pair, session)


async def test_opening_a_stream_twice_ends_the_session(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with two_nodes() as pair:
        pair.bob.endpoint.serve("echo", echo)
        session = await pair.connect()
        for _ in range(2):
            (await raw_channel(session)).send(encode(Open(7, 99, "echo")))
        await ends_the_session(pair, session)


async def test_a_stream_whose_move_overtakes_its_opening_is_opened_once(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """No fault of anybody: the link that was slow had lost a packet, the other was faster. A second
    late OPEN is one."""
    async with two_nodes() as pair:
        pair.bob.endpoint.serve("echo", echo)
        session = await pair.connect()
        slow, fast, again = [await raw_channel(session) for _ in range(3)]
        fast.send(encode(Resume(7, 0, 99, "echo")))
        await trio.sleep(0.1)
        slow.send(encode(Open(7, 99, "echo")))
        await trio.sleep(0.1)
        assert not session.closed.is_set(), session.close_reason
        fast.send(encode_data(0, b"hello"))
        heard = RecordDecoder()
        echoed = b""
        with trio.fail_after(2):
            while not echoed:
                found = heard.feed_untrusted(await fast.receive())
                echoed = b"".join(bytes(one.payload) for one in found if isinstance(one, Data))
        assert echoed == b"hello"
        again.send(encode(Open(7, 99, "echo")))
        await ends_the_session(pair, session)


async def test_a_stream_record_on_the_control_channel_ends_the_session(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with two_nodes() as pair:
        pair.bob.endpoint.serve("echo", echo)
        session = await pair.connect()
        session._links[0].control.send(encode(Data(0, b"x")))
        await ends_the_session(pair, session)


async def test_a_control_channel_that_ends_ends_the_session(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with two_nodes() as pair:
        pair.bob.endpoint.serve("echo", echo)
        session = await pair.connect()
        session._links[0].control.finish()
        await ends_the_session(pair, session)


async def test_a_channel_that_stays_silent_is_reset(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with two_nodes() as pair:
        session = await pair.connect()
        channel = await raw_channel(session)
        channel.send(b"\x20\x00")  # the beginning of a header
        with trio.fail_after(6), pytest.raises(TunnelError, match="reset"):
            await channel.receive()
        assert not session.closed.is_set()


async def test_resuming_a_stream_that_is_not_there_is_told_so(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with two_nodes() as pair:
        session = await pair.connect()
        channel = await raw_channel(session)
        channel.send(encode(Resume(12345, 0, 0)))
        answer = await channel.receive()
        assert isinstance(parse_record_untrusted(answer[0], answer[4:]), Reset)
        assert await channel.receive() == b""
        assert not session.closed.is_set()


async def test_too_many_streams_are_refused_on_both_sides(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with two_nodes() as pair:
        pair.bob.endpoint.serve("echo", echo)
        session = await pair.connect()
        for _ in range(MAX_STREAMS):
            await session.open("echo")
        with pytest.raises(TunnelError, match="open already"):
            await session.open("echo")
        await trio.sleep(1)  # channels may overtake one another: let all of them arrive
        channel = await raw_channel(session)
        channel.send(encode(Open(9999, 99, "echo")))
        answer = await channel.receive()
        reset = parse_record_untrusted(answer[0], answer[4:])
        assert isinstance(reset, Reset)
        assert "too many streams" in reset.reason


async def test_refused_streams_do_not_count(autojump_clock: trio.testing.MockClock) -> None:
    async with two_nodes() as pair:
        pair.bob.endpoint.serve("echo", echo)
        session = await pair.connect()
        for _ in range(3 * MAX_STREAMS):
            stream = await session.open("nothing")
            with pytest.raises(StreamRefused):
                await stream.receive_some()
        assert await exchange(await session.open("echo"), b"hello") == b"hello"


async def test_a_session_that_ended_opens_nothing(autojump_clock: trio.testing.MockClock) -> None:
    async with two_nodes() as pair:
        session = await pair.connect()
        await session.aclose()
        with pytest.raises(SessionClosed):
            await session.open("echo")
        with pytest.raises(ValueError, match="1 to 255 bytes"):
            await session.open("")
        assert session.rtt_s is None
        assert session.stats.remote is None
        assert session.stats.bytes_out > 0
