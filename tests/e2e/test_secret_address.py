"""A model behind an address that only the orchestrator's user knows: workers get their parts."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from meshnode.demo.nodes import NodeProcess
from meshnode.models.facts import read_facts
from meshnode.models.manifest import digest_model
from meshnode.models.store.hearsay import told_root
from meshnode.models.store.slice import Slice, open_slice
from tests.conftest import require
from tests.e2e.conftest import Mesh, World
from tests.e2e.test_two_nodes import alone, greedy_tokens, url_of
from tests.engine.synthetic import make_model
from tests.lab.nginx import nginx_program, running_nginx

pytestmark = pytest.mark.engine

SECRET = "geheim"
LAYOUT = ("--layers", "local=0:1,ben=2:output")


@contextmanager
def served(model: Path, scratch: Path) -> Iterator[str]:
    """The model's address, which is no address without its token."""
    program = nginx_program()
    require("nginx", program is not None, "nginx is not installed")
    assert program is not None
    scratch.mkdir(exist_ok=True)
    with running_nginx(program, model.parent, scratch, token=SECRET) as address:
        yield f"{address}{model.name}?token={SECRET}"


@dataclass
class Stage:
    world: World
    model: Path

    def held(self, name: str) -> Slice:
        return open_slice(self.world.folder / name / "models" / "big")

    @asynccontextmanager
    async def serving(self, url: str, *ben: str) -> AsyncIterator[NodeProcess]:
        """The orchestrator, with the worker `ben`."""
        async with self.world.worker(*ben, name="ben") as worker:
            joins = ("--join-file", str(await self.world.join_file(worker)))
            async with self.world.serve("--model", url, *LAYOUT, *joins, name="anna") as node:
                yield node


@pytest.fixture
def stage(world: World) -> Stage:
    (world.folder / "served").mkdir()
    path = world.folder / "served" / "big.gguf"
    model = make_model(path, layers=6, width=512, ffn=2048, name="big")
    return Stage(world, model)


def warnings(node: NodeProcess) -> list[str]:
    return [event["text"] for event in node.events if "carries a secret" in event["text"]]


async def test_workers_take_from_here_what_they_cannot_fetch_and_are_told_no_secret(
    stage: Stage,
) -> None:
    expected = await alone(stage.world, stage.model)
    with served(stage.model, stage.world.folder / "nginx") as url:
        async with stage.serving(url) as node:
            assert await greedy_tokens(await url_of(node)) == expected
            (told,) = warnings(node)
            assert "so ben cannot fetch from there" in told
            assert "`mesh pull`" in told
    ben = stage.held("ben")
    assert 0 < ben.held_bytes < ben.facts.weight_bytes
    assert ben.document.source == "mesh:big"
    assert ben.document.needed == ben.document.held
    anna = stage.held("anna").document
    assert anna.needed is not None
    assert anna.needed < anna.held, "what it fetched for ben"
    async with stage.serving(url) as node:
        assert await greedy_tokens(await url_of(node)) == expected, "the server is gone"
        assert warnings(node) == []
    for path in stage.world.folder.rglob("*"):
        if path.is_file() and path.parent.name != "nginx":
            assert SECRET.encode() not in path.read_bytes(), path


async def test_who_pulled_by_hand_with_the_whole_address_is_sent_nothing(
    stage: Stage, mesh: Mesh
) -> None:
    with served(stage.model, stage.world.folder / "nginx") as url:
        home = ("--home", str(stage.world.folder / "ben"))
        mesh("pull", url, "--layers", "2:output", *home).check(0)
        async with stage.serving(url) as node:
            await url_of(node)
            assert warnings(node) == []
    anna = stage.held("anna")
    assert anna.held_bytes < anna.facts.weight_bytes, "its own layers, and no others"
    told = told_root(anna)
    assert told is not None
    assert told.root == digest_model(read_facts(stage.model)).root, "as the two say together"
    info = mesh("models", "info", "big", "--home", str(stage.world.folder / "anna")).stdout
    assert f"{told.root} by ben (" in info


async def test_a_worker_that_takes_nothing_from_members_says_so(stage: Stage) -> None:
    with served(stage.model, stage.world.folder / "nginx") as url:
        async with stage.serving(url, "--allow-pull", "hub,url") as node:
            refused = await node.wait_event("warning", containing="--allow-pull peers")
    assert "pulls nothing from other members" in refused["text"]
    assert "404" not in refused["text"]


async def test_without_its_secret_an_address_is_no_address(stage: Stage, mesh: Mesh) -> None:
    with served(stage.model, stage.world.folder / "nginx") as url:
        home = ("--home", str(stage.world.folder / "anna"))
        mesh("pull", url, "--layers", "0:1", *home).check(0)
        shown = url.replace(f"token={SECRET}", "…")
        mesh("pull", shown, *home).check(4, "name the whole address again")
        mesh("pull", url, *home).check(0)
