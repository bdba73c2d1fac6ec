"""One connection to a web server, for the thread that waits on it.

Measured beside others from a local nginx, writing to a sparse file, two busy cores: this way 380 to
570 MB/s, curl 250 to 370, httpx 200 to 250. The head is h11's, which is strict; the body goes from
the kernel straight into one room, and from there to the disk a megabyte at a time. In trio's own
thread each write would hold up the whole node.

Everything here blocks: for at most the stall time where nothing comes, and for little longer where
next to nothing does. `hang_up` may be called from any thread
and ends whatever is waited for.
"""

from __future__ import annotations

import contextlib
import selectors
import socket
import ssl
import time
from collections.abc import Callable, Mapping

import h11

from meshnode.models.pull.answers import Head
from meshnode.models.pull.patience import Patience, TooLittle
from meshnode.models.pull.source import SourceError, SourceFault
from meshnode.models.pull.url import Origin, Url

Into = Callable[[memoryview], None]

ROOM_BYTES = 1 << 20
MAX_HEAD_BYTES = 64 << 10
MAX_INTERIM_ANSWERS = 8
_HEAD_READ_BYTES = 64 << 10
_HAND_OVER_EVERY_S = 0.25


class NothingCame(SourceFault):
    """The connection ended before a byte of the answer: on one used before, as servers may."""


