"""Faults of the network and of processes while an answer is under way: it completes, and is the
undisturbed one. `./just outages` repeats them at their full length."""

from __future__ import annotations

import os
import signal
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import psutil
import pytest
import trio

from tests.faults.clocks import Clock, build_library
from tests.netlab.answering import Scene, open_scene, small_model
from tests.netlab.lan import NETWORK, LanHost, lan

pytestmark = [pytest.mark.engine, pytest.mark.netlab]

OUTAGE_S = float(os.environ.get("MESH_TEST_OUTAGE_S", "6"))
STOPPED_S = float(os.environ.get("MESH_TEST_STOPPED_S", "8"))
FLAPS = int(os.environ.get("MESH_TEST_FLAPS", "6"))
FLOWS_WITHIN_S = 0.5  # and two round trips, which take nothing here
MOVED_WITHIN_S = 1.2  # until it is noticed, doubted, and dialled again
SLACK_S = 0.3  # of a busy machine
HOUR_S = 3600


@pytest.fixture
def hosts() -> Iterator[list[LanHost]]:
    with lan(2) as machines:
        yield machines


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, engine_bin: Path) -> Path:
    return small_model(tmp_path_factory.mktemp("outages"))


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_library(tmp_path_factory.mktemp("clock"))


@dataclass
class Place:
    """Two machines on one switch, and their clocks."""

    here: LanHost
    there: LanHost
    here_clock: Clock
    there_clock: Clock


Fault = Callable[[Place, Scene], Awaitable[None]]


async def cable_out(place: Place, scene: Scene) -> None:
    place.there.ip("link", "set", "e0", "down")
    await trio.sleep(OUTAGE_S)
    place.there.ip("link", "set", "e0", "up")


async def packets_dropped(place: Place, scene: Scene) -> None:
    rules = "table inet cut {\n chain in {\n type filter hook input priority 0\n drop\n }\n }\n"
    nft = (*place.there.prefix, "nft")
    await trio.run_process([*nft, rules])
    await trio.sleep(OUTAGE_S)
    await trio.run_process([*nft, "delete", "table", "inet", "cut"])


async def flaps(place: Place, scene: Scene) -> None:
    for number in range(FLAPS):
        place.there.ip("link", "set", "e0", "down")
        await trio.sleep((0.2, 1.5, 4.5)[number % 3])
        place.there.ip("link", "set", "e0", "up")
        await trio.sleep((1.0, 0.1, 0.4)[number % 3])


async def orchestrator_moves(place: Place, scene: Scene) -> None:
    place.here.move_to(f"{NETWORK}.101")


async def worker_moves(place: Place, scene: Scene) -> None:
    place.there.move_to(f"{NETWORK}.102")


def stopped(who: str, *, asleep: bool = False) -> Fault:
    """asleep: by all clocks but the steady one ten minutes more have passed."""

    async def stop(place: Place, scene: Scene) -> None:
        node = scene.worker if who == "worker" else scene.node
        clock = place.there_clock if who == "worker" else place.here_clock
        pids = [node.pid, *(one.pid for one in psutil.Process(node.pid).children(recursive=True))]
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        await trio.sleep(STOPPED_S)
        if asleep:
            clock.sleep(600)
        for pid in pids:
            os.kill(pid, signal.SIGCONT)

    return stop


async def clocks_stepped(place: Place, scene: Scene) -> None:
    place.here_clock.set(HOUR_S)
    place.there_clock.set(-HOUR_S)


FAULTS: dict[str, tuple[Fault, float | None]] = {
    # And within which the next token comes.
    "cable out": (cable_out, FLOWS_WITHIN_S),
    "packets dropped": (packets_dropped, FLOWS_WITHIN_S),
    "flaps": (flaps, None),
    "orchestrator moves": (orchestrator_moves, MOVED_WITHIN_S),
    "worker moves": (worker_moves, MOVED_WITHIN_S),
    "worker stopped": (stopped("worker"), None),
    "orchestrator stopped": (stopped("orchestrator"), None),
    "worker suspended": (stopped("worker", asleep=True), None),
    "orchestrator suspended": (stopped("orchestrator", asleep=True), None),
    "clocks stepped": (clocks_stepped, FLOWS_WITHIN_S),
}
KINDS = ("quic", "tcp")
A_FEW = (
    ("cable out", "quic"),
    ("cable out", "tcp"),
    ("orchestrator moves", "quic"),
    ("orchestrator moves", "tcp"),
    ("worker stopped", "tcp"),
    ("orchestrator suspended", "quic"),
    ("clocks stepped", "tcp"),
)
ALL = [(fault, kind) for fault in FAULTS for kind in KINDS]


@pytest.mark.parametrize(("fault", "kind"), ALL if "MESH_TEST_ALL_OUTAGES" in os.environ else A_FEW)
async def test_an_answer_under_way_survives(
    hosts: list[LanHost],
    model: Path,
    library: Path,
    tmp_path: Path,
    fault: str,
    kind: str,
) -> None:
    happen, within_s = FAULTS[fault]
    clocks = [Clock(library, tmp_path / f"{name}.clock") for name in ("here", "there")]
    here, there = hosts
    place = Place(here, there, *clocks)
    async with open_scene(
        *(here, there, model, tmp_path, ("--transport", kind)),
        environments=[clock.environment() for clock in clocks],
    ) as scene:
        answers, took_s = await scene.survives(
            partial(happen, place), 120 + 2 * OUTAGE_S + STOPPED_S + 6 * FLAPS
        )
    assert within_s is None or took_s <= within_s + SLACK_S + answers.pause_s
