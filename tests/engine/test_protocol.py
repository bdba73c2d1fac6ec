"""Messages 128 and up against a real server: what they return, and what garbage does not do."""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import gguf
import pytest

from tests.engine.manifests import ROOT, write_manifest
from tests.engine.processes import Running, rpc_server
from tests.engine.rpc_client import (
    GET_ALIGNMENT,
    GET_MAX_SIZE,
    GGUF_INDEX,
    LOAD_COMMIT,
    LOAD_STATUS,
    MESH_HELLO,
    MESH_VERSION,
    SET_TENSOR_GGUF,
    RpcClient,
    rpc_tensor,
)

pytestmark = pytest.mark.engine

ROOT_BYTES = bytes.fromhex(ROOT)
NAME = "blk.0.attn_q.weight"


@dataclass(frozen=True)
class Request:
    """A SET_TENSOR_GGUF for `NAME`: right in all parts, until a test replaces one."""

    root: bytes
    name: str
    type: int
    ne: tuple[int, ...]
    file_ne: tuple[int, ...]
    buffer: int
    data: int
    view_src: int = 0

    def tensor(self) -> bytes:
        return rpc_tensor(
            self.name,
            type=self.type,
            ne=self.ne,
            buffer=self.buffer,
            data=self.data,
            row_bytes=256 * 34 // 32,
            type_bytes=34,
            view_src=self.view_src,
        )

    def send(self, client: RpcClient, load: int) -> None:
        client.set_tensor_gguf(load, self.root, self.file_ne, self.tensor())


@pytest.fixture
def worker(engine_bin: Path, folder: Path, model: Path) -> Iterator[Running]:
    manifest = write_manifest(folder / "manifest", [model])
    with rpc_server(engine_bin, folder, "--gguf-manifest", manifest) as running:
        yield running


def _right(client: RpcClient) -> tuple[Request, int]:
    """A request that works, and the tensor's size in bytes."""
    kind, ne, size = client.index(ROOT_BYTES)[NAME]
    buffer = client.allocate(size)
    request = Request(ROOT_BYTES, NAME, kind, ne, ne, buffer, client.base(buffer))
    return request, size


def test_the_hello_has_the_mesh_bit_and_a_version_follows(worker: Running) -> None:
    with RpcClient(worker.address) as client:
        assert client.mesh_bit == 1
        facts = client.facts()
        assert (facts.version, facts.offers) == (MESH_VERSION, True)


def test_the_hello_says_what_upstream_asks_of_each_device(worker: Running) -> None:
    with RpcClient(worker.address) as client:
        (device,) = client.facts().devices
        for command, expected in (
            (GET_ALIGNMENT, device.alignment),
            (GET_MAX_SIZE, device.max_size),
        ):
            assert client.ask(command, bytes(4)) == struct.pack("<Q", expected)
        assert client.device_memory()[1] == device.total_bytes
        assert 0 < device.free_bytes <= device.total_bytes
        assert device.plain
        assert list(device.refused_ops) == sorted(set(device.refused_ops))


def test_a_server_without_files_says_so(engine_bin: Path, folder: Path) -> None:
    with rpc_server(engine_bin, folder) as bare, RpcClient(bare.address) as client:
        assert not client.facts().offers
        assert client.index(ROOT_BYTES) == {}


def test_the_index_lists_exactly_the_file(worker: Running, model: Path) -> None:
    with RpcClient(worker.address) as client:
        index = client.index(ROOT_BYTES)
        assert client.index(bytes(32)) == {}
    tensors = gguf.GGUFReader(model).tensors
    assert set(index) == {tensor.name for tensor in tensors}
    for tensor in tensors:
        kind, ne, size = index[tensor.name]
        assert (kind, size) == (int(tensor.tensor_type), tensor.n_bytes)
        assert ne[: len(tensor.shape)] == tuple(int(length) for length in tensor.shape)


def test_the_bytes_in_the_buffer_are_those_in_the_file(worker: Running, model: Path) -> None:
    with RpcClient(worker.address) as client:
        request, size = _right(client)
        request.send(client, load=7)
        assert client.commit(7) == (1, size, 0, "", "", "")
        found = client.get_tensor(request.tensor(), size)
    tensor = next(t for t in gguf.GGUFReader(model).tensors if t.name == NAME)
    assert found == tensor.data.tobytes()


