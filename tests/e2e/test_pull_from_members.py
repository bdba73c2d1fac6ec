"""`mesh pull mesh:NAME` and `mesh pull --for NODE`, between nodes as users run them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import trio

from meshnode.demo.nodes import open_node
from tests.e2e.conftest import LOOPBACK, ONE_THREAD, Finished, Mesh, World
from tests.engine.synthetic import make_model_of_size

pytestmark = pytest.mark.engine

USAGE, NETWORK, ACCESS, MODEL, RESOURCE, NO_NODE = 2, 4, 5, 6, 7, 8
BIG_BYTES = 40 * 10**6  # ten seconds at the holder's pace


@dataclass
class Shell:
    """Runs `mesh pull` beside a node, on its home."""

    world: World
    mesh: Mesh

    async def pull(self, node: str, *arguments: str, json: bool = True) -> Finished:
        home, style = str(self.world.folder / node), ["--json"] if json else []
        return await trio.to_thread.run_sync(
            lambda: self.mesh("pull", *arguments, "--home", home, *style)
        )

    async def pulled(self, node: str, *arguments: str) -> dict[str, Any]:
        done = await self.pull(node, *arguments)
        assert done.exit_code == 0, done.stderr
        answer: dict[str, Any] = json.loads(done.stdout)
        return answer

    async def refused(self, node: str, exit_code: int, *arguments: str, word: str) -> None:
        done = await self.pull(node, *arguments)
        done.check(exit_code, word)
        assert done.stderr.count("\n") == 1, done.stderr

    @asynccontextmanager
    async def running(self, node: str, *arguments: str) -> AsyncIterator[Running]:
        argv = [sys.executable, "-m", "meshnode.cli.main", "pull", *arguments]
        argv += ["--home", str(self.world.folder / node)]
        process = await trio.lowlevel.open_process(argv, stderr=subprocess.PIPE)
        try:
            yield Running(process)
        finally:
            process.kill()
            await process.wait()


@dataclass
class Running:
    """A command under way."""

    process: trio.Process

    async def failed(self, exit_code: int) -> str:
        """What it complains of at its end."""
        assert self.process.stderr is not None
        with trio.fail_after(60):
            said = b"".join([chunk async for chunk in self.process.stderr]).decode()
            assert await self.process.wait() == exit_code, said
        assert said.count("\n") == 1, said
        return said


@pytest.fixture
def shell(world: World, mesh: Mesh) -> Shell:
    return Shell(world, mesh)


async def test_a_model_of_a_member_is_pulled_by_its_name(
    world: World, shell: Shell, small_model: Path
) -> None:
    async with world.worker("--models", str(small_model.parent), name="holder") as holder:
        join = f"--join-file={await world.join_file(holder)}"
        async with world.worker(join, name="asker") as asker:
            await asker.wait_event("peer")
            part = await shell.pulled("asker", "mesh:SMALL", "--layers", "0:3")
            assert 0 < part["held_bytes"] < part["weight_bytes"]
            whole = await shell.pulled("asker", "mesh:small")
            assert whole["complete"]
            assert whole["pulled_bytes"] == whole["weight_bytes"] - part["held_bytes"]
            assert Path(whole["path"]).read_bytes() == small_model.read_bytes()
            await shell.refused("asker", MODEL, "mesh:other", word="there are")
            for node in ("holder", "asker"):
                again = await shell.pulled(node, "mesh:small")
                assert again["pulled_bytes"] == 0, "it is there already"


async def test_a_member_pulls_what_another_orders(
    world: World, shell: Shell, small_model: Path
) -> None:
    """`boss` has the file, `attic` is to have it, `closed` pulls for nobody."""
    models = ("--models", str(small_model.parent))
    async with world.worker(*models, name="boss") as boss:
        join = f"--join-file={await world.join_file(boss)}"
        async with (
            world.worker(join, name="attic") as attic,
            world.worker(join, "--allow-pull", "none", name="closed"),
        ):
            await attic.wait_event("peer")
            part = await shell.pulled("boss", "mesh:small", "--layers", "0:3", "--for", "attic")
            assert (part["node"], part["name"]) == ("attic", "small")
            plain = await shell.pull("boss", "mesh:small", "--layers=0", "--for=attic", json=False)
            assert "nothing had to come" in plain.stdout
            assert "are on attic" in plain.stdout
            assert 0 < part["held_bytes"] < part["weight_bytes"]
            whole = await shell.pulled("boss", "mesh:small", "--for", "attic")
            assert whole["complete"]
            mine = world.folder / "attic" / "models" / "small" / "small.gguf"
            assert mine.read_bytes() == small_model.read_bytes()
            here = await shell.pulled("boss", "mesh:small", "--for", "boss")
            assert (here["node"], here["pulled_bytes"]) == ("boss", 0)

            async def refused(code: int, source: str, node: str, word: str) -> None:
                await shell.refused("boss", code, source, "--for", node, word=word)

            await refused(ACCESS, "mesh:small", "closed", "--allow-pull peers")
            await refused(ACCESS, "https://example.org/m.gguf", "attic", "--allow-pull url")
            await refused(USAGE, "mesh:small", "cellar", "there is no peer")
            await refused(MODEL, "mesh:other", "attic", "there are")
            await refused(USAGE, "https://example.org/m.gguf?token=geheim", "attic", "on attic")
            await attic.wait_event("models", containing="pulled small for boss")
    done = await shell.pull("boss", "mesh:small", "--for", "attic")
    done.check(NO_NODE, "only a running one knows the members")


async def test_the_asker_is_killed_and_then_the_one_that_obeys(
    world: World, shell: Shell, tmp_path: Path
) -> None:
    """Each command ends with a sentence; what came stays, and the next order goes on from there."""
    (tmp_path / "served").mkdir()
    model = make_model_of_size(tmp_path / "served" / "big.gguf", size_bytes=BIG_BYTES)
    slowly = ("--models", str(model.parent), "--upload-limit", "4M")
    order = ("mesh:big", "--for", "attic")
    async with world.worker(*slowly, name="holder") as holder:
        join = f"--join-file={await world.join_file(holder)}"
        async with world.worker(join, name="attic") as attic:
            await attic.wait_event("peer")
            async with world.worker(join, name="boss") as boss:
                await boss.wait_event("peer", containing="attic")
                async with shell.running("boss", *order) as ordered:
                    await attic.wait_event("models", containing="for boss")
                    os.kill(boss.pid, signal.SIGKILL)
                    assert "gave no proper answer" in await ordered.failed(NO_NODE)
            async with world.worker(name="boss") as boss:
                await boss.wait_event("peer", containing="attic")
                async with shell.running("boss", *order) as ordered:
                    await attic.wait_event("models", containing="for boss", after=len(attic.events))
                    os.kill(attic.pid, signal.SIGKILL)
                    restarted = world.worker(name="attic")
                    async with restarted as attic_again:
                        assert "broke off" in await ordered.failed(NETWORK)
                        await attic_again.wait_event("peer", containing="holder")
                        held = await shell.pulled("boss", *order)
                        assert held["complete"]
    mine = world.folder / "attic" / "models" / "big" / "big.gguf"
    assert mine.read_bytes() == model.read_bytes()


async def test_a_member_on_a_small_disk_says_so_and_stays(
    world: World, shell: Shell, tmp_path: Path, own_disk: tuple[str, ...]
) -> None:
    """60 MB, of which others may fill nine tenths: too little for the whole, enough for a layer."""
    for name in ("served", "disk"):
        (tmp_path / name).mkdir()
    model = make_model_of_size(tmp_path / "served" / "big.gguf", size_bytes=80 * 10**6)
    async with world.worker("--models", str(model.parent), name="boss") as boss:
        join = f"--join-file={await world.join_file(boss)}"
        async with open_node(
            *("worker", *LOOPBACK, *ONE_THREAD, join),
            name="attic",
            home=tmp_path / "disk" / "home",
            log_folder=tmp_path,
            prefix=(*own_disk, str(tmp_path / "disk")),
            environment={"XDG_RUNTIME_DIR": str(tmp_path / "disk")},
        ) as attic:
            await attic.wait_event("peer")
            order = ("mesh:big", "--for", "attic")
            await shell.refused("boss", RESOURCE, *order, word="attic: ")
            part = await shell.pulled("boss", *order, "--layers", "0")
            assert 0 < part["held_bytes"] < part["weight_bytes"] / 2
            await shell.refused("boss", RESOURCE, *order, word="mesh models gc --keep")
