"""More workers than sixteen, which was the engine's limit in three places."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.engine.processes import alone, greedy_tokens, llama_server, loads, mesh_env, rpc_servers
from tests.engine.synthetic import make_model

pytestmark = pytest.mark.engine

MANY = 64


@pytest.fixture(scope="module")
def tall_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A layer for each worker, and one more."""
    path = tmp_path_factory.mktemp("model") / "tall.gguf"
    return make_model(path, layers=MANY + 1, width=64, vocab=300, heads=2, ffn=64)


def test_sixty_four_workers_answer_as_one_machine_does(
    engine_bin: Path, tall_model: Path, folder: Path
) -> None:
    expected = alone(engine_bin, folder, tall_model)
    split = ("--tensor-split", ",".join("1" * MANY))
    with (
        rpc_servers(engine_bin, folder, tall_model, MANY) as workers,
        llama_server(
            *(engine_bin, folder, tall_model, *split),
            rpc=workers,
            name="spread",
            env=mesh_env(folder),
        ) as server,
    ):
        assert greedy_tokens(server) == expected
    found = loads(folder / "report.jsonl")
    assert {load.server for load in found} == {worker.address for worker in workers}
    assert all(load.local_tensors + load.sent_tensors for load in found)
