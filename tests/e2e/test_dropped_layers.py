"""A worker whose share became smaller gives back what it had of the rest, and fetches it anew.

The address carries a secret, so that the worker takes its share from the orchestrator: a web server
on loopback is no place where an orchestrator may send it.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from meshnode.demo.nodes import NodeProcess
from meshnode.models.store.slice import Slice, open_slice
from tests.conftest import require
from tests.e2e.conftest import Mesh, World
from tests.e2e.test_two_nodes import alone, greedy_tokens, url_of
from tests.engine.synthetic import make_model
from tests.lab.nginx import nginx_program, running_nginx

pytestmark = pytest.mark.engine

MOST, LITTLE = "local=0:0,ben=1:output", "local=0:4,ben=5:output"


async def test_a_share_that_shrinks_is_given_back_and_may_grow_again(
    world: World, mesh: Mesh
) -> None:
    program = nginx_program()
    require("nginx", program is not None, "nginx is not installed")
    assert program is not None
    for name in ("served", "nginx"):
        (world.folder / name).mkdir()
    model = make_model(
        world.folder / "served" / "big.gguf", layers=6, width=512, ffn=2048, name="big"
    )
    expected = await alone(world, model)
    collect = ("models", "gc", "--home", str(world.folder / "ben"), "--keep")

    def held() -> Slice:
        return open_slice(world.folder / "ben" / "models" / "big")

    @asynccontextmanager
    async def serving(layers: str) -> AsyncIterator[NodeProcess]:
        async with world.worker(name="ben") as worker:
            joins = ("--join-file", str(await world.join_file(worker)))
            options = ("--model", url, "--layers", layers, *joins)
            async with world.serve(*options, name="anna") as node:
                yield node

    with running_nginx(program, model.parent, world.folder / "nginx", token="x") as address:
        url = f"{address}{model.name}?token=x"
        async with serving(MOST) as node:
            assert await greedy_tokens(await url_of(node)) == expected
        much = held().held_bytes
        async with serving(LITTLE) as node:
            assert await greedy_tokens(await url_of(node)) == expected
            busy = mesh(*collect, "1K")
            busy.check(0)
            assert "big is in use and stays" in busy.stdout
            assert held().held_bytes == much
            assert await greedy_tokens(await url_of(node)) == expected
        given_back = mesh(*collect, f"{much // 2048}K")
        given_back.check(0)
        assert "what no plan needs of big any more is dropped" in given_back.stdout
        assert "is removed" not in given_back.stdout
        assert held().document.held == held().document.needed
        assert held().held_bytes < much // 2
        for layers in (LITTLE, MOST):
            async with serving(layers) as node:
                assert await greedy_tokens(await url_of(node)) == expected
        assert held().held_bytes == much
