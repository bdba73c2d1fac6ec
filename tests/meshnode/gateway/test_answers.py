"""What the gateway answers by itself: how far the node is, who may come in, what it refuses."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest
import trio

from meshnode.gateway import body as body_module
from meshnode.gateway.body import MAX_BODY_BYTES
from meshnode.gateway.lending import Lending
from meshnode.gateway.routes import PASSED
from meshnode.gateway.view import Health, Stage, WorkerProgress
from tests.meshnode.gateway.conftest import Gateway
from tests.meshnode.gateway.scripted_server import Visit, scripted_server

CHAT = "/v1/chat/completions"
HELLO = {"messages": [{"role": "user", "content": "hello"}]}


def error_of(answer: httpx.Response) -> dict[str, object]:
    """The error object, after a look at its shape, which OpenAI's clients rely on."""
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert answer.headers["content-type"] == "application/json"
    return dict(error)


async def echo(visit: Visit) -> None:
    await visit.answer_json(200, {"target": visit.target, "headers": visit.headers})


# -- how far the node is --------------------------------------------------------------------------


WELL = (Stage.READY, Stage.LENDING)


@pytest.mark.parametrize("stage", [stage for stage in Stage if stage not in WELL])
async def test_until_it_is_ready_health_tells_the_stage_and_when_to_ask_again(
    gateway: Gateway, stage: Stage
) -> None:
    gateway.node.present = Health(stage, "loading tiny", 0.25, 3)
    answer = await gateway.http.get("/health")
    assert answer.status_code == 503
    assert answer.headers["retry-after"] == "3"
    facts = answer.json()
    assert (facts["stage"], facts["progress"]) == (stage.value, 0.25)
    assert error_of(answer)["message"] == "loading tiny"


async def test_a_node_that_serves_no_model_is_well_and_says_so(gateway: Gateway) -> None:
    gateway.node.present = Lending(dict).health()
    answer = await gateway.http.get("/health")
    assert (answer.status_code, answer.json()["stage"]) == (200, "lending")
    for route in PASSED:
        refused = await gateway.http.request(route.method, route.path, json={})
        assert (refused.status_code, error_of(refused)["code"]) == (501, "not_served")
        assert "mesh serve" in str(error_of(refused)["message"])


async def test_health_tells_how_far_each_worker_is(gateway: Gateway) -> None:
    workers = (WorkerProgress("tower", 3, 4), WorkerProgress("attic", 0, 0))
    gateway.node.present = Health(Stage.LOADING, "loading tiny", 0.25, workers=workers)
    answer = await gateway.http.get("/health")
    assert answer.status_code == 503
    assert answer.json()["workers"] == [
        {"node": "tower", "done_bytes": 3, "total_bytes": 4},
        {"node": "attic", "done_bytes": 0, "total_bytes": 0},
    ]


async def test_until_it_is_ready_every_route_says_so(gateway: Gateway) -> None:
    gateway.node.present = Health(Stage.LOADING, "loading tiny", 0.5)
    for route in PASSED:
        answer = await gateway.http.request(route.method, route.path, json={})
        assert answer.status_code == 503, route
        assert answer.headers["retry-after"].isdecimal()
        assert error_of(answer)["message"] == "loading tiny"


async def test_when_it_is_ready_health_says_ok(gateway: Gateway, socket_folder: Path) -> None:
    gateway.node.serve_from(socket_folder / "llama.sock")
    for path in ("/health", "/v1/health"):
        answer = await gateway.http.get(path)
        assert answer.status_code == 200
        assert answer.json()["status"] == "ok"


async def test_status_shows_what_the_node_says(gateway: Gateway) -> None:
    answer = await gateway.http.get("/api/v1/status")
    assert answer.status_code == 200
    assert answer.json() == gateway.node.status()


async def test_health_answers_while_every_request_hangs(
    gateway: Gateway, socket_folder: Path, nursery: trio.Nursery
) -> None:
    arrived = trio.Semaphore(0)

    async def hang(visit: Visit) -> None:
        arrived.release()
        await visit.client_closes()

    async with scripted_server(socket_folder, hang) as socket, trio.open_nursery() as asking:
        gateway.node.serve_from(socket)
        for _ in range(32):
            asking.start_soon(lambda: gateway.http.post(CHAT, json=HELLO))
        for _ in range(32):
            await arrived.acquire()
        assert (await gateway.http.get("/health")).status_code == 200
        asking.cancel_scope.cancel()


