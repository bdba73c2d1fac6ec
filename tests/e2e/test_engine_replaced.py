"""An engine's program removed or replaced under a running node: a sentence, and recovery."""

from __future__ import annotations

import os
import shutil
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import psutil
import pytest

from meshnode.demo.nodes import NodeProcess
from tests.e2e.conftest import World
from tests.e2e.test_two_nodes import greedy_tokens, url_of

pytestmark = pytest.mark.engine


def engine_of(node: NodeProcess, name: str) -> psutil.Process:
    (process,) = (one for one in psutil.Process(node.pid).children() if name in one.cmdline()[0])
    return process


def no_traceback(*logs: Path) -> None:
    for log in logs:
        assert "Traceback" not in log.read_text(errors="replace"), log


@asynccontextmanager
async def serving(world: World, model: Path) -> AsyncIterator[tuple[NodeProcess, NodeProcess]]:
    """A worker, and an orchestrator that is ready."""
    async with world.worker("--models", str(model.parent)) as worker:
        joins = ("--join-file", str(await world.join_file(worker)))
        async with world.serve("--model", str(model), "--split", "always", *joins) as node:
            await url_of(node)
            yield worker, node


@pytest.fixture
def own_engine(tmp_path: Path, engine_bin: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the engine that may be broken; its `bin` folder."""
    cache = tmp_path / "cache"
    copy = cache / "engine" / "engines" / engine_bin.parent.name
    shutil.copytree(engine_bin.parent, copy)
    monkeypatch.setenv("MESH_CACHE", str(cache))
    return copy / "bin"


def deleted(program: Path, _stock: Path) -> None:
    program.unlink()


def garbage(program: Path, _stock: Path) -> None:
    replace_with(program, b"\x00garbage\xff" * 1000)


def another_build(program: Path, stock: Path) -> None:
    """Its operations may be numbered otherwise: it must never run beside ours."""
    replace_with(program, (stock / program.name).read_bytes())


def not_executable(program: Path, _stock: Path) -> None:
    program.chmod(0o644)


def replace_with(program: Path, content: bytes) -> None:
    new = program.with_name("new")
    new.write_bytes(content)
    new.chmod(0o755)
    new.replace(program)


@pytest.mark.parametrize("break_it", [deleted, garbage, another_build, not_executable])
@pytest.mark.parametrize("program", ["ggml-rpc-server", "llama-server"])
async def test_a_program_of_the_engine_changes_under_a_running_node(
    world: World,
    small_model: Path,
    own_engine: Path,
    stock_bin: Path,
    program: str,
    break_it: Callable[[Path, Path], None],
) -> None:
    async with serving(world, small_model) as (worker, node):
        url = await url_of(node)
        expected = await greedy_tokens(url)
        kept = own_engine / "kept"
        os.link(own_engine / program, kept)
        break_it(own_engine / program, stock_bin)
        seen = len(node.events)
        owner = worker if program == "ggml-rpc-server" else node
        engine_of(owner, program).kill()
        said = await node.wait_event("warning", containing="mesh engine build", after=seen)
        assert program in said["text"]
        async with httpx.AsyncClient(base_url=url, timeout=30) as client:
            health = await client.get("/health")
        assert health.status_code == 503
        kept.chmod(0o755)
        kept.replace(own_engine / program)
        await node.wait_event("ready", after=seen)
        assert await greedy_tokens(url) == expected
    no_traceback(*world.folder.glob("*/logs/mesh.log"))
