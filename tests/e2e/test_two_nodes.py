"""The main job in its variations: who invites, who joins, who computes what, what comes back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import trio

from meshnode.demo.nodes import NodeProcess, invite_token, write_token
from meshnode.engine.cache import load_engine
from meshnode.engine.children import child_environment, open_child
from tests.e2e.conftest import Mesh, World
from tests.engine.synthetic import make_model

pytestmark = pytest.mark.engine

COMPARED_TOKENS = 32


async def url_of(node: NodeProcess) -> str:
    return str((await node.wait_event("ready"))["url"])


async def greedy_tokens(url: str, count: int = COMPARED_TOKENS) -> list[int]:
    body = {
        "prompt": "one two three",
        "max_tokens": count,
        "temperature": 0,
        "ignore_eos": True,
        "logprobs": 1,
    }
    async with httpx.AsyncClient(timeout=120) as client:
        response = await client.post(f"{url}/v1/completions", json=body)
    assert response.status_code == 200, response.text
    return [token["id"] for token in response.json()["choices"][0]["logprobs"]["content"]]


async def status_of(url: str) -> dict[str, Any]:
    async with httpx.AsyncClient(timeout=30) as client:
        status: dict[str, Any] = (await client.get(f"{url}/api/v1/status")).json()
        return status


async def alone(world: World, model: Path, name: str = "alone") -> list[int]:
    async with world.serve("--model", str(model), "--split", "never", name=name) as node:
        return await greedy_tokens(await url_of(node))


async def test_the_worker_invites_and_no_weight_crosses(world: World, small_model: Path) -> None:
    expected = await alone(world, small_model)
    async with world.worker("--models", str(small_model.parent)) as worker:
        joins = ("--join-file", str(await world.join_file(worker)))
        arguments = ("--model", str(small_model), "--split", "always", *joins)
        async with world.serve(*arguments) as node:
            url = await url_of(node)
            assert await greedy_tokens(url) == expected
            status = await status_of(url)
    (load,) = status["load"]
    assert load["sent_bytes"] == 0
    assert load["local_bytes"] > 0
    assert {share["node"] for share in status["layers"]} == {"local", "worker"}
    assert [peer["link"] for peer in status["peers"]] == ["tcp"], "the fastest between the two"


@pytest.mark.parametrize("transport", ["tcp", "quic"])
async def test_one_kind_of_link_is_enough(transport: str, world: World, small_model: Path) -> None:
    expected = await alone(world, small_model)
    only = ("--transport", transport)
    async with world.worker("--models", str(small_model.parent), *only) as worker:
        joins = ("--join-file", str(await world.join_file(worker)))
        arguments = ("--model", str(small_model), "--split", "always", *joins, *only)
        async with world.serve(*arguments) as node:
            url = await url_of(node)
            assert await greedy_tokens(url) == expected
            status = await status_of(url)
    assert [peer["link"] for peer in status["peers"]] == [transport]


async def test_the_orchestrator_invites_and_serves_once_a_worker_has_come(
    world: World, small_model: Path
) -> None:
    expected = await alone(world, small_model)
    arguments = ("--model", str(small_model), "--split", "always")
    async with world.serve(*arguments) as node:
        token_file = await world.join_file(node)
        await node.wait_event("warning", containing="no worker")
        joins = ("--join-file", str(token_file))
        async with world.worker("--models", str(small_model.parent), *joins):
            assert await greedy_tokens(await url_of(node)) == expected


@pytest.mark.parametrize(
    ("objective", "nodes", "told"),
    [
        ("memory", {"local", "worker"}, "plan: worker (CPU) computes layers"),
        ("latency", {"local"}, "plan: alone on local is faster: "),
    ],
)
async def test_what_the_plan_is_to_be_best_at_decides_where_layers_lie(
    world: World, small_model: Path, objective: str, nodes: set[str], told: str
) -> None:
    expected = await alone(world, small_model)
    async with world.worker("--models", str(small_model.parent)) as worker:
        joins = ("--join-file", str(await world.join_file(worker)))
        arguments = ("--model", str(small_model), "--for", objective, *joins)
        async with world.serve(*arguments) as node:
            await node.wait_event("plan", containing=told)
            url = await url_of(node)
            assert await greedy_tokens(url) == expected
            status = await status_of(url)
    assert {share["node"] for share in status["layers"]} == nodes


async def test_two_workers_that_founded_two_meshes_serve_one_orchestrator(
    world: World, small_model: Path
) -> None:
    expected = await alone(world, small_model)
    async with (
        world.two_workers(small_model) as (_, joins),
        world.serve("--model", str(small_model), "--split=always", *joins) as node,
    ):
        url = await url_of(node)
        assert await greedy_tokens(url) == expected
        status = await status_of(url)
    assert {share["node"] for share in status["layers"]} == {"local", "one", "two"}
    assert sum(load["sent_bytes"] for load in status["load"]) == 0


async def test_a_worker_without_the_file_is_sent_its_layers(
    world: World, small_model: Path
) -> None:
    expected = await alone(world, small_model)
    async with world.worker() as worker:
        joins = ("--join-file", str(await world.join_file(worker)))
        arguments = ("--model", str(small_model), "--split", "always", *joins)
        async with world.serve(*arguments) as node:
            url = await url_of(node)
            assert await greedy_tokens(url) == expected
            (load,) = (await status_of(url))["load"]
    assert load["local_bytes"] == 0
    assert load["sent_bytes"] > 0


@pytest.mark.parametrize(
    ("layers", "remote"),
    [
        ("local=0:6,worker=7:output", {"worker": (7, 8)}),  # big orchestrator
        ("local=0:0,worker=1:output", {"worker": (1, 8)}),  # small orchestrator
        ("worker=0:output", {"worker": (0, 8)}),  # all remote
    ],
)
async def test_the_layers_go_where_the_user_says(
    world: World, small_model: Path, layers: str, remote: dict[str, tuple[int, int]]
) -> None:
    expected = await alone(world, small_model)
    async with world.worker("--models", str(small_model.parent)) as worker:
        joins = ("--join-file", str(await world.join_file(worker)))
        async with world.serve("--model", str(small_model), "--layers", layers, *joins) as node:
            url = await url_of(node)
            assert await greedy_tokens(url) == expected
            status = await status_of(url)
    placed = {
        share["node"]: (share["first"], share["last"])
        for share in status["layers"]
        if share["node"] != "local"
    }
    assert placed == remote


async def test_a_bare_rpc_server_over_tcp_needs_no_mesh(
    world: World, small_model: Path, stock_bin: Path, free_tcp_port: int
) -> None:
    expected = await alone(world, small_model)
    argv = [str(load_engine(stock_bin).binary("ggml-rpc-server")), "-p", str(free_tcp_port)]
    log = world.folder / "bare.log"
    async with open_child(argv, env=child_environment(), log=log, name="bare") as child:
        await until_listening(free_tcp_port, child.ended)
        arguments = ("--model", str(small_model), f"rpc=127.0.0.1:{free_tcp_port}")
        async with world.serve(*arguments) as node:
            url = await url_of(node)
            assert await greedy_tokens(url) == expected
            layers = (await status_of(url))["layers"]
    assert f"127.0.0.1:{free_tcp_port}" in {share["node"] for share in layers}


async def until_listening(port: int, ended: trio.Event) -> None:
    with trio.fail_after(30):
        while not ended.is_set():
            try:
                stream = await trio.open_tcp_stream("127.0.0.1", port)
            except OSError:
                await trio.sleep(0.05)
            else:
                await stream.aclose()
                return


async def test_after_a_restart_both_find_each_other_without_a_token(
    world: World, small_model: Path
) -> None:
    models = ("--models", str(small_model.parent))
    arguments = ("--model", str(small_model), "--split", "always")
    async with world.worker(*models) as worker:
        joins = ("--join-file", str(await world.join_file(worker)))
        async with world.serve(*arguments, *joins) as node:
            expected = await greedy_tokens(await url_of(node))
    async with world.worker(*models), world.serve(*arguments) as node:
        assert await greedy_tokens(await url_of(node)) == expected


async def test_the_token_comes_by_standard_input_and_lands_nowhere(
    world: World, small_model: Path
) -> None:
    """`join=-` by hand: the token is in no log, no file, no argument and no environment."""
    async with world.worker("--models", str(small_model.parent)) as worker:
        token = await world.token_of(worker)
        arguments = ("--model", str(small_model), "--split", "always", "join=-")
        async with world.serve(*arguments, stdin=token + "\n") as node:
            await url_of(node)
            known = await trio.to_thread.run_sync(arguments_and_environments, node.pid)
            shown = (*worker.last_lines, *node.last_lines)
    secret = token.removeprefix("mesh1")
    assert all(secret not in text for text in (*known, *shown))
    written = {path.name: path.read_bytes() for path in world.folder.rglob("*") if path.is_file()}
    assert b"join=mesh1" in written["worker.log"], "the invite's line is there, and cut short"
    assert [name for name, content in written.items() if secret.encode() in content] == []


def arguments_and_environments(pid: int) -> list[str]:
    process = psutil.Process(pid)
    family = [process, *process.children(recursive=True)]
    return [" ".join([*one.cmdline(), *one.environ().values()]) for one in family]


async def test_one_node_lends_and_serves(world: World, small_model: Path) -> None:
    expected = await alone(world, small_model)
    models = ("--models", str(small_model.parent))
    async with world.serve("--lend", "--model", str(small_model), *models, name="both") as both:
        file = write_token(world.folder / "both.token", await world.token_of(both))
        await url_of(both)
        arguments = ("--model", str(small_model), "--split", "always", "--join-file", str(file))
        async with world.serve(*arguments, name="other") as other:
            assert await greedy_tokens(await url_of(other)) == expected


async def test_mesh_invite_gives_what_was_asked_for(mesh: Mesh, world: World) -> None:
    import json

    from discovery.token import parse_untrusted

    async with world.worker() as worker:
        first = parse_untrusted(invite_token(await worker.wait_event("invite")))
        home = str(world.folder / "worker")
        finished = await trio.to_thread.run_sync(
            lambda: mesh("invite", "--role=worker", "--expires=2h", "--json", "--home", home)
        )
        answer = json.loads(finished.stdout)
        token = parse_untrusted(answer["token"])
    assert (token.role.value, token.uses, token.inviter) == ("worker", 8, first.inviter)
    assert token.mesh == first.mesh
    assert answer["id"] == token.id.hex()


async def test_a_bigger_model_waits_for_the_orchestrators_digest_and_says_so(
    world: World, tmp_path: Path
) -> None:
    folder = tmp_path / "models"
    folder.mkdir()
    model = make_model(folder / "big.gguf", layers=4, width=1024, vocab=4096, ffn=2816, seed=3)
    async with world.worker("--models", str(folder)) as worker:
        joins = ("--join-file", str(await world.join_file(worker)))
        async with world.serve("--model", str(model), "--split", "always", *joins) as node:
            await node.wait_event("stage", containing="digesting")
            await url_of(node)
