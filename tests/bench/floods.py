"""`./just floods`: what a flood costs a node, and what honest peers keep meanwhile.

The node and one honest peer share the first core, the attacker has the second one to itself, so
what is lost is what the node spends. The attacker's uplink is policed to UPLINK_BITS_PER_S. Times
with and without the flood take turns; each ratio is of two turns side by side, and the table has
the median over the rounds.

Each turn is counted twice: by the clock, and by the processor time that node and honest peer had,
which says the same of a core that nothing else runs on, whatever else this machine does.
"""

from __future__ import annotations

import datetime
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import click
import psutil
import trio

from tests.bench import attackers, members
from tests.bench.attackers import Target
from tests.bench.flooded import CHUNK, member, run_node
from tunnels import PeerId, Session, quic_size
from tunnels.pmtu import LARGEST_V4_BYTES

ATTACKS = attackers.ATTACKS | members.ATTACKS
RESULT = Path(__file__).parents[2] / "docs" / "floods.md"
BEGIN, END = "<!-- result -->", "<!-- end of result -->"
NODE_CORE, ATTACKER_CORE = 0, 1
TURN_S = 1.5
SETTLE_S = 0.7
MESSAGE = bytes(10_000)


@dataclass(frozen=True)
class Result:
    """Ratios are with the flood to without: by the clock, by processor time. cpu: of one core,
    for the flood alone."""

    name: str
    bulk: tuple[float, float]
    trips: tuple[float, float]
    cpu: float
    grown_mib: float


# --- the processes --------------------------------------------------------------------------


def flooded_node(pipe: Connection, core: int) -> None:
    _pin(core)
    quic_size.SAME_MACHINE_DATAGRAM_BYTES = LARGEST_V4_BYTES
    run_node(pipe)


def run_attack(pipe: Connection, name: str, target: Target, core: int) -> None:
    """Floods between each "start" and "stop"."""
    _pin(core)
    quic_size.SAME_MACHINE_DATAGRAM_BYTES = LARGEST_V4_BYTES

    async def main() -> None:
        while await trio.to_thread.run_sync(pipe.recv) == "start":
            try:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(ATTACKS[name].run, target)
                    await trio.to_thread.run_sync(pipe.recv)
                    nursery.cancel_scope.cancel()
            except* RuntimeError:
                pass  # of an endpoint that was stopped as its dial was answered
            pipe.send("stopped")

    trio.run(main)


def _pin(core: int) -> None:
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {core})


# --- the honest peer ------------------------------------------------------------------------


class Honest:
    """I measure what one peer gets: bytes a second, and 10 KB round trips a second."""

    def __init__(self, session: Session, node: psutil.Process) -> None:
        self._session = session
        self._node = node

    async def turn(self, kind: str) -> tuple[float, float]:
        """How much a second, and a second of the processor."""
        began_s, began_cpu_s = time.perf_counter(), self._cpu_s()
        done = await (self.bulk() if kind == "bulk" else self.trips())
        return (
            done / (time.perf_counter() - began_s),
            done / (self._cpu_s() - began_cpu_s),
        )

    def _cpu_s(self) -> float:
        return time.process_time() + _cpu_s(self._node)

    async def bulk(self) -> int:
        sent = 0
        async with await self._session.open("swallow") as stream:
            began_s = time.perf_counter()
            while time.perf_counter() - began_s < TURN_S:
                await stream.send_all(CHUNK)
                sent += len(CHUNK)
        return sent

    async def trips(self) -> int:
        count = 0
        async with await self._session.open("echo") as stream:
            began_s = time.perf_counter()
            while time.perf_counter() - began_s < TURN_S:
                await stream.send_all(MESSAGE)
                left = len(MESSAGE)
                while left:
                    left -= len(await stream.receive_some())
                count += 1
        return count


class Flood:
    """The attacker's process."""

    def __init__(self, name: str, target: Target) -> None:
        self._near, far = multiprocessing.Pipe()
        self._settle_s = ATTACKS[name].settle_s
        self._process = _spawn(run_attack, far, name, target, ATTACKER_CORE)

    async def start(self) -> None:
        self._near.send("start")
        await trio.sleep(self._settle_s)

    async def stop(self) -> None:
        self._near.send("stop")
        await trio.to_thread.run_sync(self._near.recv)
        await trio.sleep(SETTLE_S)

    def end(self) -> None:
        self._near.send("end")
        _join(self._process)


