"""What a client may not do, and that the next one is served as if it had not tried (patch 8).

Each attempt is refused by an answer or by a closed connection; the server is the one that ships,
and where clang is at hand also one under AddressSanitizer and UndefinedBehaviorSanitizer.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from tests.engine import hostile_messages as m
from tests.engine.hostile_messages import Memory, NamedMemory, Tensor, graph
from tests.engine.processes import Running, alone, greedy_tokens, llama_server, rpc_server
from tests.engine.refusals import LIMIT, computes, refused
from tests.engine.rpc_client import (
    ALLOC_BUFFER,
    BUFFER_GET_BASE,
    FREE_BUFFER,
    GET_DEVICE_MEMORY,
    GET_TENSOR,
    RpcClient,
)

pytestmark = pytest.mark.engine


GraphOf = Callable[[Memory], tuple[list[Tensor], list[int]]]


def binary(memory: Memory, **changes: object) -> tuple[list[Tensor], list[int]]:
    """An addition of two 8 by 4 matrices, its result as changed."""
    a, b = memory.tensor(1, 0), memory.tensor(2, 256)
    result = replace(memory.tensor(3, 512, op=m.ADD), src=(1, 2))
    return [a, b, replace(result, **changes)], [3]  # type: ignore[arg-type]


def source(memory: Memory, **changes: object) -> tuple[list[Tensor], list[int]]:
    """The same, its first source as changed."""
    tensors, nodes = binary(memory)
    return [replace(tensors[0], **changes), *tensors[1:]], nodes  # type: ignore[arg-type]


def product(memory: Memory, **changes: object) -> tuple[list[Tensor], list[int]]:
    a, b = memory.tensor(1, 0, (8, 4)), memory.tensor(2, 256, (8, 2))
    result = replace(memory.tensor(3, 512, (4, 2), op=m.MUL_MAT), src=(1, 2))
    return [a, b, replace(result, **changes)], [3]  # type: ignore[arg-type]


def rows(memory: Memory, row: int, op: int) -> tuple[list[Tensor], list[int]]:
    """Rows taken or set by a number that the client wrote."""
    memory.write(1024, struct.pack("<2i", 0, row))
    table, indexes = memory.tensor(1, 0, (8, 4)), memory.tensor(2, 1024, (2,), type=m.I32)
    if op == m.GET_ROWS:
        result = replace(memory.tensor(3, 512, (8, 2), op=op), src=(1, 2))
        return [table, indexes, result], [3]
    values = memory.tensor(4, 2048, (8, 2))
    result = replace(memory.tensor(3, 0, (8, 4), op=op), src=(4, 2, 1), view_src=1)
    return [table, indexes, values, result], [3]


def experts(memory: Memory, expert: int) -> tuple[list[Tensor], list[int]]:
    memory.write(4096, struct.pack("<i", expert))
    weights, values = memory.tensor(1, 0, (8, 4, 3)), memory.tensor(2, 1024, (8, 1, 1))
    indexes = memory.tensor(3, 4096, (1, 1), type=m.I32)
    result = replace(memory.tensor(4, 2048, (4, 1, 1), op=m.MUL_MAT_ID), src=(1, 2, 3))
    return [weights, values, indexes, result], [4]


def rope(memory: Memory, *params: int) -> tuple[list[Tensor], list[int]]:
    a, positions = memory.tensor(1, 0, (8, 2, 2)), memory.tensor(2, 1024, (2,), type=m.I32)
    result = memory.tensor(3, 512, (8, 2, 2), op=m.ROPE)
    return [a, positions, replace(result, src=(1, 2), op_params=params)], [3]


def unary(memory: Memory, op: int, code: int) -> tuple[list[Tensor], list[int]]:
    a = memory.tensor(1, 0)
    return [a, replace(memory.tensor(3, 512, op=op), src=(1,), op_params=(code,))], [3]


GRAPHS: dict[str, GraphOf] = {
    "an operation that calls a pointer": lambda b: binary(b, op=m.MAP_CUSTOM1, src=(1,)),
    "one of two sources": lambda b: binary(b, op=m.MAP_CUSTOM2),
    "one of three": lambda b: binary(b, op=m.MAP_CUSTOM3, src=(1, 2, 1)),
    "one of many": lambda b: binary(b, op=m.CUSTOM),
    "one that calls a pointer and is not to be computed": lambda b: binary(b, op=m.CUSTOM, flags=0),
    "an operation beyond the table": lambda b: binary(b, op=m.OP_COUNT),
    "one far beyond": lambda b: binary(b, op=0xFFFFFFFF),
    "one that no model's layers need": lambda b: binary(b, op=m.CONV_2D),
    "a unary beyond the table": lambda b: unary(b, m.UNARY, 99),
    "a negative unary": lambda b: unary(b, m.UNARY, -1),
    "a gated unit beyond the table": lambda b: unary(b, m.GLU, 99),
    "no source": lambda b: binary(b, src=()),
    "one source too few": lambda b: binary(b, src=(1,)),
    "one source too many": lambda b: binary(b, src=(1, 2, 1)),
    "a source that is nowhere": lambda b: binary(b, src=(1, 77)),
    "itself as a source": lambda b: binary(b, src=(1, 3)),
    "two that need each other": lambda b: (
        [
            replace(b.tensor(1, 0, op=m.ADD), src=(2, 2)),
            replace(b.tensor(2, 256, op=m.ADD), src=(1, 1)),
        ],
        [1, 2],
    ),
    "a view of itself": lambda b: binary(b, view_src=3),
    "a view of nothing": lambda b: binary(b, view_src=77),
    "two tensors of one name": lambda b: ([b.tensor(1, 0), b.tensor(1, 256)], [1]),
    "a node that is nowhere": lambda b: (binary(b)[0], [77]),
    "a node twice": lambda b: (binary(b)[0], [3, 3]),
    "no node": lambda b: (binary(b)[0], []),
    "a node of the name 0": lambda b: (binary(b)[0], [0]),
    "a type beyond the table": lambda b: source(b, type=43),
    "a removed type": lambda b: source(b, type=4),
    "a type that an addition has not": lambda b: source(b, type=m.I32),
    "half a block": lambda b: source(b, type=m.Q4_0, nb=(18, 18, 72, 72)),
    "a shape that overflows": lambda b: source(b, ne=(2**31 - 1,) * 4),
    "strides that overflow": lambda b: source(b, nb=(4, 2**32 - 4, 2**32 - 4, 2**32 - 4)),
    "a dimension too large": lambda b: source(b, ne=(2**32 - 1, 1, 1, 1)),
    "many elements in few bytes": lambda b: binary(b, ne=(2**20, 16, 1, 1), nb=(0, 0, 0, 0)),
    "no elements": lambda b: source(b, ne=(0, 4, 1, 1)),
    "a result that is too small": lambda b: binary(b, ne=(8, 3, 1, 1)),
    "a tensor before its buffer": lambda b: source(b, data=b.base - 4),
    "beyond it": lambda b: source(b, data=b.base + b.size - 4),
    "at an address that wraps": lambda b: source(b, data=2**64 - 16),
    "at no address": lambda b: source(b, data=0, buffer=0),
    "in no buffer": lambda b: source(b, buffer=0),
    "in a buffer that never was": lambda b: source(b, buffer=b.handle + 8),
    "not aligned": lambda b: source(b, data=b.base + 1),
    "a result across its source": lambda b: binary(b, data=b.base + 16),
    "a transposed product": lambda b: product(b, nb=(16, 4, 32, 32)),
    "a product of other shapes": lambda b: product(b, ne=(5, 2, 1, 1)),
    "scratch memory without end": lambda b: (
        [
            replace(b.tensor(1, 0), ne=(32, 1, 1, 1), nb=(4, 128, 128, 128)),
            replace(b.tensor(2, 0), ne=(32, 2**24, 1, 1), nb=(4, 0, 0, 0)),
            replace(
                b.tensor(3, 512, op=m.MUL_MAT), ne=(1, 2**24, 1, 1), nb=(4, 0, 0, 0), src=(1, 2)
            ),
        ],
        [3],
    ),
    "a row below the table": lambda b: rows(b, -1, m.GET_ROWS),
    "a row above it": lambda b: rows(b, 4, m.GET_ROWS),
    "a row to set below": lambda b: rows(b, -1, m.SET_ROWS),
    "a row to set above": lambda b: rows(b, 2**30, m.SET_ROWS),
    "an expert that is not": lambda b: experts(b, 3),
    "a negative expert": lambda b: experts(b, -(2**31)),
    "a rotation of nothing": lambda b: rope(b, 0, 0, 0),
    "a rotation of more than there is": lambda b: rope(b, 0, 16, 0),
    "a rotation of no kind": lambda b: rope(b, 0, 8, 77),
    "sections of no length": lambda b: rope(b, 0, 8, 8),
    "a shape both huge and empty": lambda b: source(b, ne=(2**31 - 1,) * 3 + (0,)),
    "a filling of another type": lambda b: (
        [
            b.tensor(1, 0, type=m.I32),
            replace(b.tensor(3, 512, op=m.FILL), src=(1,)),
        ],
        [3],
    ),
    "a recurrence narrower than its kernel's vectors": lambda b: (
        [
            *(b.tensor(number, 128 * number, (20, 1, 1)) for number in range(1, 7)),
            b.tensor(7, 4096, (400, 1)),
            replace(b.tensor(8, 8192, (20, 21), op=m.RWKV_WKV7), src=(1, 2, 3, 4, 5, 6, 7)),
        ],
        [8],
    ),
    "an order that is none": lambda b: (
        [
            b.tensor(1, 0),
            replace(b.tensor(3, 512, op=m.ARGSORT, type=m.I32), src=(1,), op_params=(9,)),
        ],
        [3],
    ),
}


@pytest.mark.parametrize("named", [False, True], ids=["upstream's", "named"])
@pytest.mark.parametrize("attempt", GRAPHS)
def test_a_graph_that_cannot_be_is_refused(worker: Running, attempt: str, named: bool) -> None:
    with refused(worker) as client:
        payload = graph(*GRAPHS[attempt](NamedMemory(client) if named else Memory(client)))
        if named:
            client.graph(3, payload)
        else:
            client.send(m.RPC_GRAPH_COMPUTE, payload)
    # ours, and two that upstream has
    assert re.search("refused|invalid data ptr|failed to create", worker.log)


def test_a_chain_as_deep_as_a_message_may_be_long_is_computed_without_recursion(
    worker: Running,
) -> None:
    with RpcClient(worker.address) as client:
        memory = Memory(client)
        chain = [memory.tensor(1, 0)]
        for number in range(2, 60_000):
            chain.append(replace(memory.tensor(number, 0, op=m.RESHAPE), src=(number - 1,)))
        client.send(m.RPC_GRAPH_COMPUTE, graph(chain, [chain[-1].id]))
        assert computes(client)


def test_more_tensors_than_any_model_has_are_refused(worker: Running) -> None:
    with refused(worker, "too many tensors") as client:
        memory = Memory(client)
        packed = memory.tensor(1, 0).pack()
        header = struct.pack("<IIQI", 0, 1, 1, 70_000)
        client.send(m.RPC_GRAPH_COMPUTE, header + packed * 70_000)


def test_counts_that_lie_are_refused(worker: Running) -> None:
    for header in (
        struct.pack("<II", 0, 2**32 - 1),
        struct.pack("<IIQI", 0, 1, 1, 2**32 - 1),
        struct.pack("<I", 0),
        struct.pack("<IIQI", 7, 1, 1, 0),  # a device that is not
    ):
        with refused(worker) as client:
            client.send(m.RPC_GRAPH_COMPUTE, header)


LENGTHS = [m.RPC_SET_TENSOR, m.RPC_GRAPH_COMPUTE, ALLOC_BUFFER, FREE_BUFFER, GET_TENSOR]


@pytest.mark.parametrize("command", LENGTHS)
@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 10**10])
def test_a_length_is_refused_before_memory_is_taken_for_it(
    worker: Running, command: int, length: int
) -> None:
    with refused(worker) as client:
        tensor = Memory(client).tensor(1, 0)
        client.send_raw(struct.pack("<BQ", command, length) + tensor.pack() + bytes(16))
    status = Path(f"/proc/{worker.process.pid}/status")
    if status.exists() and "ASAN" not in worker.log and "sanitized" not in str(worker.process.args):
        peak_kb = int(status.read_text().split("VmHWM:")[1].split()[0])
        assert peak_kb < 512 * 1024


@pytest.mark.parametrize("command", [18, 19, 20, 64, 127, 142, 200, 255])
def test_an_unknown_command_is_refused(worker: Running, command: int) -> None:
    with refused(worker) as client:
        client.send(command, bytes(8))


def test_a_second_hello_is_refused(worker: Running) -> None:
    with refused(worker) as client:
        client.send(14, bytes(24))


def test_memory_beyond_the_lease_is_not_given_in_small_pieces_either(worker: Running) -> None:
    with RpcClient(worker.address) as client:
        assert client.allocate(LIMIT + 1) == 0
        assert client.allocate(2**64 - 1) == 0
        given = sum(client.allocate(1) != 0 for _ in range(4200))
        assert given == 4096
        assert "refused a buffer" in worker.log
    with RpcClient(worker.address) as client:
        assert computes(client)


def test_an_empty_buffer_can_be_had_and_nothing_done_with_it(worker: Running) -> None:
    with RpcClient(worker.address) as client:
        empty = client.allocate(0)
        assert client.base(empty) == 0
        client.send(m.RPC_BUFFER_CLEAR, struct.pack("<QB", empty, 1))
        client.free(empty)
        assert computes(client)


@pytest.mark.parametrize("command", [BUFFER_GET_BASE, FREE_BUFFER, m.RPC_BUFFER_CLEAR])
@pytest.mark.parametrize("handle", ["freed", "never", "another's"])
def test_a_buffer_that_is_not_the_connection_s_is_refused(
    worker: Running, command: int, handle: str
) -> None:
    with RpcClient(worker.address) as other:
        anothers = other.allocate(4096)
    with refused(worker, "buffer not found") as client:
        freed = client.allocate(4096)
        client.free(freed)
        number = {"freed": freed, "never": 0x1234, "another's": anothers}[handle]
        tail = b"\1" if command == m.RPC_BUFFER_CLEAR else b""
        client.send(command, struct.pack("<Q", number) + tail)


def test_a_graph_is_forgotten_with_the_buffer_it_used(worker: Running) -> None:
    with refused(worker) as client:
        memory = Memory(client)
        client.send(m.RPC_GRAPH_COMPUTE, graph(*binary(memory)))
        client.send(m.RPC_GRAPH_RECOMPUTE, struct.pack("<I", 0))
        client.free(memory.handle)
        client.send(m.RPC_GRAPH_RECOMPUTE, struct.pack("<I", 0))


def test_row_numbers_are_looked_at_again_when_a_graph_is_computed_again(worker: Running) -> None:
    with refused(worker, "out of range") as client:
        memory = Memory(client)
        client.send(m.RPC_GRAPH_COMPUTE, graph(*rows(memory, 3, m.GET_ROWS)))
        client.send(m.RPC_GRAPH_RECOMPUTE, struct.pack("<I", 0))
        memory.write(1024, struct.pack("<2i", 0, 4))
        client.send(m.RPC_GRAPH_RECOMPUTE, struct.pack("<I", 0))


def test_row_numbers_that_the_graph_itself_computes_are_looked_at(worker: Running) -> None:
    with refused(worker, "out of range") as client:
        memory = Memory(client)
        memory.write(256, struct.pack("<2f", 1, 99))
        table, numbers = memory.tensor(1, 0, (8, 4)), memory.tensor(2, 256, (2,))
        cast = replace(memory.tensor(3, 1024, (2,), op=m.CPY, type=m.I32), src=(2, 3))
        result = replace(memory.tensor(4, 512, (8, 2), op=m.GET_ROWS), src=(1, 3))
        client.send(m.RPC_GRAPH_COMPUTE, graph([table, numbers, cast, result], [3, 4]))


def test_numbers_that_are_none_are_sorted(worker: Running) -> None:
    with RpcClient(worker.address) as client:
        memory = Memory(client)
        values = [float("nan") if i % 3 else 900.0 - i for i in range(900)]
        memory.write(0, struct.pack("<900f", *values))
        a = memory.tensor(1, 0, (900,))
        result = replace(memory.tensor(2, 8192, (900,), op=m.ARGSORT, type=m.I32), src=(1,))
        client.send(m.RPC_GRAPH_COMPUTE, graph([a, result], [2]))
        order = struct.unpack("<900i", memory.read(8192, 3600) or b"")
        assert sorted(order) == list(range(900))
        assert order[:3] == (897, 894, 891)


@pytest.mark.parametrize("device", [1, 2**32 - 1])
@pytest.mark.parametrize("command", [1, 2, GET_DEVICE_MEMORY, m.RPC_GRAPH_RECOMPUTE])
def test_a_device_that_is_not_is_refused(worker: Running, command: int, device: int) -> None:
    with refused(worker) as client:
        client.send(command, struct.pack("<I", device))


RANGES = {"beyond the end": (0, 132), "at the end": (132, 4), "wrapped": (2**64 - 4, 8)}


@pytest.mark.parametrize(("offset", "size"), RANGES.values(), ids=RANGES.keys())
def test_a_range_outside_its_tensor_is_refused(worker: Running, offset: int, size: int) -> None:
    def tensor(client: RpcClient) -> bytes:
        return Memory(client).tensor(1, 64).pack()  # 128 bytes, with more of the buffer around

    with refused(worker) as client:
        client.send(GET_TENSOR, tensor(client) + struct.pack("<QQ", offset, size))
    with refused(worker) as client:
        client.send(m.RPC_SET_TENSOR, tensor(client) + struct.pack("<BQ", 0, offset) + bytes(size))
    with refused(worker) as client:
        client.send(m.RPC_MEMSET_TENSOR, tensor(client) + struct.pack("<QQB", offset, size, 1))


def test_copies_that_do_not_fit_or_overlap_are_refused(worker: Running) -> None:
    for a, b in (((0, (8, 4)), (64, (8, 4))), ((0, (8, 4)), (512, (8, 3)))):
        with refused(worker) as client:
            memory = Memory(client)
            source, target = memory.tensor(1, *a), memory.tensor(2, *b)
            client.send(m.RPC_COPY_TENSOR, source.pack() + target.pack())


def test_a_tensor_that_cannot_be_is_not_made_known_nor_measured(worker: Running) -> None:
    for changes in ({"type": 99}, {"ne": (2**31,) * 4}, {"data": 8}, {"op": 999}):
        for command, before in ((m.RPC_INIT_TENSOR, b""), (m.RPC_GET_ALLOC_SIZE, bytes(4))):
            with refused(worker) as client:
                tensor = replace(Memory(client).tensor(1, 0), **changes)
                tail = bytes(10 * len(tensor.pack())) if before else b""
                client.send(command, before + tensor.pack() + tail)


def test_the_size_of_an_operation_without_its_sources_is_its_plain_size(worker: Running) -> None:
    with RpcClient(worker.address) as client:
        tensor = replace(Memory(client).tensor(1, 0), op=m.FLASH_ATTN_EXT)
        reply = client.ask(
            m.RPC_GET_ALLOC_SIZE, bytes(4) + tensor.pack() + bytes(10 * len(tensor.pack()))
        )
        assert reply is None or struct.unpack("<Q", reply) == (128,)


def test_an_honest_client_gets_its_tokens_after_all_that(
    server_bin: Path, engine_bin: Path, folder: Path, model: Path
) -> None:
    expected = alone(engine_bin, folder, model)
    with rpc_server(server_bin, folder, "--memory-limit", str(LIMIT)) as worker:
        for attempt in GRAPHS.values():
            with RpcClient(worker.address) as client:
                client.send(m.RPC_GRAPH_COMPUTE, graph(*attempt(Memory(client))))
                assert client.reply() is None
        with llama_server(engine_bin, folder, model, rpc=[worker]) as server:
            assert greedy_tokens(server) == expected
