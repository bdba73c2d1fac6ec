"""Streams that a thread carries: the same bytes, whatever happens to the channel or to either end.

Over real sockets: a thread waits for nothing else.
"""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial

import pytest
import trio

from tests.lab.nodes import anyone, identity
from tests.lab.stalls import until
from tunnels import Endpoint, Session, Stream, connect_and_splice, listen_and_forward, ride, splice
from tunnels.frames import Ack, Open, encode, encode_data
from tunnels.link import CloseCode
from tunnels.tcp_channels import TcpChannel

LOOPBACK = "127.0.0.1"
MIB = 1 << 20
PATIENCE_S = 30


@dataclass
class Road:
    """A local port at alice's; what connects there comes out at a program beside bob."""

    alice: Endpoint
    bob: Endpoint
    session: Session
    address: tuple[str, int]
    nursery: trio.Nursery

    async def connect(self) -> trio.SocketStream:
        return await trio.open_tcp_stream(*self.address)

    def streams(self) -> list[Stream]:
        sessions = [*self.alice.sessions(), *self.bob.sessions()]
        return [stream for one in sessions for stream in one._streams]

    def connections(self) -> list[TcpChannel]:
        channels = [stream.channel for stream in self.streams()]
        return [channel for channel in channels if isinstance(channel, TcpChannel)]

    async def add_link(self, kind: str) -> None:
        """Between the same two, whatever stands already."""
        [place] = [one for one in self.bob.candidates() if one.transport == kind]
        self.alice._sessions.adopt(await self.alice._attempt(self.bob.peer, place))


def rides() -> int:
    """Threads that carry streams now, of both ends: they are in this process."""
    return splice._seats.borrowed_tokens


async def until_rides(count: int) -> None:
    with trio.fail_after(10):
        while rides() != count:  # noqa: ASYNC110 - a thread sets no event
            await trio.sleep(0.005)


async def echo(connection: trio.SocketStream) -> None:
    async with connection:
        while data := await connection.receive_some():
            await connection.send_all(data)
        await connection.send_eof()


@asynccontextmanager
async def road(program: object = echo) -> AsyncIterator[Road]:
    with trio.fail_after(PATIENCE_S):
        async with trio.open_nursery() as nursery:
            [listener] = await trio.open_tcp_listeners(0, host=LOOPBACK)
            nursery.start_soon(partial(trio.serve_listeners, program, [listener]))  # type: ignore[arg-type]
            alice = Endpoint(identity("alice"), authorize=anyone)
            bob = Endpoint(identity("bob"), authorize=anyone)
            target = (LOOPBACK, listener.socket.getsockname()[1])
            bob.serve("road", partial(connect_and_splice, target=target))
            await nursery.start(alice.run, LOOPBACK, 0)
            await nursery.start(bob.run, LOOPBACK, 0)
            session = await alice.connect(bob.peer, bob.candidates())
            assert session.stats.link_kind == "tcp"
            address = await nursery.start(
                listen_and_forward, (LOOPBACK, 0), partial(session.open, "road")
            )
            yield Road(alice, bob, session, address, nursery)
            nursery.cancel_scope.cancel()
    await until_rides(0)


async def there_and_back(client: trio.SocketStream, data: bytes, dice: random.Random) -> bytes:
    """In pieces of any size, while what comes back is read."""
    received = bytearray()

    async def send() -> None:
        at = 0
        while at < len(data):
            size = dice.choice([1, 100, 10_000, 65_524, 65_536, 300_000])
            await client.send_all(data[at : at + size])
            at += size
        await client.send_eof()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(send)
        while piece := await client.receive_some():
            received += piece
    return bytes(received)


async def test_a_stream_that_is_only_carried_has_a_thread_at_both_ends() -> None:
    async with road() as one:
        client = await one.connect()
        await client.send_all(b"hello")
        assert await client.receive_some() == b"hello"
        await until_rides(2)
        await client.send_eof()
        assert await client.receive_some() == b""
        await until_rides(0)


@pytest.mark.parametrize("seed", range(3))
async def test_the_bytes_are_the_same_at_the_other_end(seed: int) -> None:
    dice = random.Random(seed)
    data = dice.randbytes(8 * MIB)
    async with road() as one:
        assert await there_and_back(await one.connect(), data, dice) == data


async def test_many_at_once_keep_their_bytes_apart() -> None:
    async with road() as one:

        async def exchange(seed: int) -> None:
            dice = random.Random(seed)
            data = dice.randbytes(MIB)
            assert await there_and_back(await one.connect(), data, dice) == data

        async with trio.open_nursery() as nursery:
            for seed in range(12):
                nursery.start_soon(exchange, seed)


