"""The gateway's sockets: bound exactly where told, served by hypercorn, closed at once."""

from __future__ import annotations

import errno
import logging
import math
import socket
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import cast

import hypercorn.protocol.h2
import trio
from hypercorn.app_wrappers import ASGIWrapper
from hypercorn.config import Config
from hypercorn.trio.tcp_server import TCPServer
from hypercorn.trio.worker_context import WorkerContext
from hypercorn.typing import ASGIFramework, ConnectionState
from starlette.routing import BaseRoute
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from meshnode.config import Address
from meshnode.errors import NetworkError
from meshnode.gateway.app import make_app
from meshnode.gateway.rules import WILDCARDS, HostRule
from meshnode.gateway.view import NodeView

BACKLOG = 128
MAX_CONNECTIONS = 256
IDLE_CONNECTION_S = 60
SEND_STALL_S = 300.0
WINDOW_STALL_S = SEND_STALL_S + 5.0
"""For an HTTP/2 client to open its window. Later than the other: hypercorn must not be cancelled
while it tells the application that a send has failed."""

_log = logging.getLogger(__name__)


class GatewayListenFailed(NetworkError):
    """The gateway's address cannot be listened at."""


class GatewayPortInUse(GatewayListenFailed):
    """Another program listens at the gateway's port."""


