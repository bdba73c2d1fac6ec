"""`mesh peers` and `mesh ping` between real processes, and what a careless user gets."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio

from meshnode.demo.nodes import NodeProcess
from tests.e2e.conftest import Mesh, World
from tests.e2e.test_members import Commands

pytestmark = pytest.mark.engine

USAGE, NETWORK, HOME = 2, 4, 8


@pytest.fixture
def commands(mesh: Mesh, world: World) -> Commands:
    return Commands(mesh, world)


@asynccontextmanager
async def two_nodes(world: World, commands: Commands) -> AsyncIterator[NodeProcess]:
    """founder and guest, connected; the guest."""
    async with world.worker(name="founder") as founder:
        await founder.wait_event("node")
        join = await commands.join_file("founder")
        async with world.worker(join, name="guest") as guest:
            await guest.wait_event("peer", containing="founder")
            await founder.wait_event("peer", containing="guest")
            yield guest


async def test_connected_nodes_show_their_path_and_answer_pings(
    world: World, commands: Commands
) -> None:
    async with two_nodes(world, commands):
        await check_answers(commands)


async def test_a_peer_that_is_stopped_is_shown_as_silent_until_it_goes_on(
    world: World, commands: Commands
) -> None:
    async def until(silent: bool) -> None:
        with trio.fail_after(90):
            while True:
                listed = (await commands.run("founder", "peers")).stdout
                [row] = (await commands.json("founder", "status"))["peers"]
                if row["suspected"] == ("silent for " in listed) == silent:
                    assert (row["silent_s"] is not None) == silent
                    return

    async with two_nodes(world, commands) as guest:
        await until(silent=False)
        os.kill(guest.pid, signal.SIGSTOP)
        try:
            await until(silent=True)
        finally:
            os.kill(guest.pid, signal.SIGCONT)
        await until(silent=False)


async def test_a_plan_counts_the_machines_of_the_running_node_s_mesh(
    world: World, commands: Commands
) -> None:
    async with two_nodes(world, commands):
        alone = await commands.json("founder", "plan")
        assert alone["nodes"] == ["local"]
        assert alone["why"] == []  # nobody has measured anything
        both = await commands.json("founder", "plan", "--balanced")
        assert both["nodes"] == ["local", "guest"]
        fast = await commands.json("guest", "plan", "--for", "latency")
        assert "the speed of local and founder" in fast["why"][-1]
        assert "and the rate of the link to founder" in fast["why"][-1], "its delay is known"


async def check_answers(commands: Commands) -> None:
    [row] = (await commands.json("founder", "peers"))["peers"]
    assert (row["name"], row["member"], row["relayed"]) == ("guest", True, False)
    assert row["address"].startswith("127.0.0.1:")
    listed = await commands.run("founder", "peers")
    assert listed.stdout.splitlines()[0].split()[:3] == ["name", "peer", "link"]
    assert row["peer"][:8] in listed.stdout
    for who in ("guest", row["peer"], row["peer"][:6]):
        done = await commands.run("founder", "ping", who, "-c", "2")
        assert done.exit_code == 0, done.stderr
        assert "guest" in done.stdout
        assert "2 of 2 answered" in done.stdout
    measured = await commands.json("founder", "ping", "guest", "-c", "3")
    assert max(link["answered"] for link in measured["links"]) == 3
    status = await commands.json("founder", "status")
    assert status["peers"][0]["links"][0]["address"] == row["address"]


async def test_whoever_is_not_known_is_a_usage_error(world: World, commands: Commands) -> None:
    async with two_nodes(world, commands):
        (await commands.run("founder", "ping", "toaster")).check(USAGE, "toaster", "mesh members")
        (await commands.run("founder", "ping", "founder")).check(USAGE, "itself")
        (await commands.run("founder", "ping")).check(USAGE, "PEER")
        (await commands.run("founder", "ping", "guest", "-c", "0")).check(USAGE, "count")


async def test_a_member_that_has_gone_is_told_of(world: World, commands: Commands) -> None:
    async with world.worker(name="founder") as founder:
        await founder.wait_event("node")
        join = await commands.join_file("founder")
        async with world.worker(join, name="guest") as guest:
            await guest.wait_event("peer", containing="founder")
        await founder.wait_event("peer", containing="lost guest")
        (await commands.run("founder", "ping", "guest")).check(NETWORK, "guest", "running")
        assert "no node is connected" in (await commands.run("founder", "peers")).stdout
        assert json.loads((await commands.run("founder", "peers", "--json")).stdout)["peers"] == []


def test_where_no_node_runs(mesh: Mesh) -> None:
    mesh("peers").check(HOME, "mesh worker")
    mesh("ping", "tower").check(HOME, "mesh worker")
