"""Two workers and an orchestrator: what one worker computed goes to the other straight."""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import trio

from meshnode.demo.nodes import NodeProcess
from tests.e2e.conftest import World
from tests.e2e.test_two_nodes import alone, greedy_tokens, status_of, url_of

pytestmark = pytest.mark.engine

PROMPT_TOKENS = 1500
ROW_BYTES = 128 * 4  # what one worker hands on of each token of the small model
STRAIGHT = "sends what it computes straight to"
ALL_REMOTE = ("--layers", "one=0:3,two=4:output")


@dataclass
class Stage:
    """Two workers and an orchestrator, members of one mesh. `first`, `last`: the workers' names, as
    their layers follow one another."""

    workers: dict[str, NodeProcess]
    first: str
    last: str
    url: str


@asynccontextmanager
async def stage(world: World, model: Path) -> AsyncIterator[Stage]:
    models = ("--models", str(model.parent))
    async with world.worker(*models, name="one") as one:
        join = ("--join-file", str(await world.join_file(one)))
        async with (
            world.worker(*models, *join, name="two") as two,
            world.serve("--model", str(model), "--split=always", *join) as node,
        ):
            # It may have begun with one of them alone.
            joined = await node.wait_event("lease", containing=STRAIGHT)
            ready = await node.wait_event("ready", after=node.events.index(joined))
            workers = {"one": one, "two": two}
            yield Stage(workers, joined["from"], joined["to"], str(ready["url"]))


async def bytes_from(url: str, name: str) -> int:
    (row,) = [row for row in (await status_of(url))["peers"] if row["name"] == name]
    return int(row["bytes_in"])


async def read_prompt(url: str) -> None:
    body = {"prompt": list(range(1, 251)) * (PROMPT_TOKENS // 250), "max_tokens": 1}
    async with httpx.AsyncClient(timeout=120) as client:
        response = await client.post(f"{url}/v1/completions", json=body)
    assert response.status_code == 200, response.text


async def test_activations_do_not_pass_the_orchestrator(world: World, small_model: Path) -> None:
    expected = await alone(world, small_model)
    async with stage(world, small_model) as nodes:
        assert await greedy_tokens(nodes.url) == expected
        before = await bytes_from(nodes.url, nodes.first)
        await read_prompt(nodes.url)
        passed = await bytes_from(nodes.url, nodes.first) - before
        assert passed < ROW_BYTES * PROMPT_TOKENS / 10, f"{passed} bytes passed the orchestrator"
        assert await greedy_tokens(nodes.url) == expected


async def test_workers_of_two_meshes_answer_through_the_orchestrator(
    world: World, small_model: Path
) -> None:
    expected = await alone(world, small_model)
    async with (
        world.two_workers(small_model) as (_, joins),
        world.serve("--model", str(small_model), *ALL_REMOTE, *joins) as node,
    ):
        url = await url_of(node)
        await node.wait_event("lease", containing="goes to two through this node")
        assert await greedy_tokens(url) == expected


@pytest.mark.parametrize("place", ["first", "last"])
async def test_a_worker_of_the_ring_dies_and_is_the_one_that_is_named(
    world: World, small_model: Path, place: str
) -> None:
    async with stage(world, small_model) as nodes, httpx.AsyncClient(timeout=60) as client:
        dying = nodes.first if place == "first" else nodes.last
        body = {"prompt": "one two three", "max_tokens": 3000, "stream": True}
        async with client.stream("POST", f"{nodes.url}/v1/completions", json=body) as answer:
            lines = answer.aiter_lines()
            assert (await anext(lines)).startswith("data:")
            os.kill(nodes.workers[dying].pid, signal.SIGKILL)
            with trio.fail_after(30):
                rest = "\n".join([line async for line in lines])
    assert f"the lease on {dying} ended" in rest, rest[-500:]
