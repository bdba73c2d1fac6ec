"""Clients by the hundred, slow ones and large ones: what they take is bounded, others get in."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
import trio

from meshnode.gateway import body, server
from tests.meshnode.gateway.conftest import Gateway
from tests.meshnode.gateway.scripted_server import Visit, scripted_server
from tests.meshnode.gateway.test_relay import CHAT

HEAD = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n".encode()


@pytest.mark.parametrize("words", [b"", b"GET /hea", HEAD], ids=["silent", "slow", "no end"])
async def test_idle_clients_make_room_for_the_next(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch, words: bytes
) -> None:
    monkeypatch.setattr(server, "MAX_CONNECTIONS", 20)
    streams = []
    for _ in range(60):
        stream = await trio.open_tcp_stream("127.0.0.1", gateway.port)
        await stream.send_all(words)
        streams.append(stream)
    assert (await gateway.http.get("/health")).status_code == 503
    with trio.fail_after(20):
        assert await streams[0].receive_some() == b"", "the first was closed"


async def test_a_client_that_is_being_answered_is_not_put_out(
    gateway: Gateway, socket_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "MAX_CONNECTIONS", 5)
    asked, answer_now = trio.Event(), trio.Event()

    async def answer(visit: Visit) -> None:
        asked.set()
        await answer_now.wait()
        await visit.answer_json(200, {"here": True})

    async with scripted_server(socket_folder, answer) as sock:
        gateway.node.serve_from(sock)
        async with await trio.open_tcp_stream("127.0.0.1", gateway.port) as served:
            await served.send_all(HEAD + b"Content-Length: 2\r\n\r\n{}")
            with trio.fail_after(20):
                await asked.wait()
            idle = [await trio.open_tcp_stream("127.0.0.1", gateway.port) for _ in range(20)]
            with trio.fail_after(20):
                assert await idle[0].receive_some() == b""
                answer_now.set()
                assert b"200" in await served.receive_some()


async def test_headers_are_bounded(gateway: Gateway) -> None:
    answer = b""
    async with await trio.open_tcp_stream("127.0.0.1", gateway.port) as stream:
        with contextlib.suppress(trio.BrokenResourceError), trio.fail_after(20):
            await stream.send_all(b"GET / HTTP/1.1\r\nX: " + b"x" * 64_000)
            async for piece in stream:  # which ends, although the headers do not
                answer += piece
    assert not answer or answer.startswith(b"HTTP/1.1 4")


async def test_bodies_together_are_bounded_and_given_back(
    gateway: Gateway, socket_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(body, "MAX_BODIES_BYTES", 150_000)

    async def answer(visit: Visit) -> None:
        await visit.answer_json(200, {})

    large = b'{"x": "' + b"x" * 100_000 + b'"}'
    async with scripted_server(socket_folder, answer) as sock:
        gateway.node.serve_from(sock)
        async with await trio.open_tcp_stream("127.0.0.1", gateway.port) as slow:
            await slow.send_all(HEAD + b"Content-Length: 200000\r\n\r\n" + b" " * 100_000)
            headers = {"content-type": "application/json"}
            with trio.fail_after(20):
                while (await gateway.http.post(CHAT, content=large, headers=headers)).json().get(
                    "error", {}
                ).get("code") != "gateway_busy":
                    pass  # the slow one's bytes are still on their way
        with trio.fail_after(20):
            while (
                await gateway.http.post(CHAT, content=large, headers=headers)
            ).status_code != 200:
                pass  # its end too
