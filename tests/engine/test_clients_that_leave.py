"""A request is given up when its client leaves, whoever else is being served (patch 7)."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from tests.engine.processes import PROMPT, Running, llama_server
from tests.engine.synthetic import make_model

pytestmark = pytest.mark.engine

SLOT_TOKENS = 2048
TIME_LIMIT_S = 60


@pytest.fixture(scope="module")
def slow_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that takes several seconds for `SLOT_TOKENS`, so that a second is not its end."""
    path = tmp_path_factory.mktemp("models") / "slow.gguf"
    return make_model(path, layers=4, width=1024, ffn=2048)


def request_body(*, stream: bool) -> dict[str, object]:
    return {
        "prompt": PROMPT,
        "n_predict": SLOT_TOKENS,
        "ignore_eos": True,
        "stream": stream,
        # A beginning that both have in common must not be computed by one for the other.
        "cache_prompt": False,
    }


@contextmanager
def asking_for_a_whole_answer(server: Running) -> Iterator[socket.socket]:
    """A client whose answer is not streamed; it has left when its socket is closed."""
    body = json.dumps(request_body(stream=False)).encode()
    head = f"POST /completion HTTP/1.1\r\nHost: engine\r\nContent-Length: {len(body)}\r\n"
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(TIME_LIMIT_S)
        client.connect(server.address)
        client.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + body)
        yield client


@contextmanager
def streamed_results(server: Running) -> Iterator[Iterator[str]]:
    """The events of another client's answer, each a result that all who wait are woken for."""
    transport = httpx.HTTPTransport(uds=server.address)
    with (
        httpx.Client(transport=transport, timeout=TIME_LIMIT_S) as client,
        client.stream("POST", "http://engine/completion", json=request_body(stream=True)) as reply,
    ):
        yield (line for line in reply.iter_lines() if line)


def slots_at_work(server: Running) -> int:
    with httpx.Client(transport=httpx.HTTPTransport(uds=server.address), timeout=60) as client:
        slots = client.get("http://engine/slots").raise_for_status().json()
    return sum(slot["is_processing"] for slot in slots)


def test_a_client_that_leaves_is_noticed_while_another_is_served(
    engine_bin: Path, folder: Path, slow_model: Path
) -> None:
    context = ["-c", str(2 * SLOT_TOKENS), "-np", "2", "--slots"]
    with (
        llama_server(engine_bin, folder, slow_model, *context) as server,
        asking_for_a_whole_answer(server) as leaving,
        streamed_results(server) as results,
    ):
        while server.log.count("processing task") < 2:
            next(results)
        assert slots_at_work(server) == 2
        leaving.close()
        # The other answer goes on: had it ended first, there would be nothing to wait for.
        while "cancel task" not in server.log:
            assert next(results, None) is not None, "the answer nobody waits for was computed"
        while "stop processing" not in server.log:
            next(results)
        assert slots_at_work(server) == 1