async def test_beyond_so_many_threads_the_event_loop_carries(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(splice, "_seats", trio.CapacityLimiter(1))
    dice = random.Random(5)
    data = dice.randbytes(2 * MIB)
    async with road() as one:
        assert await there_and_back(await one.connect(), data, dice) == data


async def test_without_a_descriptor_left_for_a_thread_the_event_loop_carries(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class NoneLeft(ride.Ride):
        def __init__(self, *_given: object) -> None:
            raise OSError(24, "Too many open files")

    monkeypatch.setattr(splice, "Ride", NoneLeft)
    dice = random.Random(6)
    data = dice.randbytes(2 * MIB)
    async with road() as one:
        assert await there_and_back(await one.connect(), data, dice) == data
    assert "without a thread: Too many open files" in caplog.text


@pytest.mark.parametrize("seed", range(4))
async def test_channels_may_break_again_and_again(seed: int) -> None:
    """The stream moves to another connection of the same link; nothing is lost or doubled."""
    dice = random.Random(seed)
    data = dice.randbytes(24 * MIB)
    breaks = 0
    async with road() as one:

        async def break_channels() -> None:
            nonlocal breaks
            while True:
                await trio.sleep(dice.uniform(0.005, 0.05))
                for channel in one.connections()[:1]:
                    channel.connection.reset("cut by the test")
                    breaks += 1

        async with trio.open_nursery() as nursery:
            nursery.start_soon(break_channels)
            assert await there_and_back(await one.connect(), data, dice) == data
            nursery.cancel_scope.cancel()
    assert breaks > 3


@pytest.mark.parametrize("seed", range(2))
async def test_a_stream_goes_on_over_quic_when_the_tcp_link_dies_and_comes_back(seed: int) -> None:
    dice = random.Random(seed)
    data = dice.randbytes(12 * MIB)
    async with road() as one:
        await one.add_link("quic")

        async def flap() -> None:
            while True:
                await trio.sleep(0.1)
                best = one.session.best_link
                if best is not None and best.kind == "tcp":
                    best.close(CloseCode.LINK_OVER, "cut by the test")
                else:
                    await one.add_link("tcp")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(flap)
            assert await there_and_back(await one.connect(), data, dice) == data
            nursery.cancel_scope.cancel()


async def test_a_reader_that_stalls_stalls_the_writer_and_holds_nothing_up() -> None:
    async def stall(connection: trio.SocketStream) -> None:
        first = await connection.receive_some(1)
        if first == b"s":
            await trio.sleep_forever()
        await connection.send_all(first)
        await echo(connection)

    async with road(stall) as one:
        stalled = await one.connect()
        sent = 0
        with trio.move_on_after(1):
            while True:
                await stalled.send_all(b"s" * MIB)
                sent += MIB
        assert sent < 64 * MIB
        assert all(stream.kept_bytes <= 4 * MIB for stream in one.streams())
        client = await one.connect()
        await client.send_all(b"hello")
        assert await client.receive_some(1) == b"h"


async def test_a_stalled_stream_too_leaves_a_channel_that_broke() -> None:
    """While nobody reads, its thread waits for the local socket alone."""
    go_on = trio.Event()

    async def stall(connection: trio.SocketStream) -> None:
        await go_on.wait()
        await echo(connection)

    dice = random.Random(1)
    data = dice.randbytes(16 * MIB)
    async with road(stall) as one, trio.open_nursery() as nursery:
        client = await one.connect()

        async def exchange() -> None:
            assert await there_and_back(client, data, dice) == data

        nursery.start_soon(exchange)
        await until_rides(2)
        await trio.sleep(0.3)
        before = one.connections()
        assert len(before) == 2
        for channel in before:
            channel.connection.reset("cut by the test")
        with trio.fail_after(5):
            while set(one.connections()) & set(before):  # noqa: ASYNC110
                await trio.sleep(0.01)
        go_on.set()


async def test_a_session_that_ends_breaks_both_local_ends_and_leaves_no_thread() -> None:
    broken = trio.Event()

    async def wait(connection: trio.SocketStream) -> None:
        try:
            while await connection.receive_some():
                pass
        except trio.BrokenResourceError:
            broken.set()

    async with road(wait) as one:
        client = await one.connect()
        await client.send_all(b"x")
        await until_rides(2)
        one.session.end("enough")
        with pytest.raises(trio.BrokenResourceError):
            await client.receive_some()
        await broken.wait()
        await until_rides(0)


async def test_a_local_end_that_breaks_resets_the_stream() -> None:
    broken = trio.Event()

    async def wait(connection: trio.SocketStream) -> None:
        try:
            while await connection.receive_some():
                pass
        except trio.BrokenResourceError:
            broken.set()

    async with road(wait) as one:
        client = await one.connect()
        await client.send_all(b"x")
        await until_rides(2)
        client.setsockopt(1, 13, b"\x01\0\0\0\0\0\0\0")  # SO_LINGER: close sends a reset
        await client.aclose()
        await broken.wait()
        await until_rides(0)
        assert not one.session.closed.is_set()


async def test_bytes_that_break_the_rules_end_the_session_of_a_ride_too() -> None:
    async with road() as one:
        assert one.session.best_link is not None
        channel = await one.session.best_link.open_channel()
        channel.send(encode(Open(77, MIB, "road")) + encode_data(0, b"hello"))
        await until_rides(1)
        channel.send(encode_data(99, b"a gap"))
        with trio.fail_after(5):
            await one.session.closed.wait()
        assert one.session.close_reason == "stream bytes out of order"
        await until_rides(0)


async def test_who_only_makes_work_runs_into_debt() -> None:
    async with road() as one:
        assert one.session.best_link is not None
        channel = await one.session.best_link.open_channel()
        channel.send(encode(Open(77, MIB, "road")))
        await until_rides(1)
        [bobs] = one.bob.sessions()
        assert bobs.best_link is not None
        share = bobs.best_link.share
        channel.send(encode_data(0, b"x"))
        junk = encode(Ack(0, 0)) * 20_000  # they say nothing

        async def keep_sending() -> None:
            while True:
                await channel.wait_writable()
                channel.send(junk)
                await trio.sleep(0.01)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(keep_sending)
            # Watched from beside: who is in debt is not read from, and debts pass.
            await until(lambda: share.wait_s(trio.current_time()) > 0)
            nursery.cancel_scope.cancel()
