"""Who may do what, who is put out, and that nothing brings it back: by the commands users run."""

from __future__ import annotations

import json
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
import trio

from discovery.token import Token, parse_untrusted
from meshnode.connections import Connections
from meshnode.control import ask_node
from meshnode.demo.nodes import write_token
from meshnode.errors import NetworkError
from meshnode.membership import Membership
from meshnode.pipeline.borrow import ask_facts
from meshnode.state import Home
from tests.e2e.conftest import Finished, Mesh, World
from tests.e2e.test_two_nodes import url_of
from tests.lab.homes import copy_home
from tunnels import Endpoint, StreamRefused

pytestmark = pytest.mark.engine

USAGE, ACCESS, HOME = 2, 5, 8
GONE_WITHIN_S = 2.0
SOON_S = 60


class Commands:
    """`mesh COMMAND --home …` for the nodes of one world."""

    def __init__(self, mesh: Mesh, world: World) -> None:
        self._mesh = mesh
        self._world = world

    async def run(self, name: str, *arguments: str) -> Finished:
        home = str(self._world.folder / name)
        return await trio.to_thread.run_sync(partial(self._mesh, *arguments, "--home", home))

    async def json(self, name: str, *arguments: str) -> dict[str, Any]:
        finished = await self.run(name, *arguments, "--json")
        assert finished.exit_code == 0, finished.stderr
        answer: dict[str, Any] = json.loads(finished.stdout)
        return answer

    async def token(self, name: str, *arguments: str) -> Token:
        return parse_untrusted((await self.json(name, "invite", *arguments))["token"])

    async def join_file(self, name: str, *arguments: str) -> str:
        text = (await self.json(name, "invite", *arguments))["token"]
        return f"--join-file={write_token(self._world.folder / f'{name}.token', text)}"

    async def member_names(self, name: str) -> set[str]:
        listed = await self.json(name, "members")
        return {one["name"] for mesh in listed["meshes"] for one in mesh["members"]}


@pytest.fixture
def commands(mesh: Mesh, world: World) -> Commands:
    return Commands(mesh, world)


async def until(condition: Callable[[], Awaitable[bool]], within_s: float = SOON_S) -> None:
    with trio.fail_after(within_s):
        while not await condition():  # noqa: ASYNC110 - another process knows
            await trio.sleep(0.02)


def ask(home: Path, op: str) -> Awaitable[dict[str, Any]]:
    return trio.to_thread.run_sync(ask_node, home, {"op": op})


@asynccontextmanager
async def bare_member(folder: Path, token: Token) -> AsyncIterator[Endpoint]:
    """A node of our own making: a member by `token` that asks for whatever it likes."""
    with Home(folder) as home:
        identity = home.identity("node.key")
        membership = Membership(home, identity, folder.name)
        endpoint = Endpoint(identity, authorize=membership.authorize)
        connections = Connections(endpoint, membership, lambda _event: None)
        connections.offer_services()
        async with trio.open_nursery() as nursery:
            await nursery.start(endpoint.run, "127.0.0.1", 0)
            await connections.join(token)
            yield endpoint
            nursery.cancel_scope.cancel()


# -- roles ----------------------------------------------------------------------------------------


async def test_a_client_cannot_lease_and_an_orchestrator_can(
    world: World, commands: Commands, tmp_path: Path
) -> None:
    async with world.worker() as worker:
        await worker.wait_event("node")
        client = await commands.token("worker", "--role=client")
        async with bare_member(tmp_path / "client", client) as endpoint:
            session = endpoint.session(client.inviter)
            assert session is not None
            for service in ("control", "rpc/0123456789abcdef", "store"):
                stream = await session.open(service)
                with pytest.raises(StreamRefused):
                    await stream.receive_some()
            with pytest.raises(NetworkError, match="not offered"):
                await ask_facts(session)
        orchestrator = await commands.token("worker", "--role=orchestrator")
        async with bare_member(tmp_path / "orchestrator", orchestrator) as endpoint:
            session = endpoint.session(orchestrator.inviter)
            assert session is not None
            assert (await ask_facts(session)).name == "worker"


