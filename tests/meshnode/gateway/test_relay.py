"""Answers on their way through: at once, unchanged, stopped when the client leaves, never torn."""

from __future__ import annotations

import json
from pathlib import Path

import httpx
import openai
import pytest
import trio
import trio.testing
from starlette.types import Message

from meshnode.gateway.body import BodyRoom
from meshnode.gateway.relay import Relay
from meshnode.gateway.routes import PASSED
from tests.meshnode.gateway.conftest import Gateway
from tests.meshnode.gateway.node_view import SettableNode
from tests.meshnode.gateway.scripted_server import STREAM_HEADERS, Visit, scripted_server

CHAT = "/v1/chat/completions"
HELLO = {"messages": [{"role": "user", "content": "hello"}], "stream": True}
DONE = b"data: [DONE]\n\n"
LOST = "worker shed has left the mesh; waiting for workers"


def event(text: str) -> bytes:
    choice = {"index": 0, "delta": {"content": text}, "finish_reason": None}
    chunk = {"id": "1", "object": "chat.completion.chunk", "created": 1, "model": "tiny"}
    return b"data: " + json.dumps({**chunk, "choices": [choice]}).encode() + b"\n\n"


async def raw_pieces(answer: httpx.Response) -> bytes:
    return b"".join([piece async for piece in answer.aiter_raw()])


async def test_each_event_is_with_the_client_before_the_next_is_made(
    gateway: Gateway, socket_folder: Path
) -> None:
    """Nothing here waits for time: were an event held back, both sides would wait for ever."""
    received = trio.Semaphore(0)

    async def one_by_one(visit: Visit) -> None:
        await visit.start()
        for number in range(50):
            await visit.write(event(str(number)))
            await received.acquire()
        await visit.write(DONE)
        await visit.end()

    async with scripted_server(socket_folder, one_by_one) as socket:
        gateway.node.serve_from(socket)
        whole = b""
        async with gateway.http.stream("POST", CHAT, json=HELLO) as answer:
            async for piece in answer.aiter_raw():
                whole += piece
                received.release()
        assert whole == b"".join(event(str(number)) for number in range(50)) + DONE
        assert answer.headers["content-type"] == "text/event-stream"
        assert "access-control-allow-origin" not in answer.headers
        assert "server" not in answer.headers


async def test_an_answer_in_one_piece_passes_unchanged(
    gateway: Gateway, socket_folder: Path
) -> None:
    value = {"choices": [], "timings": {"predicted_n": 8, "predicted_ms": 500.0}}

    async def answer_at_once(visit: Visit) -> None:
        await visit.answer_json(200, value)

    async with scripted_server(socket_folder, answer_at_once) as socket:
        gateway.node.serve_from(socket)
        answer = await gateway.http.post(CHAT, json=HELLO)
        assert answer.content == json.dumps(value).encode()
        assert gateway.node.generated == [(8, 0.5)]


async def test_speed_is_told_from_the_last_events_of_a_stream(
    gateway: Gateway, socket_folder: Path
) -> None:
    async def tell_timings(visit: Visit) -> None:
        await visit.start()
        await visit.write(event("a"))
        await visit.write(b'data: {"timings":{"predicted_n":3,"predicted_ms":100}}\n\n' + DONE)
        await visit.end()

    async with scripted_server(socket_folder, tell_timings) as socket:
        gateway.node.serve_from(socket)
        async with gateway.http.stream("POST", CHAT, json=HELLO) as answer:
            await raw_pieces(answer)
        assert gateway.node.generated == [(3, 0.1)]


async def test_an_error_of_llama_servers_own_is_passed_on(
    gateway: Gateway, socket_folder: Path
) -> None:
    error = {"error": {"code": 400, "message": "'messages' is required", "type": "x"}}

    async def refuse(visit: Visit) -> None:
        await visit.answer_json(400, error)

    async with scripted_server(socket_folder, refuse) as socket:
        gateway.node.serve_from(socket)
        answer = await gateway.http.post(CHAT, json={})
        assert (answer.status_code, answer.json()) == (400, error)


# -- the client leaves ----------------------------------------------------------------------------