async def measure(name: str, target: Target, node: psutil.Process, rounds: int) -> Result:
    flood = Flood(name, target)
    ratios: dict[str, list[tuple[float, float]]] = {"bulk": [], "trips": []}
    async with AsyncExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        one = await stack.enter_async_context(member(Path(folder), target))
        honest = Honest(one.session, node)
        await honest.bulk()  # warm: windows and the other process
        before = peak = node.memory_info().rss
        for _ in range(rounds):
            for kind, found in ratios.items():
                alone = await honest.turn(kind)
                await flood.start()
                flooded = await honest.turn(kind)
                found.append((flooded[0] / alone[0], flooded[1] / alone[1]))
                peak = max(peak, node.memory_info().rss)
                await flood.stop()
        await flood.start()
        spent_s = _cpu_s(node)
        await trio.sleep(2 * TURN_S)
        cpu = (_cpu_s(node) - spent_s) / (2 * TURN_S)
        peak = max(peak, node.memory_info().rss)
        await flood.stop()
    flood.end()
    bulk, trips = (_medians(ratios[kind]) for kind in ("bulk", "trips"))
    return Result(name, bulk, trips, cpu, (peak - before) / 2**20)


def _medians(pairs: list[tuple[float, float]]) -> tuple[float, float]:
    by_clock, by_processor = zip(*pairs, strict=True)
    return statistics.median(by_clock), statistics.median(by_processor)


def _cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def _spawn(target: Callable[..., None], *arguments: object) -> BaseProcess:
    process = multiprocessing.get_context("spawn").Process(target=target, args=arguments)
    process.start()
    return process


def _join(process: BaseProcess) -> None:
    process.join(5)
    if process.is_alive():
        process.kill()


def run_one(name: str, rounds: int) -> Result:
    """A node of its own for each attack, so that what one leaves is not counted for the next."""
    near, far = multiprocessing.Pipe()
    process = _spawn(flooded_node, far, NODE_CORE)
    try:
        key, port, token = near.recv()
        target = Target(PeerId(key), port, token)
        assert process.pid is not None
        return trio.run(measure, name, target, psutil.Process(process.pid), rounds)
    finally:
        near.send(None)
        _join(process)


HEADER = (
    "| flood | bulk kept: clock, processor | 10 KB round trips kept: clock, processor "
    "| of a core, flood alone | memory, MiB | run |\n|---|---|---|---|---|---|"
)


def row(one: Result, rounds: int) -> str:
    today = datetime.datetime.now(datetime.UTC).date()
    return (
        f"| {ATTACKS[one.name].what} | {one.bulk[0]:.2f}, {one.bulk[1]:.2f} "
        f"| {one.trips[0]:.2f}, {one.trips[1]:.2f} | {one.cpu:.0%} | {one.grown_mib:.0f} "
        f"| {today}, {rounds} rounds |"
    )


def table(rows: dict[str, str]) -> str:
    """`rows`: by what the attack is called in the first column."""
    found = (rows.get(attack.what) for attack in ATTACKS.values())
    return "\n".join((HEADER, *(one for one in found if one is not None)))


def recorded(page: str) -> dict[str, str]:
    lines = page.partition(BEGIN)[2].partition(END)[0].splitlines()
    return {line[2:].partition(" |")[0]: line for line in lines if line.startswith("| ")}


@click.command()
@click.argument("names", nargs=-1)
@click.option("--rounds", type=click.IntRange(1), default=5)
@click.option("--write", is_flag=True, help="Put the rows into docs/floods.md.")
def main(names: tuple[str, ...], rounds: int, write: bool) -> None:
    """Each attack against one node, or only those in NAMES."""
    _pin(NODE_CORE)
    quic_size.SAME_MACHINE_DATAGRAM_BYTES = LARGEST_V4_BYTES
    rows = {}
    for name in names or ATTACKS:
        result = run_one(name, rounds)
        click.echo(
            f"{name}: bulk {result.bulk[0]:.2f} {result.bulk[1]:.2f}, "
            f"trips {result.trips[0]:.2f} {result.trips[1]:.2f}, "
            f"cpu {result.cpu:.0%}, +{result.grown_mib:.0f} MiB"
        )
        rows[ATTACKS[name].what] = row(result, rounds)
    click.echo("\n" + table(rows))
    if write:
        page = RESULT.read_text()
        before, _, rest = page.partition(BEGIN)
        text = table(recorded(page) | rows)
        RESULT.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.partition(END)[2]}")


if __name__ == "__main__":
    main()
