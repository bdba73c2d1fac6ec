"""More workers than sixteen, which was the engine's limit in three places."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import pytest

from meshnode.engine.abilities import MAX_DEVICES
from tests.engine.processes import alone, greedy_tokens, llama_server, loads, mesh_env, rpc_server
from tests.engine.synthetic import make_model

MANY = 20


@pytest.fixture(scope="module")
def tall_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A layer for each worker, and one more."""
    path = tmp_path_factory.mktemp("model") / "tall.gguf"
    return make_model(path, layers=MANY + 1, width=64, vocab=300, heads=2, ffn=64)


@pytest.mark.skipif(MAX_DEVICES < MANY, reason="the engine takes 16 devices")
def test_twenty_workers_answer_as_one_machine_does(
    engine_bin: Path, tall_model: Path, folder: Path
) -> None:
    expected = alone(engine_bin, folder, tall_model)
    with ExitStack() as stack:
        workers = [
            stack.enter_context(
                rpc_server(engine_bin, folder, "--gguf", tall_model, name=f"w{number}")
            )
            for number in range(MANY)
        ]
        split = ("--tensor-split", ",".join("1" * MANY))
        server = stack.enter_context(
            llama_server(
                *(engine_bin, folder, tall_model, *split),
                rpc=workers,
                name="spread",
                env=mesh_env(folder),
            )
        )
        assert greedy_tokens(server) == expected
    found = loads(folder / "report.jsonl")
    assert {load.server for load in found} == {worker.address for worker in workers}
    assert all(load.local_tensors + load.sent_tensors for load in found)
