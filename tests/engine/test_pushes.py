"""PUSH, TAKE and the two sockets of the ring (patch 16): what comes through, and what does not."""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from tests.engine import hostile_messages as m
from tests.engine.hostile_messages import NamedMemory
from tests.engine.processes import EngineFailed, Running, rpc_server
from tests.engine.refusals import LIMIT, computes, refused
from tests.engine.rpc_client import F16, Q8, RpcClient

pytestmark = pytest.mark.engine

PREFACE = b"meshpsh1"
RECORD = struct.Struct("<QIQ")
BYTES = 128
CLIENT = 5 << 32
ENDED = "the connection of the server before this one has ended"
LIMIT_S = 20.0


@pytest.fixture
def worker(server_bin: Path, folder: Path) -> Iterator[Running]:
    ends = ["--push-listen", f"unix:{folder}/in", "--push-to", f"unix:{folder}/out"]
    with rpc_server(server_bin, folder, "--memory-limit", str(LIMIT), *ends) as running:
        yield running


@contextmanager
def connected(path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as joint:
        joint.settimeout(LIMIT_S)
        joint.connect(str(path))
        yield joint


def record(number: int, data: bytes, coding: int = 0) -> bytes:
    return RECORD.pack(number, coding, len(data)) + data


def exactly(joint: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        piece = joint.recv(size - len(data))
        assert piece, f"the end after {data!r}"
        data += piece
    return data


def numbers(first: int) -> bytes:
    return np.arange(first, first + 32, dtype=np.float32).tobytes()


def test_what_is_pushed_leaves_as_records(worker: Running, folder: Path) -> None:
    with connected(folder / "out") as reader, RpcClient(worker.address) as client:
        tensor = NamedMemory(client).tell(0)
        assert exactly(reader, 8) == PREFACE
        for number in range(3):
            client.input(tensor, numbers(number), size=BYTES)
            client.push(tensor, CLIENT | number, BYTES)
            expected = record(CLIENT | number, numbers(number))
            assert exactly(reader, len(expected)) == expected
        client.push(tensor, CLIENT | 3, BYTES, coding=F16)
        halves = np.frombuffer(numbers(2), np.float32).astype(np.float16).tobytes()
        assert exactly(reader, RECORD.size + 64) == record(CLIENT | 3, halves, F16)


def test_what_was_pushed_is_what_it_was_when_it_was_pushed(worker: Running, folder: Path) -> None:
    with connected(folder / "out") as reader, RpcClient(worker.address) as client:
        tensor = NamedMemory(client).tell(0)
        for number in range(3):
            client.input(tensor, numbers(number), size=BYTES)
            client.push(tensor, CLIENT | number, BYTES)
        client.input(tensor, bytes(BYTES), size=BYTES)
        assert client.confirm() == (0, "")
        sent = b"".join(record(CLIENT | number, numbers(number)) for number in range(3))
        assert exactly(reader, 8 + len(sent)) == PREFACE + sent


def test_what_is_taken_is_what_came(worker: Running, folder: Path) -> None:
    with connected(folder / "in") as pusher, RpcClient(worker.address) as client:
        tensor = NamedMemory(client).tell(0)
        pusher.sendall(PREFACE + record(CLIENT, numbers(1)) + record(CLIENT | 1, numbers(2)))
        for number in range(2):
            client.take(tensor, CLIENT | number, BYTES)
            assert client.get(tensor, BYTES) == numbers(1 + number)
        halves = np.frombuffer(numbers(3), np.float32).astype(np.float16).tobytes()
        client.take(tensor, CLIENT | 2, BYTES, coding=F16)
        pusher.sendall(record(CLIENT | 2, halves, F16))  # it waits for what has not come yet
        assert client.get(tensor, BYTES) == numbers(3)


def test_what_another_client_left_behind_is_passed_over(worker: Running, folder: Path) -> None:
    with connected(folder / "in") as pusher, RpcClient(worker.address) as client:
        tensor = NamedMemory(client).tell(0)
        others = b"".join(record(other << 32, numbers(other)) for other in (1, 2, 9))
        pusher.sendall(PREFACE + others + record(CLIENT, numbers(4)))
        client.take(tensor, CLIENT, BYTES)
        assert client.get(tensor, BYTES) == numbers(4)


WRONG = {
    "the next one": record(CLIENT | 1, numbers(0)),
    "the one before": record(CLIENT | 0xFFFFFFFF, numbers(0)),
    "less": record(CLIENT, numbers(0)[:-4]),
    "more": record(CLIENT, numbers(0) + bytes(4)),
    "nothing": record(CLIENT, b""),
    "another coding": record(CLIENT, numbers(0), F16),
    "no coding": record(CLIENT, numbers(0), 77),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_pusher_that_sends_something_else_ends_the_client_s_connection(
    worker: Running, folder: Path, wrong: str
) -> None:
    with (
        connected(folder / "in") as pusher,
        refused(worker, "something else was pushed") as client,
    ):
        tensor = NamedMemory(client).tell(0)
        pusher.sendall(PREFACE + WRONG[wrong])
        client.take(tensor, CLIENT, BYTES)


GARBAGE = {
    "no preface": b"GET / HTTP/1.1\r\n\r\n",
    "another version": b"meshpsh2" + record(CLIENT, numbers(0)),
    "more than there can be": PREFACE + RECORD.pack(CLIENT, 0, 2**40),
    "all there is": PREFACE + RECORD.pack(CLIENT, 0, 2**64 - 1),
}


@pytest.mark.parametrize("garbage", GARBAGE)
def test_a_pusher_that_sends_garbage_is_cut_off_and_the_next_one_is_heard(
    worker: Running, folder: Path, garbage: str
) -> None:
    with RpcClient(worker.address) as client:
        tensor = NamedMemory(client).tell(0)
        with connected(folder / "in") as pusher:
            pusher.sendall(GARBAGE[garbage])
            assert pusher.recv(1) == b""
        with connected(folder / "in") as pusher:
            client.take(tensor, CLIENT, BYTES)
            pusher.sendall(PREFACE + record(CLIENT, numbers(5)))
            assert client.get(tensor, BYTES) == numbers(5)


def test_announcing_much_takes_no_memory(worker: Running, folder: Path) -> None:
    with connected(folder / "in") as pusher, RpcClient(worker.address) as client:
        tensor = NamedMemory(client).tell(0)
        pusher.sendall(PREFACE + record(CLIENT, numbers(6)) + RECORD.pack(CLIENT | 1, 0, 2**26))
        pusher.sendall(bytes(1 << 16))
        client.take(tensor, CLIENT, BYTES)
        assert client.get(tensor, BYTES) == numbers(6)
        status = Path(f"/proc/{worker.process.pid}/status").read_text()
        if "sanitized" not in str(worker.process.args):
            assert int(status.split("VmHWM:")[1].split()[0]) < 48 * 1024


def test_a_pusher_that_is_not_taken_from_fills_no_memory(engine_bin: Path, folder: Path) -> None:
    piece = record(1 << 32, bytes(1 << 20))
    ends = ["--push-listen", f"unix:{folder}/in"]
    with (
        rpc_server(engine_bin, folder, *ends) as worker,
        connected(folder / "in") as pusher,
        RpcClient(worker.address) as client,
    ):
        tensor = NamedMemory(client).tell(0)
        pusher.sendall(PREFACE)
        pusher.settimeout(1.0)
        sent = _send_until_full(pusher, piece)
        assert 64 << 20 <= sent < 80 << 20
        # the next client takes what is its own, when the rest of the last record has come
        pusher.settimeout(LIMIT_S)
        client.take(tensor, CLIENT, BYTES)
        pusher.sendall(piece[sent % len(piece) :] + record(CLIENT, numbers(8)))
        assert client.get(tensor, BYTES) == numbers(8)


def _send_until_full(pusher: socket.socket, piece: bytes) -> int:
    """How much went before the server read no more for a second."""
    sent = 0
    while sent < 1 << 30:
        try:
            sent += pusher.send(piece[sent % len(piece) :])
        except TimeoutError:
            break
    return sent


def test_a_connection_that_dies_midway_ends_the_wait_at_once(worker: Running, folder: Path) -> None:
    with refused(worker, ENDED) as client:
        tensor = NamedMemory(client).tell(0)
        with connected(folder / "in") as pusher:
            pusher.sendall(PREFACE + record(CLIENT, numbers(7)))
            client.take(tensor, CLIENT, BYTES)
            assert client.get(tensor, BYTES) == numbers(7)
            pusher.sendall(record(CLIENT | 1, numbers(7))[:-1])
            client.take(tensor, CLIENT | 1, BYTES)
        # at once, or when no other pusher has come in 30 s: if the end was there before the TAKE
        assert client.reply(limit_s=40) is None


@pytest.mark.parametrize("command", ["push", "take"])
def test_what_does_not_fit_its_tensor_is_neither_pushed_nor_taken(
    worker: Running, command: str
) -> None:
    for type, size, coding in (
        (m.F32, BYTES - 4, 0),
        (m.F32, BYTES + 4, 0),
        (m.F32, 0, 0),
        (m.F32, 2**64 - 1, 0),
        (m.F32, BYTES, 5),
        (m.F32, BYTES, 0x80),
        (m.I32, BYTES, F16),
        (m.I32, BYTES, Q8),
    ):
        with refused(worker, "it does not fit its tensor") as client:
            tensor = NamedMemory(client).tell(0, type=type)
            getattr(client, command)(tensor, CLIENT, size, coding=coding)
    with refused(worker, "it does not fit its tensor") as client:
        tensor = NamedMemory(client).tell(0, (8, 3))  # three blocks of 32 would do, 24 numbers not
        getattr(client, command)(tensor, CLIENT, 96, coding=Q8)


def test_without_the_sockets_nothing_is_waited_for(server_bin: Path, folder: Path) -> None:
    with rpc_server(server_bin, folder, "--memory-limit", str(LIMIT)) as worker:
        begun = time.monotonic()
        with refused(worker, "there is no connection to the next server") as client:
            client.push(NamedMemory(client).tell(0), CLIENT, BYTES)
        with refused(worker, "no other server is connected that could push it") as client:
            client.take(NamedMemory(client).tell(0), CLIENT, BYTES)
        assert time.monotonic() - begun < 5


def test_a_push_that_nobody_reads_and_a_take_that_nobody_serves_end(
    engine_bin: Path, folder: Path
) -> None:
    def waits(command: str) -> float:
        (folder / command).mkdir()
        ends = ["--push-listen", f"unix:{folder}/{command}/in"]
        ends += ["--push-to", f"unix:{folder}/{command}/out"]
        with rpc_server(engine_bin, folder / command, *ends) as worker:
            with RpcClient(worker.address) as client:
                begun = time.monotonic()
                getattr(client, command)(NamedMemory(client).tell(0), CLIENT, BYTES)
                assert client.reply(limit_s=60) is None
                waited = time.monotonic() - begun
            with RpcClient(worker.address) as client:
                assert computes(client)
            return waited

    with ThreadPoolExecutor(2) as pool:
        push_s, take_s = pool.map(waits, ("push", "take"))
    assert 9 < push_s < 20
    assert 29 < take_s < 45


@pytest.mark.parametrize("option", ["--push-listen", "--push-to"])
def test_a_socket_that_cannot_be_made_keeps_the_server_from_starting(
    engine_bin: Path, folder: Path, option: str
) -> None:
    place = f"unix:{folder}/nowhere/in"
    with (
        pytest.raises(EngineFailed, match=f"cannot listen on {place} for pushes") as failed,
        rpc_server(engine_bin, folder, option, place),
    ):
        pass
    assert failed.value.returncode == 1
