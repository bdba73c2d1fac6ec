"""A relayed stream as the tcp link sees it: a ByteSocket (tcp_socket.py)."""

from __future__ import annotations

import errno
import socket

import trio

from tunnels.binding import Address
from tunnels.errors import BadFrame, StreamError
from tunnels.peer import PeerId
from tunnels.relay import Carries, parse_carries_untrusted
from tunnels.stream import Stream
from tunnels.tcp_socket import RECEIVE_BYTES


class RelayedSocket:
    """One end of what a relay joins. Its first byte is the relay's, all others the peer's."""

    kernel: socket.socket | None = None

    def __init__(self, stream: Stream, peer: PeerId, way: str) -> None:
        """peer: at the other end, by what the relay says. way: to the relay, for display."""
        self.relay: PeerId = stream.peer
        self.peer = peer
        self.way = way
        self.remote: Address = (str(stream.peer), 0)
        self.carries: Carries | None = None  # once the relay has said so
        self.closed = trio.Event()
        self._stream = stream

    def send(self, data: bytes | memoryview) -> int:
        try:
            return self._stream.send_some(data)
        except StreamError as error:
            raise _broken(error) from error

    async def wait_writable(self) -> None:
        try:
            await self._stream.wait_send_all_might_not_block()
        except StreamError as error:
            raise _broken(error) from error

    async def receive(self) -> bytes:
        try:
            if self.carries is None:
                self.carries = parse_carries_untrusted(await self._stream.receive_some(1))
            return await self._stream.receive_some(RECEIVE_BYTES)
        except (StreamError, BadFrame) as error:
            raise _broken(error) from error

    def drop_arrived(self) -> None:
        """A stream that is closed with bytes unread is closed all the same."""

    def finish(self) -> None:
        self._stream.end_now()

    def reset(self) -> None:
        self._stream.reset("the other side reset the channel")
        self.closed.set()

    def close(self) -> None:
        self._stream.close_now()
        self.closed.set()


def _broken(error: Exception) -> OSError:
    return OSError(errno.ECONNABORTED, str(error))
