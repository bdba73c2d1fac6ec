"""`mesh` on a home of its own, and a model that is there in part."""

from __future__ import annotations

from pathlib import Path

import pytest

from meshnode.cli.commands import run
from meshnode.models.store.slice import Slice, open_slice
from meshnode.models.store.store import Store
from meshnode.models.store.writer import SliceWriter
from meshnode.state import subfolder_beside_node
from tests.meshnode.commands.lines import Mesh
from tests.meshnode.models.store.slices import Whole, make_whole, pull


@pytest.fixture
def mesh(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Mesh:
    monkeypatch.setenv("MESH_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("MESH_CACHE", str(tmp_path / "cache"))

    def command(*arguments: object) -> tuple[int, str, str]:
        code = run([*map(str, arguments)])
        out, complaint = capfd.readouterr()
        return code, out, complaint

    return command


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(subfolder_beside_node(tmp_path / "home", "models"))


@pytest.fixture
def whole(tmp_path: Path) -> Whole:
    return make_whole(tmp_path / "source")


@pytest.fixture
def made(store: Store, whole: Whole) -> Slice:
    """One of its layers is here."""
    made = whole.create(store)
    with SliceWriter(made.folder) as writer:
        pull(writer, whole, whole.names("blk.1."))
    return open_slice(made.folder)
