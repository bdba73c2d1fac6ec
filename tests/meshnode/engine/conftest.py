"""A cache of its own and the miniature llama.cpp, for whoever asks."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.conftest import require
from tests.meshnode.engine import fake_llama


@dataclass(frozen=True)
class Fake:
    """Where the miniature lies. Without MESH_ENGINE_SOURCE its sdist would be fetched by pip."""

    sdist: Path
    patches: Path
    cache: Path


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fake:
    sdist = tmp_path / "mesh_fake_llama-1.0.tar.gz"
    sha256 = fake_llama.write_sdist(sdist)
    patches = fake_llama.write_patches(tmp_path / "patches", sha256)
    monkeypatch.setenv("MESH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("MESH_ENGINE_SOURCE", str(sdist))
    monkeypatch.setattr("meshnode.engine.patches.patches_folder", lambda: patches)
    return Fake(sdist, patches, tmp_path / "cache")


@pytest.fixture
def compiler() -> None:
    found = shutil.which("c++") is not None
    require("compiler", found, "no c++ on the PATH: ./just setup")
