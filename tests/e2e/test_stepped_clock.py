"""A wall clock set an hour forwards or back under running nodes: nothing breaks or is lost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import psutil
import pytest
import trio

from meshnode.demo.nodes import NodeFailed, NodeProcess, open_node
from tests.e2e.conftest import ANY_HTTP, LOOPBACK, ONE_THREAD, SAME_LAYOUT, Mesh
from tests.e2e.test_planned_again import long_answer
from tests.e2e.test_two_nodes import greedy_tokens, url_of
from tests.faults.clocks import Clock, build_library
from tunnels.interfaces import time_asleep_s

pytestmark = pytest.mark.engine

HOUR_S = 3600


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_library(tmp_path_factory.mktemp("clock"))


@pytest.fixture
def clocks(library: Path, tmp_path: Path) -> tuple[Clock, Clock]:
    files = (tmp_path / "worker.clock", tmp_path / "orchestrator.clock")
    return Clock(library, files[0]), Clock(library, files[1])


def test_the_clock_steps_and_the_steady_one_does_not(clocks: tuple[Clock, Clock]) -> None:
    """The tests below see what they say they see."""
    clock, _ = clocks
    source = "import time; print(time.time(), time.monotonic())"
    clock.set(-HOUR_S)
    environment = {**os.environ, **clock.environment()}
    told = subprocess.check_output([sys.executable, "-c", source], env=environment, text=True)
    wall_s, steady_s = map(float, told.split())
    assert abs(wall_s - (time.time() - HOUR_S)) < 60
    assert abs(steady_s - time.monotonic()) < 60


def test_a_sleep_is_seen_by_all_clocks_but_the_steady_one(clocks: tuple[Clock, Clock]) -> None:
    clock, _ = clocks
    source = (
        "import time; from tunnels.interfaces import time_asleep_s;"
        "print(time.time(), time.monotonic(), time_asleep_s())"
    )
    before_s = time_asleep_s()
    clock.sleep(HOUR_S)
    environment = {**os.environ, **clock.environment()}
    told = subprocess.check_output([sys.executable, "-c", source], env=environment, text=True)
    wall_s, steady_s, asleep_s = map(float, told.split())
    assert abs(wall_s - (time.time() + HOUR_S)) < 60
    assert abs(steady_s - time.monotonic()) < 60
    assert abs(asleep_s - before_s - HOUR_S) < 1


@pytest.mark.parametrize("step_s", [HOUR_S, -HOUR_S], ids=["forwards", "back"])
@pytest.mark.parametrize("whose", [0, 1], ids=["worker", "orchestrator"])
async def test_a_step_disturbs_neither_answer_nor_lease_nor_invite(
    clocks: tuple[Clock, Clock],
    tmp_path: Path,
    small_model: Path,
    mesh: Mesh,
    whose: int,
    step_s: int,
) -> None:
    models = ("--models", str(small_model.parent))
    common = (*LOOPBACK, *ONE_THREAD)
    async with open_node(
        *("worker", *common, *models),
        name="worker",
        home=tmp_path / "worker",
        log_folder=tmp_path,
        environment=clocks[0].environment(),
    ) as worker:
        await worker.wait_event("invite")
        short, long = [await invite(mesh, tmp_path, expires) for expires in ("30m", "24h")]
        (tmp_path / "token").write_text(long)
        async with open_node(
            *("serve", *common, *ANY_HTTP, "--model", str(small_model), "--split", "always"),
            *("--join-file", str(tmp_path / "token")),
            name="orchestrator",
            home=tmp_path / "orchestrator",
            log_folder=tmp_path,
            engine_options=SAME_LAYOUT,
            environment=clocks[1].environment(),
        ) as node:
            url = await url_of(node)
            expected = await greedy_tokens(url)
            seen = (len(worker.events), len(node.events))
            async with long_answer(url, 300):
                clocks[whose].set(step_s)
            assert await greedy_tokens(url) == expected
            assert told_since(worker, seen[0]) == told_since(node, seen[1]) == []
            # What is made and shown while the clock is wrong, and after it is right again.
            await joins(tmp_path, "during", long)
            if step_s > 0 and whose == 0:
                with pytest.raises(NodeFailed, match="expired"):
                    await joins(tmp_path, "short-during", short)
            clocks[whose].set(0)
            await joins(tmp_path, "short-after", short)
            # A lease and a deployment anew.
            clocks[whose].set(step_s)
            seen = (len(worker.events), len(node.events))
            llama_server_of(node).kill()
            await node.wait_event("ready", after=seen[1])
            assert await greedy_tokens(url) == expected
    for name in ("worker", "orchestrator"):
        assert "Traceback" not in (tmp_path / name / "logs" / "mesh.log").read_text()


def told_since(node: NodeProcess, seen: int) -> list[str]:
    return [event["text"] for event in node.events[seen:]]


def llama_server_of(node: NodeProcess) -> psutil.Process:
    (engine,) = [
        child
        for child in psutil.Process(node.pid).children(recursive=True)
        if "llama-server" in child.name()
    ]
    return engine


async def invite(mesh: Mesh, folder: Path, expires: str) -> str:
    arguments = ("invite", "--expires", expires, "--json", "--home", str(folder / "worker"))
    finished = await trio.to_thread.run_sync(partial(mesh, *arguments))
    return str(json.loads(finished.stdout)["token"])


async def joins(folder: Path, name: str, token: str) -> None:
    """A third machine, whose clock is right, joins with the token."""
    (folder / f"{name}.token").write_text(token)
    async with open_node(
        *("worker", *LOOPBACK, *ONE_THREAD, "--join-file", str(folder / f"{name}.token")),
        name=name,
        home=folder / name,
        log_folder=folder,
    ) as third:
        await third.wait_event("peer", containing="connected to worker")
