"""Memory for computing, promised for architectures that nobody here has a large model of.

The figures are the engine's, recorded with the caches' in
`tests/meshnode/models/engine_memory.json`: models 64 to 512 numbers wide and, of some, 1024
(`-wide`).
"""

from __future__ import annotations

import pytest

from meshnode.pipeline.costs import costs_of, plan_model
from tests.meshnode.models.test_layer_memory import RECORDED, WAYS, facts

N_VOCAB = 128


@pytest.mark.parametrize("name", RECORDED)
def test_computing_takes_no_more_than_is_promised(name: str) -> None:
    recorded = RECORDED[name]
    model = plan_model(facts(recorded["arch"], {"vocab_size": N_VOCAB} | recorded["metadata"]))
    for way, options in WAYS.items():
        costs = costs_of(model, ctx_tokens=16384, slots=8, cache=options)
        items_bytes = sum(item.compute_bytes for item in costs.items)
        promised = items_bytes + costs.device_compute_bytes + costs.host_compute_bytes
        assert recorded["compute_mib"][way] <= promised / 2**20, way


def test_every_figure_is_of_a_model_that_computed() -> None:
    assert all(all(found["compute_mib"].values()) for found in RECORDED.values())
