"""Graphs that the server keeps in slots and runs again (patch 15), and slots that have none."""

from __future__ import annotations

import struct
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.engine import hostile_messages as m
from tests.engine.hostile_messages import NamedMemory, changes, graph
from tests.engine.processes import Running, rpc_server
from tests.engine.refusals import LIMIT, MIB, refused
from tests.engine.rpc_client import CHANGES, KEEP, RpcClient

pytestmark = pytest.mark.engine

SLOTS = 16
GRAPHS_BYTES = 512 * MIB
BYTES = 128  # of a matrix of 8 by 4 floats


def added(memory: NamedMemory) -> bytes:
    """The graph of a sum of two matrices at 0 and 256, to 512."""
    a, b = memory.tensor(1, 0), memory.tensor(2, 256)
    return graph([a, b, replace(memory.tensor(3, 512, op=m.ADD), src=(1, 2))], [3])


def test_graphs_stay_in_their_slots(worker: Running) -> None:
    with RpcClient(worker.address) as client:
        memory = NamedMemory(client)
        a, b, result = memory.tell(0), memory.tell(256), memory.tell(512)
        doubled = replace(memory.tensor(3, 512, op=m.ADD), src=(1, 1))
        client.input(b, np.full(32, 10, np.float32).tobytes(), size=BYTES)
        client.graph(0, added(memory))
        client.graph(SLOTS - 1, graph([memory.tensor(1, 0), doubled], [3]))
        for value in (1, 2):
            client.input(a, np.full(32, value, np.float32).tobytes(), size=BYTES)
            for slot, expected in ((0, value + 10), (SLOTS - 1, 2 * value)):
                client.graph_again(slot)
                assert client.get(result, 4) == struct.pack("<f", expected)


def _beyond(client: RpcClient, memory: NamedMemory) -> None:
    client.graph(SLOTS, added(memory))


def _another_slot(client: RpcClient, memory: NamedMemory) -> None:
    client.graph(1, added(memory))
    client.graph_again(0)


def _upstreams(client: RpcClient, memory: NamedMemory) -> None:
    client.send(m.RPC_GRAPH_COMPUTE, added(memory))
    client.graph_again(0)


def _upstreams_again(client: RpcClient, memory: NamedMemory) -> None:
    client.graph(0, added(memory))
    client.send(m.RPC_GRAPH_RECOMPUTE, bytes(4))


def _freed(client: RpcClient, memory: NamedMemory) -> None:
    client.alloc(8, 1 << 50, 4096)
    client.graph(0, added(memory))
    client.free(8)  # whatever it was used by
    client.graph_again(0)


def _refused_before(client: RpcClient, memory: NamedMemory) -> None:
    client.graph(0, added(memory))
    client.graph_again(0)
    assert client.confirm() == (0, "")
    client.graph(0, added(memory)[:-1])


BAD_GRAPHS: dict[str, Callable[[RpcClient, NamedMemory], None]] = {
    "a slot behind the last": _beyond,
    "the largest slot": lambda client, memory: client.graph(2**32 - 1, added(memory)),
    "a device that is not": lambda client, memory: client.graph(0, added(memory), device=1),
    "two devices": lambda client, memory: client.graph(0, b"\1" + added(memory)[1:]),
    "one cut off": _refused_before,
    "again from an empty slot": _another_slot,
    "again from upstream's": _upstreams,
    "again from behind the last": lambda client, memory: client.graph_again(SLOTS),
    "again on no device": lambda client, memory: client.graph_again(0, device=1),
    "upstream's again without one": _upstreams_again,
    "again after a buffer was freed": _freed,
}


@pytest.mark.parametrize("attempt", BAD_GRAPHS)
def test_a_graph_that_is_not_there_is_refused(worker: Running, attempt: str) -> None:
    with refused(worker) as client:
        BAD_GRAPHS[attempt](client, NamedMemory(client))


def test_row_numbers_are_looked_at_each_time_a_kept_graph_runs(worker: Running) -> None:
    with refused(worker, "out of range") as client:
        memory = NamedMemory(client)
        table, numbers = memory.tensor(1, 0), memory.tensor(2, 1024, (2,), type=m.I32)
        told = memory.tell(1024, (2,), type=m.I32)
        rows = replace(memory.tensor(3, 512, (8, 2), op=m.GET_ROWS), src=(1, 2))
        client.input(told, struct.pack("<2i", 0, 3), size=8, coding=KEEP)
        client.graph(0, graph([table, numbers, rows], [3]))
        client.graph_again(0)
        assert client.confirm() == (0, "")
        client.input(told, changes((4, b"\4")), size=8, coding=CHANGES)
        client.graph_again(0)


def test_graphs_of_more_than_512_mib_are_not_kept(engine_bin: Path, folder: Path) -> None:
    tensors = 60_000
    with rpc_server(engine_bin, folder, "--memory-limit", str(LIMIT)) as worker:
        with refused(worker, "a graph: too much to keep") as client:
            memory = NamedMemory(client)
            chain = [memory.tensor(1, 0)]
            for number in range(2, tensors):
                chain.append(replace(memory.tensor(number, 0, op=m.RESHAPE), src=(number - 1,)))
            large = graph(chain, [tensor.id for tensor in chain[1:]])
            with suppress(ConnectionError):  # the end may come while one is being sent
                for slot in range(SLOTS):
                    client.graph(slot, large)
        peak_kb = int(
            Path(f"/proc/{worker.process.pid}/status").read_text().split("VmHWM:")[1].split()[0]
        )
        assert peak_kb * 1024 < GRAPHS_BYTES + LIMIT
