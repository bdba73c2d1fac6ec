"""Three nodes and a web server that has the model: each fetches what it computes with."""

from __future__ import annotations

import os
import shutil
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import trio

from meshnode.demo.nodes import NodeProcess, invite_token, open_node, write_token
from tests.engine.synthetic import make_model
from tests.netlab.hall import Machine, hall, nginx
from tests.netlab.test_whole_nodes import ask

pytestmark = [pytest.mark.engine, pytest.mark.netlab]

NAMES = ("anna", "ben", "carl")
SHARE = "local=0:5,ben=6:11,carl=12:output"
EXCHANGED = "local=0:5,carl=6:11,ben=12:output"
QUIET = ("--no-mdns", "--no-portmap", "--stun", "none", "--threads", "1")
BODY = {
    "prompt": "one two three",
    "max_tokens": 16,
    "temperature": 0,
    "ignore_eos": True,
    "logprobs": 1,
}
MOST_OVER = 0.03
ASKING_BYTES = 20_000
"""What a web server says where nothing is fetched from it: that its file is still the same one."""


@dataclass
class Mesh:
    """Three machines and the web server's. `homes` outlive the nodes."""

    machines: dict[str, Machine]
    server: Machine
    served: Path
    folder: Path
    heard: dict[str, int] = field(default_factory=dict)

    def home(self, name: str) -> Path:
        return self.folder / name

    @property
    def url(self) -> str:
        return f"http://{self.server.address}/big.gguf"

    @contextmanager
    def serving(self) -> Iterator[None]:
        with nginx(self.server, self.served, self.folder / "nginx"):
            yield

    async def acquaint(self) -> None:
        """All three become members of one mesh, and know each other from then on."""
        async with self._node("ben", "worker") as ben:
            token = write_token(self.folder / "token", invite_token(await ben.wait_event("invite")))
            join = ("worker", "--join-file", str(token))
            async with self._node("carl", *join) as carl, self._node("anna", *join) as anna:
                for node in (carl, anna):
                    await node.wait_event("peer", containing="connected to ben")
                await anna.wait_event("peer", containing="connected to carl")

    @asynccontextmanager
    async def run(self, layers: str = SHARE) -> AsyncIterator[NodeProcess]:
        """A deployment from start to ready; `heard` has what each machine received in it."""
        before = self._received()
        async with AsyncExitStack() as stack:
            for name in NAMES[1:]:
                await stack.enter_async_context(
                    self._node(name, "worker", "--allow-pull=url,peers")
                )
            serve = ("serve", "--model", self.url, "--ctx", "512", "--layers", layers)
            first = await stack.enter_async_context(self._node(NAMES[0], *serve))
            await first.wait_event("ready", timeout_s=600)
            yield first
            self.heard = {name: now - before[name] for name, now in self._received().items()}

    @asynccontextmanager
    async def _node(self, name: str, *arguments: str) -> AsyncIterator[NodeProcess]:
        async with open_node(
            *(*arguments, *QUIET, "--name", name),
            name=name,
            home=self.home(name),
            log_folder=self.folder,
            engine_options=("--no-repack",) if arguments[0] == "serve" else (),
            prefix=self.machines[name].prefix,
        ) as node:
            yield node

    def _received(self) -> dict[str, int]:
        return {name: machine.received_bytes() for name, machine in self.machines.items()}

    def wipe(self, name: str) -> None:
        shutil.rmtree(self.home(name) / "models")

    def disk_bytes(self, name: str) -> int:
        """What its disk holds of models, holes left out."""
        files = (self.home(name) / "models").rglob("*.gguf")
        return sum(file.stat().st_blocks * 512 for file in files)


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[Mesh]:
    served = tmp_path / "served"
    served.mkdir()
    make_model(served / "big.gguf", layers=18, width=2560, vocab=8192, heads=20, ffn=10240, seed=11)
    assert (served / "big.gguf").stat().st_size > 2 * 10**9
    with hall([*NAMES, "web"]) as (*machines, server):
        yield Mesh(dict(zip(NAMES, machines, strict=True)), server, served, tmp_path)


async def tokens_of(mesh: Mesh, node: NodeProcess) -> list[int]:
    url = next(event["url"] for event in node.events if event["event"] == "ready")
    machine = mesh.machines[NAMES[0]]
    answer = await trio.to_thread.run_sync(ask, machine.space, f"{url}/v1/completions", BODY)
    return tokens_in(answer)


def tokens_in(answer: Any) -> list[int]:
    return [token["id"] for token in answer["choices"][0]["logprobs"]["content"]]


async def tokens_alone(mesh: Mesh) -> list[int]:
    async with open_node(
        *("serve", "--model", str(mesh.served / "big.gguf"), "--split", "never", "--ctx", "512"),
        *QUIET,
        name="alone",
        home=mesh.home("alone"),
        log_folder=mesh.folder,
        engine_options=("--no-repack", "--ubatch-size", "128"),
        prefix=mesh.server.prefix,
    ) as node:
        url = (await node.wait_event("ready", timeout_s=600))["url"]
        answer = await trio.to_thread.run_sync(
            ask, mesh.server.space, f"{url}/v1/completions", BODY
        )
    return tokens_in(answer)


async def test_each_node_fetches_its_own_layers_and_no_more(mesh: Mesh, engine_bin: Path) -> None:
    expected = await tokens_alone(mesh)
    whole_bytes = os.path.getsize(mesh.served / "big.gguf")
    await mesh.acquaint()
    with mesh.serving():
        async with mesh.run() as node:
            assert await tokens_of(mesh, node) == expected
        slices = {name: mesh.disk_bytes(name) for name in NAMES}
        print(f"slices {slices}, received {mesh.heard}, whole {whole_bytes}")  # pytest -s shows it
        for name in NAMES:
            assert slices[name] < 0.5 * whole_bytes, "no disk holds the whole"
            assert mesh.heard[name] <= slices[name] * (1 + MOST_OVER), name
        assert sum(slices.values()) >= whole_bytes - 2**20, "together they do"

        before = mesh.server.sent_bytes()
        async with mesh.run() as node:
            assert await tokens_of(mesh, node) == expected
        again = mesh.server.sent_bytes() - before
        print(f"started again: received {mesh.heard}, from the web server {again}")
        assert again < ASKING_BYTES, "nothing is fetched again"
        assert {name: mesh.disk_bytes(name) for name in NAMES} == slices

        async with mesh.run(EXCHANGED) as node:
            assert await tokens_of(mesh, node) == expected, "slices grow as plans change"

    mesh.wipe("ben")
    async with mesh.run() as node:
        assert await tokens_of(mesh, node) == expected
    print(f"ben wiped, without the web server: received {mesh.heard}")
    assert mesh.disk_bytes("ben") >= slices["ben"], "it came from its peers"
