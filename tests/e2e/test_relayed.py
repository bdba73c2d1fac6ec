"""A model over two machines that reach each other only through a third, and what the third sees."""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest
import trio

from meshnode.demo.nodes import NodeProcess, open_node
from tests.e2e.conftest import LOOPBACK, World
from tests.e2e.test_two_nodes import COMPARED_TOKENS, alone, greedy_tokens, status_of, url_of

pytestmark = pytest.mark.engine

THROUGH_IT = ("--transport", "relay")  # as if no packet got through between the two
RETURN_S = 240.0
ASK_AGAIN_S = 1.0


@asynccontextmanager
async def relay(world: World) -> AsyncIterator[NodeProcess]:
    home = world.folder / "rita"
    async with open_node(
        *("relay", *LOOPBACK), name="rita", home=home, log_folder=world.folder
    ) as node:
        yield node


async def link_to_worker(url: str) -> str | None:
    rows = {row["name"]: row["link"] for row in (await status_of(url))["peers"]}
    return rows.get("worker")


async def test_a_model_runs_through_a_relay_as_it_does_alone(
    world: World, small_model: Path
) -> None:
    expected = await alone(world, small_model)
    async with relay(world) as rita:
        joins = (*THROUGH_IT, "--join-file", str(await world.join_file(rita)))
        async with world.worker("--models", str(small_model.parent), *joins) as worker:
            await worker.wait_event("peer", containing="rita")
            arguments = ("--model", str(small_model), "--split", "always")
            async with world.serve(*arguments, *joins) as node:
                url = await url_of(node)
                assert await greedy_tokens(url) == expected
                assert len(expected) == COMPARED_TOKENS
                assert await link_to_worker(url) == "relay"


async def test_a_relay_that_dies_is_followed_by_the_next_answer(
    world: World, small_model: Path
) -> None:
    async with relay(world) as first:
        joins = (*THROUGH_IT, "--join-file", str(await world.join_file(first)))
        async with world.worker("--models", str(small_model.parent), *joins) as worker:
            await worker.wait_event("peer", containing="rita")
            arguments = ("--model", str(small_model), "--split", "always")
            async with world.serve(*arguments, *joins) as node:
                url = await url_of(node)
                before = await greedy_tokens(url)
                os.kill(first.pid, signal.SIGKILL)
                await first.wait_exit()
                async with relay(world):
                    with trio.fail_after(RETURN_S):
                        while await answer(url) != before:  # noqa: ASYNC110 - nothing tells
                            await trio.sleep(ASK_AGAIN_S)
                    assert await link_to_worker(url) == "relay"


async def answer(url: str) -> list[int] | None:
    """None while there is none: the pipeline is being made anew."""
    try:
        return await greedy_tokens(url)
    except (AssertionError, httpx.HTTPError):
        return None