@pytest.mark.parametrize("begun", [False, True], ids=["before the answer", "in mid-stream"])
async def test_a_client_that_leaves_takes_the_generation_with_it(
    gateway: Gateway, socket_folder: Path, begun: bool
) -> None:
    arrived, stopped = trio.Event(), trio.Event()

    async def generate_for_ever(visit: Visit) -> None:
        if begun:
            await visit.start()
            await visit.write(event("a"))
        arrived.set()
        await visit.client_closes()
        stopped.set()

    async with scripted_server(socket_folder, generate_for_ever) as socket:
        gateway.node.serve_from(socket)
        async with trio.open_nursery() as asking:
            asking.start_soon(lambda: gateway.http.post(CHAT, json=HELLO))
            await arrived.wait()
            asking.cancel_scope.cancel()
        with trio.fail_after(5):
            await stopped.wait()


# -- a worker or the server dies ------------------------------------------------------------------


async def test_a_worker_that_dies_ends_a_stream_with_a_clear_error(
    gateway: Gateway, socket_folder: Path
) -> None:
    """llama-server itself hangs then, waiting for the worker: the node's word is what counts."""

    async def hang_in_mid_stream(visit: Visit) -> None:
        await visit.start()
        await visit.write(event("a") + event("torn")[:20])
        await visit.client_closes()

    async with scripted_server(socket_folder, hang_in_mid_stream) as socket:
        gateway.node.serve_from(socket)
        client = openai_client(gateway)
        stream = await client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "hello"}], stream=True
        )
        assert (await anext(stream)).choices[0].delta.content == "a"
        gateway.node.lose(LOST)
        with pytest.raises(openai.APIError, match=LOST):
            await anext(stream)
        answer = await gateway.http.post(CHAT, json=HELLO)
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "7")
        assert answer.json()["error"]["message"] == LOST


async def test_a_worker_that_dies_ends_a_waiting_request_with_a_clear_error(
    gateway: Gateway, socket_folder: Path
) -> None:
    async def lose_then_hang(visit: Visit) -> None:
        gateway.node.lose(LOST)
        await visit.client_closes()

    async with scripted_server(socket_folder, lose_then_hang) as socket:
        gateway.node.serve_from(socket)
        answer = await gateway.http.post(CHAT, json=HELLO)
        assert answer.status_code == 502
        assert answer.headers["retry-after"] == "7"
        assert answer.json()["error"]["code"] == "upstream_lost"
        assert LOST in answer.json()["error"]["message"]


