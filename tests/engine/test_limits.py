"""What a server may hold, and how long it may live (patches 5 and 6)."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.engine.processes import (
    STOP_LIMIT_S,
    EngineFailed,
    alone,
    greedy_tokens,
    llama_server,
    rpc_server,
)
from tests.engine.rpc_client import RpcClient

pytestmark = pytest.mark.engine

MIB = 1 << 20


def test_buffers_beyond_the_limit_are_refused_and_freed_ones_count_no_more(
    engine_bin: Path, folder: Path
) -> None:
    with rpc_server(engine_bin, folder, "--memory-limit", str(10 * MIB)) as worker:
        with RpcClient(worker.address) as client:
            assert client.device_memory() == (10 * MIB, 10 * MIB)
            first = client.allocate(6 * MIB)
            assert first != 0
            free, _ = client.device_memory()
            assert free <= 4 * MIB
            assert client.allocate(6 * MIB) == 0
            client.free(first)
            assert client.allocate(6 * MIB) != 0
            assert client.allocate(2**62) == 0
        # a client that leaves without freeing gives everything back
        with RpcClient(worker.address) as client:
            assert client.device_memory() == (10 * MIB, 10 * MIB)
        assert "refused a buffer" in worker.log


def test_a_model_too_large_for_the_limit_fails_to_load_and_the_server_stays(
    engine_bin: Path, folder: Path, model: Path
) -> None:
    with rpc_server(engine_bin, folder, "--gguf", model, "--memory-limit", str(MIB)) as worker:
        with (
            pytest.raises(EngineFailed, match="no memory for a buffer of") as failed,
            llama_server(engine_bin, folder, model, rpc=[worker]),
        ):
            pass
        assert failed.value.returncode == 1
        assert worker.alive


def test_a_model_within_the_limit_answers(engine_bin: Path, folder: Path, model: Path) -> None:
    expected = alone(engine_bin, folder, model)
    with (
        rpc_server(engine_bin, folder, "--memory-limit", str(256 * MIB)) as worker,
        llama_server(engine_bin, folder, model, rpc=[worker]) as server,
    ):
        assert greedy_tokens(server) == expected


@pytest.mark.parametrize("limit", ["0", "-1", "many", "5G", ""])
def test_a_limit_that_is_no_number_of_bytes_is_refused(
    engine_bin: Path, folder: Path, limit: str
) -> None:
    with (
        pytest.raises(EngineFailed, match="--memory-limit takes a number of bytes"),
        rpc_server(engine_bin, folder, "--memory-limit", limit),
    ):
        pass


@pytest.mark.parametrize("program", ["ggml-rpc-server", "llama-server"])
def test_a_server_exits_when_its_parent_s_pipe_reaches_its_end(
    engine_bin: Path, folder: Path, model: Path, program: str
) -> None:
    reader, writer = os.pipe()
    env = {"MESH_PARENT_FD": str(reader)}
    started = (
        rpc_server(engine_bin, folder, env=env, pass_fds=[reader])
        if program == "ggml-rpc-server"
        else llama_server(engine_bin, folder, model, env=env, pass_fds=[reader])
    )
    with started as server:
        os.close(reader)
        os.write(writer, b"still here")
        assert server.alive
        os.close(writer)
        assert server.process.wait(STOP_LIMIT_S) == 0


def test_a_parent_pipe_that_was_not_inherited_is_an_error(engine_bin: Path, folder: Path) -> None:
    with (
        pytest.raises(EngineFailed, match="MESH_PARENT_FD=77 is not an open descriptor"),
        rpc_server(engine_bin, folder, env={"MESH_PARENT_FD": "77"}),
    ):
        pass
