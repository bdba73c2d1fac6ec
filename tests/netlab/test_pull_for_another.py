"""One machine has another pull from a web server, and the cable between the two comes out."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import trio

from meshnode.demo.nodes import NodeProcess, invite_token, open_node, write_token
from meshnode.models.store.slice import open_slice
from tests.engine.synthetic import make_model_of_size
from tests.netlab.hall import INTERFACE, Machine, hall, nginx

pytestmark = [pytest.mark.engine, pytest.mark.netlab]

MODEL_BYTES = 60 * 10**6
SPEED = "40mbit"  # twelve seconds for all of it
OUT_S = 5.0
QUIET = ("--no-mdns", "--no-portmap", "--stun", "none", "--threads", "1")
NETWORK = 4


@dataclass
class Scene:
    """`anna` orders, `ben` obeys, `web` has the file."""

    anna: Machine
    ben: Machine
    web: Machine
    folder: Path
    model: Path

    @property
    def url(self) -> str:
        return f"http://{self.web.address}/{self.model.name}"

    @property
    def pulled(self) -> Path:
        return self.folder / "ben" / "models" / "big" / self.model.name

    async def order(self, url: str) -> tuple[int, str]:
        """`mesh pull URL --for ben` beside anna's node: its exit code, and all that it says."""
        argv = [sys.executable, "-m", "meshnode.cli.main", "pull", url, "--for", "ben"]
        done = await trio.run_process(
            [*argv, "--home", str(self.folder / "anna")],
            capture_stdout=True,
            stderr=subprocess.STDOUT,
            check=False,
        )
        return done.returncode, done.stdout.decode()

    async def until_bytes_came(self, count: int) -> None:
        """Ben's disk holds so much of it."""
        while not self.pulled.exists() or self.pulled.stat().st_blocks * 512 < count:  # noqa: ASYNC110
            await trio.sleep(0.1)

    @asynccontextmanager
    async def node(self, name: str, machine: Machine, *options: str) -> AsyncIterator[NodeProcess]:
        async with open_node(
            *("worker", *QUIET, "--name", name, *options),
            name=name,
            home=self.folder / name,
            log_folder=self.folder,
            prefix=machine.prefix,
        ) as node:
            yield node


@pytest.fixture
def scene(tmp_path: Path, engine_bin: Path) -> Iterator[Scene]:
    (tmp_path / "served").mkdir()
    model = make_model_of_size(tmp_path / "served" / "big.gguf", size_bytes=MODEL_BYTES)
    with hall(["anna", "ben", "web"]) as (anna, ben, web):
        shape = ("root", "tbf", "rate", SPEED, "burst", "64kb", "latency", "200ms")
        web.space.run("tc", "qdisc", "add", "dev", INTERFACE, *shape)
        yield Scene(anna, ben, web, tmp_path, model)


async def test_an_order_outlives_an_outage_and_obeys_the_others_rules(scene: Scene) -> None:
    options = ("--allow-pull", "url,peers")
    with nginx(scene.web, scene.model.parent, scene.folder / "nginx"):
        async with scene.node("ben", scene.ben, *options) as ben:
            token = invite_token(await ben.wait_event("invite"))
            join = f"--join-file={write_token(scene.folder / 'token', token)}"
            async with scene.node("anna", scene.anna, join) as anna:
                await anna.wait_event("peer", containing="connected to ben")
                code, said = await scene.order("http://127.0.0.1/big.gguf")
                assert (code, "127.0.0.1" in said) == (NETWORK, True), said
                assert said.count("\n") == 1

                async with trio.open_nursery() as nursery:
                    nursery.start_soon(pull_the_cable, scene)
                    with trio.fail_after(120):
                        code, said = await scene.order(scene.url)
                assert code == 0, said
                assert "all of it is on ben" in said
                assert "without TLS" in said
    assert scene.pulled.read_bytes() == scene.model.read_bytes()
    assert open_slice(scene.pulled.parent).complete


async def pull_the_cable(scene: Scene) -> None:
    """Anna's, for a while, once some has come."""
    await scene.until_bytes_came(MODEL_BYTES // 5)
    scene.anna.space.ip(f"link set {INTERFACE} down")
    await trio.sleep(OUT_S)
    scene.anna.space.ip(f"link set {INTERFACE} up")
    assert scene.pulled.stat().st_blocks * 512 < MODEL_BYTES, "it was under way all the time"
