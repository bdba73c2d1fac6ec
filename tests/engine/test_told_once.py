"""Tensors by number and their data in its codings (patches 14 and 17), and what those cannot do."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tests.engine import hostile_messages as m
from tests.engine.hostile_messages import NamedMemory, changes, repeats
from tests.engine.processes import Running
from tests.engine.refusals import MIB, refused
from tests.engine.rpc_client import (
    CHANGES,
    DATA,
    EXACT,
    F16,
    GET,
    GRAPH,
    GRAPH_AGAIN,
    INPUT,
    KEEP,
    PUSH,
    Q8,
    REPEATS,
    TAKE,
    TENSOR,
    RpcClient,
)

pytestmark = pytest.mark.engine

MOST_TENSORS = 4096
KEPT_BYTES = 64 * MIB
BYTES = 128  # of a tensor of 8 by 4 floats


def test_an_input_arrives_as_it_was_changed(worker: Running) -> None:
    with RpcClient(worker.address) as client:
        tensor = NamedMemory(client).tell(0)
        data = bytearray(np.arange(32, dtype=np.float32).tobytes())
        client.input(tensor, bytes(data), size=BYTES, coding=KEEP | EXACT)
        for at, new in ((0, b"\1"), (127, b"\2"), (40, b"four"), (40, bytes(4))):
            data[at : at + len(new)] = new
            client.input(tensor, changes((at, new)), size=BYTES, coding=KEEP | CHANGES)
            assert client.get(tensor, BYTES) == bytes(data)
        client.input(tensor, changes(), size=BYTES, coding=KEEP | CHANGES)
        assert client.get(tensor, BYTES) == bytes(data)


def test_changes_are_those_since_what_was_kept_last(worker: Running) -> None:
    with RpcClient(worker.address) as client:
        tensor = NamedMemory(client).tell(0)
        client.input(tensor, bytes(BYTES), size=BYTES, coding=KEEP | EXACT)
        client.input(tensor, changes((0, b"a")), size=BYTES, coding=CHANGES)
        client.input(tensor, changes((1, b"b")), size=BYTES, coding=CHANGES)
        assert client.get(tensor, 2) == b"\0b"


def test_repeated_words_are_written_out(worker: Running) -> None:
    with RpcClient(worker.address) as client:
        tensor = NamedMemory(client).tell(0)
        words = repeats((3, 7), (0, 99), (29, 0xFF800000))
        client.input(tensor, words, size=BYTES, coding=KEEP | REPEATS)
        assert client.get(tensor, BYTES) == struct.pack("<32I", *[7] * 3, *[0xFF800000] * 29)
        client.input(tensor, changes((4, b"\x08")), size=BYTES, coding=KEEP | CHANGES)
        assert client.get(tensor, 12) == struct.pack("<3I", 7, 8, 7)


def test_half_precision_and_q8_0_round_there_and_back(worker: Running) -> None:
    values = np.linspace(-3, 5, 32, dtype=np.float32)
    halves = values.astype(np.float16)
    scale = np.float16(np.abs(values).max() / 127)
    block = scale.tobytes() + np.round(values / np.float32(scale)).astype(np.int8).tobytes()
    with RpcClient(worker.address) as client:
        tensor = NamedMemory(client).tell(0, (32, 1))
        client.input(tensor, halves.tobytes(), size=BYTES, coding=F16)
        assert client.get(tensor, BYTES) == halves.astype(np.float32).tobytes()
        assert client.get(tensor, BYTES, coding=F16) == halves.tobytes()
        client.input(tensor, block, size=BYTES, coding=Q8)
        found = np.frombuffer(client.get(tensor, BYTES) or b"", dtype=np.float32)
        assert np.abs(found - values).max() <= float(scale) / 2 * 1.01
        assert len(client.get(tensor, BYTES, coding=Q8) or b"") == 34


SendTo = Callable[[RpcClient, NamedMemory], None]


def _in_turn(*sends: SendTo) -> SendTo:
    def send(client: RpcClient, memory: NamedMemory) -> None:
        for one in sends:
            one(client, memory)

    return send


def _again(coding: int, data: bytes) -> SendTo:
    return lambda client, memory: client.input(1, data, size=BYTES, coding=coding)


def _after_keeping(coding: int, data: bytes) -> SendTo:
    return _in_turn(_input(KEEP | EXACT, bytes(BYTES)), _again(coding, data))


def _input(coding: int, data: bytes, *, size: int = BYTES, offset: int = 0) -> SendTo:
    return lambda client, memory: client.input(
        memory.tell(0), data, size=size, coding=coding, offset=offset
    )


def _get(coding: int, size: int, *, offset: int = 0, type: int = m.F32) -> SendTo:
    def send(client: RpcClient, memory: NamedMemory) -> None:
        tensor = memory.tell(0, type=type)
        client.send(GET, DATA.pack(tensor, coding, offset, size))

    return send


def _of_integers(coding: int, data: bytes) -> SendTo:
    return lambda client, memory: client.input(
        memory.tell(0, type=m.I32), data, size=BYTES, coding=coding
    )


def _forgotten(client: RpcClient, memory: NamedMemory) -> None:
    client.input(memory.tell(0), bytes(BYTES), size=BYTES, coding=KEEP)
    client.describe(0, b"")
    memory.told = 0
    client.input(memory.tell(0), changes(), size=BYTES, coding=CHANGES)


BAD_CODINGS: dict[str, SendTo] = {
    "changes of what was never sent": _input(CHANGES, changes()),
    "changes of another size": _in_turn(
        _input(KEEP, bytes(64), size=64), _again(CHANGES, changes())
    ),
    "changes of what was not kept": _in_turn(
        _input(EXACT, bytes(BYTES)), _again(CHANGES, changes())
    ),
    "changes of what was forgotten": _forgotten,
    "a change behind the end": _after_keeping(CHANGES, changes((BYTES - 1, b"ab"))),
    "a change far behind it": _after_keeping(CHANGES, changes((2**32 - 1, b"a"))),
    "a change as long as a word can say": _after_keeping(
        CHANGES, struct.pack("<IIII", 0, 2**32 - 1, 0, 0)
    ),
    "changes without an end": _after_keeping(CHANGES, struct.pack("<II", 0, 1)),
    "changes of half a pair": _after_keeping(CHANGES, bytes(7)),
    "no changes, not even their end": _after_keeping(CHANGES, b""),
    "a change of missing bytes": _after_keeping(CHANGES, struct.pack("<IIII", 0, 2, 0, 0) + b"a"),
    "a change of too many": _after_keeping(CHANGES, changes((0, b"a")) + b"b"),
    "repeats too long": _input(REPEATS, repeats((33, 0))),
    "repeats as long as a word can say": _input(REPEATS, repeats((2**32 - 1, 0))),
    "repeats too short": _input(REPEATS, repeats((31, 0))),
    "repeats of half a pair": _input(REPEATS, repeats((32, 0)) + bytes(4)),
    "repeats of half a word": _input(REPEATS, repeats((1, 0)), size=6),
    "a coding that is none": _input(5, bytes(BYTES)),
    "another, kept": _input(0xFF, bytes(BYTES)),
    "half precision of integers": _of_integers(F16, bytes(64)),
    "Q8_0 of integers": _of_integers(Q8, bytes(34 * 4)),
    "half precision of half a number": _input(F16, bytes(63), size=126),
    "half precision of another length": _input(F16, bytes(62)),
    "half precision of nothing": _input(F16, b"", size=0),
    "Q8_0 of half a block": _input(Q8, bytes(17), size=64),
    "Q8_0 of another length": _input(Q8, bytes(34 * 3)),
    "more bytes than the tensor has": _input(EXACT, bytes(132), size=132),
    "more than it says": _input(EXACT, bytes(BYTES)[:8], size=4),
    "less than it says": _input(EXACT, bytes(4), size=8),
    "a kept one of less": _input(EXACT | KEEP, bytes(4), size=8),
    "an offset that wraps": _input(EXACT, bytes(8), size=8, offset=2**64 - 4),
    "an offset behind the end": _input(REPEATS, repeats((1, 0)), size=4, offset=BYTES),
    "a read behind the end": _get(EXACT, 4, offset=BYTES),
    "a read that wraps": _get(EXACT, 8, offset=2**64 - 4),
    "a read of changes": _get(CHANGES, BYTES),
    "a read that keeps": _get(KEEP, BYTES),
    "a read of integers in half precision": _get(F16, BYTES, type=m.I32),
    "a read of half a block": _get(Q8, 64),
    "a narrow read of nothing": _get(F16, 0),
}


@pytest.mark.parametrize("attempt", BAD_CODINGS)
def test_data_that_is_not_in_its_coding_is_refused(worker: Running, attempt: str) -> None:
    with refused(worker) as client:
        BAD_CODINGS[attempt](client, NamedMemory(client))


LENGTHS = {
    TENSOR: (0, 3, 5, 303),
    INPUT: (0, 20),
    GET: (0, 20, 22),
    GRAPH: (0, 7, 8, 12),
    GRAPH_AGAIN: (0, 7, 9),
    PUSH: (0, 20, 22),
    TAKE: (0, 20, 22),
}


@pytest.mark.parametrize("command", LENGTHS)
def test_a_message_too_short_or_too_long_is_refused(worker: Running, command: int) -> None:
    for length in LENGTHS[command]:
        with refused(worker) as client:
            NamedMemory(client).tell(0)
            client.send(command, bytes(length))
    for length in (2**63, 2**64 - 1):
        with refused(worker) as client:
            client.send_raw(struct.pack("<BQ", command, length) + bytes(600))


@pytest.mark.parametrize("number", [0, 2, MOST_TENSORS, 2**32 - 1])
def test_a_tensor_that_was_not_described_is_refused(worker: Running, number: int) -> None:
    for command in (INPUT, GET, PUSH, TAKE):
        with refused(worker) as client:
            NamedMemory(client).tell(0)
            client.send(command, DATA.pack(number, EXACT, 0, 0))


@pytest.mark.parametrize("number", [1, 3, 2**32 - 1])
def test_tensors_are_numbered_in_their_order(worker: Running, number: int) -> None:
    with refused(worker) as client:
        memory = NamedMemory(client)
        memory.tell(0)
        client.describe(number, memory.tensor(1, 0).pack())


WRONG_TENSORS: dict[str, dict[str, Any]] = {
    "no type": {"type": 99},
    "overflowing": {"ne": (2**31 - 1,) * 4},
    "outside": {"data": (1 << 40) - 4},
    "in no buffer": {"buffer": 0},
    "in a buffer that never was": {"buffer": 0x1234},
}


@pytest.mark.parametrize("wrong", WRONG_TENSORS)
def test_a_tensor_that_cannot_be_has_no_data(worker: Running, wrong: str) -> None:
    for command in (INPUT, GET, PUSH, TAKE):
        with refused(worker) as client:
            tensor = replace(NamedMemory(client).tensor(1, 0), **WRONG_TENSORS[wrong])
            client.describe(1, tensor.pack())
            client.send(command, DATA.pack(1, EXACT, 0, 0))


def test_a_tensor_is_nothing_any_more_when_its_buffer_is_freed(worker: Running) -> None:
    with refused(worker, "its tensor is not good") as client:
        memory = NamedMemory(client)
        tensor = memory.tell(0)
        client.input(tensor, bytes(BYTES), size=BYTES)
        client.free(memory.handle)
        client.input(tensor, bytes(BYTES), size=BYTES)


def test_so_many_tensors_can_be_described_and_no_more_until_all_are_forgotten(
    worker: Running,
) -> None:
    with refused(worker) as client:
        memory = NamedMemory(client)
        for _ in range(2):
            for _ in range(MOST_TENSORS):
                memory.tell(0)
            assert client.get(MOST_TENSORS, 4) is not None
            client.describe(0, b"")
            memory.told = 0
        for _ in range(MOST_TENSORS + 1):
            memory.tell(0)


def test_more_than_64_mib_are_not_kept(worker: Running) -> None:
    rows = KEPT_BYTES // 2 // 4 // 1024
    with refused(worker, "too much to keep") as client:
        memory = NamedMemory(client, size=KEPT_BYTES + 4096)
        first, second = (memory.tell(at, (1024, rows)) for at in (0, KEPT_BYTES // 2))
        whole = repeats((KEPT_BYTES // 8, 1))
        for tensor in (first, second, first):
            client.input(tensor, whole, size=KEPT_BYTES // 2, coding=KEEP | REPEATS)
        third = memory.tell(KEPT_BYTES, (1, 1))
        client.input(third, bytes(4), size=4)
        assert client.get(third, 4) == bytes(4)
        client.input(third, bytes(4), size=4, coding=KEEP)
