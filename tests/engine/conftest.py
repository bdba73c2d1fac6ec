"""Short folders for sockets, and models made once a session."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import require
from tests.engine.compiling import NotBuilt
from tests.engine.fuzz.build import build
from tests.engine.processes import Running, rpc_server
from tests.engine.refusals import LIMIT
from tests.engine.synthetic import make_model


@pytest.fixture(scope="session", params=["shipped", "sanitized"])
def server_bin(request: pytest.FixtureRequest, engine_bin: Path) -> Path:
    """The folder of a server to attack: the one that ships, and the sanitizers' where clang is."""
    if request.param == "shipped":
        return engine_bin
    try:
        return build().folder
    except NotBuilt as error:
        require("fuzzer", False, str(error))
        raise AssertionError from error


@pytest.fixture
def folder() -> Iterator[Path]:
    """An empty folder whose path leaves room for a socket name (about 100 bytes in all)."""
    path = Path(tempfile.mkdtemp(prefix="mesh-", dir="/tmp"))
    yield path
    shutil.rmtree(path)


@pytest.fixture
def worker(server_bin: Path, folder: Path) -> Iterator[Running]:
    """A server to attack, which may lend `LIMIT` bytes."""
    with rpc_server(server_bin, folder, "--memory-limit", str(LIMIT)) as running:
        yield running


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "one.gguf", seed=1)


@pytest.fixture(scope="session")
def twin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Same names, shapes and metadata as `model`; other weights."""
    return make_model(tmp_path_factory.mktemp("models") / "two.gguf", seed=2)
