"""Buffers that the client names itself (ALLOC, CONFIRM; patch 13), and what naming cannot do."""

from __future__ import annotations

import struct
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from tests.engine import hostile_messages as m
from tests.engine.hostile_messages import NamedMemory, Tensor
from tests.engine.manifests import ROOT, write_manifest
from tests.engine.processes import EngineFailed, Running, llama_server, rpc_server
from tests.engine.refusals import LIMIT, MIB, computes, refused
from tests.engine.rpc_client import (
    ALLOC,
    CONFIRM,
    DATA,
    FREE_BUFFER,
    GET,
    GET_TENSOR,
    INPUT,
    KEEP,
    RpcClient,
    rpc_tensor,
)

pytestmark = pytest.mark.engine

HANDLE, BASE = 7, 1 << 40
MOST_BUFFERS = 4096
TOO_MUCH = f"no memory for a buffer of {LIMIT // MIB + 44}.0 MiB"


def test_a_buffer_is_used_before_the_server_has_said_a_word(worker: Running) -> None:
    with RpcClient(worker.address) as client:
        memory = NamedMemory(client)
        memory.write(64, b"here")
        assert memory.read(64, 4) == b"here"
        assert client.confirm() == (0, "")


def test_an_address_space_may_end_in_the_middle_of_a_buffer(worker: Running) -> None:
    with RpcClient(worker.address) as client:
        memory = NamedMemory(client)
        client.alloc(8, 2**64 - 4096, memory.size)
        around = Tensor(1, 8, 2**64 - 8, (4, 1, 1, 1)).pack()
        client.send(m.RPC_SET_TENSOR, around + struct.pack("<BQ", 0, 0) + b"sixteen bytes of")
        assert client.get_tensor(around, 16) == b"sixteen bytes of"


OUTSIDE: dict[str, Callable[[int], int]] = {
    "before": lambda b: b - 4,
    "across the end": lambda b: b + (1 << 16) - 4,
    "far behind": lambda b: b + (1 << 40),
    "at the server's own": lambda b: 1 << 46,
}


@pytest.mark.parametrize("base", [BASE, 2**64 - 4096, 0], ids=["high", "wrapping", "zero"])
@pytest.mark.parametrize("place", OUTSIDE)
def test_data_outside_a_named_buffer_is_refused(worker: Running, base: int, place: str) -> None:
    with refused(worker, "it lies outside its buffer") as client:
        client.alloc(HANDLE, base, 1 << 16)
        tensor = Tensor(1, HANDLE, OUTSIDE[place](base) % 2**64, (4, 1, 1, 1)).pack()
        client.send(m.RPC_SET_TENSOR, tensor + struct.pack("<BQ", 0, 0) + bytes(16))


TAKEN: dict[str, Callable[[RpcClient], int]] = {
    "zero": lambda client: 0,
    "taken": lambda client: _named(client, HANDLE),
    "that of a refused one": lambda client: _named(client, HANDLE, LIMIT + MIB),
    "the server's own of another buffer": lambda client: client.allocate(4096),
}


def _named(client: RpcClient, handle: int, size: int = 4096) -> int:
    client.alloc(handle, BASE, size)
    return handle


@pytest.mark.parametrize("name", TAKEN)
def test_a_name_is_free_or_the_buffer_is_refused(worker: Running, name: str) -> None:
    with refused(worker, "its name is taken") as client:
        client.alloc(TAKEN[name](client), BASE, 4096)


def test_a_buffer_on_a_device_that_is_not_is_refused(worker: Running) -> None:
    with refused(worker) as client:
        client.alloc(HANDLE, BASE, 4096, device=1)


def test_more_buffers_than_any_client_needs_are_refused(worker: Running) -> None:
    with refused(worker, "or there are too many") as client:
        for handle in range(1, MOST_BUFFERS + 2):
            client.alloc(handle, handle << 32, 1)


@pytest.mark.parametrize("command", [ALLOC, CONFIRM])
@pytest.mark.parametrize("length", [1, 27, 29, 2**63])
def test_a_message_of_another_length_is_refused(worker: Running, command: int, length: int) -> None:
    with refused(worker) as client:
        client.send_raw(struct.pack("<BQ", command, length) + bytes(min(length, 29)))


def test_a_refused_buffer_is_told_once_and_what_was_done_to_it_is_passed_over(
    worker: Running,
) -> None:
    size = LIMIT + 44 * MIB
    with RpcClient(worker.address) as client:
        memory = NamedMemory(client)
        for handle in (8, 9):
            client.alloc(handle, handle << 40, size)
        weights = Tensor(1, 8, 8 << 40, (1 << 20, 1, 1, 1)).pack()
        client.send(m.RPC_INIT_TENSOR, weights)
        client.send(m.RPC_SET_TENSOR, weights + struct.pack("<BQ", 0, 0) + bytes(4 << 20))
        client.send(m.RPC_BUFFER_CLEAR, struct.pack("<QB", 8, 1))
        client.send(FREE_BUFFER, struct.pack("<Q", 8))
        refused_buffers, reason = client.confirm()
        assert (refused_buffers, reason.split(":")[0]) == (2, TOO_MUCH)
        assert reason.endswith(f"of the {LIMIT / MIB:.1f} MiB allowed are left")
        assert client.confirm() == (0, "")
        memory.write(0, b"good")
        assert memory.read(0, 4) == b"good"


