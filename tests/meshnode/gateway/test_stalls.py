"""A client that stops at any step of HTTP loses its connection within that step's limit, and the
request that it had under way is over."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import h2.config
import h2.connection
import h2.settings
import pytest
import trio
import trio.testing

from meshnode.gateway.body import BODY_TIMEOUT_S
from meshnode.gateway.door import LINGER_S
from meshnode.gateway.server import IDLE_CONNECTION_S, SEND_STALL_S, WINDOW_STALL_S, serve_gateway
from tests.lab.stalls import let_pass, pushed_clock, until
from tests.meshnode.gateway.node_view import SettableNode
from tests.meshnode.gateway.scripted_server import Visit, scripted_server
from tests.meshnode.gateway.test_relay import CHAT, event

Clock = trio.testing.MockClock
LATE_S = 1.0
STEP_S = 5.0
POST = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n".encode()
HALF_A_BODY = POST + b'Content-Length: 100\r\n\r\n{"mess'


@pytest.fixture
def clock() -> Clock:
    return pushed_clock()


class Client:
    """I say words to the gateway, and know when it has closed the connection."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self.stream = stream
        self.heard = b""
        self.closed = False

    async def listen(self) -> None:
        with suppress(trio.BrokenResourceError):
            async for data in self.stream:
                self.heard += data
        self.closed = True


@dataclass(frozen=True)
class Stage:
    node: SettableNode
    port: int
    nursery: trio.Nursery

    async def client(self, *, listens: bool = True) -> Client:
        client = Client(await trio.open_tcp_stream("127.0.0.1", self.port))
        if listens:
            self.nursery.start_soon(client.listen)
        return client


@asynccontextmanager
async def stage(folder: Path) -> AsyncIterator[Stage]:
    """The gateway before a server that streams without end."""

    async def stream_for_ever(visit: Visit) -> None:
        await visit.start()
        while True:
            await visit.write(event("x" * 60_000))

    async with scripted_server(folder, stream_for_ever) as sock, trio.open_nursery() as nursery:
        node = SettableNode()
        node.serve_from(sock)
        port = await nursery.start(serve_gateway, node, "127.0.0.1", 0)
        yield Stage(node, port, nursery)
        nursery.cancel_scope.cancel()


def http2(*, window_bytes: int = 65_535) -> h2.connection.H2Connection:
    client = h2.connection.H2Connection(h2.config.H2Configuration())
    client.initiate_connection()
    client.update_settings({h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: window_bytes})
    return client


def http2_post(body: bytes, *, end: bool, window_bytes: int = 65_535) -> bytes:
    client = http2(window_bytes=window_bytes)
    pseudo = {":method": "POST", ":scheme": "http", ":authority": "localhost", ":path": CHAT}
    client.send_headers(1, [*pseudo.items(), ("content-type", "application/json")])
    client.send_data(1, body, end_stream=end)
    return client.data_to_send()


def http2_half_a_head() -> bytes:
    """A HEADERS frame that says of itself that more follows, and nothing does."""
    return http2().data_to_send() + b"\0\0\1\1\0\0\0\0\1\x83"


STOPS = {
    "nothing said": (b"", IDLE_CONNECTION_S),
    "half a head": (POST, IDLE_CONNECTION_S),
    "half a body": (HALF_A_BODY, BODY_TIMEOUT_S + LINGER_S),
    "half a chunk": (
        POST + b"Transfer-Encoding: chunked\r\n\r\nff\r\n{",
        BODY_TIMEOUT_S + LINGER_S,
    ),
    "half a body that nobody asked for": (
        b"GET /health HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n{",
        LINGER_S,
    ),
    "no next request": (b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n", IDLE_CONNECTION_S),
    "HTTP/2: half the preface": (b"PRI * HTTP/2.0\r\n\r\nS", IDLE_CONNECTION_S),
    "HTTP/2: no request": (http2().data_to_send(), IDLE_CONNECTION_S),
    "HTTP/2: half a head": (http2_half_a_head(), IDLE_CONNECTION_S),
    "HTTP/2: half a body": (
        http2_post(b'{"mess', end=False),
        BODY_TIMEOUT_S + LINGER_S + IDLE_CONNECTION_S,
    ),
}


@pytest.mark.parametrize("step", STOPS)
async def test_a_client_that_stops_loses_its_connection(
    step: str, socket_folder: Path, clock: Clock
) -> None:
    words, limit_s = STOPS[step]
    async with stage(socket_folder) as here:
        client = await here.client()
        await client.stream.send_all(words)
        await trio.testing.wait_all_tasks_blocked(0.01)
        await let_pass(clock, limit_s - 2 * LATE_S)
        assert not client.closed
        await let_pass(clock, 3 * LATE_S)
        await until(lambda: client.closed)
        assert here.node.in_flight == 0
        if "body" in step and "HTTP/2" not in step and "nobody" not in step:
            assert b"408" in client.heard
            assert b"did not arrive within 60 seconds" in client.heard


@pytest.mark.parametrize(
    ("words", "word", "limit_s"),
    [
        pytest.param(POST + b"X: ", b"x", IDLE_CONNECTION_S, id="a letter of a header"),
        pytest.param(HALF_A_BODY, b" ", BODY_TIMEOUT_S + LINGER_S, id="a letter of the body"),
        pytest.param(
            http2().data_to_send(),
            b"\0\0\x08\6\0\0\0\0\0" + bytes(8),
            IDLE_CONNECTION_S,
            id="HTTP/2: pings",
        ),
    ],
)
async def test_a_word_now_and_then_buys_no_time(
    words: bytes, word: bytes, limit_s: float, socket_folder: Path, clock: Clock
) -> None:
    async with stage(socket_folder) as here:
        client = await here.client()
        await client.stream.send_all(words)
        with suppress(trio.BrokenResourceError):
            for _ in range(int(limit_s / STEP_S)):
                assert not client.closed
                await let_pass(clock, STEP_S)
                await client.stream.send_all(word)
        await let_pass(clock, LATE_S)
        await until(lambda: client.closed)


@pytest.mark.parametrize(
    ("words", "listens"),
    [
        pytest.param(POST + b"Content-Length: 2\r\n\r\n{}", False, id="not read"),
        pytest.param(http2_post(b"{}", end=True), False, id="HTTP/2: not read"),
        pytest.param(
            http2_post(b"{}", end=True, window_bytes=0), True, id="HTTP/2: no window for it"
        ),
        pytest.param(
            http2_post(b"{}", end=True, window_bytes=9), True, id="HTTP/2: no further window"
        ),
    ],
)
async def test_an_answer_that_is_not_taken_is_cut_off(
    words: bytes, listens: bool, socket_folder: Path, clock: Clock
) -> None:
    async with stage(socket_folder) as here:
        client = await here.client(listens=listens)
        await client.stream.send_all(words)
        await until(lambda: here.node.in_flight == 1)
        await trio.testing.wait_all_tasks_blocked(0.05)
        await let_pass(clock, SEND_STALL_S - 2 * LATE_S, STEP_S)
        assert here.node.in_flight == 1
        await let_pass(clock, WINDOW_STALL_S - SEND_STALL_S + 4 * LATE_S)
        await until(lambda: here.node.in_flight == 0)
        if not listens:
            here.nursery.start_soon(client.listen)
        await until(lambda: client.closed)
