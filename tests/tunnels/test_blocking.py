"""A stream as a blocking socket: threads at its ends see what a stream's user would see."""

from __future__ import annotations

import random
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial

import pytest
import trio

from tests.lab.nodes import anyone, identity
from tunnels import BlockingEnd, Endpoint, Session, Stream, StreamReset, as_socket, splice

LOOPBACK = "127.0.0.1"
SIZE_BYTES = (3 << 20) + 1
PATIENCE_S = 30


@asynccontextmanager
async def joined(serve: Callable[[Stream], Awaitable[None]], kind: str) -> AsyncIterator[Session]:
    """Alice's session with bob, who has a service. Over real sockets, as threads need."""
    with trio.fail_after(PATIENCE_S):
        async with trio.open_nursery() as nursery:
            alice, bob = (
                Endpoint(identity(name), authorize=anyone, transports=(kind,))
                for name in ("alice", "bob")
            )
            bob.serve("data", serve)
            for one in (alice, bob):
                await nursery.start(one.run, LOOPBACK, 0)
            yield await alice.connect(bob.peer, bob.candidates())
            nursery.cancel_scope.cancel()


async def in_thread(end: BlockingEnd, work: Callable[[socket.socket], object]) -> object:
    """Hung up on when it is cancelled, as `meshnode.models.pull.threads` does it."""
    outcome: list[object] = []

    def run() -> None:
        try:
            outcome.append(work(end.socket))
        except OSError as error:
            outcome.append(error)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.to_thread.run_sync, run)
        try:
            while not outcome:  # noqa: ASYNC110 - a thread sets no event
                await trio.sleep(0.002)
        finally:
            if not outcome:
                end.hang_up()
    return outcome[0]


def read_all(local: socket.socket) -> bytes:
    return b"".join(iter(partial(local.recv, 1 << 16), b""))


@pytest.mark.parametrize("kind", ["tcp", "quic"])
async def test_threads_at_both_ends_hand_the_same_bytes_on_and_see_the_end(kind: str) -> None:
    data = random.Random(1).randbytes(SIZE_BYTES)

    async def give(stream: Stream) -> None:
        assert await stream.receive_some() == b"?"
        await stream.send_all(data[:1])  # said by the event loop, before a thread goes on
        async with as_socket(stream) as end:
            await in_thread(end, lambda local: local.sendall(data[1:]))
            await end.finish()

    async with joined(give, kind) as session:
        async with await session.open("data") as stream:
            await stream.send_all(b"?")
            async with as_socket(stream) as end:
                assert await in_thread(end, read_all) == data
        async with await session.open("data") as stream:  # once more, as nothing was left behind
            await stream.send_all(b"?")
            async with as_socket(stream) as end:
                assert await in_thread(end, lambda local: local.recv(1)) == data[:1]
    assert splice._seats.borrowed_tokens == 0


async def test_a_stream_that_is_reset_says_why_to_whoever_waits_in_a_thread() -> None:
    async def refuse(stream: Stream) -> None:
        await stream.send_all(b"12")
        stream.reset("the disk is gone")

    async with joined(refuse, "tcp") as session, await session.open("data") as stream:
        with pytest.raises(StreamReset, match="the disk is gone"):
            async with as_socket(stream) as end:
                await in_thread(end, read_all)


async def test_what_fails_beside_the_stream_comes_out_as_itself() -> None:
    async def idle(stream: Stream) -> None:
        await stream.receive_some()

    async with joined(idle, "tcp") as session, await session.open("data") as stream:
        with pytest.raises(LookupError, match="nowhere"):
            async with as_socket(stream):
                raise LookupError("nowhere")
        await stream.send_all(b"?")
        assert await stream.receive_some() == b"", "the stream itself is whole, and ended by bob"


async def test_who_is_cancelled_leaves_no_thread_and_no_seat() -> None:
    async def idle(stream: Stream) -> None:
        await stream.send_all(b"1")
        await trio.sleep_forever()

    async with joined(idle, "tcp") as session, await session.open("data") as stream:
        with trio.CancelScope() as scope:
            async with as_socket(stream) as end:
                assert await in_thread(end, lambda local: local.recv(1)) == b"1"

                async def read() -> None:
                    await in_thread(end, read_all)

                async with trio.open_nursery() as nursery:
                    nursery.start_soon(read)
                    await trio.testing.wait_all_tasks_blocked()
                    scope.cancel()
        assert scope.cancelled_caught
        assert splice._seats.borrowed_tokens <= 1, "bob's own"
