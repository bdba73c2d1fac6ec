"""Local sockets carried over streams: unix and TCP, half-close, errors both ways."""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import pytest
import trio

from tests.lab import nodes
from tests.lab.nodes import anyone, identity
from tests.tunnels.conftest import over_every_kind
from tunnels import (
    Endpoint,
    ForwardFailed,
    Session,
    Stream,
    StreamReset,
    connect_and_splice,
    listen_and_forward,
)
from tunnels.forward import Target

pytestmark = [pytest.mark.usefixtures("link_kind"), over_every_kind]
Serve = Callable[[trio.SocketStream], Awaitable[None]]


@asynccontextmanager
async def service(path: Path, serve: Serve) -> AsyncIterator[None]:
    """A local program that listens at `path`."""
    sock = trio.socket.socket(trio.socket.AF_UNIX, trio.socket.SOCK_STREAM)
    await sock.bind(str(path))
    sock.listen(16)

    async def accept() -> None:
        while True:
            connection, _ = await sock.accept()
            nursery.start_soon(serve, trio.SocketStream(connection))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(accept)
        yield
        nursery.cancel_scope.cancel()
    sock.close()


@asynccontextmanager
async def joined(target: Target) -> AsyncIterator[tuple[Session, trio.Nursery]]:
    """Two endpoints on loopback; bob forwards the service "local" to `target`."""
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            kinds = nodes.KINDS
            alice = Endpoint(identity("alice"), authorize=anyone, transports=kinds)
            bob = Endpoint(identity("bob"), authorize=anyone, transports=kinds)
            bob.serve("local", partial(connect_and_splice, target=target))
            await nursery.start(alice.run, "127.0.0.1", 0)
            await nursery.start(bob.run, "127.0.0.1", 0)
            session = await alice.connect(bob.peer, bob.candidates())
            yield session, nursery
            nursery.cancel_scope.cancel()


async def connect_unix(path: object) -> trio.SocketStream:
    stream = await trio.open_unix_socket(str(path))
    assert isinstance(stream, trio.SocketStream)
    return stream


async def read_all(stream: trio.abc.ReceiveStream) -> bytes:
    data = b""
    while piece := await stream.receive_some():
        data += piece
    return data


async def count(connection: trio.SocketStream) -> None:
    """Answer after the question has ended: needs half-close all the way."""
    async with connection:
        question = await read_all(connection)
        await connection.send_all(b"%d" % len(question))


async def test_a_question_ends_before_the_answer_begins(tmp_path: Path) -> None:
    async with service(tmp_path / "far", count), joined(tmp_path / "far") as (session, nursery):
        near = tmp_path / "near"
        bound = await nursery.start(listen_and_forward, near, partial(session.open, "local"))
        assert bound == str(near)
        assert stat.S_IMODE(near.stat().st_mode) == 0o600
        for size in (0, 1, 3 << 20):
            client = await connect_unix(near)
            await client.send_all(bytes(size))
            await client.send_eof()
            assert await read_all(client) == b"%d" % size
            await client.aclose()


async def test_tcp_in_front_and_many_connections_at_once(tmp_path: Path) -> None:
    async def shout(connection: trio.SocketStream) -> None:
        async with connection:
            while data := await connection.receive_some():
                await connection.send_all(data.upper())

    async with service(tmp_path / "far", shout), joined(tmp_path / "far") as (session, nursery):
        host, port = await nursery.start(
            listen_and_forward, ("127.0.0.1", 0), partial(session.open, "local")
        )

        async def client(number: int) -> None:
            stream = await trio.open_tcp_stream(host, port)
            await stream.send_all(b"hello %d" % number)
            await stream.send_eof()
            assert await read_all(stream) == b"HELLO %d" % number

        async with trio.open_nursery() as clients:
            for number in range(20):
                clients.start_soon(client, number)


async def test_tcp_behind() -> None:
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    target = listeners[0].socket.getsockname()
    async with joined(target) as (session, nursery):
        nursery.start_soon(trio.serve_listeners, count, listeners)
        stream = await session.open("local")
        await stream.send_all(bytes(100))
        await stream.send_eof()
        assert await read_all(stream) == b"100"


async def test_a_service_that_is_not_there_is_a_sentence(tmp_path: Path) -> None:
    async with joined(tmp_path / "nobody") as (session, _):
        stream = await session.open("local")
        with pytest.raises(StreamReset, match="does not answer"):
            await read_all(stream)


async def test_a_service_that_breaks_resets_the_client(tmp_path: Path) -> None:
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")

    async def break_off(connection: trio.SocketStream) -> None:
        await connection.receive_some()
        linger = b"\x01\x00\x00\x00\x00\x00\x00\x00"
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        connection.socket.close()  # TCP reset

    async with joined(listeners[0].socket.getsockname()) as (session, nursery):
        nursery.start_soon(trio.serve_listeners, break_off, listeners)
        stream = await session.open("local")
        await stream.send_all(b"x")
        with pytest.raises(StreamReset, match="broke"):
            await read_all(stream)


async def test_a_stream_that_breaks_resets_both_local_ends(tmp_path: Path) -> None:
    began, ended = trio.Event(), trio.Event()

    async def wait(connection: trio.SocketStream) -> None:
        async with connection:
            await connection.receive_some()
            began.set()
            await read_all(connection)
            ended.set()

    async with service(tmp_path / "far", wait), joined(tmp_path / "far") as (session, nursery):
        address = await nursery.start(
            listen_and_forward, ("127.0.0.1", 0), partial(session.open, "local")
        )
        client = await trio.open_tcp_stream(*address)
        await client.send_all(b"x")
        await began.wait()
        await session.aclose("the end")
        with pytest.raises(trio.BrokenResourceError):
            await read_all(client)
        await ended.wait()


async def test_the_socket_goes_with_its_listener(tmp_path: Path) -> None:
    near = tmp_path / "near"

    async def never() -> Stream:
        raise AssertionError("nobody connects")

    async with trio.open_nursery() as nursery:
        await nursery.start(listen_and_forward, near, never)
        nursery.cancel_scope.cancel()
    assert not near.exists()


async def test_a_socket_left_by_a_killed_process_is_replaced(tmp_path: Path) -> None:
    near = tmp_path / "near"
    left = socket.socket(socket.AF_UNIX)
    left.bind(str(near))
    left.close()

    async def never() -> Stream:
        raise AssertionError("nobody connects")

    async with trio.open_nursery() as nursery:
        await nursery.start(listen_and_forward, near, never)
        with pytest.raises(ForwardFailed, match="another process listens"):
            await listen_and_forward(near, never)
        nursery.cancel_scope.cancel()


async def test_what_cannot_be_listened_on_is_a_sentence(tmp_path: Path) -> None:
    async def never() -> Stream:
        raise AssertionError("nobody connects")

    (tmp_path / "file").write_text("precious")
    [taken] = await trio.open_tcp_listeners(0, host="127.0.0.1")
    cases: list[tuple[Target, str]] = [
        (tmp_path / "file", "another file is there"),
        (tmp_path / ("x" * 120), "too long"),
        (tmp_path / "nowhere" / "near", "no such file"),
        (taken.socket.getsockname(), "port is in use"),
    ]
    for address, why in cases:
        with pytest.raises(ForwardFailed, match=why):
            await listen_and_forward(address, never)
    assert (tmp_path / "file").read_text() == "precious"
    assert os.listdir(tmp_path) == ["file"]
    await taken.aclose()
