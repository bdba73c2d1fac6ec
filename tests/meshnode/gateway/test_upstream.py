"""One exchange with llama-server: few writes, no wait that is not needed, and an end it can see."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio
import trio.testing

from meshnode.gateway.upstream import (
    UpstreamBroken,
    UpstreamRequest,
    UpstreamUnreachable,
    open_answer,
)
from tests.meshnode.gateway.scripted_server import Visit, scripted_server

LARGE_BYTES = 1 << 20
LENGTH_2 = "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n"


@pytest.fixture(autouse=True)
def bounded(nursery: trio.Nursery) -> None:
    """A test that hangs fails here, not in CI's own limit."""
    nursery.cancel_scope.deadline = trio.current_time() + 30


def post(body: bytes = b"{}") -> UpstreamRequest:
    return UpstreamRequest("POST", "/v1/completions", body)


@pytest.mark.parametrize("size", [0, 2, LARGE_BYTES])
async def test_a_body_arrives_whole(socket_folder: Path, size: int) -> None:
    async def tell_size(visit: Visit) -> None:
        assert visit.headers["content-type"] == "application/json"
        await visit.answer_json(200, {"size": len(visit.body)})

    async with scripted_server(socket_folder, tell_size) as socket:
        async with open_answer(socket, post(b"x" * size)) as answer:
            whole = b"".join([piece async for piece in answer.pieces])
        assert (answer.status, whole) == (200, b'{"size": %d}' % size)


async def test_a_request_without_a_body_says_nothing_of_one(socket_folder: Path) -> None:
    async def tell_headers(visit: Visit) -> None:
        await visit.answer_json(200, sorted(visit.headers))

    async with (
        scripted_server(socket_folder, tell_headers) as socket,
        open_answer(socket, UpstreamRequest("GET", "/v1/models")) as answer,
    ):
        assert [piece async for piece in answer.pieces] == [b'["accept", "connection", "host"]']


async def test_the_answer_ends_though_the_server_keeps_the_connection(socket_folder: Path) -> None:
    closed = trio.Event()

    async def answer_and_stay(visit: Visit) -> None:
        await visit.start()
        await visit.write(b"data: [DONE]\n\n")
        await visit.end()
        await visit.client_closes()
        closed.set()

    async with scripted_server(socket_folder, answer_and_stay) as socket:
        async with open_answer(socket, post()) as answer:
            assert [piece async for piece in answer.pieces] == [b"data: [DONE]\n\n"]
        await closed.wait()


async def test_events_that_came_together_stay_together(socket_folder: Path) -> None:
    """Each piece passed on costs a write and wakes the client."""

    async def two_at_once(visit: Visit) -> None:
        chunks = b"1\r\na\r\n1\r\nb\r\n0\r\n\r\n"
        await visit.raw(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + chunks)

    async with (
        scripted_server(socket_folder, two_at_once) as socket,
        open_answer(socket, post()) as answer,
    ):
        assert [piece async for piece in answer.pieces] == [b"ab"]


async def test_an_interim_answer_is_not_the_answer(socket_folder: Path) -> None:
    async def ask_to_wait(visit: Visit) -> None:
        await visit.raw(b"HTTP/1.1 102 Processing\r\n\r\n" + LENGTH_2.encode() + b"{}")

    async with (
        scripted_server(socket_folder, ask_to_wait) as socket,
        open_answer(socket, post()) as answer,
    ):
        assert answer.status == 200
        assert [piece async for piece in answer.pieces] == [b"{}"]


@pytest.mark.parametrize("said", ["", "HTTP/1.1 200", "no HTTP\r\n\r\n"])
async def test_no_answer_is_an_error(socket_folder: Path, said: str) -> None:
    async def say(visit: Visit) -> None:
        await visit.raw(said.encode())

    async with scripted_server(socket_folder, say) as socket:
        with pytest.raises(UpstreamBroken):
            async with open_answer(socket, post()):
                pytest.fail("an answer began")


async def test_half_an_answer_is_an_error_after_what_there_was(socket_folder: Path) -> None:
    async def say_half(visit: Visit) -> None:
        await visit.raw(LENGTH_2.encode() + b"{")

    async with (
        scripted_server(socket_folder, say_half) as socket,
        open_answer(socket, post()) as answer,
    ):
        assert await anext(answer.pieces) == b"{"
        with pytest.raises(UpstreamBroken):
            await anext(answer.pieces)


async def test_a_refusal_is_read_though_the_body_was_not(socket_folder: Path) -> None:
    """llama-server answers a body that is too large for it at once, and closes."""
    path = socket_folder / "llama.sock"
    listener = trio.socket.socket(trio.socket.AF_UNIX)
    await listener.bind(str(path))
    listener.listen()

    async def refuse() -> None:
        connection, _ = await listener.accept()
        await connection.send(b"HTTP/1.1 413 Too Large\r\nContent-Length: 0\r\n\r\n")
        connection.shutdown(trio.socket.SHUT_RDWR)
        listener.close()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(refuse)
        async with open_answer(path, post(b"x" * LARGE_BYTES)) as answer:
            assert answer.status == 413


async def test_one_of_many_waits_for_its_turn(socket_folder: Path, nursery: trio.Nursery) -> None:
    """More than the kernel keeps for a server that has not accepted them yet."""
    path = socket_folder / "llama.sock"
    listener = trio.socket.socket(trio.socket.AF_UNIX)
    await listener.bind(str(path))
    listener.listen(0)
    statuses: list[int] = []
    all_answered = trio.Event()

    async def ask() -> None:
        async with open_answer(path, post()) as answer:
            statuses.append(answer.status)
        if len(statuses) == 3:
            all_answered.set()

    async def serve(stream: trio.SocketStream) -> None:
        async with stream:
            await stream.receive_some()
            await stream.send_all(LENGTH_2.encode() + b"{}")

    for _ in range(3):
        nursery.start_soon(ask)
    await trio.testing.wait_all_tasks_blocked()
    nursery.start_soon(trio.serve_listeners, serve, [trio.SocketListener(listener)])
    await all_answered.wait()
    assert statuses == [200, 200, 200]


async def test_nobody_listens(socket_folder: Path) -> None:
    with pytest.raises(UpstreamUnreachable):
        async with open_answer(socket_folder / "none.sock", post()):
            pytest.fail("an answer began")
