"""A web server on loopback that does what a test says: honest at first, hostile when told."""

from __future__ import annotations

import email.utils
import re
import ssl
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import trio

from meshnode.models.spans import Span, within

_RANGE = re.compile(r"bytes=(\d+)-(\d+)")
MODIFIED = email.utils.formatdate(1_700_000_000, usegmt=True)


@dataclass(frozen=True)
class Query:
    """One request as it came. stop: after the last byte asked for; 0: no range was named."""

    target: str
    headers: dict[str, str]
    start: int = 0
    stop: int = 0

    @property
    def is_first_look(self) -> bool:
        return (self.start, self.stop) == (0, 1)


Behaviour = Callable[[Query, trio.abc.Stream], Awaitable[bool]]
"""Answers a request; whether the connection is kept."""


@dataclass
class Web:
    """I serve one file under every path. `behave` answers in my place where it is set."""

    content: bytes
    etag: str | None = '"one"'
    modified: str | None = None
    behave: Behaviour | None = None
    tls: ssl.SSLContext | None = None
    port: int = 0
    connections: int = 0
    queries: list[Query] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"{'https' if self.tls else 'http'}://127.0.0.1:{self.port}/model.gguf"

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        self.port = listener.socket.getsockname()[1]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.serve_listeners, self._serve, [listener])
            task_status.started()

    async def say(self, data: bytes, stream: trio.abc.Stream, status: int = 200) -> bool:
        """A small document, or a status with nothing to it."""
        told = f"HTTP/1.1 {status} So\r\nContent-Length: {len(data)}\r\n\r\n"
        await stream.send_all(told.encode() + data)
        return True

    async def honest(self, query: Query, stream: trio.abc.Stream) -> bool:
        if query.stop == 0:
            await stream.send_all(self.head(200, len(self.content)) + self.content)
        elif query.start >= len(self.content):
            await stream.send_all(self.head(416, 0, f"Content-Range: bytes */{len(self.content)}"))
        elif query.headers.get("if-range") not in (None, self.etag, self.modified):
            await stream.send_all(self.head(200, len(self.content)) + self.content)
        else:
            await stream.send_all(self.part_head(query) + self.content[query.start : query.stop])
        return True

    def part_head(self, query: Query, length: int | None = None) -> bytes:
        stop = min(query.stop, len(self.content))
        told = f"Content-Range: bytes {query.start}-{stop - 1}/{len(self.content)}"
        return self.head(206, stop - query.start if length is None else length, told)

    def head(self, status: int, length: int | None, *lines: str) -> bytes:
        told = [f"HTTP/1.1 {status} So", *lines]
        if length is not None:
            told.append(f"Content-Length: {length}")
        if self.etag is not None:
            told.append(f"ETag: {self.etag}")
        if self.modified is not None:
            told.append(f"Last-Modified: {self.modified}")
        return ("\r\n".join(told) + "\r\n\r\n").encode("latin-1")

    async def _serve(self, stream: trio.abc.Stream) -> None:
        self.connections += 1
        if self.tls is not None:
            stream = trio.SSLStream(stream, self.tls, server_side=True, https_compatible=True)
        try:
            while (query := await _read_query(stream)) is not None:
                self.queries.append(query)
                if not await (self.behave or self.honest)(query, stream):
                    await stream.aclose()
                    return
        except (trio.BrokenResourceError, trio.ClosedResourceError, ssl.SSLError):
            return


async def _read_query(stream: trio.abc.Stream) -> Query | None:
    data = b""
    while b"\r\n\r\n" not in data:
        more = await stream.receive_some()
        if not more:
            return None
        data += more
    first, *lines = data.decode("latin-1").split("\r\n\r\n")[0].split("\r\n")
    headers = {}
    for line in lines:
        name, _, value = line.partition(":")
        headers[name.strip().lower()] = value.strip()
    asked = _RANGE.fullmatch(headers.get("range", ""))
    start, stop = (int(asked[1]), int(asked[2]) + 1) if asked else (0, 0)
    return Query(first.split(" ")[1], headers, start, stop)


def redirect(location: str, *lines: str, status: int = 302) -> bytes:
    told = [f"HTTP/1.1 {status} There", f"Location: {location}", "Content-Length: 0", *lines]
    return ("\r\n".join(told) + "\r\n\r\n").encode()


class Bucket:
    """A sink in memory that holds what is done against the truth: of what is called done, every
    byte must be there and right."""

    def __init__(self, truth: bytes) -> None:
        self.truth = truth
        self.data = bytearray(len(truth))
        self.written: list[Span] = []
        self.held: list[Span] = []

    def write(self, file_index: int, offset: int, data: memoryview) -> None:
        assert len(data)
        self.data[offset : offset + len(data)] = data
        self.written.append(Span(file_index, offset, offset + len(data)))

    def done(self, file_index: int, start: int, stop: int) -> tuple[Span, ...]:
        span = Span(file_index, start, stop)
        assert within((span,), self.written) == (span,), "called done before it was written"
        assert self.data[start:stop] == self.truth[start:stop], "called done with wrong bytes"
        self.held.append(span)
        return ()

    def missing(self, tensors: object) -> tuple[Span, ...]:
        raise NotImplementedError

    @property
    def held_bytes(self) -> int:
        return sum(span.size_bytes for span in self.held)
