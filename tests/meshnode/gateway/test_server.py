"""The gateway's sockets: bound where told, closed at once, undisturbed by any one client."""

from __future__ import annotations

import logging
import socket
from pathlib import Path

import h2.config
import h2.connection
import httpx
import pytest
import trio
import trio.testing

from meshnode.errors import NetworkError
from meshnode.gateway.server import GatewayListenFailed, GatewayPortInUse, serve_gateway
from tests.meshnode.gateway.conftest import Gateway
from tests.meshnode.gateway.node_view import SettableNode
from tests.meshnode.gateway.scripted_server import Visit, scripted_server
from tests.meshnode.gateway.test_relay import CHAT, HELLO, event


async def test_a_port_in_use_is_told_with_the_way_out(nursery: trio.Nursery) -> None:
    node = SettableNode()
    port = await nursery.start(serve_gateway, node, "127.0.0.1", 0)
    with pytest.raises(GatewayPortInUse, match=r"--http 127\.0\.0\.1:OTHER") as refused:
        await nursery.start(serve_gateway, node, "127.0.0.1", port)
    assert f"127.0.0.1:{port}" in str(refused.value)
    assert refused.value.exit_code == NetworkError.exit_code


@pytest.mark.parametrize("host", ["192.0.2.1", "no-such-host.invalid"])
async def test_an_address_of_another_machine_is_told(nursery: trio.Nursery, host: str) -> None:
    with pytest.raises(GatewayListenFailed, match="--http HOST:PORT"):
        await nursery.start(serve_gateway, SettableNode(), host, 0)


class HostsFile(trio.abc.HostnameResolver):
    """Names an IPv6 address that this machine does not have, as ::1 is where IPv6 is off."""

    async def getaddrinfo(  # type: ignore[no-untyped-def]
        self, host, port, family=0, type=0, proto=0, flags=0
    ):
        absent = (socket.AF_INET6, socket.SOCK_STREAM, 6, "", ("2001:db8::1", port, 0, 0))
        present = (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port))
        return [absent, present]

    async def getnameinfo(  # type: ignore[no-untyped-def]
        self, sockaddr, flags
    ):
        raise AssertionError("nobody asks")


async def test_localhost_can_be_bound_where_ipv6_is_switched_off(nursery: trio.Nursery) -> None:
    previous = trio.socket.set_custom_hostname_resolver(HostsFile())
    try:
        port = await nursery.start(serve_gateway, SettableNode(), "localhost", 0)
    finally:
        trio.socket.set_custom_hostname_resolver(previous)
    await (await trio.open_tcp_stream("127.0.0.1", port)).aclose()


async def test_it_listens_at_the_address_told_and_at_no_other(gateway: Gateway) -> None:
    with pytest.raises(OSError, match=r"refused|all attempts"):
        await trio.open_tcp_stream("127.0.0.2", gateway.port)


