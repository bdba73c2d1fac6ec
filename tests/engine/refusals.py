"""What a server refuses, and that it serves the next client as if nobody had tried."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from tests.engine import hostile_messages as m
from tests.engine.hostile_messages import Memory, graph
from tests.engine.processes import Running
from tests.engine.rpc_client import RpcClient

MIB = 1 << 20
LIMIT = 256 * MIB
"""What the attacked servers may lend."""


def computes(client: RpcClient) -> bool:
    """Whether an honest sum comes out right: the server is there and remembers nothing wrong."""
    memory = Memory(client)
    memory.write(0, struct.pack("<8f", *range(8)))
    a, b = memory.tensor(1, 0, (4,)), memory.tensor(2, 16, (4,))
    result = replace(memory.tensor(3, 64, (4,), op=m.ADD), src=(1, 2))
    client.send(m.RPC_GRAPH_COMPUTE, graph([a, b, result], [3]))
    return memory.read(64, 16) == struct.pack("<4f", 4, 6, 8, 10)


@contextmanager
def refused(worker: Running, reason: str = "") -> Iterator[RpcClient]:
    """What is sent inside ends that connection, and only that."""
    with RpcClient(worker.address) as client:
        yield client
        assert client.reply() is None
    with RpcClient(worker.address) as client:
        assert computes(client)
    assert worker.alive
    assert reason in worker.log
