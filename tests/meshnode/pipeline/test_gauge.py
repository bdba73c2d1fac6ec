"""This machine is measured while nobody needs it, and whoever needs it does not wait for that."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import trio
import trio.testing

from meshnode.engine.cache import Engine
from meshnode.engine.devices import Device, DeviceKind
from meshnode.engine.speed import Speeds
from meshnode.pipeline import gauge as module
from meshnode.pipeline.gauge import Gauge, until_quiet
from meshnode.pipeline.inventory import Inventory
from meshnode.pipeline.survey import local_node
from tests.meshnode.engine.bench_answer import answer

CPU = Device("CPU", "x86_64, 2 cores", DeviceKind.CPU, 1 << 34, 1 << 33)
CARD = Device("CUDA0", "a card", DeviceKind.GPU, 1 << 34, 1 << 33)
RUNS = 3
"""Of llama-bench, to measure one device."""
BENCH = """#!/bin/sh
echo "$$ $(nice)" >> "{folder}/started"
while [ -e "{folder}/slow" ]; do sleep 0.01; done
cat "{folder}/answer"
"""


class Machine:
    """Its llama-bench lasts for as long as it is `slow`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        program = folder / "llama-bench"
        program.write_text(BENCH.format(folder=folder))
        program.chmod(0o700)
        (folder / "answer").write_text(json.dumps(answer()))
        self.engine = Engine(folder, "key", "cpu", False, "source", "c++", "a CPU")

    def gauge(self, *devices: Device, is_quiet: bool = True) -> Gauge:
        async def quiet() -> bool:
            await trio.lowlevel.checkpoint()
            return is_quiet

        speeds = Speeds(self.folder, self.engine)
        return Gauge(speeds, Inventory(self.engine, devices or (CPU,)), quiet=quiet)

    @property
    def slow(self) -> Path:
        return self.folder / "slow"

    def started(self) -> list[tuple[int, int]]:
        """Pid and niceness of each llama-bench so far."""
        path = self.folder / "started"
        lines = path.read_text().splitlines() if path.exists() else []
        return [(int(line.split()[0]), int(line.split()[1])) for line in lines if " " in line]

    async def until_started(self, count: int) -> int:
        with trio.fail_after(20):
            while len(self.started()) < count:  # noqa: ASYNC110 - a script writes a file
                await trio.sleep(0.01)
        return self.started()[-1][0]


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


async def test_a_machine_is_measured_once_and_behind_everything_else(machine: Machine) -> None:
    gauge = machine.gauge(CARD, CPU)
    assert gauge.speed(CPU) is None
    await gauge.run()
    await gauge.settle()
    found = gauge.speed(CPU)
    assert found is not None
    assert found.is_measured
    assert [nice for _, nice in machine.started()] == [19] * 2 * RUNS
    again = machine.gauge(CARD, CPU)
    await again.run()
    assert again.speed(CPU) == found
    assert len(machine.started()) == 2 * RUNS
    assert [one.measured for one in local_node((CPU,), gauge.speed).devices] == [found]


async def test_what_a_busy_machine_does_serves_until_it_is_measured_again(
    machine: Machine,
) -> None:
    beside_others = machine.gauge(is_quiet=False)
    await beside_others.run()
    assert beside_others.speed(CPU) is not None
    later = machine.gauge()
    assert later.speed(CPU) is None, "the next start measures anew"
    await later.run()
    assert machine.gauge().speed(CPU) == later.speed(CPU)


async def test_whoever_needs_the_machine_has_it_at_once_and_it_is_measured_after(
    machine: Machine,
) -> None:
    machine.slow.touch()
    gauge = machine.gauge()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(gauge.run)
        pid = await machine.until_started(1)
        with gauge.in_use(), gauge.in_use():
            with trio.fail_after(5):
                while psutil.pid_exists(pid):  # noqa: ASYNC110 - no system tells
                    await trio.sleep(0.001)
            await gauge.settle()  # nobody waits for what waits for others
            assert gauge.speed(CPU) is None
            assert len(machine.started()) == 1, "it is not tried again meanwhile"
        await machine.until_started(2)
        machine.slow.unlink()
        await gauge.settle()
    assert gauge.speed(CPU) is not None


async def test_what_cannot_be_measured_is_not_known(machine: Machine) -> None:
    (machine.folder / "answer").write_text("[]")
    gauge = machine.gauge()
    await gauge.run()
    await gauge.settle()
    assert gauge.speed(CPU) is None
    assert len(machine.started()) == RUNS


async def test_a_busy_machine_is_waited_for_but_not_for_ever(
    autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    busy: Callable[[], float] = lambda: 90.0 if trio.current_time() < 7 else 10.0  # noqa: E731
    monkeypatch.setattr(psutil, "cpu_percent", busy)
    assert await until_quiet()
    assert 7 <= trio.current_time() < 9
    monkeypatch.setattr(psutil, "cpu_percent", lambda: 100.0)
    began_s = trio.current_time()
    assert not await until_quiet()
    assert trio.current_time() - began_s == module.WAIT_S


async def test_a_killed_measurement_leaves_nothing_behind(
    machine: Machine, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    temporary = tmp_path_factory.mktemp("temporary")
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    machine.slow.touch()
    gauge = machine.gauge()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(gauge.run)
        await machine.until_started(1)
        assert os.listdir(temporary)
        nursery.cancel_scope.cancel()
    assert not os.listdir(temporary)