async def serve_gateway(
    view: NodeView,
    host: str,
    port: int,
    further: Sequence[BaseRoute] = (),
    *,
    task_status: trio.TaskStatus[int] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serves until cancelled; the started value is the bound port (for `port` 0, the one found).
    `further`: routes of the node's besides the model's own.

    Raises `GatewayPortInUse` and `GatewayListenFailed` before it has started. Cancelled, it closes
    every connection at once: requests in flight end with their connection.
    """
    listeners = await _listen(host, port)
    bound: int = listeners[0].socket.getsockname()[1]
    app = make_app(view, HostRule.for_bound(host), further)
    server = _ConnectionServer(app)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.serve_listeners, server.serve, listeners)
        task_status.started(bound)
        try:
            await trio.sleep_forever()
        finally:
            server.abort()


async def _listen(host: str, port: int) -> list[trio.SocketListener]:
    """Every address that `host` names, at one port; for port 0 the first of them only."""
    name = None if host in WILDCARDS - {"0.0.0.0", "::"} else host  # noqa: S104
    try:
        listeners = await trio.open_tcp_listeners(port, host=name, backlog=BACKLOG)
    except (socket.gaierror, UnicodeError) as error:  # the latter: a label empty or too long
        why = getattr(error, "strerror", None) or "no host has such a name"
        raise GatewayListenFailed(
            f"{host!r} is not a name or address that can be listened at ({why}): use "
            "--http HOST:PORT with an address of this machine"
        ) from None
    except OSError as error:
        if name == "localhost" and error.errno == errno.EADDRNOTAVAIL:
            # The hosts file names ::1 on many machines that have IPv6 switched off.
            return await _listen("127.0.0.1", port)
        raise _listen_error(Address(name, port), error) from None
    for unneeded in listeners[1:] if port == 0 else ():
        await unneeded.aclose()
    return listeners[:1] if port == 0 else listeners


def _listen_error(where: Address, error: OSError) -> GatewayListenFailed:
    if error.errno == errno.EADDRINUSE:
        return GatewayPortInUse(
            f"another program listens at {where} already: stop it, or choose another port with "
            f"--http {where.host or '*'}:OTHER"
        )
    if error.errno == errno.EACCES:
        return GatewayListenFailed(
            f"listening at {where} is not permitted: choose a port above 1023 with --http HOST:PORT"
        )
    return GatewayListenFailed(
        f"cannot listen at {where} ({error.strerror}): use --http HOST:PORT with an address of "
        "this machine"
    )


class _ConnectionServer:
    """I run hypercorn's protocol on each connection, and can end all of them at once.

    Of MAX_CONNECTIONS, the one that has been without a request for longest makes room for the next;
    when each has one under way, the next is closed. So clients that connect and say nothing, or
    little, keep nobody out. One without a request for IDLE_CONNECTION_S ends, and so does one that
    takes nothing of an answer for SEND_STALL_S. (hypercorn's own idle timer stops for good at an
    HTTP/2 preface, and an answer may wait for ever for a window that an HTTP/2 client never opens.)

    hypercorn's own `serve` is not used for two reasons: it shields its sends from cancellation, so
    one client that stops reading would keep a node from ever stopping; and an exception from one
    connection ends them all.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._config = _quiet_config()
        self._context = WorkerContext(None)
        self._open: OrderedDict[_Connection, None] = OrderedDict()  # longest idle first

    async def serve(self, stream: trio.SocketStream) -> None:
        if len(self._open) >= MAX_CONNECTIONS:
            idle = next((one for one in self._open if not one.requests), None)
            if idle is None:
                await trio.aclose_forcefully(stream)
                return
            idle.abort()
            del self._open[idle]
        connection = _Connection(stream)
        self._open[connection] = None
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(connection.end_when_idle)
                await self._talk(connection)
                nursery.cancel_scope.cancel()
        finally:
            self._open.pop(connection, None)
            connection.abort()

    async def _talk(self, connection: _Connection) -> None:
        try:
            # TCPServer takes whatever has a SocketStream's methods and its `socket`.
            server = TCPServer(
                ASGIWrapper(cast(ASGIFramework, self._counted(connection))),
                self._config,
                self._context,
                ConnectionState({}),
                connection,  # type: ignore[arg-type]
            )
            server.idle_task = _NoTimer()  # type: ignore[assignment]
            await server
        except* Exception:
            _log.exception("a connection to the gateway ended with an unexpected error")

    def _counted(self, connection: _Connection) -> ASGIApp:
        """The application, keeping count of the connection's requests under way."""

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            async def send_in_time(message: Message) -> None:
                with connection.sending() as stall:
                    await send(message)
                if stall.cancelled_caught:
                    connection.cut_off()  # which the application hears of as a disconnect

            connection.begin_request()
            try:
                await self._app(scope, receive, send_in_time)
            finally:
                connection.end_request()
                if not connection.requests and connection in self._open:
                    self._open.move_to_end(connection)

        return app

    def abort(self) -> None:
        for connection in self._open:
            connection.abort()


class _NoTimer:
    """In the place of hypercorn's idle timer, whose task is started anew for each request:
    `_Connection` has one of its own that covers HTTP/2 too."""

    async def restart(self, *_: object) -> None:
        pass

    async def stop(self) -> None:
        pass


class _BoundedBuffer(hypercorn.protocol.h2.StreamBuffer):
    """What an HTTP/2 client has no window for yet. hypercorn's own takes ever more of it: it calls
    a buffer drained when nothing could be sent of it."""

    async def pop(self, max_length: int) -> bytes:
        data = bytes(self.buffer[:max_length])
        del self.buffer[: len(data)]
        if len(self.buffer) < hypercorn.protocol.h2.BUFFER_LOW_WATER:
            await self._paused.set()
        if not self.buffer:
            await self._is_empty.set()
        return data


hypercorn.protocol.h2.StreamBuffer = _BoundedBuffer  # type: ignore[misc]


class _Connection:
    """A TCP stream that can be cut off, even in the middle of a send that is shielded."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self.socket = stream.socket
        self.requests = 0  # under way
        self._stream = stream
        self._is_gone = False
        self._sends: set[trio.CancelScope] = set()
        self._idle = trio.CancelScope(deadline=trio.current_time() + IDLE_CONNECTION_S)

    def begin_request(self) -> None:
        self.requests += 1
        self._idle.deadline = math.inf

    def end_request(self) -> None:
        self.requests -= 1
        if not self.requests:
            self._idle.deadline = trio.current_time() + IDLE_CONNECTION_S

    async def end_when_idle(self) -> None:
        with self._idle:
            await trio.sleep_forever()
        self.abort()

    async def send_all(self, data: bytes) -> None:
        try:
            with trio.fail_after(SEND_STALL_S):
                await self._stream.send_all(data)
        except trio.TooSlowError:
            self.abort()  # what the application still has to say is not waited for again
            raise trio.BrokenResourceError("the client has stopped reading") from None

    async def receive_some(self, max_bytes: int) -> bytes:
        data = b""
        try:
            data = bytes(await self._stream.receive_some(max_bytes))
        finally:
            if not data:
                self._give_up_sends()  # nobody opens a window any more
        return data

    def _give_up_sends(self) -> None:
        self._is_gone = True
        for scope in self._sends:
            scope.cancel()

    @contextmanager
    def sending(self) -> Iterator[trio.CancelScope]:
        """While a message is on its way: until the client stalls, or leaves."""
        with trio.move_on_after(WINDOW_STALL_S) as scope:
            self._sends.add(scope)
            if self._is_gone:
                scope.cancel()
            try:
                yield scope
            finally:
                self._sends.remove(scope)

    async def send_eof(self) -> None:
        await self._stream.send_eof()

    async def aclose(self) -> None:
        await self._stream.aclose()

    def cut_off(self) -> None:
        """Ends it under an answer: what is still to be said is not waited for."""
        self._give_up_sends()
        self.abort()

    def abort(self) -> None:
        self.socket.close()


def _quiet_config() -> Config:
    """hypercorn's settings: nothing on stderr or in headers, its complaints in our log."""
    config = Config()
    config.accesslog = None
    config.errorlog = _log
    config.include_server_header = False
    config.keep_alive_timeout = IDLE_CONNECTION_S
    return config
