"""What tests share: the built engines, and what to do about what a machine lacks.

MESH_TEST_REQUIRE names, separated by commas, what must not be skipped here: `engine`,
`namespaces`, `tun`, `compiler`, …. MESH_TEST_ENGINE and MESH_TEST_STOCK_ENGINE name folders of
binaries to test instead of the built ones.
"""

from __future__ import annotations

import itertools
import os
import time
from pathlib import Path

import hypothesis
import pytest

from meshnode import membership
from meshnode.engine.build import find_engine
from meshnode.errors import MeshError
from tests.secrets_watch import pytest_configure

__all__ = ["pytest_configure"]

# Nodes of tests leave this machine and the namespaces made for them alone.
os.environ.setdefault("MESH_OFFLINE", "1")

# The same examples in every run, and none that fails because the machine is busy.
hypothesis.settings.register_profile(
    "mesh",
    derandomize=True,
    deadline=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("mesh")

LOOKS_TAKE_S = 50e-6


@pytest.fixture
def steady_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Work takes the same time on every machine: LOOKS_TAKE_S from one look at the clock to the
    next. Beside a fake clock a slow processor would put honest peers into debt for minutes, since
    what is charged in real seconds is paid in fake ones.
    """
    monkeypatch.setattr(time, "thread_time", itertools.count(step=LOOKS_TAKE_S).__next__)
    monkeypatch.setattr(membership, "perf_counter", itertools.count(step=LOOKS_TAKE_S).__next__)


@pytest.fixture(autouse=True)
def _steady_beside_a_fake_clock(request: pytest.FixtureRequest) -> None:
    if "autojump_clock" in request.fixturenames:
        request.getfixturevalue("steady_processor")


def require(name: str, available: bool, reason: str) -> None:
    """Skip when something is not available, or fail when MESH_TEST_REQUIRE names it."""
    if available:
        return
    required = {word.strip() for word in os.environ.get("MESH_TEST_REQUIRE", "").split(",")}
    if name in required:
        pytest.fail(f"{name} is required here (MESH_TEST_REQUIRE), but: {reason}", pytrace=False)
    pytest.skip(f"{name}: {reason}")


def _engine_folder(variable: str, *, stock: bool) -> Path:
    named = os.environ.get(variable)
    folder: Path | None = None
    reason = f"not built: ./just build{' --stock' if stock else ''}"
    if named:
        folder = Path(named)
    else:
        try:
            folder = find_engine(stock=stock)
        except MeshError as error:
            reason = str(error)
    require("engine", folder is not None and (folder / "llama-server").is_file(), reason)
    assert folder is not None
    return folder


@pytest.fixture(scope="session")
def engine_bin() -> Path:
    """The folder with the patched llama-server, ggml-rpc-server, llama-bench and llama-cli."""
    return _engine_folder("MESH_TEST_ENGINE", stock=False)


@pytest.fixture(scope="session")
def stock_bin() -> Path:
    """The same, unpatched."""
    return _engine_folder("MESH_TEST_STOCK_ENGINE", stock=True)
