"""A model of 120 GB is sliced, listed and made smaller in bounded memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from meshnode.models.facts import read_facts
from meshnode.models.store.disk import allocated_bytes
from tests.engine.synthetic import make_model
from tests.meshnode.models.store import large

MAX_RESIDENT_BYTES = 300 * 10**6


def test_a_model_of_120_gigabytes_takes_little_memory_and_little_disk(tmp_path: Path) -> None:
    model = make_model(
        tmp_path / "huge.gguf",
        layers=126,
        width=8192,
        vocab=120_000,
        heads=64,
        ffn=28_672,
        hollow=True,
    )
    assert model.stat().st_size > 115 * 10**9
    done = subprocess.run(
        [sys.executable, large.__file__, str(tmp_path / "models"), str(model)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        check=True,
    )
    told = json.loads(done.stdout)
    layer = [t for t in read_facts(model).tensors if t.name.startswith(large.LAYER)][:3]
    assert told["held"] == sorted(tensor.name for tensor in layer)
    assert told["held_bytes"] == sum(tensor.nbytes for tensor in layer)
    assert told["size_bytes"] == model.stat().st_size
    assert told["resident_bytes"] <= MAX_RESIDENT_BYTES
    assert allocated_bytes(tmp_path / "models" / "huge") <= told["held_bytes"] + 16 * 2**20
    print(f"resident: {told['resident_bytes'] / 10**6:.0f} MB")
