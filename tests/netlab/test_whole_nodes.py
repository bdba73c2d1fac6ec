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
from tests.netlab.servers import TURN_PASSWORD, TURN_USER, can_run, coturn
from tests.netlab.topology import STUN, STUN_PORT, Internet, internet

pytestmark = [pytest.mark.engine, pytest.mark.netlab]

ASK_STUN = ("--no-offline", "--stun", ",".join(f"{host}:{STUN_PORT}" for host in STUN))
QUESTION = {"role": "user", "content": "What is the capital of France?"}
BODY = {"messages": [QUESTION], "max_tokens": 24, "temperature": 0}


@pytest.fixture
def net(tmp_path: Path) -> Iterator[Internet]:
    """With servers that say how a node looks from outside, and carry for who has the password."""
    require("coturn", can_run("turnserver"), "needs coturn (./just setup)")
    with internet() as laid:
        server = coturn(laid.servers, list(STUN), STUN_PORT, tmp_path, carries=True)
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
async def relay_on(host: Namespace, folder: Path) -> AsyncIterator[Path]:
    """The file with its token."""
    async with open_node(
        *("relay", "--no-mdns", "--no-offline", "--stun", "none", "--no-portmap", "--tcp", "443"),
        name="relay",
        home=folder / "relay",
        log_folder=folder,
        prefix=host.prefix,
    ) as node:
        yield write_token(folder / "relay-token", invite_token(await node.wait_event("invite")))


@asynccontextmanager
async def worker_on(
    host: Namespace, folder: Path, token: Path | None = None, *options: str
) -> AsyncIterator[Path]:
    """The file with its token, where it has not joined by another's."""
    join = () if token is None else ("--join-file", str(token))
    async with open_node(
        *("worker", "--no-mdns", "--no-portmap", "--threads", "1", *ASK_STUN, *join, *options),
        name="worker",
        home=folder / "worker",
        log_folder=folder,
        prefix=host.prefix,
    ) as node:
        if token is None:
            token = write_token(folder / "token", invite_token(await node.wait_event("invite")))
        else:
            await node.wait_event("peer")
        yield token


@asynccontextmanager
async def server_on(
    host: Namespace, folder: Path, token: Path, *options: str
) -> AsyncIterator[NodeProcess]:
    async with open_node(
        *("serve", "--no-mdns", "--no-portmap", "--threads", "1", *ASK_STUN),
        *("--join-file", str(token)),
        *("--layers", "local=0:3,worker=4:output", *options),
        name="orchestrator",
        home=folder / "orchestrator",
        log_folder=folder,
        engine_options=("--no-repack",),
        prefix=host.prefix,
    ) as node:
        yield node


async def answers_over(node: NodeProcess, host: Namespace, kind: str) -> None:
    """The model answers, and the worker is reached over this kind of link, by then or soon."""
    url = (await node.wait_event("ready", timeout_s=300))["url"]
    answer = await trio.to_thread.run_sync(ask, host, f"{url}/v1/chat/completions", BODY)
    assert answer["choices"][0]["message"]["content"]
    if await link_to_worker(host, url) != kind:
        await node.wait_event("path", containing=f"over {kind}")


async def link_to_worker(host: Namespace, url: str) -> str:
    status = await trio.to_thread.run_sync(ask, host, f"{url}/api/v1/status")
    (link,) = (peer["link"] for peer in status["peers"] if peer["name"] == "worker")
    return str(link)


async def accept(reply: dict[str, Any], host: Namespace, home: Path) -> None:
    """What the joiner printed is typed on the other machine."""
    command, *code = str(reply["line"]).removeprefix("mesh ").split()
    done = await trio.to_thread.run_sync(lambda: mesh(host, command, *code, "--home", str(home)))
    assert (done.returncode, done.stderr) == (0, "")
    assert "it joins now" in done.stdout


async def test_both_behind_routers_and_no_relay(net: Internet, tmp_path: Path) -> None:
    here, there = net.site("home"), net.site("home")
    async with (
        worker_on(there.host, tmp_path) as token,
        server_on(here.host, tmp_path, token, "--wait-accept", "5m") as server,
    ):
        await accept(await server.wait_event("reply"), there.host, tmp_path / "worker")
        await answers_over(server, here.host, "quic")


async def test_both_behind_routers_and_webrtc_alone(net: Internet, tmp_path: Path) -> None:
    """What is punched serves to begin it, and for nothing else."""
    here, there, alone = net.site("home"), net.site("home"), ("--transport", "webrtc")
    async with (
        worker_on(there.host, tmp_path, None, *alone) as token,
        server_on(here.host, tmp_path, token, "--wait-accept", "5m", *alone) as server,
    ):
        await accept(await server.wait_event("reply"), there.host, tmp_path / "worker")
        await answers_over(server, here.host, "webrtc")


@pytest.mark.parametrize(
    ("joiner", "port", "transport"), [("sym", STUN_PORT, "udp"), ("blocked", 443, "tcp")]
)
async def test_nothing_can_be_punched_and_a_turn_server_carries(
    net: Internet, tmp_path: Path, joiner: str, port: int, transport: str
) -> None:
    """The routers show everybody another port, or let no UDP out, and no node relays. The joiner
    has a TURN server, and its place there is in the reply code."""
    here, there = net.site(joiner), net.site("sym")
    secret = tmp_path / "turn-password"
    secret.write_text(TURN_PASSWORD)
    server_uri = f"turn:{STUN[0]}:{port}?transport={transport}"
    turn = ("--turn", f"{server_uri},{TURN_USER}", "--turn-password-file", str(secret))
    async with (
        worker_on(there.host, tmp_path) as token,
        server_on(here.host, tmp_path, token, "--wait-accept", "5m", *turn) as server,
    ):
        await accept(await server.wait_event("reply"), there.host, tmp_path / "worker")
        await answers_over(server, here.host, "webrtc")


async def test_both_behind_routers_with_a_relay(net: Internet, tmp_path: Path) -> None:
    """It brings them together; then they have a way of their own."""
    here, there = net.site("home"), net.site("home")
    async with (
        relay_on(net.relay, tmp_path) as token,
        worker_on(there.host, tmp_path, token),
        server_on(here.host, tmp_path, token) as server,
    ):
        await answers_over(server, here.host, "quic")


async def test_where_only_web_pages_are_let_out_the_relay_carries(
    net: Internet, tmp_path: Path
) -> None:
    here, there = net.site("blocked"), net.site("home")
    async with (
        relay_on(net.relay, tmp_path) as token,
        worker_on(there.host, tmp_path, token),
        server_on(here.host, tmp_path, token) as server,
    ):
        await answers_over(server, here.host, "relay")


@pytest.mark.parametrize("lends", ["open", "home"])
async def test_one_behind_a_router(net: Internet, tmp_path: Path, lends: str) -> None:
    """Whoever prints the token."""
    there, here = (net.site(kind) for kind in (lends, "home" if lends == "open" else "open"))
    async with (
        worker_on(there.host, tmp_path) as token,
        server_on(here.host, tmp_path, token, "--wait-accept", "5m") as server,
    ):
        if lends == "home":
            await accept(await server.wait_event("reply"), there.host, tmp_path / "worker")
        await answers_over(server, here.host, "quic")
