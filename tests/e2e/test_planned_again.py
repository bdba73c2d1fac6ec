"""The pipeline is planned again on what is left, and again when a worker is there to be used."""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest
import trio

from meshnode.demo.nodes import NodeProcess
from tests.e2e.conftest import World
from tests.e2e.test_two_nodes import alone, greedy_tokens, status_of, url_of

pytestmark = pytest.mark.engine

LONG_TOKENS = 1500


async def placed_on(url: str) -> set[str]:
    return {share["node"] for share in (await status_of(url))["layers"]}


async def killed(node: NodeProcess) -> None:
    os.kill(node.pid, signal.SIGKILL)
    await node.wait_exit()


@asynccontextmanager
async def long_answer(url: str, tokens: int = LONG_TOKENS) -> AsyncIterator[list[str]]:
    """An answer that streams while the body runs, and is whole when it ends."""
    body = {"prompt": "one", "max_tokens": tokens, "ignore_eos": True, "stream": True}
    lines: list[str] = []
    begun = trio.Event()

    async def read() -> None:
        async with (
            httpx.AsyncClient(base_url=url, timeout=120) as client,
            client.stream("POST", "/v1/completions", json=body) as response,
        ):
            async for line in response.aiter_lines():
                lines.append(line)
                begun.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(read)
        await begun.wait()
        yield lines
    assert "data: [DONE]" in lines
    assert "error" not in "".join(lines)


async def test_one_of_two_workers_dies_and_is_used_again_when_it_returns(
    world: World, small_model: Path
) -> None:
    """No answer is cut for the worker that returns."""
    expected = await alone(world, small_model)
    async with world.two_workers(small_model) as ((one, _), joins):
        arguments = ("--model", str(small_model), "--split=always", *joins)
        async with world.serve(*arguments) as node:
            url = await url_of(node)
            with trio.fail_after(60):  # the second may come a moment after the first plan
                while await placed_on(url) != {"local", "one", "two"}:
                    await node.wait_event("ready", after=len(node.events))
            seen = len(node.events)
            await killed(one)
            await node.wait_event("warning", containing="one", after=seen)
            await node.wait_event("ready", after=seen)
            assert await placed_on(url) == {"local", "two"}
            assert await greedy_tokens(url) == expected
            seen = len(node.events)
            again = world.worker("--models", str(small_model.parent), name="one")
            async with long_answer(url) as lines, again:
                await node.wait_event("peer", containing="connected to one", after=seen)
                at_return = len(lines)
                await node.wait_event("warning", containing="one can take", after=seen)
                assert len(lines) > at_return, "it went on"
                await node.wait_event("ready", after=seen)
                assert await placed_on(url) == {"local", "one", "two"}
                assert await greedy_tokens(url) == expected


async def test_what_is_left_is_too_small_and_the_node_waits(
    world: World, small_model: Path
) -> None:
    models = ("--models", str(small_model.parent))
    tiny = world.worker("--memory", "1M", name="tiny")
    async with world.worker(*models, name="large") as large, tiny as small:
        joins = [f"--join-file={await world.join_file(worker)}" for worker in (large, small)]
        async with world.serve("--model", str(small_model), "--split=always", *joins) as node:
            url = await url_of(node)
            expected = await greedy_tokens(url)
            seen = len(node.events)
            await killed(large)
            await node.wait_event("warning", containing="no lender has room", after=seen)
            async with httpx.AsyncClient(base_url=url, timeout=30) as client:
                answer = await client.post("/v1/completions", json={"prompt": "one"})
            assert answer.status_code == 503
            assert "no lender has room for a layer" in answer.json()["error"]["message"]
            assert int(answer.headers["retry-after"]) > 0
            async with world.worker(*models, name="large"):
                await node.wait_event("ready", after=seen)
                assert await placed_on(url) == {"local", "large"}
                assert await greedy_tokens(url) == expected
