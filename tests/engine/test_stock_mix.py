"""Patched and stock engines mix, both ways: over TCP, as stock knows nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.engine.processes import (
    alone,
    greedy_tokens,
    llama_server,
    loads,
    mesh_env,
    rpc_server,
)

pytestmark = pytest.mark.engine


def test_a_stock_client_uses_a_patched_server(
    engine_bin: Path, stock_bin: Path, folder: Path, model: Path
) -> None:
    expected = alone(stock_bin, folder, model)
    with (
        rpc_server(engine_bin, folder, "--gguf", model, tcp=True) as worker,
        llama_server(stock_bin, folder, model, rpc=[worker]) as server,
    ):
        assert greedy_tokens(server) == expected


def test_a_patched_client_sends_everything_to_a_stock_server(
    engine_bin: Path, stock_bin: Path, folder: Path, model: Path
) -> None:
    expected = alone(engine_bin, folder, model)
    with (
        rpc_server(stock_bin, folder, tcp=True) as worker,
        llama_server(engine_bin, folder, model, rpc=[worker], env=mesh_env(folder)) as server,
    ):
        assert greedy_tokens(server) == expected
    (load,) = loads(folder / "report.jsonl")
    assert load.local_tensors == 0
    assert load.sent_tensors > 0
    assert load.failures == 0


def test_patched_on_both_sides_works_over_tcp_too(
    engine_bin: Path, folder: Path, model: Path
) -> None:
    expected = alone(engine_bin, folder, model)
    with (
        rpc_server(engine_bin, folder, "--gguf", model, tcp=True) as worker,
        llama_server(engine_bin, folder, model, rpc=[worker], env=mesh_env(folder)) as server,
    ):
        assert greedy_tokens(server) == expected
    (load,) = loads(folder / "report.jsonl")
    assert (load.sent_tensors, load.failures) == (0, 0)
