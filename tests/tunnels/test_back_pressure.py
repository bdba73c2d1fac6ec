"""A reader that stalls holds the writer; memory stays bounded on both sides."""

from __future__ import annotations

import gc

import psutil
import pytest
import trio

from tests.lab.nodes import anyone, echo, identity
from tunnels import Endpoint, Stream
from tunnels.credit import INITIAL_WINDOW_BYTES, MAX_WINDOW_BYTES

GIB = 1 << 30
PIECE = bytes(range(256)) * 4096  # 1 MiB
READ_PIECES = 8
ALLOWED_GROWTH_BYTES = 64 << 20


def resident_bytes() -> int:
    gc.collect()
    return int(psutil.Process().memory_info().rss)


class Pusher:
    """Pushes 1 GiB and counts what was taken off its hands."""

    def __init__(self) -> None:
        self.taken = 0

    async def push(self, stream: Stream) -> None:
        for _ in range(GIB // len(PIECE)):
            await stream.send_all(PIECE)
            self.taken += len(PIECE)

    async def stands_still(self) -> None:
        """Until a whole second has passed in which nothing was taken."""
        before = -1
        while before != self.taken:
            before = self.taken
            await trio.sleep(1)


@pytest.mark.parametrize("kinds", [("tcp", "quic"), ("webrtc",)], ids=",".join)
async def test_a_gibibyte_at_a_stalled_reader_grows_memory_by_less_than_64_mib(
    kinds: tuple[str, ...],
) -> None:
    wake = trio.Event()
    received = trio.Event()

    async def stall(stream: Stream) -> None:
        await wake.wait()
        for _ in range(READ_PIECES):
            got = b""
            while len(got) < len(PIECE):
                got += await stream.receive_some(len(PIECE) - len(got))
            assert got == PIECE
        received.set()
        await trio.sleep_forever()

    async with trio.open_nursery() as nursery:
        alice = Endpoint(identity("alice"), authorize=anyone, transports=kinds)
        bob = Endpoint(identity("bob"), authorize=anyone, transports=kinds)
        bob.serve("stall", stall)
        bob.serve("echo", echo)
        await nursery.start(alice.run, "127.0.0.1", 0)
        await nursery.start(bob.run, "127.0.0.1", 0)
        session = await alice.connect(bob.peer, bob.candidates())
        await (await session.open("echo")).aclose()  # what a link takes is loaded by now
        before = resident_bytes()
        pushers = [Pusher() for _ in range(2)]
        with trio.fail_after(50):
            for pusher in pushers:
                nursery.start_soon(pusher.push, await session.open("stall"))
            for pusher in pushers:
                await pusher.stands_still()
                assert pusher.taken <= INITIAL_WINDOW_BYTES
            assert resident_bytes() - before < ALLOWED_GROWTH_BYTES
            # the stalled ones hold nobody else up
            other = await session.open("echo")
            await other.send_all(b"hello")
            assert await other.receive_some() == b"hello"
            # once the reader reads, bytes flow, and the window it earns is bounded too
            wake.set()
            await received.wait()
            for pusher in pushers:
                await pusher.stands_still()
                assert pusher.taken <= (READ_PIECES + 1) * len(PIECE) + MAX_WINDOW_BYTES
            assert resident_bytes() - before < ALLOWED_GROWTH_BYTES
        nursery.cancel_scope.cancel()
