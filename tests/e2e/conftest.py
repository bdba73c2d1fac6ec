"""Whole nodes as real processes, on loopback, each with a home of its own below `tmp_path`."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import pytest

from meshnode.demo.nodes import NodeProcess, invite_token, open_node, write_token
from tests.conftest import require
from tests.engine.synthetic import make_model

LOOPBACK = ("--listen", "127.0.0.1:0")
ANY_HTTP = ("--http", "127.0.0.1:0")
SAME_LAYOUT = ("--no-repack",)
# Two engine threads that wait for one another on a busy machine wait for the scheduler.
ONE_THREAD = ("--threads", "1")
COMMAND_TIMEOUT_S = 120
OWN_DISK = (
    shutil.which("unshare") or "unshare",
    "--user",
    "--map-root-user",
    "--mount",
    "/bin/sh",
    "-c",
)


@pytest.fixture(scope="session", autouse=True)
def _engine(engine_bin: Path) -> None:
    """Every test here runs the engine; nodes find it in the cache as users' nodes do."""


@dataclass(frozen=True)
class Finished:
    """How a command ended."""

    exit_code: int
    stdout: str
    stderr: str

    def check(self, exit_code: int, *words: str) -> None:
        """One clear sentence, the documented code, no traceback."""
        said = self.stdout + self.stderr
        assert self.exit_code == exit_code, said
        assert "Traceback" not in said
        for word in words:
            assert word in self.stderr, said


Mesh = Callable[..., Finished]


@pytest.fixture
def mesh(tmp_path: Path) -> Mesh:
    """Runs `mesh ARGUMENTS` to its end."""

    def run(*arguments: str, stdin: str = "", env: dict[str, str] | None = None) -> Finished:
        done = subprocess.run(
            [sys.executable, "-m", "meshnode.cli.main", *arguments],
            input=stdin,
            capture_output=True,
            text=True,
            timeout=COMMAND_TIMEOUT_S,
            env={**os.environ, "MESH_HOME": str(tmp_path / "home"), **(env or {})},
            check=False,
        )
        return Finished(done.returncode, done.stdout, done.stderr)

    return run


@dataclass(frozen=True)
class World:
    """A folder of homes, and ways to start nodes in it."""

    folder: Path

    @asynccontextmanager
    async def worker(
        self,
        *arguments: str,
        name: str = "worker",
        environment: Mapping[str, str] = MappingProxyType({}),
    ) -> AsyncIterator[NodeProcess]:
        async with open_node(
            *("worker", *LOOPBACK, *ONE_THREAD, *arguments),
            name=name,
            home=self.folder / name,
            log_folder=self.folder,
            environment=environment,
        ) as node:
            yield node

    @asynccontextmanager
    async def serve(
        self,
        *arguments: str,
        name: str = "orchestrator",
        http: Sequence[str] = ANY_HTTP,
        engine_options: Sequence[str] = SAME_LAYOUT,
        stdin: str = "",
        environment: Mapping[str, str] = MappingProxyType({}),
    ) -> AsyncIterator[NodeProcess]:
        async with open_node(
            *("serve", *LOOPBACK, *ONE_THREAD, *http, *arguments),
            name=name,
            home=self.folder / name,
            log_folder=self.folder,
            engine_options=engine_options,
            stdin=stdin,
            environment=environment,
        ) as node:
            yield node

    @asynccontextmanager
    async def two_workers(
        self, model: Path
    ) -> AsyncIterator[tuple[tuple[NodeProcess, NodeProcess], list[str]]]:
        """`one` and `two`, each the founder of a mesh, and the options that join both meshes."""
        models = ("--models", str(model.parent))
        async with self.worker(*models, name="one") as one, self.worker(*models, name="two") as two:
            joins = [f"--join-file={await self.join_file(worker)}" for worker in (one, two)]
            yield (one, two), joins

    async def token_of(self, node: NodeProcess) -> str:
        return invite_token(await node.wait_event("invite"))

    async def join_file(self, node: NodeProcess) -> Path:
        return write_token(self.folder / f"{node.name}.token", await self.token_of(node))


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """8 layers of noise, 2 MB."""
    folder = tmp_path_factory.mktemp("small")
    return make_model(folder / "small.gguf", layers=8, width=128, ffn=256, seed=1, name="small")


@pytest.fixture
def free_tcp_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.fixture
def own_disk() -> tuple[str, ...]:
    """Runs a command that sees a disk of its own of 60 MB at the folder that follows."""
    works = subprocess.run([*OWN_DISK, "mount -t tmpfs t /mnt"], check=False, capture_output=True)
    require("namespaces", works.returncode == 0, works.stderr.decode().strip())
    return (*OWN_DISK, 'mount -t tmpfs -o size=60m mesh "$0" && exec "$@"')