def test_a_refused_buffer_that_is_freed_leaves_its_name(worker: Running) -> None:
    with RpcClient(worker.address) as client:
        client.alloc(HANDLE, BASE, LIMIT + 44 * MIB)
        client.send(FREE_BUFFER, struct.pack("<Q", HANDLE))
        memory = NamedMemory(client)
        assert memory.handle == HANDLE
        assert client.confirm()[0] == 1
        memory.write(0, b"good")
        assert memory.read(0, 4) == b"good"


def test_weights_from_a_file_into_a_refused_buffer_fail_with_the_same_reason(
    server_bin: Path, folder: Path, model: Path
) -> None:
    manifest = write_manifest(folder / "manifest", [model])
    root = bytes.fromhex(ROOT)
    name = "blk.0.attn_q.weight"
    options = ["--gguf-manifest", str(manifest), "--memory-limit", str(MIB)]
    with rpc_server(server_bin, folder, *options) as worker, RpcClient(worker.address) as client:
        kind, ne, _ = client.index(root)[name]
        client.alloc(HANDLE, BASE, 2 * MIB)
        tensor = rpc_tensor(
            name, type=kind, ne=ne, buffer=HANDLE, data=BASE, row_bytes=272, type_bytes=34
        )
        client.set_tensor_gguf(1, root, ne, tensor)
        *_, failures, _, _, reason = client.commit(1)
        assert (failures, reason) == (1, client.confirm()[1])
        assert reason.startswith("no memory for a buffer of 2.0 MiB")


@pytest.mark.parametrize("command", [GET_TENSOR, GET, INPUT])
def test_nothing_is_read_from_a_refused_buffer_nor_kept_for_it(
    worker: Running, command: int
) -> None:
    tensor = Tensor(1, HANDLE, BASE, (4, 1, 1, 1)).pack()
    with refused(worker) as client:
        client.alloc(HANDLE, BASE, LIMIT + MIB)
        client.describe(1, tensor)
        upstreams = tensor + struct.pack("<QQ", 0, 16)
        client.send(command, upstreams if command == GET_TENSOR else DATA.pack(1, KEEP, 0, 0))


def test_memory_is_there_again_when_the_client_has_left(worker: Running) -> None:
    for _ in range(3):
        with RpcClient(worker.address) as client:
            client.alloc(HANDLE, BASE, LIMIT - MIB)
            assert client.confirm() == (0, "")
            client.alloc(HANDLE + 1, 2 * BASE, 2 * MIB)
            assert client.confirm()[0] == 1
            client.free(HANDLE)
            client.alloc(HANDLE, BASE, LIMIT - MIB)
            assert client.confirm() == (0, "")


def test_nothing_freed_is_used_when_a_client_guesses_what_the_server_calls_its_buffer(
    server_bin: Path, folder: Path
) -> None:
    memory_is_used_again = {
        "ASAN_OPTIONS": "quarantine_size_mb=0:thread_local_quarantine_size_kb=0"
    }
    with rpc_server(server_bin, folder, env=memory_is_used_again) as worker:
        with RpcClient(worker.address) as client, suppress(ConnectionError):
            own = client.allocate(4096)
            client.free(own)
            client.alloc(HANDLE, BASE, 4096)  # most probably where the other one was
            client.free(own)
            tensor = Tensor(1, HANDLE, BASE, (4, 1, 1, 1)).pack()
            client.send(m.RPC_SET_TENSOR, tensor + struct.pack("<BQ", 0, 0) + bytes(16))
            client.ask(CONFIRM, b"")  # an answer or the end
        with RpcClient(worker.address) as client:
            assert computes(client)
        assert worker.alive


def test_a_model_too_large_fails_in_one_sentence_that_names_the_server(
    engine_bin: Path, folder: Path, model: Path
) -> None:
    with rpc_server(engine_bin, folder, "--memory-limit", str(MIB)) as worker:
        with (
            pytest.raises(EngineFailed) as failed,
            llama_server(engine_bin, folder, model, rpc=[worker]),
        ):
            pass
        (sentence,) = [
            line for line in failed.value.log.splitlines() if "error loading model" in line
        ]
        assert f"{worker.address}: no memory for a buffer of " in sentence
        assert "1.0 of the 1.0 MiB allowed are left" in sentence
        assert failed.value.returncode == 1
        assert worker.alive
