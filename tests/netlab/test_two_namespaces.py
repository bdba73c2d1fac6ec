"""Two processes on two hosts of their own, a 1 GB model: what the cable carried is counted."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trio

from meshnode.demo.nodes import invite_token, open_node, write_token
from tests.engine.synthetic import make_model
from tests.netlab.namespaces import Host, two_hosts

pytestmark = [pytest.mark.engine, pytest.mark.netlab]

GIGABYTE = 10**9
MOST_SENT_BYTES = 5_000_000
TOKENS = 64
URL = "http://127.0.0.1:8090"
SAME_LAYOUT = ("--no-repack",)
BODY = {
    "prompt": "one two three",
    "max_tokens": TOKENS,
    "temperature": 0,
    "ignore_eos": True,
    "logprobs": 1,
}


@pytest.fixture
def hosts() -> Iterator[tuple[Host, Host]]:
    with two_hosts() as pair:
        yield pair


@pytest.fixture
def big_model(tmp_path: Path) -> Path:
    folder = tmp_path / "models"
    folder.mkdir()
    model = make_model(
        folder / "big.gguf", layers=24, width=2048, vocab=8192, heads=16, ffn=4096, seed=5
    )
    assert model.stat().st_size > GIGABYTE
    return model


def ask(host: Host, path: str, body: dict[str, Any] | None = None) -> Any:
    script = str(Path(__file__).with_name("ask.py"))
    arguments = [*host.prefix, sys.executable, script, URL + path]
    arguments += [json.dumps(body)] if body else []
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def tokens_in(answer: Any) -> list[int]:
    return [token["id"] for token in answer["choices"][0]["logprobs"]["content"]]


async def test_a_gigabyte_model_costs_the_cable_less_than_five_megabytes(
    hosts: tuple[Host, Host], big_model: Path, tmp_path: Path, engine_bin: Path
) -> None:
    orchestrator_host, worker_host = hosts
    async with open_node(
        *("worker", "--models", str(big_model.parent)),
        name="worker",
        home=tmp_path / "worker",
        log_folder=tmp_path,
        prefix=worker_host.prefix,
    ) as worker:
        invite = await worker.wait_event("invite")
        token_file = write_token(tmp_path / "token", invite_token(invite))
        before = orchestrator_host.sent_bytes()
        async with open_node(
            *("serve", "--model", str(big_model), "--join-file", str(token_file)),
            *("--layers", "local=0:3,worker=4:output", "--ctx", "512"),
            name="orchestrator",
            home=tmp_path / "orchestrator",
            log_folder=tmp_path,
            engine_options=SAME_LAYOUT,
            prefix=orchestrator_host.prefix,
        ) as node:
            await node.wait_event("ready", timeout_s=600)
            answer = await trio.to_thread.run_sync(ask, orchestrator_host, "/v1/completions", BODY)
            status = await trio.to_thread.run_sync(ask, orchestrator_host, "/api/v1/status")
        sent = orchestrator_host.sent_bytes() - before
    print(f"orchestrator to worker: {sent:,} bytes")  # pytest -s shows it
    assert sent < MOST_SENT_BYTES, "orchestrator to worker, on the interface"
    assert sum(load["sent_bytes"] for load in status["load"]) == 0
    assert tokens_in(answer) == await tokens_alone(orchestrator_host, big_model, tmp_path)


async def tokens_alone(host: Host, model: Path, folder: Path) -> list[int]:
    async with open_node(
        *("serve", "--model", str(model), "--split", "never", "--ctx", "512"),
        name="alone",
        home=folder / "alone",
        log_folder=folder,
        engine_options=SAME_LAYOUT,
        prefix=host.prefix,
    ) as node:
        await node.wait_event("ready", timeout_s=600)
        return tokens_in(await trio.to_thread.run_sync(ask, host, "/v1/completions", BODY))
