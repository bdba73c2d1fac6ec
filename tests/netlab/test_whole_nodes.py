"""Two whole `mesh` nodes, each behind a home router, and what a person does there."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from meshnode.demo.nodes import NodeProcess, invite_token, open_node, write_token
from tests.conftest import require
from tests.netlab.netns import Namespace
from tests.netlab.servers import can_run, coturn
from tests.netlab.topology import STUN, STUN_PORT, Internet, internet

pytestmark = [pytest.mark.engine, pytest.mark.netlab]

ASK_STUN = ("--no-offline", "--stun", ",".join(f"{host}:{STUN_PORT}" for host in STUN))
QUESTION = {"role": "user", "content": "What is the capital of France?"}
BODY = {"messages": [QUESTION], "max_tokens": 24, "temperature": 0}


@pytest.fixture
def net(tmp_path: Path) -> Iterator[Internet]:
    """With servers that say how a node looks from outside."""
    require("coturn", can_run("turnserver"), "needs coturn (./just setup)")
    with internet() as laid:
        server = coturn(laid.servers, list(STUN), STUN_PORT, tmp_path)
        try:
            yield laid
        finally:
            server.close()


def ask(host: Namespace, url: str, body: dict[str, Any] | None = None) -> Any:
    script = str(Path(__file__).with_name("ask.py"))
    arguments = [*host.prefix, sys.executable, script, url]
    arguments += [json.dumps(body)] if body else []
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def mesh(host: Namespace, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A command that a person types there."""
    argv = [*host.prefix, sys.executable, "-m", "meshnode.cli.main", *arguments]
    return subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)


@asynccontextmanager
async def worker_on(host: Namespace, folder: Path) -> AsyncIterator[tuple[NodeProcess, Path]]:
    """It, and the file with its token."""
    async with open_node(
        *("worker", "--no-mdns", "--threads", "1", *ASK_STUN),
        name="worker",
        home=folder / "worker",
        log_folder=folder,
        prefix=host.prefix,
    ) as node:
        token = invite_token(await node.wait_event("invite"))
        yield node, write_token(folder / "token", token)


@asynccontextmanager
async def server_on(
    host: Namespace, folder: Path, token: Path, *options: str
) -> AsyncIterator[NodeProcess]:
    async with open_node(
        *("serve", "--no-mdns", "--threads", "1", *ASK_STUN, "--join-file", str(token)),
        *("--layers", "local=0:3,worker=4:output", *options),
        name="orchestrator",
        home=folder / "orchestrator",
        log_folder=folder,
        engine_options=("--no-repack",),
        prefix=host.prefix,
    ) as node:
        yield node


async def answers_over(node: NodeProcess, host: Namespace, kind: str) -> None:
    """The model answers, and the worker is reached over this kind of link."""
    url = (await node.wait_event("ready", timeout_s=300))["url"]
    answer = await trio.to_thread.run_sync(ask, host, f"{url}/v1/chat/completions", BODY)
    assert answer["choices"][0]["message"]["content"]
    status = await trio.to_thread.run_sync(ask, host, f"{url}/api/v1/status")
    assert [peer["link"] for peer in status["peers"]] == [kind]


async def test_both_behind_routers_and_no_relay(net: Internet, tmp_path: Path) -> None:
    here, there = net.site("home"), net.site("home")
    async with (
        worker_on(there.host, tmp_path) as (_, token),
        server_on(here.host, tmp_path, token, "--wait-accept", "5m") as server,
    ):
        line = (await server.wait_event("reply"))["line"]
        command, *code = str(line).removeprefix("mesh ").split()
        home = ("--home", str(tmp_path / "worker"))
        done = await trio.to_thread.run_sync(lambda: mesh(there.host, command, *code, *home))
        assert (done.returncode, done.stderr) == (0, "")
        assert "it joins now" in done.stdout
        await answers_over(server, here.host, "quic")