async def test_a_worker_cannot_invite_and_is_told_what_it_can(
    world: World, commands: Commands
) -> None:
    async with world.worker(name="founder") as founder:
        await founder.wait_event("node")
        join = await commands.join_file("founder", "--role=worker")
        async with world.worker(join, name="lender") as lender:
            await lender.wait_event("peer", containing="founder")
            for role in ("peer", "worker"):
                refused = await commands.run("lender", "invite", f"--role={role}")
                refused.check(ACCESS, "no right to invite")
            assert (await commands.json("lender", "invite", "--mesh=own"))["mesh_name"]
            (await commands.run("lender", "invite", "--mesh=nowhere")).check(USAGE, "mesh members")
            listed = await commands.json("founder", "members")
            (row,) = [one for one in listed["meshes"][0]["members"] if one["name"] == "lender"]
            assert (row["role"], row["depth"], row["connected"]) == ("worker", 2, True)
            assert row["invited_by"] == "founder"


async def test_a_member_invites_into_the_mesh_that_it_has_joined(
    world: World, commands: Commands
) -> None:
    async with world.worker(name="founder") as founder:
        await founder.wait_event("node")
        founders = (await commands.token("founder")).mesh
        first = await commands.join_file("founder")
        async with world.worker(first, name="ann") as ann:
            await ann.wait_event("peer", containing="founder")
            assert (await commands.token("ann")).mesh == founders
            second = await commands.join_file("ann")
            async with world.worker(second, name="ben") as ben:
                await ben.wait_event("peer", containing="ann")
                listed = await commands.json("ann", "invites")
                joined = [one["name"] for row in listed["invites"] for one in row["redeemed_by"]]
                assert joined == ["ben"]
                (await commands.run("ben", "invite")).check(ACCESS, "no right to invite")


# -- removal --------------------------------------------------------------------------------------


async def test_a_removed_peers_generation_ends_within_two_seconds_and_its_lease_is_gone(
    world: World, commands: Commands, small_model: Path
) -> None:
    async with world.worker("--models", str(small_model.parent)) as worker:
        join = ("--join-file", str(await world.join_file(worker)))
        arguments = ("--model", str(small_model), "--split", "always", *join)
        async with world.serve(*arguments) as node:
            url = await url_of(node)
            assert (await ask(world.folder / "worker", "status"))["lent"]
            took_s = await remove_while_it_generates(world, commands, url)
            assert took_s["lease"] < GONE_WITHIN_S, took_s
            assert took_s["answer"] < GONE_WITHIN_S, took_s
            told = await node.wait_event("warning", containing="no longer a member")
            assert "worker's mesh" in told["text"]
            assert await commands.member_names("worker") == {"worker"}


async def remove_while_it_generates(world: World, commands: Commands, url: str) -> dict[str, float]:
    """How long after the command's end the running answer and the lease were gone."""
    body = {"prompt": "one", "max_tokens": 4000, "ignore_eos": True, "stream": True}
    ended_at: dict[str, float] = {}

    async def lease_is_gone() -> bool:
        return not (await ask(world.folder / "worker", "status"))["lent"]

    async def watch_lease() -> None:
        await until(lease_is_gone)
        ended_at["lease"] = trio.current_time()

    async with (
        httpx.AsyncClient(base_url=url, timeout=SOON_S) as client,
        client.stream("POST", "/v1/completions", json=body) as response,
    ):
        lines = response.aiter_lines()
        await anext(lines)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(watch_lease)
            removed = await commands.run("worker", "remove", "orchestrator")
            assert removed.exit_code == 0, removed.stderr
            done_at = trio.current_time()
            rest = [line async for line in lines]
            ended_at["answer"] = trio.current_time()
        assert '"error"' in "".join(rest[-3:]), rest[-3:]
    return {what: moment - done_at for what, moment in ended_at.items()}


