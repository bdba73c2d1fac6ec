"""A stream as a blocking socket, for threads that have a disk at their other end.

What a thread reads and writes there is carried as a local connection is (splice.py): by a thread
too, where the link allows, and the event loop has its time for others (`./just bench pull`).
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

from tunnels.errors import StreamError
from tunnels.splice import Splice
from tunnels.stream import Stream

ROOM_BYTES = 1 << 20  # between the thread and who carries, as far as the system gives it


class BlockingEnd:
    """One end of a socket pair; the stream is at the other. The end of input is the stream's end,
    or its failure, which `as_socket` raises."""

    def __init__(self, sock: socket.socket) -> None:
        self.socket = sock
        self._carried = trio.Event()

    def hang_up(self) -> None:
        """Whoever reads or writes here in a thread stops waiting."""
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)

    async def finish(self) -> None:
        """No byte follows. Returns once all is on its way and the other side has ended too."""
        self.socket.shutdown(socket.SHUT_WR)
        await self._carried.wait()

    def over(self) -> None:
        """Nothing is carried any more."""
        self._carried.set()
        self.hang_up()


@asynccontextmanager
async def as_socket(stream: Stream) -> AsyncIterator[BlockingEnd]:
    """Nobody else uses the stream meanwhile; after that it is the caller's to close, or reset. All
    threads must have left the socket when the block ends. Raises StreamError where the stream
    fails, whatever the block makes of that."""
    near, far = socket.socketpair()
    for one in (near, far):
        one.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, ROOM_BYTES)
    end, failures, failed = BlockingEnd(far), list[StreamError](), None
    with far, trio.socket.from_stdlib_socket(near) as local:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_carry, stream, local, end, failures)
            try:
                yield end
            except Exception as error:
                failed = error
            nursery.cancel_scope.cancel()
    if failures:
        raise failures[0] from failed
    if failed is not None:
        raise failed


async def _carry(
    stream: Stream, local: trio.socket.SocketType, end: BlockingEnd, failures: list[StreamError]
) -> None:
    try:
        await Splice(stream, local).run()
    except* StreamError as group:
        failures += [one for one in group.exceptions if isinstance(one, StreamError)]
    except* (OSError, trio.ClosedResourceError):
        pass  # somebody hung up
    finally:
        end.over()