async def test_stopping_is_prompt_and_silent_whatever_clients_do(
    socket_folder: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """One waits for an answer, one has stopped reading a stream, one idles, one is half sent."""
    busy = trio.Semaphore(0)

    async def answer(visit: Visit) -> None:
        if b"flood" not in visit.body:
            busy.release()
            return await visit.client_closes()
        await visit.start()
        busy.release()
        while True:
            await visit.write(event("x" * 60_000))

    async with scripted_server(socket_folder, answer) as sock, trio.open_nursery() as clients:
        node = SettableNode()
        node.serve_from(sock)
        stopped = trio.Event()
        scope = trio.CancelScope()

        async def run_gateway(*, task_status: trio.TaskStatus[int]) -> None:
            with scope:
                await serve_gateway(node, "127.0.0.1", 0, task_status=task_status)
            stopped.set()

        port = await clients.start(run_gateway)
        head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        streams = []
        for body in (b'{"a": "wait"}', b'{"a": "flood"}'):
            stream = await trio.open_tcp_stream("127.0.0.1", port)
            await stream.send_all(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            streams.append(stream)
            await busy.acquire()
        for start in (b"", f"{head}Content-Length: 9\r\n\r\n{{".encode(), head[:30].encode()):
            stream = await trio.open_tcp_stream("127.0.0.1", port)
            await stream.send_all(start)
            streams.append(stream)
        await trio.testing.wait_all_tasks_blocked(0.05)
        scope.cancel()
        with trio.fail_after(2):
            await stopped.wait()
        with pytest.raises(OSError, match=r"refused|all attempts"):
            await trio.open_tcp_stream("127.0.0.1", port)
        for stream in streams:
            await stream.aclose()
        clients.cancel_scope.cancel()
    assert capfd.readouterr() == ("", "")
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


@pytest.mark.parametrize(
    "noise",
    [
        b"\x16\x03\x01\x02\x00\x01\x00",
        b"GET /health HTTP/1.1\r\n\r\n",
        b"GET  / HTTP/9.9\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n",
        b"A" * 100_000,
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(100),
        b"GET /v1/x HTTP/1.1\r\nHost: localhost\r\nConnection: upgrade\r\nUpgrade: websocket\r\n"
        b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n",
    ],
)
async def test_a_client_that_talks_nonsense_harms_only_itself(
    gateway: Gateway, noise: bytes
) -> None:
    async with await trio.open_tcp_stream("127.0.0.1", gateway.port) as stream:
        await stream.send_all(noise)
        await stream.send_eof()
        async for _ in stream:
            pass
    assert (await gateway.http.get("/health")).status_code == 503


async def test_clients_that_vanish_in_the_middle_of_everything_harm_nobody(
    gateway: Gateway, socket_folder: Path
) -> None:
    async def stream_for_ever(visit: Visit) -> None:
        await visit.start()
        while True:
            await visit.write(event("x"))

    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n".encode()
    whole = head + b"Content-Length: 2\r\n\r\n{}"
    async with scripted_server(socket_folder, stream_for_ever) as sock:
        gateway.node.serve_from(sock)
        for size in range(1, len(whole) + 1, 7):
            stream = await trio.open_tcp_stream("127.0.0.1", gateway.port)
            # Closing with a zero linger time sends a reset, as a crashed client would.
            stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            await stream.send_all(whole[:size])
            await stream.aclose()
        assert (await gateway.http.get("/health")).status_code == 200


async def test_a_connection_is_kept_for_the_next_request(gateway: Gateway) -> None:
    request = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
    async with await trio.open_tcp_stream("127.0.0.1", gateway.port) as stream:
        for _ in range(3):
            await stream.send_all(request)
            answer = b""
            while not answer.endswith(b"}}"):
                answer += await stream.receive_some()
            assert answer.startswith(b"HTTP/1.1 503 ")


async def test_two_requests_sent_at_once_are_answered_in_turn(
    gateway: Gateway, socket_folder: Path
) -> None:
    async def echo(visit: Visit) -> None:
        await visit.answer_json(200, {"path": visit.target})

    async with scripted_server(socket_folder, echo) as sock:
        gateway.node.serve_from(sock)
        one = b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n"
        last = b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
        async with await trio.open_tcp_stream("127.0.0.1", gateway.port) as stream:
            await stream.send_all(one + last)
            answers = b"".join([bytes(data) async for data in stream])
    assert answers.count(b"HTTP/1.1 200 ") == 2
    assert answers.index(b'"path"') < answers.index(b'"status"')


async def test_http_2_clients_are_served_too(gateway: Gateway, socket_folder: Path) -> None:
    async def two_events(visit: Visit) -> None:
        await visit.start()
        await visit.write(event("a"))
        await visit.write(b"data: [DONE]\n\n")
        await visit.end()

    async with scripted_server(socket_folder, two_events) as sock:
        gateway.node.serve_from(sock)
        async with httpx.AsyncClient(http1=False, http2=True, trust_env=False) as client:
            answer = await client.post(gateway.url + CHAT, json=HELLO)
            assert answer.http_version == "HTTP/2"
            assert answer.content == event("a") + b"data: [DONE]\n\n"
            foreign = await client.get(gateway.url + "/health", headers={"host": "evil.example"})
            assert foreign.status_code == 403


async def test_a_request_that_breaks_hypercorn_itself_ends_one_connection_only(
    gateway: Gateway, caplog: pytest.LogCaptureFixture
) -> None:
    """Its HTTP/2 part decodes a path as ASCII without asking, and the error reaches us."""
    client = h2.connection.H2Connection(h2.config.H2Configuration(header_encoding=None))
    client.initiate_connection()
    pseudo = {b":method": b"GET", b":scheme": b"http", b":authority": b"localhost"}
    client.send_headers(1, [*pseudo.items(), (b":path", b"/\xff")], end_stream=True)
    async with await trio.open_tcp_stream("127.0.0.1", gateway.port) as stream:
        await stream.send_all(client.data_to_send())
        async for _ in stream:
            pass
    assert "ended with an unexpected error" in caplog.text
    assert (await gateway.http.get("/health")).status_code == 503


async def test_a_defect_of_the_node_is_a_500_in_the_log_and_not_on_the_terminal(
    gateway: Gateway,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail() -> dict[str, object]:
        raise ZeroDivisionError("of the node")

    monkeypatch.setattr(gateway.node, "status", fail)
    answer = await gateway.http.get("/api/v1/status")
    assert answer.status_code == 500
    assert answer.json()["error"]["code"] == "internal_error"
    assert "of the node" not in answer.text
    await trio.testing.wait_all_tasks_blocked()
    assert "of the node" in caplog.text
    assert capfd.readouterr() == ("", "")
