"""Death is an event: memory comes back, no orphan stays, clients get a sentence."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import httpx
import psutil
import pytest
import trio

from meshnode.demo.nodes import NodeProcess
from tests.e2e.conftest import World
from tests.e2e.test_two_nodes import greedy_tokens, url_of

pytestmark = pytest.mark.engine

KILLS = int(os.environ.get("MESH_TEST_KILLS", "5"))
NOTICE_S = 30
SLACK_BYTES = 8 * 2**20
# What the first lease leaves: modules imported, digests of the model, tables of the allocator.
WARM_UP_BYTES = 24 * 2**20


def children_of(node: NodeProcess) -> list[psutil.Process]:
    return psutil.Process(node.pid).children(recursive=True)


def memory_of(node: NodeProcess) -> int:
    """Resident bytes of the node and all its children."""
    process = psutil.Process(node.pid)
    return sum(one.memory_info().rss for one in [process, *process.children(recursive=True)])


async def until_gone(processes: list[psutil.Process], within_s: float = NOTICE_S) -> None:
    gone, alive = await trio.to_thread.run_sync(psutil.wait_procs, processes, within_s)
    assert not alive, f"{len(gone)} ended, still there: {alive}"


async def test_killed_orchestrators_leave_the_worker_as_it_was(
    world: World, small_model: Path
) -> None:
    """The hundred of the nightly recipe: MESH_TEST_KILLS=100."""
    async with world.worker("--models", str(small_model.parent)) as worker:
        joins = ("--join-file", str(await world.join_file(worker)))
        arguments = ("--model", str(small_model), "--split", "always", *joins)
        memory = [memory_of(worker)]
        for _ in range(KILLS):
            seen = len(worker.events)
            async with world.serve(*arguments) as node:
                await greedy_tokens(await url_of(node), 4)
                orphans = children_of(node)
                assert orphans, "the orchestrator runs a llama-server"
                os.kill(node.pid, signal.SIGKILL)
                await node.wait_exit()
                await until_gone(orphans)
            await worker.wait_event("lease", containing="free again", after=seen)
            await until_gone(children_of(worker))
            memory.append(memory_of(worker))
    before, first, *later = memory
    assert first - before < WARM_UP_BYTES, memory
    assert max(later) - first < SLACK_BYTES, memory


async def test_a_killed_worker_leaves_no_orphan(world: World, small_model: Path) -> None:
    async with world.worker("--models", str(small_model.parent)) as worker:
        joins = ("--join-file", str(await world.join_file(worker)))
        arguments = ("--model", str(small_model), "--split", "always", *joins)
        async with world.serve(*arguments) as node:
            await url_of(node)
            orphans = children_of(worker)
            assert orphans, "the worker runs an rpc-server"
            os.kill(worker.pid, signal.SIGKILL)
            await until_gone(orphans)


async def test_a_workers_death_ends_requests_with_a_sentence_and_the_node_lives(
    world: World, small_model: Path
) -> None:
    async with world.worker("--models", str(small_model.parent)) as worker:
        joins = ("--join-file", str(await world.join_file(worker)))
        arguments = ("--model", str(small_model), "--split", "always", *joins)
        async with world.serve(*arguments) as node:
            url = await url_of(node)
            async with httpx.AsyncClient(base_url=url, timeout=NOTICE_S) as client:
                body = {"prompt": "one", "max_tokens": 4000, "ignore_eos": True, "stream": True}
                async with client.stream("POST", "/v1/completions", json=body) as response:
                    lines = response.aiter_lines()
                    await anext(lines)
                    os.kill(worker.pid, signal.SIGKILL)
                    rest = [line async for line in lines]
                assert '"error"' in "".join(rest[-3:]), rest[-3:]
                answer = await client.post("/v1/completions", json={"prompt": "one"})
                assert answer.status_code == 503
                assert int(answer.headers["retry-after"]) > 0
                assert "worker" in answer.json()["error"]["message"]
                health = await client.get("/health")
                assert health.status_code == 503
            await node.wait_event("warning", containing="worker")


async def test_a_worker_that_comes_back_is_used_again(world: World, small_model: Path) -> None:
    models = ("--models", str(small_model.parent))
    async with world.worker(*models) as worker:
        joins = ("--join-file", str(await world.join_file(worker)))
        arguments = ("--model", str(small_model), "--split", "always", *joins)
        async with world.serve(*arguments) as node:
            expected = await greedy_tokens(await url_of(node))
            seen = len(node.events)
            os.kill(worker.pid, signal.SIGKILL)
            await worker.wait_exit()
            await node.wait_event("warning", after=seen)
            async with world.worker(*models):
                ready = await node.wait_event("ready", after=seen)
                assert await greedy_tokens(ready["url"]) == expected


async def test_a_stopped_node_says_goodbye_and_ends_its_children(
    world: World, small_model: Path
) -> None:
    async with world.worker("--models", str(small_model.parent)) as worker:
        joins = ("--join-file", str(await world.join_file(worker)))
        arguments = ("--model", str(small_model), "--split", "always", *joins)
        async with world.serve(*arguments) as node:
            await url_of(node)
            children = children_of(node)
            os.kill(node.pid, signal.SIGTERM)
            assert await node.wait_exit() == 0
            await until_gone(children)
        await worker.wait_event("peer", containing="stopping")
        await worker.wait_event("lease", containing="free again")
