"""Sockets live in a short folder that is ours alone."""

import os
import socket
from pathlib import Path

import pytest

from meshnode import paths
from meshnode.errors import HomeError
from meshnode.paths import MAX_SOCKET_PATH_BYTES, runtime_folder, socket_path
from tests.conftest import require
from tests.probe import NOBODY


@pytest.fixture
def tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    return tmp_path


def test_a_deep_home_gets_a_folder_short_enough_to_bind_in(tmp: Path) -> None:
    home = tmp / ("deep" * 30)
    folder = runtime_folder(home)
    try:
        assert folder == runtime_folder(home)
        assert folder != runtime_folder(tmp)
        assert folder.stat().st_mode & 0o777 == 0o700
        path = socket_path(folder, "x" * 31)
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind(str(path))
        path.unlink()
    finally:
        folder.rmdir()
        runtime_folder(tmp).rmdir()


def test_the_runtime_folder_of_the_session_is_used(
    tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = Path("/tmp") / f"mesh-test-{os.getpid()}"
    given.mkdir(mode=0o700)
    try:
        monkeypatch.setenv("XDG_RUNTIME_DIR", str(given))
        folder = runtime_folder(tmp)
        assert folder.parent == given / "mesh"
        folder.rmdir()
        folder.parent.rmdir()
    finally:
        given.rmdir()


@pytest.mark.parametrize("given", ["relative", "/nonexistent/run", "{tmp}/" + "d" * 90])
def test_a_useless_runtime_folder_is_passed_over(
    tmp: Path, monkeypatch: pytest.MonkeyPatch, given: str
) -> None:
    given = given.format(tmp=tmp)
    if str(tmp) in given:
        Path(given).mkdir(mode=0o700)
    monkeypatch.setenv("XDG_RUNTIME_DIR", given)
    folder = runtime_folder(tmp)
    assert folder.parent == Path(f"/tmp/mesh-{os.getuid()}")
    folder.rmdir()


def test_a_folder_somebody_made_first_is_refused(
    tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trap = tmp / "trap"
    (tmp / "elsewhere").mkdir()
    trap.symlink_to(tmp / "elsewhere")
    monkeypatch.setattr(paths, "_runtime_parent", lambda name: trap)
    with pytest.raises(HomeError, match="belongs to somebody else"):
        runtime_folder(tmp)


@pytest.mark.parametrize("planted", ["the parent", "the folder itself"])
def test_a_folder_another_user_made_first_is_refused(
    tmp: Path, monkeypatch: pytest.MonkeyPatch, planted: str
) -> None:
    require("root", os.geteuid() == 0, "only root can make a folder somebody else's")
    parent = tmp / "parent"
    monkeypatch.setattr(paths, "_runtime_parent", lambda name: parent)
    folder = runtime_folder(tmp)
    trap = parent if planted == "the parent" else folder
    os.chown(trap, NOBODY, NOBODY)
    with pytest.raises(HomeError, match=r"belongs to somebody else: remove it, or set XDG_RUNTIME"):
        runtime_folder(tmp)
    assert trap.stat().st_uid == NOBODY, "it is left as it is"


def test_a_file_in_the_folders_place_is_refused(tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp / "file").touch()
    monkeypatch.setattr(paths, "_runtime_parent", lambda name: tmp / "file")
    with pytest.raises(HomeError, match="belongs to somebody else"):
        runtime_folder(tmp)


def test_a_folder_open_to_others_is_closed(tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loose = tmp / "loose"
    loose.mkdir(mode=0o755)
    monkeypatch.setattr(paths, "_runtime_parent", lambda name: loose)
    runtime_folder(tmp)
    assert loose.stat().st_mode & 0o777 == 0o700


def test_a_folder_that_cannot_be_made_is_told(tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paths, "_runtime_parent", lambda name: tmp / "gone" / "below")
    with pytest.raises(HomeError, match="cannot be made"):
        runtime_folder(tmp)


def test_a_socket_path_too_long_to_bind_is_refused(tmp: Path) -> None:
    folder = Path("/tmp")
    name = "x" * (MAX_SOCKET_PATH_BYTES - len("/tmp/"))
    assert socket_path(folder, name) == folder / name
    with pytest.raises(HomeError, match="too long for a socket"):
        socket_path(folder, name + "x")
