"""A full disk, no file descriptor left: a sentence, and recovery."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest
import trio

from meshnode.demo.nodes import NodeProcess, invite_token, open_node, write_token
from tests.conftest import require
from tests.e2e.conftest import LOOPBACK, ONE_THREAD, World
from tests.e2e.test_engine_replaced import engine_of, no_traceback, serving
from tests.e2e.test_two_nodes import greedy_tokens, url_of

pytestmark = pytest.mark.engine

RESOURCES = 7
OBSERVED_S = 3.0


# -- file descriptors -----------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform != "linux", reason="prlimit is Linux's")
@pytest.mark.parametrize("whose", ["worker", "orchestrator"])
async def test_no_file_descriptor_left_is_told_and_passes(
    world: World, small_model: Path, whose: str
) -> None:
    async with serving(world, small_model) as (worker, node):
        url = await url_of(node)
        expected = await greedy_tokens(url)
        seen = len(node.events)
        victim = {"worker": worker, "orchestrator": node}[whose]
        process = psutil.Process(victim.pid)
        before = resource.prlimit(victim.pid, resource.RLIMIT_NOFILE)
        resource.prlimit(victim.pid, resource.RLIMIT_NOFILE, (3, before[1]))
        try:
            engine_of(victim, "server").kill()
            if whose == "worker":  # its own log says why it lends nothing
                await node.wait_event("warning", containing="waiting for workers", after=seen)
                assert "ulimit -n" in (world.folder / "worker/logs/mesh.log").read_text()
            else:
                said = await node.wait_event("warning", containing="too many open", after=seen)
                assert "ulimit -n" in said["text"]
                with trio.move_on_after(OBSERVED_S):  # accepted by the kernel, not by the node
                    async with httpx.AsyncClient(timeout=30) as client:
                        await client.get(f"{url}/health")
            used = process.cpu_times()
            await trio.sleep(OBSERVED_S)
            now = process.cpu_times()
            assert now.user + now.system - used.user - used.system < OBSERVED_S / 2, "a busy loop"
        finally:
            resource.prlimit(victim.pid, resource.RLIMIT_NOFILE, before)
        await node.wait_event("ready", after=seen)
        assert await greedy_tokens(url) == expected
    no_traceback(*world.folder.glob("*/logs/mesh.log"))


# -- disks ----------------------------------------------------------------------------------------


class SmallDisk:
    """A file system of 2 MB that only the node on it sees, at a short path; filled and emptied."""

    def __init__(self, mount_point: Path) -> None:
        self.mount_point = mount_point
        self.prefix = (
            *(shutil.which("unshare") or "unshare", "--user", "--map-root-user", "--mount"),
            *("/bin/sh", "-c"),
            *(
                'mount -t tmpfs -o size=2m mesh "$0" && eval "$PREPARE" && exec "$@"',
                str(mount_point),
            ),
        )
        self.environment = {"XDG_RUNTIME_DIR": str(mount_point), "PREPARE": ":"}

    def seen_by(self, node: NodeProcess) -> Path:
        return Path(f"/proc/{node.pid}/root{self.mount_point}")

    def fill(self, node: NodeProcess) -> None:
        with (self.seen_by(node) / "fill").open("wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(4096))
            except OSError as full:
                if full.errno != errno.ENOSPC:
                    raise

    def empty(self, node: NodeProcess) -> None:
        (self.seen_by(node) / "fill").unlink()

    def run(self, node: NodeProcess, *arguments: str) -> subprocess.CompletedProcess[str]:
        """`mesh ARGUMENTS` on the node's home."""
        inside = ("nsenter", f"--target={node.pid}", "--user", "--mount", "--preserve-credentials")
        command = (*inside, sys.executable, "-m", "meshnode.cli.main", *arguments)
        return subprocess.run(
            [*command, "--home", str(self.mount_point / "home")],
            env={**os.environ, **self.environment},
            capture_output=True,
            text=True,
            check=False,
        )


@pytest.fixture
def small_disk() -> Iterator[SmallDisk]:
    works = subprocess.run(
        ["unshare", "--user", "--map-root-user", "--mount", "mount", "-t", "tmpfs", "t", "/mnt"],
        check=False,
        capture_output=True,
    )
    require("namespaces", works.returncode == 0, works.stderr.decode().strip())
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="md-") as folder:
        yield SmallDisk(Path(folder))


async def test_a_worker_on_a_full_disk_says_so_and_loses_nothing(
    world: World, small_model: Path, small_disk: SmallDisk
) -> None:
    """Invites, joins, logs."""
    async with open_node(
        *("worker", *LOOPBACK, *ONE_THREAD, "--models", str(small_model.parent)),
        name="worker",
        home=small_disk.mount_point / "home",
        log_folder=world.folder,
        prefix=small_disk.prefix,
        environment=small_disk.environment,
    ) as worker:
        token = invite_token(await worker.wait_event("invite"))
        joins = ("--join-file", str(write_token(world.folder / "token", token)))
        async with world.serve("--model", str(small_model), "--split", "always", *joins) as node:
            url = await url_of(node)
            expected = await greedy_tokens(url)
            small_disk.fill(worker)
            invited = await trio.to_thread.run_sync(small_disk.run, worker, "invite")
            assert invited.returncode == RESOURCES, invited.stderr
            assert "no space left" in invited.stderr
            async with world.worker(*joins, name="third") as third:
                assert await third.wait_exit() != 0
            assert "a problem of its own" in " ".join(third.last_lines), third.last_lines
            assert await greedy_tokens(url) == expected, "what runs goes on"
            small_disk.empty(worker)
            assert await greedy_tokens(url) == expected
            async with world.worker(*joins, name="fourth") as fourth:
                await fourth.wait_event("peer", containing="connected to worker")
            log = (small_disk.seen_by(worker) / "home/logs/mesh.log").read_text()
            assert "Traceback" not in log


async def test_a_disk_that_is_full_at_the_start_is_told(
    world: World, small_disk: SmallDisk
) -> None:
    small_disk.environment["PREPARE"] = f"! cat /dev/zero >{small_disk.mount_point}/fill"
    async with open_node(
        *("worker", *LOOPBACK),
        name="worker",
        home=small_disk.mount_point / "home",
        log_folder=world.folder,
        prefix=small_disk.prefix,
        environment=small_disk.environment,
    ) as worker:
        assert await worker.wait_exit() == RESOURCES
    assert "free some space" in " ".join(worker.last_lines)
