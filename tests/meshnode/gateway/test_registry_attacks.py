"""What a client without the key, or with bad manners, can do to the registry API: nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import trio

from meshnode.gateway import model_data
from meshnode.gateway.door import LINGER_S
from meshnode.gateway.server import SEND_STALL_S
from meshnode.models.model_file import ModelFile
from tests.lab.stalls import let_pass, pushed_clock, until
from tests.meshnode.gateway.model_node import KEY, ROOT, ModelNode, open_model_node
from tests.meshnode.gateway.test_answers import error_of
from tests.meshnode.gateway.test_model_pull import FAR

PULL = f"POST {ROOT}/{FAR}/pull HTTP/1.1\r\nHost: localhost\r\n"
JSON = "Content-Type: application/json\r\n"
SHOWN = f"Authorization: Bearer {KEY}\r\n"
LARGE: dict[str, Any] = {"layers": 6, "width": 1024, "ffn": 1024, "vocab": 4000}


async def said_to(node: ModelNode, words: bytes, more: bytes = b"") -> bytes:
    """The answer to words that no library would send, the last of them again and again."""
    port = node.http.base_url.port
    assert port is not None
    stream = await trio.open_tcp_stream("127.0.0.1", port)
    heard = b""

    async def say() -> None:
        try:
            await stream.send_all(words)
            while more:
                await stream.send_all(more)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass  # the gateway has heard enough

    async with stream, trio.open_nursery() as nursery:
        nursery.start_soon(say)
        try:
            async for data in stream:
                heard += data
        except trio.BrokenResourceError:
            pass
        nursery.cancel_scope.cancel()
    return heard


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        pytest.param(JSON, b"401", id="without the key"),
        pytest.param(JSON + SHOWN, b"413", id="with it"),
    ],
)
@pytest.mark.parametrize(
    ("length", "more"),
    [
        pytest.param("Content-Length: 1000000000000", b"x" * 65536, id="told beforehand"),
        pytest.param(
            "Transfer-Encoding: chunked", b"10000\r\n" + b" " * 65536 + b"\r\n", id="without end"
        ),
    ],
)
async def test_a_giant_body_is_not_waited_for(
    node: ModelNode, headers: str, status: bytes, length: str, more: bytes
) -> None:
    with trio.fail_after(4 * LINGER_S):
        heard = await said_to(node, f"{PULL}{headers}{length}\r\n\r\n".encode(), more)
    assert heard.split(b" ", 2)[1] == status
    assert node.web.asked == []


@pytest.mark.parametrize("shown", [b"\xff\xfe", b"Bearer \xe9" * 40, b"Bearer", b"bearer\t"])
async def test_a_key_of_odd_bytes_is_another_key(node: ModelNode, shown: bytes) -> None:
    head = f"GET {ROOT}/m/data HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nAuthorization: "
    heard = await said_to(node, head.encode() + shown + b"\r\n\r\n")
    assert heard.split(b" ", 2)[1] == b"401"
    assert KEY.encode() not in heard


@pytest.mark.parametrize("method", ["PUT", "PATCH", "DELETE", "POST", "GET", "HEAD", "TRACE"])
@pytest.mark.parametrize("route", ["registry", "m/metadata", "m/tensors", "m/data", "m/pull"])
async def test_no_other_method_does_anything(node: ModelNode, route: str, method: str) -> None:
    path = node.put()
    before = path.read_bytes()
    own = ("POST",) if route.endswith("pull") else ("GET", "HEAD")
    answer = await node.http.request(method, f"{ROOT}/{route}")
    if method not in own:
        assert answer.status_code == 405
        assert set(answer.headers["allow"].split(", ")) == set(own)
    assert path.read_bytes() == before
    assert node.web.asked == []


@pytest.mark.parametrize("route", ["registry", "m/metadata", "m/tensors", "m/data"])
async def test_a_page_of_another_origin_reads_nothing(node: ModelNode, route: str) -> None:
    node.put()
    for origin in ("http://evil.example", "null", "https://localhost", "http://127.0.0.1:1"):
        answer = await node.http.get(f"{ROOT}/{route}", headers={"origin": origin})
        assert (answer.status_code, error_of(answer)["code"]) == (403, "forbidden_origin")
    own = str(node.http.base_url).rstrip("/")
    assert (await node.http.get(f"{ROOT}/{route}", headers={"origin": own})).status_code == 200


@pytest.mark.parametrize(
    "path",
    [
        "/api/v1/models/../../../etc/passwd/data",
        "/api/v1/models/%2e%2e%2f%2e%2e%2fm.gguf/data",
        "/api/v1/models/..%2fmodels%2fm/data",
        "/api/v1/models/m.gguf%00/data",
        "/api/v1/models//data",
        "/api/v1/models/" + "m" * 5000 + "/data",
        "/api/v1/models/m/data/../../../status",
    ],
)
async def test_no_path_leads_out_of_the_models(node: ModelNode, path: str) -> None:
    node.put()
    head = f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n{SHOWN}\r\n"
    heard = await said_to(node, head.encode())
    assert heard.split(b" ", 2)[1] == b"404"
    assert b"GGUF" not in heard


async def test_a_reader_that_takes_nothing_is_read_to_no_further(
    node: ModelNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = node.put(**LARGE).read_bytes()
    read_bytes = 0
    read = ModelFile.read

    def count(file: ModelFile, at: int, size_bytes: int) -> bytes:
        nonlocal read_bytes
        read_bytes += size_bytes
        return read(file, at, size_bytes)

    monkeypatch.setattr(ModelFile, "read", count)
    port = node.http.base_url.port
    assert port is not None
    async with await trio.open_tcp_stream("127.0.0.1", port) as idle:
        head = f"GET {ROOT}/m/data HTTP/1.1\r\nHost: localhost\r\n{SHOWN}\r\n"
        await idle.send_all(head.encode())
        await until(lambda: read_bytes > 0)
        assert (await node.data()).content == content  # another one gets all meanwhile
        assert read_bytes < 2 * len(content), "the rest of the idle one's was not read"


def test_a_reader_that_stops_for_good_loses_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_data, "MAX_STREAMS", 1)

    async def story() -> None:
        async with open_model_node(tmp_path) as node:
            node.put(**LARGE)
            port = node.http.base_url.port
            assert port is not None
            async with await trio.open_tcp_stream("127.0.0.1", port) as idle:
                head = f"GET {ROOT}/m/data HTTP/1.1\r\nHost: localhost\r\n{SHOWN}\r\n"
                await idle.send_all(head.encode())
                assert await idle.receive_some(1)
                assert (await node.data(range="bytes=0-0")).status_code == 503
                await let_pass(clock, SEND_STALL_S + 10, 5)
                assert (await node.data(range="bytes=0-0")).status_code == 206

    clock = pushed_clock()
    trio.run(story, clock=clock)
