"""TCP connections as the tcp link sees them: never blocking, and waited for by trio."""

from __future__ import annotations

import contextlib
import errno
import logging
import socket
import sys
from collections.abc import Awaitable, Callable
from typing import Protocol

import trio

from tunnels.binding import Address, bound_socket, plain_host, reason_of, unreached
from tunnels.errors import LinkClosed, ListenFailed

RECEIVE_BYTES = 64 << 10
BACKLOG = 128
FULL_PAUSE_S = 0.25  # no descriptor is left: some may be given back
# The kernel doubles its wait after each try that gets no answer, up to two minutes: after an outage
# of 20 s nothing would move for another 5 to 25 (Linux 6.15; where it is missing, it is so).
_TCP_RTO_MAX_MS = 44
RETRY_AT_LEAST_EVERY_MS = 1000
# It would give up after fifteen tries, which that makes fifteen seconds. How long a silent peer is
# kept is the session's to say.
_TCP_USER_TIMEOUT = 18
GIVE_UP_MS = 3600 * 1000
CONNECT_AGAIN_S = 0.25
CONNECT_WITHIN_S = 2.5  # so ten at once
_NO_ROOM = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)

log = logging.getLogger(__name__)


class ByteSocket(Protocol):
    """One TCP connection. Every failure is an OSError."""

    remote: Address
    kernel: socket.socket | None  # for a thread that may wait by itself (express.py)

    def send(self, data: bytes | memoryview) -> int:
        """Hand bytes to the network; how many it took, 0 when it is full."""

    async def wait_writable(self) -> None: ...

    async def receive(self) -> bytes:
        """At least one byte, at most RECEIVE_BYTES; b"" at the end."""

    def drop_arrived(self) -> None:
        """Throw away what has arrived, that closing may not become a reset."""

    def finish(self) -> None:
        """No byte follows; what was sent still arrives."""

    def reset(self) -> None:
        """Close, and let the other side know that this is no orderly end."""

    def close(self) -> None: ...


class Listener(Protocol):
    @property
    def local(self) -> Address: ...

    async def accept(self) -> ByteSocket:
        """Raises trio.ClosedResourceError after close."""

    def close(self) -> None: ...


class TcpSocket:
    """A connection of this machine's kernel."""

    def __init__(self, sock: socket.socket, remote: Address) -> None:
        self.kernel: socket.socket | None = sock
        self.remote = remote
        self._socket = sock
        self._closed = False
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if sys.platform == "linux":
            with contextlib.suppress(OSError):
                sock.setsockopt(socket.IPPROTO_TCP, _TCP_RTO_MAX_MS, RETRY_AT_LEAST_EVERY_MS)
            with contextlib.suppress(OSError):
                sock.setsockopt(socket.IPPROTO_TCP, _TCP_USER_TIMEOUT, GIVE_UP_MS)

    def send(self, data: bytes | memoryview) -> int:
        try:
            return self._socket.send(data)
        except (BlockingIOError, InterruptedError):
            return 0

    async def wait_writable(self) -> None:
        await trio.lowlevel.wait_writable(self._socket)

    async def receive(self) -> bytes:
        await trio.lowlevel.checkpoint_if_cancelled()
        while True:
            try:
                data = self._socket.recv(RECEIVE_BYTES)
            except (BlockingIOError, InterruptedError):
                await trio.lowlevel.wait_readable(self._socket)
            else:
                await trio.lowlevel.cancel_shielded_checkpoint()
                return data

    def drop_arrived(self) -> None:
        with contextlib.suppress(OSError):
            while self._socket.recv(RECEIVE_BYTES):
                pass

    def finish(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR)

    def reset(self) -> None:
        if not self._closed:
            with contextlib.suppress(OSError):
                linger = b"\x01\x00\x00\x00\x00\x00\x00\x00"  # on, 0 s: close sends RST
                self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.close()

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            trio.lowlevel.notify_closing(self._socket)
            self._socket.close()


class TcpListener:
    """I accept connections on one port."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._closed = False
        self._is_full = False
        sock.setblocking(False)

    @property
    def local(self) -> Address:
        host, port = self._socket.getsockname()[:2]
        return plain_host(host), port

    async def accept(self) -> ByteSocket:
        await trio.lowlevel.checkpoint()
        while True:
            if self._closed:
                raise trio.ClosedResourceError
            try:
                sock, remote = self._socket.accept()
            except (BlockingIOError, InterruptedError):
                await trio.lowlevel.wait_readable(self._socket)
            except OSError as error:
                if error.errno in _NO_ROOM:
                    self._tell_no_room(error)
                    await trio.sleep(FULL_PAUSE_S)
            else:
                self._is_full = False
                with contextlib.suppress(OSError):  # it may be gone already
                    return TcpSocket(sock, (plain_host(remote[0]), remote[1]))
                sock.close()

    def _tell_no_room(self, error: OSError) -> None:
        """Once, not four times a second."""
        if not self._is_full:
            self._is_full = True
            why = reason_of(error.errno)
            log.warning("connections of peers wait: %s; raise the limit (ulimit -n)", why)

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            trio.lowlevel.notify_closing(self._socket)
            self._socket.close()


def listen(host: str | None, port: int) -> TcpListener:
    """host None: every interface, v4 and v6. Raises ListenFailed."""
    sock = bound_socket(host, port, socket.SOCK_STREAM)
    try:
        sock.listen(BACKLOG)
    except OSError as error:
        sock.close()
        raise ListenFailed(f"cannot listen on TCP port {port}: {reason_of(error.errno)}") from error
    return TcpListener(sock)


async def connect(to: Address) -> TcpSocket:
    """Raises LinkClosed with the reason, Refused where that is it."""
    family = socket.AF_INET6 if ":" in to[0] else socket.AF_INET
    try:
        sock = socket.socket(family, socket.SOCK_STREAM)
    except OSError as error:
        raise LinkClosed(reason_of(error.errno)) from error
    try:
        waiting = trio.socket.from_stdlib_socket(sock)
        await waiting.connect(to)
        return TcpSocket(sock, to)
    except OSError as error:
        sock.close()
        raise unreached(error.errno) from error
    except BaseException:
        sock.close()
        raise


async def connect_soon(connect: Callable[[], Awaitable[ByteSocket]]) -> ByteSocket:
    """A connection, as soon as the way is there: the kernel tries again after a second, then two,
    so another is begun beside it. Raises LinkClosed."""
    made: list[ByteSocket] = []
    failures: list[LinkClosed] = []

    async def begin() -> None:
        with trio.move_on_after(CONNECT_WITHIN_S):
            try:
                made.append(await connect())
            except LinkClosed as error:
                failures.append(error)
            nursery.cancel_scope.cancel()

    try:
        async with trio.open_nursery() as nursery:
            while True:
                nursery.start_soon(begin)
                await trio.sleep(CONNECT_AGAIN_S)
    except BaseException:
        for unwanted in made:
            unwanted.reset()
        raise
    for late in made[1:]:
        late.reset()
    if not made:
        raise failures[0]
    return made[0]
