"""Short folders for sockets, and models made once a session."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engine.synthetic import make_model


@pytest.fixture
def folder() -> Iterator[Path]:
    """An empty folder whose path leaves room for a socket name (about 100 bytes in all)."""
    path = Path(tempfile.mkdtemp(prefix="mesh-", dir="/tmp"))
    yield path
    shutil.rmtree(path)


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "one.gguf", seed=1)


@pytest.fixture(scope="session")
def twin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Same names, shapes and metadata as `model`; other weights."""
    return make_model(tmp_path_factory.mktemp("models") / "two.gguf", seed=2)