async def test_what_a_withdrawn_or_unknown_thing_is_called(
    world: World, commands: Commands
) -> None:
    async with world.worker(name="founder") as founder:
        await founder.wait_event("node")
        token = await commands.token("founder", "--uses=2")
        join = str(await world.join_file(founder))
        async with world.worker("--join-file", join, name="ann") as ann:
            await ann.wait_event("peer", containing="founder")
            (await commands.run("founder", "revoke", "ffff")).check(USAGE, "mesh invites")
            finished = await commands.run("founder", "revoke", token.id.hex())
            assert "is withdrawn" in finished.stdout
            (await commands.run("founder", "remove", "nobody")).check(USAGE, "mesh members")
            (await commands.run("founder", "remove", "founder")).check(USAGE, "mesh leave")
            (await commands.run("ann", "remove", "founder")).check(ACCESS, "may remove")
            (await commands.run("founder", "leave")).check(ACCESS, "founder cannot leave")
            assert "ann" in (await commands.run("founder", "members")).stdout
            left = await commands.run("ann", "leave")
            assert "this node has left founder's mesh; 1 of 1" in left.stdout
            await founder.wait_event("peer", containing="ann")

            async def ann_is_gone() -> bool:
                return await commands.member_names("founder") == {"founder"}

            await until(ann_is_gone)
    (await commands.run("nowhere", "members")).check(HOME, "no node runs")
    listed = await commands.json("founder", "invites")  # no node runs, and none is needed
    assert "withdrawn" in {row["state"] for row in listed["invites"]}


# -- old disks ------------------------------------------------------------------------------------


async def test_nothing_is_undone_by_restarting_any_of_them_from_an_old_disk(
    world: World, commands: Commands
) -> None:
    async with world.worker(name="founder") as founder:
        await founder.wait_event("node")
        withdrawn = await commands.token("founder")
        ann_joins = await commands.join_file("founder")
        async with world.worker(ann_joins, name="ann") as ann:
            await ann.wait_event("peer", containing="founder")
            out_joins = await commands.join_file("founder")
            async with world.worker(out_joins, name="out") as out:
                await out.wait_event("peer", containing="founder")
                for name in ("founder", "ann", "out"):
                    copy_home(world.folder / name, world.folder / f"{name}.old")
                seen = len(out.events)
                await commands.json("founder", "remove", "out")
                await commands.json("founder", "revoke", withdrawn.id.hex())
                await out.wait_event("warning", containing="no longer a member", after=seen)

                async def ann_has_heard() -> bool:
                    return "out" not in await commands.member_names("ann")

                await until(ann_has_heard)
    set_back(world, "founder", "out")
    async with world.worker(name="ann"), world.worker(name="founder") as founder:
        await founder.wait_event("peer", containing="ann")
        await is_still_out(world, commands, "founder", "ann")
        listed = await commands.json("founder", "invites")
        states = {row["id"]: row["state"] for row in listed["invites"]}
        assert states[withdrawn.id.hex()] == "withdrawn"
    set_back(world, "ann", "out")
    async with world.worker(name="founder"), world.worker(name="ann") as ann:
        await ann.wait_event("peer", containing="founder")
        await is_still_out(world, commands, "founder", "ann")


def set_back(world: World, *names: str) -> None:
    for name in names:
        shutil.rmtree(world.folder / name)
        shutil.copytree(world.folder / f"{name}.old", world.folder / name)


async def is_still_out(world: World, commands: Commands, *members: str) -> None:
    """The removed node, from a disk that knows nothing of it, is refused and told."""
    async with world.worker(name="out") as out:
        await out.wait_event("warning", containing="no longer a member")
        for name in members:
            assert await commands.member_names(name) == {"founder", "ann"}, name