# -- who may come in ------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/health", "/api/v1/status", CHAT, "/v1/models", "/nothing"])
async def test_a_rebound_name_gets_nothing(gateway: Gateway, path: str) -> None:
    for method in ("GET", "POST", "OPTIONS"):
        answer = await gateway.http.request(method, path, headers={"host": "evil.example:8090"})
        assert answer.status_code == 403
        assert error_of(answer)["code"] == "forbidden_host"


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://localhost:3000"])
async def test_a_page_of_another_origin_gets_nothing(gateway: Gateway, origin: str) -> None:
    preflight = {"access-control-request-method": "POST", "origin": origin}
    for method, headers in (("POST", {"origin": origin}), ("OPTIONS", preflight)):
        answer = await gateway.http.request(method, CHAT, headers=headers)
        assert answer.status_code == 403
        assert error_of(answer)["code"] == "forbidden_origin"
        assert not [name for name in answer.headers if name.startswith("access-control")]


async def test_a_page_of_our_own_origin_is_served(gateway: Gateway, socket_folder: Path) -> None:
    async with scripted_server(socket_folder, echo) as socket:
        gateway.node.serve_from(socket)
        answer = await gateway.http.post(CHAT, json=HELLO, headers={"origin": gateway.url})
        assert answer.status_code == 200


async def test_what_a_page_can_send_without_asking_is_refused(gateway: Gateway) -> None:
    """Forms and no-cors fetches can choose only these content types."""
    gateway.node.serve_from(Path("/nowhere"))
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""):
        answer = await gateway.http.post(CHAT, content=b"{}", headers={"content-type": kind})
        assert answer.status_code == 415
        assert error_of(answer)["code"] == "not_json"


async def test_no_answer_lets_another_origin_read_it(gateway: Gateway, socket_folder: Path) -> None:
    async with scripted_server(socket_folder, echo) as socket:
        gateway.node.serve_from(socket)
        for path in ("/health", "/v1/models", "/nothing"):
            headers = (await gateway.http.get(path)).headers
            assert not [name for name in headers if name.startswith("access-control")]
            assert headers["x-content-type-options"] == "nosniff"
            assert headers["cross-origin-resource-policy"] == "same-origin"


# -- what is served -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "target",
    [
        "/slots",
        "/props",
        "/metrics",
        "/v1",
        "/v1/",
        "/v1/models/",
        "/v1//models",
        "/v1/../slots",
        "/v1/%2e%2e/slots",
        "/v1/models%2f..%2f..%2fslots",
        "/v1/lora-adapters",
        "//v1/models",
        "http://localhost/v1/models",
    ],
)
async def test_no_path_reaches_what_is_not_in_the_table(
    gateway: Gateway, socket_folder: Path, target: str
) -> None:
    async with scripted_server(socket_folder, echo) as socket:
        gateway.node.serve_from(socket)
        request = f"GET {target} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
        answer = await exchange(gateway.port, request.encode())
        assert answer.startswith(b"HTTP/1.1 404 ")
        assert b'"unknown_route"' in answer


async def test_llama_server_sees_the_route_and_nothing_else_of_the_client(
    gateway: Gateway, socket_folder: Path
) -> None:
    """X-Conversation-Id, say, would make it go on generating after the client has left."""
    async with scripted_server(socket_folder, echo) as socket:
        gateway.node.serve_from(socket)
        headers = {"authorization": "Bearer secret", "x-conversation-id": "1", "cookie": "a=b"}
        answer = (await gateway.http.post(f"{CHAT}?x=1", json=HELLO, headers=headers)).json()
        assert answer["target"] == CHAT
        assert set(answer["headers"]) == {
            *("host", "accept", "connection", "content-type", "content-length")
        }


async def test_the_wrong_method_is_told_the_right_one(gateway: Gateway) -> None:
    answer = await gateway.http.get(CHAT)
    assert answer.status_code == 405
    assert answer.headers["allow"] == "POST"
    assert error_of(answer)["code"] == "method_not_allowed"