class Exchange:
    """I am one connection. Requests follow each other while `is_reusable`."""

    def __init__(self, connected: socket.socket, stall_s: float) -> None:
        connected.settimeout(stall_s)
        self._socket = connected
        self._stall_s = stall_s
        self._http = h11.Connection(h11.CLIENT, max_incomplete_event_size=MAX_HEAD_BYTES)
        self._room: bytearray | None = None
        self._head: Head | None = None
        self._proxy_headers: list[tuple[str, str]] | None = None
        self._keeps_open = False
        self._is_spent = True
        self.was_used = False

    def secure(self, context: ssl.SSLContext, host: str) -> None:
        """TLS from here on, with the certificate of `host`. Raises `SourceError` where it is not
        that, `SourceFault`."""
        try:
            self._socket = context.wrap_socket(self._socket, server_hostname=host)
        except ssl.SSLCertVerificationError as error:
            raise SourceError(
                f"whoever answers for {host} has no valid certificate "
                f"({error.verify_message}): not used"
            ) from error
        except (OSError, ValueError) as error:
            raise SourceFault(f"no TLS with {host}: {_reason(error)}") from error

    def tunnel(self, origin: Origin, authorization: str | None) -> None:
        """Through the proxy at the other end, on to `origin`. Raises `SourceFault`."""
        through = h11.Connection(h11.CLIENT, max_incomplete_event_size=MAX_HEAD_BYTES)
        target = f"{origin.authority_with_port}"
        headers = [("Host", target), *_for_proxy(authorization)]
        request = h11.Request(method="CONNECT", target=target, headers=headers)
        try:
            self._socket.sendall(through.send(request) or b"")
            through.send(h11.EndOfMessage())
            status = self._next_head(through).status
        except (OSError, h11.RemoteProtocolError) as error:
            raise SourceFault(f"the proxy on the way to {target}: {_reason(error)}") from error
        if not 200 <= status < 300:
            raise SourceFault(f"the proxy on the way to {target} refuses it ({status})")

    def forward(self, authorization: str | None) -> None:
        """At the other end is a proxy, which is told whole addresses."""
        self._proxy_headers = _for_proxy(authorization)

    def ask(self, url: Url, headers: Mapping[str, str]) -> Head:
        """Sends a request; the head of the answer. Raises `SourceFault`."""
        own = [("Host", url.origin.authority), ("User-Agent", "mesh"), *headers.items()]
        target = url.target
        if self._proxy_headers is not None:
            target = f"{url.origin.scheme}://{url.origin.authority}{target}"
            own += self._proxy_headers
        request = h11.Request(method="GET", target=target, headers=own)
        data = self._http.send(request) or b""
        data += self._http.send(h11.EndOfMessage()) or b""
        self._is_spent = True  # until the answer was read to its end
        try:
            self._socket.sendall(data)
            self._head = self._next_head(self._http)
        except OSError as error:
            raise self._fault(error, url, nothing=True) from error
        except h11.RemoteProtocolError as error:
            raise SourceFault(f"{url.shown} was answered with what is no HTTP: {error}") from error
        return self._head

    def receive(self, url: Url, skip: int, size_bytes: int, into: Into) -> None:
        """Hands over `size_bytes` of the body, after `skip` that are passed over. Raises
        `SourceFault` where it ends early, `SourceError` where it goes on although a part was asked
        for; what `into` raises."""
        assert self._head is not None
        counted = _Counted(skip, size_bytes, into)
        length = self._head.number("content-length")
        self._read_body(url, counted)
        if counted.excess_bytes and self._head.status == 206:
            raise SourceError(f"{url.shown} sends more bytes than were asked for: not used")
        is_framed = self._head.get("transfer-encoding") is not None
        self._is_spent = bool(counted.excess_bytes) or not (
            self._keeps_open and (is_framed or length == skip + size_bytes)
        )

    def body(self, url: Url, max_bytes: int) -> bytes:
        """A small body, whole. Raises as `receive`, `SourceError` where it is larger."""
        assert self._head is not None
        parts: list[bytes] = []
        length = self._head.number("content-length")
        wanted = max_bytes + 1 if length is None else min(length, max_bytes + 1)
        counted = _Counted(0, wanted, lambda data: parts.append(bytes(data)))
        try:
            self._read_body(url, counted)
        except SourceFault as error:
            if length is not None or not isinstance(error.__cause__, _Ended):
                raise
        data = b"".join(parts)
        if len(data) > max_bytes:
            raise SourceError(f"{url.shown} is larger than what it is said to be can be")
        return data

    @property
    def is_reusable(self) -> bool:
        """The answer was read to its end, and nothing came after it."""
        if self._is_spent or self._http.trailing_data[0]:
            return False
        if isinstance(self._socket, ssl.SSLSocket) and self._socket.pending():
            return False
        with selectors.DefaultSelector() as selector:
            selector.register(self._socket, selectors.EVENT_READ)
            return not selector.select(0)

    def renew(self) -> None:
        """Ready for the next request."""
        self._http = h11.Connection(h11.CLIENT, max_incomplete_event_size=MAX_HEAD_BYTES)
        self._head = None
        self.was_used = True

    def hang_up(self) -> None:
        # Not the TLS socket's own shutdown: it takes the TLS away under the feet of a reader.
        with contextlib.suppress(OSError):
            socket.socket.shutdown(self._socket, socket.SHUT_RDWR)

    def close(self) -> None:
        self._socket.close()

    def _next_head(self, http: h11.Connection) -> Head:
        give_up_at = time.monotonic() + 2 * self._stall_s
        for _ in range(MAX_INTERIM_ANSWERS):
            while (event := http.next_event()) is h11.NEED_DATA:
                data = self._socket.recv(_HEAD_READ_BYTES)
                if not data:
                    raise _Ended(None)
                if time.monotonic() > give_up_at:
                    raise TooLittle(f"its answer had not begun after {2 * self._stall_s:g} s")
                http.receive_data(data)
            if isinstance(event, h11.Response):
                headers = tuple(
                    (name.decode("latin-1"), value.decode("latin-1"))
                    for name, value in event.headers
                )
                head = Head(event.status_code, headers)
                closes = (head.get("connection") or "").lower() == "close"
                self._keeps_open = event.http_version == b"1.1" and not closes
                return head
        raise h11.RemoteProtocolError("an answer is announced again and again, and never sent")

    def _read_body(self, url: Url, counted: _Counted) -> None:
        assert self._head is not None
        try:
            if self._head.get("transfer-encoding") is None:
                self._receive_plain(counted, self._head.number("content-length"))
            else:
                self._receive_framed(counted)
        except h11.RemoteProtocolError as error:
            raise SourceFault(f"{url.shown} broke off: {error}") from error
        except OSError as error:
            raise self._fault(error, url) from error
        except _IntoFailed as error:
            raise error.error from None

    def _receive_plain(self, counted: _Counted, length: int | None) -> None:
        """A body of a known length, or up to the end of the connection."""
        arrived, _ = self._http.trailing_data
        counted.hand_over(memoryview(arrived))
        room = memoryview(self._own_room())
        filled, handed_over_at = 0, time.monotonic()
        patience = Patience(self._stall_s)
        try:
            while counted.wants_bytes > filled:
                stop = min(ROOM_BYTES, counted.wants_bytes)
                asked_at = time.monotonic()
                got = self._socket.recv_into(room[filled:stop])
                if not got:
                    raise _Ended(length)
                filled += got
                now = time.monotonic()
                patience.note(got, now - asked_at)
                if filled == stop or now - handed_over_at > _HAND_OVER_EVERY_S:
                    ready, filled, handed_over_at = filled, 0, now
                    counted.hand_over(room[:ready])
        except OSError:
            counted.hand_over(room[:filled])
            raise
        # What was read of the head with a part of the body in it is not for the next answer.
        self._http = h11.Connection(h11.CLIENT, max_incomplete_event_size=MAX_HEAD_BYTES)

    def _receive_framed(self, counted: _Counted) -> None:
        """A body in chunks, or one that h11 is to find the end of."""
        patience = Patience(self._stall_s)
        while not isinstance(event := self._http.next_event(), h11.EndOfMessage):
            if event is h11.NEED_DATA:
                asked_at = time.monotonic()
                data = self._socket.recv(_HEAD_READ_BYTES)
                patience.note(len(data), time.monotonic() - asked_at)
                self._http.receive_data(data)
            elif isinstance(event, h11.Data):
                counted.hand_over(memoryview(event.data))
                if counted.excess_bytes:
                    return
            else:
                raise _Ended(None)
        if counted.wants_bytes:
            raise _Ended(None)

    def _own_room(self) -> bytearray:
        if self._room is None:
            self._room = bytearray(ROOM_BYTES)
        return self._room

    def _fault(self, error: OSError, url: Url, *, nothing: bool = False) -> SourceFault:
        if isinstance(error, TooLittle):
            return SourceFault(f"{url.shown}: {error}")
        if isinstance(error, TimeoutError):
            return SourceFault(f"{url.shown}: not a byte came for {self._stall_s:g} s")
        if isinstance(error, _Ended) and not nothing:
            return SourceFault(f"{url.shown}: {error}")
        kind = NothingCame if nothing else SourceFault
        return kind(f"{url.shown}: the connection broke ({_reason(error)})")