async def test_a_message_on_its_way_is_never_cut_off(socket_folder: Path) -> None:
    """hypercorn frames a message, then waits for its turn to send: cancelled there, it is gone."""
    node = SettableNode()
    sent: list[Message] = []

    async def send(message: Message) -> None:
        node.lose(LOST)
        await trio.testing.wait_all_tasks_blocked()
        await trio.lowlevel.checkpoint()
        sent.append(message)

    async def receive() -> Message:
        if asked:
            return asked.pop()
        return await trio.sleep_forever()

    async def begin(visit: Visit) -> None:
        await visit.start()
        await visit.client_closes()

    asked: list[Message] = [{"type": "http.request", "body": b"{}", "more_body": False}]
    headers = [(b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": CHAT, "headers": headers}
    route = next(entry for entry in PASSED if entry.path == CHAT)
    async with scripted_server(socket_folder, begin) as socket:
        node.serve_from(socket)
        await Relay(route, node, BodyRoom())(scope, receive, send)
    assert [message["type"] for message in sent] == ["http.response.start", "http.response.body"]
    assert LOST.encode() in sent[1]["body"]


async def break_off_at_once(visit: Visit) -> None:
    pass


async def break_off_in_mid_stream(visit: Visit) -> None:
    await visit.start()
    await visit.write(event("a") + event("torn")[:20])


async def end_without_the_end_mark(visit: Visit) -> None:
    await visit.start()
    await visit.write(event("a"))
    await visit.end()


async def break_off_in_mid_body(visit: Visit) -> None:
    await visit.start(200, [("content-type", "application/json"), ("content-length", "10")])
    await visit.write(b"{")


@pytest.mark.parametrize("script", [break_off_at_once, break_off_in_mid_body])
async def test_a_server_that_breaks_off_before_the_answer_gives_an_error(
    gateway: Gateway,
    socket_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    script: object,
) -> None:
    monkeypatch.setattr("meshnode.gateway.relay.VERDICT_TIMEOUT_S", 0.05)
    async with scripted_server(socket_folder, script) as socket:  # type: ignore[arg-type]
        gateway.node.serve_from(socket)
        answer = await gateway.http.post(CHAT, json=HELLO)
        assert answer.status_code == 502
        assert "send the request again" in answer.json()["error"]["message"]


@pytest.mark.parametrize("script", [break_off_in_mid_stream, end_without_the_end_mark])
async def test_a_stream_cut_short_ends_with_an_error_and_no_torn_event(
    gateway: Gateway,
    socket_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    script: object,
) -> None:
    monkeypatch.setattr("meshnode.gateway.relay.VERDICT_TIMEOUT_S", 0.05)
    async with scripted_server(socket_folder, script) as socket:  # type: ignore[arg-type]
        gateway.node.serve_from(socket)
        async with gateway.http.stream("POST", CHAT, json=HELLO) as answer:
            whole = await raw_pieces(answer)
        first, last, rest = whole.split(b"\n\n")
        assert (first + b"\n\n", rest) == (event("a"), b"")
        assert json.loads(last.removeprefix(b"data: "))["error"]["code"] == "upstream_lost"


async def test_the_nodes_word_is_waited_for_when_the_socket_breaks_first(
    gateway: Gateway, socket_folder: Path, nursery: trio.Nursery
) -> None:
    broken = trio.Event()

    async def break_off(visit: Visit) -> None:
        broken.set()

    async def notice_later() -> None:
        await broken.wait()
        await trio.testing.wait_all_tasks_blocked()
        gateway.node.lose(LOST)

    async with scripted_server(socket_folder, break_off) as socket:
        gateway.node.serve_from(socket)
        nursery.start_soon(notice_later)
        answer = await gateway.http.post(CHAT, json=HELLO)
        assert LOST in answer.json()["error"]["message"]


async def test_an_anthropic_client_gets_the_error_in_its_own_kind_of_event(
    gateway: Gateway, socket_folder: Path
) -> None:
    async def lose_in_mid_stream(visit: Visit) -> None:
        await visit.start()
        await visit.write(b"event: message_start\ndata: {}\n\n")
        gateway.node.lose(LOST)
        await visit.client_closes()

    async with scripted_server(socket_folder, lose_in_mid_stream) as socket:
        gateway.node.serve_from(socket)
        async with gateway.http.stream("POST", "/v1/messages", json=HELLO) as answer:
            whole = await raw_pieces(answer)
        name, data = whole.split(b"\n\n")[-2].split(b"\n")
        assert name == b"event: error"
        value = json.loads(data.removeprefix(b"data: "))
        assert value["type"] == "error"
        assert LOST in value["error"]["message"]


async def test_a_server_that_is_not_there_means_not_ready(
    gateway: Gateway, socket_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("meshnode.gateway.relay.VERDICT_TIMEOUT_S", 0.05)
    gateway.node.serve_from(socket_folder / "llama.sock")
    answer = await gateway.http.post(CHAT, json=HELLO)
    assert answer.status_code == 503
    assert answer.headers["retry-after"].isdecimal()


async def test_a_new_server_on_the_same_socket_is_used_at_once(
    gateway: Gateway, socket_folder: Path
) -> None:
    for number in (1, 2):

        async def tell(visit: Visit, number: int = number) -> None:
            await visit.answer_json(200, {"server": number})

        async with scripted_server(socket_folder, tell) as socket:
            gateway.node.serve_from(socket)
            assert (await gateway.http.get("/v1/models")).json() == {"server": number}
        gateway.node.lose(LOST)
        socket.unlink()


def openai_client(gateway: Gateway) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key="none", max_retries=0)


assert ("access-control-allow-origin", "*") in STREAM_HEADERS  # else nothing would be stripped