async def test_embeddings_need_a_model_served_for_them(
    gateway: Gateway, socket_folder: Path
) -> None:
    async with scripted_server(socket_folder, echo) as socket:
        gateway.node.serve_from(socket)
        answer = await gateway.http.post("/v1/embeddings", json={"input": "a"})
        assert answer.status_code == 501
        assert "--embeddings" in str(error_of(answer)["message"])
        gateway.node.serve_from(socket, embeddings=True)
        assert (await gateway.http.post("/v1/embeddings", json={"input": "a"})).status_code == 200


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v1/audio/transcriptions"),
        ("GET", "/v1/stream"),
        ("DELETE", "/v1/stream"),
        ("POST", "/v1/streams/lookup"),
    ],
)
async def test_what_is_withheld_says_why(gateway: Gateway, method: str, path: str) -> None:
    answer = await gateway.http.request(method, path)
    assert answer.status_code == 501
    assert "is not offered" in str(error_of(answer)["message"])


# -- bodies ---------------------------------------------------------------------------------------


async def test_broken_json_never_reaches_llama_server(gateway: Gateway) -> None:
    gateway.node.serve_from(Path("/nowhere"))
    headers = {"content-type": "application/json"}
    for content in (b"{", b'{"a": "' + b"x" * 1_000_000):
        answer = await gateway.http.post(CHAT, content=content, headers=headers)
        assert answer.status_code == 400
        assert error_of(answer)["code"] == "invalid_json"


HEAD = (
    b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
)


async def test_a_declared_size_beyond_the_limit_is_refused_before_the_body_is_sent(
    gateway: Gateway,
) -> None:
    gateway.node.serve_from(Path("/nowhere"))
    async with await trio.open_tcp_stream("127.0.0.1", gateway.port) as stream:
        await stream.send_all(HEAD + b"Content-Length: 100000000\r\n\r\n{")
        answer = await stream.receive_some()
    assert answer.startswith(b"HTTP/1.1 413 ")


async def test_a_client_that_reads_only_after_sending_100_mb_still_gets_its_413(
    gateway: Gateway,
) -> None:
    gateway.node.serve_from(Path("/nowhere"))
    async with await trio.open_tcp_stream("127.0.0.1", gateway.port) as stream:
        await stream.send_all(HEAD + b"Content-Length: 100000000\r\n\r\n")
        for _ in range(100):
            await stream.send_all(bytes(1_000_000))
        answer = await stream.receive_some()
    assert answer.startswith(b"HTTP/1.1 413 ")


async def test_a_body_of_no_declared_size_is_refused_once_it_is_too_large(
    gateway: Gateway,
) -> None:
    gateway.node.serve_from(Path("/nowhere"))
    chunk = b"%x\r\n%b\r\n" % (2**20, bytes(2**20))
    answer = b""
    async with await trio.open_tcp_stream("127.0.0.1", gateway.port) as stream:
        await stream.send_all(HEAD + b"Transfer-Encoding: chunked\r\n\r\n")
        for _ in range(MAX_BODY_BYTES // 2**20 + 1):
            await stream.send_all(chunk)
        answer = await stream.receive_some()
    assert answer.startswith(b"HTTP/1.1 413 ")


async def test_the_largest_body_allowed_is_passed_on_whole(
    gateway: Gateway, socket_folder: Path
) -> None:
    sizes = []

    async def measure(visit: Visit) -> None:
        sizes.append(len(visit.body))
        await visit.answer_json(200, {})

    async with scripted_server(socket_folder, measure) as socket:
        gateway.node.serve_from(socket)
        frame = len(b'{"a":""}')
        content = b'{"a":"' + b"x" * (MAX_BODY_BYTES - frame) + b'"}'
        headers = {"content-type": "application/json"}
        answer = await gateway.http.post(CHAT, content=content, headers=headers)
        assert answer.status_code == 200
        assert sizes == [MAX_BODY_BYTES]


async def test_a_body_that_never_comes_is_given_up(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(body_module, "BODY_TIMEOUT_S", 0.05)
    monkeypatch.setattr("meshnode.gateway.door.LINGER_S", 0.05)
    gateway.node.serve_from(Path("/nowhere"))
    request = HEAD + b"Content-Length: 10\r\n\r\n{"
    assert (await exchange(gateway.port, request)).startswith(b"HTTP/1.1 408 ")


async def test_a_compressed_body_is_not_read(gateway: Gateway) -> None:
    gateway.node.serve_from(Path("/nowhere"))
    headers = {"content-type": "application/json", "content-encoding": "gzip"}
    answer = await gateway.http.post(CHAT, content=b"\x1f\x8b", headers=headers)
    assert answer.status_code == 415


async def exchange(port: int, request: bytes) -> bytes:
    """Sends raw bytes and returns all that comes until the gateway closes the connection."""
    async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
        await stream.send_all(request)
        return b"".join([bytes(data) async for data in stream])