class _Ended(OSError):
    """The server ended the connection before it had sent what it announced."""

    def __init__(self, length: int | None) -> None:
        announced = "" if length is None else f" of {length} bytes"
        super().__init__(f"the answer{announced} ended early")


class _IntoFailed(Exception):
    """What took the bytes failed: an OSError of a disk is none of a connection."""

    def __init__(self, error: Exception) -> None:
        self.error = error


class _Counted:
    """What of a body is wanted, and how much is still to come. `excess_bytes` came beyond it."""

    def __init__(self, skip: int, size_bytes: int, into: Into) -> None:
        self.skip_bytes = skip
        self.left_bytes = size_bytes
        self.excess_bytes = 0
        self._into = into

    @property
    def wants_bytes(self) -> int:
        return self.skip_bytes + self.left_bytes

    def hand_over(self, data: memoryview) -> None:
        skipped = min(self.skip_bytes, len(data))
        self.skip_bytes -= skipped
        wanted = data[skipped : skipped + self.left_bytes]
        self.left_bytes -= len(wanted)
        self.excess_bytes += len(data) - skipped - len(wanted)
        if wanted:
            try:
                self._into(wanted)
            except Exception as error:
                raise _IntoFailed(error) from error


def _for_proxy(authorization: str | None) -> list[tuple[str, str]]:
    return [] if authorization is None else [("Proxy-Authorization", authorization)]


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