def test_counts_belong_to_a_load_and_are_gone_after_its_commit(worker: Running) -> None:
    with RpcClient(worker.address) as client:
        request, size = _right(client)
        request.send(client, load=1)
        request.send(client, load=1)
        status = client.ask(LOAD_STATUS, struct.pack("<I", 1))
        assert status == struct.pack("<QQQ", 2, 2 * size, 0)
        request.send(client, load=2)
        assert client.commit(2)[:3] == (1, size, 0)
        assert client.commit(2)[:3] == (0, 0, 0)


WRONG = {
    "root": lambda right: replace(right, root=bytes(32)),
    "name": lambda right: replace(right, name="blk.99.attn_q.weight"),
    "a name of 64 bytes": lambda right: replace(right, name="x" * 64),
    "type": lambda right: replace(right, type=0),
    "a type that does not exist": lambda right: replace(right, type=0xFFFFFFFF),
    "a removed type": lambda right: replace(right, type=4),
    "shape in the file": lambda right: replace(right, file_ne=(32, 2048, 1, 1)),
    "shape": lambda right: replace(right, ne=(256, 257, 1, 1)),
    "half a block": lambda right: replace(right, ne=(255, 256, 1, 1)),
    "no elements": lambda right: replace(right, ne=(256, 0, 1, 1)),
    "a shape that overflows": lambda right: replace(right, ne=(2**32 - 32,) + (2**32 - 1,) * 3),
    "no buffer": lambda right: replace(right, buffer=0),
    "a buffer that never was": lambda right: replace(right, buffer=right.buffer + 8),
    "before the buffer": lambda right: replace(right, data=right.data - 1),
    "beyond the buffer": lambda right: replace(right, data=right.data + 4096),
    "an address that wraps": lambda right: replace(right, data=2**64 - 16),
    "a view": lambda right: replace(right, view_src=1),
}


@pytest.mark.parametrize("part", WRONG)
def test_a_request_wrong_in_one_part_is_a_counted_failure_and_nothing_more(
    worker: Running, part: str
) -> None:
    with RpcClient(worker.address) as client:
        request, size = _right(client)
        WRONG[part](request).send(client, load=1)
        tensors, _, failures, _, _, reason = client.commit(1)
        assert (tensors, failures) == (0, 1)
        assert reason
        request.send(client, load=2)
        assert client.commit(2)[:3] == (1, size, 0)


GARBAGE = {
    "an unknown number": struct.pack("<BQ", 200, 4) + b"abcd",
    "a hello too short": struct.pack("<BQ", MESH_HELLO, 3) + b"abc",
    "a hello of all memory": struct.pack("<BQ", MESH_HELLO, 2**63),
    "half a root": struct.pack("<BQ", GGUF_INDEX, 16) + bytes(16),
    "more roots than there are": struct.pack("<BQ", GGUF_INDEX, 2**40),
    "one root many times": struct.pack("<BQ", GGUF_INDEX, 64) + ROOT_BYTES * 2,
    "a tensor too short": struct.pack("<BQ", SET_TENSOR_GGUF, 100) + bytes(100),
    "a tensor of all memory": struct.pack("<BQ", SET_TENSOR_GGUF, 2**64 - 1),
    "a commit without a load": struct.pack("<BQ", LOAD_COMMIT, 0),
    "a status too long": struct.pack("<BQ", LOAD_STATUS, 400) + bytes(400),
}


@pytest.mark.parametrize("data", GARBAGE.values(), ids=GARBAGE.keys())
def test_garbage_ends_the_connection_and_the_next_one_is_served(
    worker: Running, data: bytes
) -> None:
    with RpcClient(worker.address) as client:
        client.send_raw(data)
        assert client.reply() is None
    with RpcClient(worker.address) as client:
        request, size = _right(client)
        request.send(client, load=1)
        assert client.commit(1)[:3] == (1, size, 0)
    assert worker.alive


def test_random_bytes_after_our_numbers_never_take_the_server_down(worker: Running) -> None:
    noise = random.Random(20260101)
    for _ in range(200):
        command = noise.choice(range(MESH_HELLO, 256))
        size = noise.choice([4, 8, 32, 64, 68, 364, 400])
        with RpcClient(worker.address) as client:
            client.send_raw(struct.pack("<BQ", command, size) + noise.randbytes(size))
    with RpcClient(worker.address) as client:
        assert client.index(ROOT_BYTES)
    assert worker.alive
