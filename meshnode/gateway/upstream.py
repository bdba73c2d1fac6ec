"""One request to llama-server and its answer, over a connection of its own.

h11 on a unix socket with nothing between: a client made for each request, with its pool, its
redirects and its cookies, was a third of what the gateway added to the first token.
"""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import h11
import trio

CONNECT_TIMEOUT_S = 5.0
CONNECT_AGAIN_S = 0.005
READ_BYTES = 64 * 1024
MAX_HEAD_BYTES = 100 * 1024
_ONE_WRITE_BYTES = 64 * 1024  # up to here, copying a body costs less than a second write


class UpstreamError(Exception):
    """An exchange with llama-server that came to nothing."""


class UpstreamUnreachable(UpstreamError):
    """Nobody listens at its socket."""


class UpstreamBroken(UpstreamError):
    """It broke off, or what it sent is no HTTP."""


@dataclass(frozen=True)
class UpstreamRequest:
    """`body`: JSON, or nothing."""

    method: str
    path: str
    body: bytes = b""

    def head(self) -> h11.Request:
        headers = [("host", "localhost"), ("accept", "*/*"), ("connection", "close")]
        if self.method == "POST":
            headers += [("content-type", "application/json")]
            headers += [("content-length", str(len(self.body)))]
        return h11.Request(method=self.method, target=self.path, headers=headers)


@dataclass(frozen=True)
class Answer:
    """The beginning of an answer. `pieces` is the rest as it comes, all that one read brought in
    one; it raises `UpstreamBroken`."""

    status: int
    headers: Mapping[str, str]
    pieces: AsyncIterator[bytes]


@asynccontextmanager
async def open_answer(path: Path, request: UpstreamRequest) -> AsyncIterator[Answer]:
    """Sends `request` and waits for the beginning of the answer; the block's end closes the
    connection, which is how generation is stopped. Raises `UpstreamError`."""
    try:
        with trio.fail_after(CONNECT_TIMEOUT_S):
            stream = await _connect(path)
    except (OSError, trio.TooSlowError) as error:
        raise UpstreamUnreachable(f"no connection to llama-server: {error}") from error
    async with stream:
        connection = _Connection(stream)
        await connection.send(request)
        head = await connection.next_head()
        headers = {name.decode(): value.decode("latin-1") for name, value in head.headers}
        yield Answer(head.status_code, headers, connection.pieces())


async def _connect(path: Path) -> trio.SocketStream:
    """At once, unless more wait to be accepted than the kernel keeps: then as soon as it can be.
    (`trio.open_unix_socket` takes that answer for a connection.)"""
    plain = socket.socket(socket.AF_UNIX)
    try:
        plain.setblocking(False)
        while True:
            try:
                plain.connect(str(path))
                return trio.SocketStream(trio.socket.from_stdlib_socket(plain))
            except BlockingIOError:
                await trio.sleep(CONNECT_AGAIN_S)
    except BaseException:
        plain.close()
        raise


class _Connection:
    """I am the client of a connection that serves one request."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self._stream = stream
        self._http = h11.Connection(h11.CLIENT, max_incomplete_event_size=MAX_HEAD_BYTES)

    async def send(self, request: UpstreamRequest) -> None:
        head = self._http.send(request.head()) or b""
        body = self._http.send(h11.Data(data=request.body)) if request.body else None
        self._http.send(h11.EndOfMessage())
        # A server that has closed may have said why: that is read next.
        with suppress(trio.BrokenResourceError):
            if body and len(body) <= _ONE_WRITE_BYTES:
                await self._stream.send_all(head + body)
            else:
                await self._stream.send_all(head)
                await self._stream.send_all(body or b"")

    async def next_head(self) -> h11.Response:
        while True:
            event = self._next_event()
            if event is h11.NEED_DATA:
                await self._read()
            elif isinstance(event, h11.Response):
                return event
            elif not isinstance(event, h11.InformationalResponse):
                raise UpstreamBroken("llama-server closed without an answer")

    async def pieces(self) -> AsyncIterator[bytes]:
        has_ended = False
        while not has_ended:
            piece = b""
            while isinstance(event := self._next_event(), h11.Data):
                piece += event.data
            has_ended = event is not h11.NEED_DATA
            if piece:
                yield piece
            elif not has_ended:
                await self._read()

    def _next_event(self) -> h11.Event | type[h11.NEED_DATA] | type[h11.PAUSED]:
        try:
            return self._http.next_event()
        except h11.RemoteProtocolError as error:
            raise UpstreamBroken(f"llama-server's answer is no HTTP: {error}") from error

    async def _read(self) -> None:
        try:
            data = await self._stream.receive_some(READ_BYTES)
        except trio.BrokenResourceError as error:
            raise UpstreamBroken("llama-server broke off the connection") from error
        self._http.receive_data(data)
