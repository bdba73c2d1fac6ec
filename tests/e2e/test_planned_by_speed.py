"""Where everything is measured, the fastest plan is made, and then done."""

from __future__ import annotations

from pathlib import Path

import pytest

from meshnode.demo.run import fetch_status, greedy
from meshnode.engine.cache import load_engine
from meshnode.engine.devices import cpu_device
from meshnode.engine.speed import KEPT_FOLDER, Speeds
from meshnode.pipeline.speeds import Speed
from meshnode.state import subfolder_beside_node
from tests.e2e.conftest import World

pytestmark = pytest.mark.engine

SLOW, FAST = Speed(1e8, 1e9), Speed(1e11, 1e12)
MEASURES = {"MESH_MEASURE": "1"}


def know(world: World, name: str, speed: Speed, engine_bin: Path) -> None:
    """The node of this name was measured before, with the one thread that tests have."""
    folder = subfolder_beside_node(world.folder / name, KEPT_FOLDER)
    Speeds(folder, load_engine(engine_bin)).keep(cpu_device(), 1, speed)


@pytest.mark.parametrize(("here", "there"), [(SLOW, FAST), (FAST, SLOW)], ids=["there", "here"])
async def test_alone_on_the_faster_machine(
    world: World, small_model: Path, engine_bin: Path, here: Speed, there: Speed
) -> None:
    know(world, "worker", there, engine_bin)
    know(world, "orchestrator", here, engine_bin)
    place = "worker" if there is FAST else "local"
    models = ("--models", str(small_model.parent))
    async with world.worker(*models, environment=MEASURES) as worker:
        join = f"--join-file={await world.join_file(worker)}"
        async with world.serve(
            *("--model", str(small_model), join), environment=MEASURES
        ) as orchestrator:
            why = await orchestrator.wait_event("plan", containing=f"alone on {place} is faster")
            assert "tok/s" in why["text"]
            after = orchestrator.events.index(why)
            ready = await orchestrator.wait_event("ready", after=after)
            status = await fetch_status(ready["url"])
            assert {share["node"] for share in status["layers"] if share["last"]} == {place}
            assert len((await greedy(ready["url"])).tokens) == 64


async def test_a_faster_machine_that_comes_later_is_found_out_and_used(
    world: World, small_model: Path, engine_bin: Path
) -> None:
    """Nothing but its speed speaks for it: the model fits here."""
    know(world, "orchestrator", SLOW, engine_bin)
    know(world, "worker", FAST, engine_bin)
    models = ("--models", str(small_model.parent))
    async with world.serve("--model", str(small_model), environment=MEASURES) as orchestrator:
        first = await orchestrator.wait_event("ready")
        status = await fetch_status(first["url"])
        assert {share["node"] for share in status["layers"]} == {"local"}
        join = f"--join-file={await world.join_file(orchestrator)}"
        async with world.worker(*models, join, environment=MEASURES):
            why = await orchestrator.wait_event("plan", containing="alone on worker is faster")
            ready = await orchestrator.wait_event("ready", after=orchestrator.events.index(why))
            status = await fetch_status(ready["url"])
            assert {share["node"] for share in status["layers"] if share["last"]} == {"worker"}
