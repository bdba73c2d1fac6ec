"""MESH_HOME: one owner, files whole or old, nothing silently replaced."""

import errno
import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import IO

import pytest

from meshnode.errors import DiskFull, HomeError, ResourceError
from meshnode.state import (
    DamagedFile,
    Home,
    HomeInUse,
    HomeUnusable,
    default_home,
    subfolder_beside_node,
    write_durably,
)

OPEN_AND_WAIT = """
import sys
from pathlib import Path
from meshnode.state import Home
home = Home(Path(sys.argv[1]))
print("open", flush=True)
sys.stdin.read()
"""

SAVE_FOR_EVER = """
import sys
from pathlib import Path
from meshnode.state import Home
home = Home(Path(sys.argv[1]))
number = 0
while True:
    number += 1
    home.save_json("doc.json", {"number": number, "fill": [number] * 20000})
    print(number, flush=True)
"""


def child(source: str, home: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", source, str(home)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def output_of(process: subprocess.Popen[str]) -> IO[str]:
    assert process.stdout is not None
    return process.stdout


def test_a_home_is_private_and_keeps_documents(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "home"
    with Home(folder) as home:
        assert folder.stat().st_mode & 0o777 == 0o700
        assert home.load_json("grants.json") is None
        home.save_json("grants.json", {"a": [1, "ü"]})
        assert (folder / "grants.json").stat().st_mode & 0o777 == 0o600
    with Home(folder) as home:
        assert home.load_json("grants.json") == {"a": [1, "ü"]}


def test_an_open_door_is_closed(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    with Home(tmp_path):
        assert tmp_path.stat().st_mode & 0o777 == 0o700


def test_a_second_node_on_one_home_is_told_what_to_do(tmp_path: Path) -> None:
    with Home(tmp_path), pytest.raises(HomeInUse, match=r"--home.*mesh serve --lend"):
        Home(tmp_path)
    Home(tmp_path).close()


def test_another_process_holds_the_home_until_it_is_killed(tmp_path: Path) -> None:
    with child(OPEN_AND_WAIT, tmp_path) as holder:
        assert output_of(holder).readline() == "open\n"
        with pytest.raises(HomeInUse) as refused:
            Home(tmp_path)
        assert isinstance(refused.value, HomeError)
        assert refused.value.exit_code == 8
        holder.kill()
        holder.wait()
        Home(tmp_path).close()


def test_a_child_that_outlives_the_node_does_not_hold_its_home(tmp_path: Path) -> None:
    home = Home(tmp_path)
    sleeper = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        home.close()
        home.close()
        Home(tmp_path).close()
    finally:
        sleeper.kill()
        sleeper.communicate()


@pytest.mark.parametrize("after_saves", [1, 2, 5, 9, 14])
def test_a_killed_writer_leaves_a_whole_document(tmp_path: Path, after_saves: int) -> None:
    with child(SAVE_FOR_EVER, tmp_path) as writer:
        for _ in range(after_saves):
            saved = int(output_of(writer).readline())
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        rest = output_of(writer).read().split()
    told = int(rest[-1]) if rest else saved
    with Home(tmp_path) as home:
        document = home.load_json("doc.json")
        assert document is not None
        assert document["number"] in (told, told + 1)
        assert document["fill"] == [document["number"]] * 20000
        assert sorted(path.name for path in tmp_path.iterdir()) == ["doc.json", "lock"]


@pytest.mark.parametrize("place", ["fsync", "replace"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_keeps_the_old_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, code: int
) -> None:
    with Home(tmp_path) as home:
        home.save_json("doc.json", {"old": True})

        def full(*_: object) -> None:
            raise OSError(code, os.strerror(code))

        with monkeypatch.context() as patch:
            patch.setattr(os, place, full)
            with pytest.raises(DiskFull, match="no space left") as refused:
                home.save_json("doc.json", {"new": True})
        assert isinstance(refused.value, ResourceError)
        assert home.load_json("doc.json") == {"old": True}
        assert not list(tmp_path.glob("*.part")) + list(tmp_path.glob(".*.part"))


def test_a_limit_on_file_size_counts_as_a_full_disk(tmp_path: Path) -> None:
    with Home(tmp_path) as home:
        home.save_json("doc.json", {"old": True})
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
        try:
            with pytest.raises(DiskFull):
                home.write_bytes("doc.json", bytes(100_000))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert home.load_json("doc.json") == {"old": True}


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe", b"[" * 100_000])
def test_a_damaged_document_is_named_and_left_alone(tmp_path: Path, content: bytes) -> None:
    with Home(tmp_path) as home:
        (tmp_path / "doc.json").write_bytes(content)
        with pytest.raises(DamagedFile, match=r"doc\.json is damaged: put a copy"):
            home.load_json("doc.json")
        assert (tmp_path / "doc.json").read_bytes() == content


def test_what_a_killed_node_left_behind_is_swept(tmp_path: Path) -> None:
    (tmp_path / "lock").touch()
    (tmp_path / ".doc.json.1234.part").write_bytes(b"half")
    (tmp_path / "mine.part").write_bytes(b"not ours")
    with Home(tmp_path):
        assert sorted(path.name for path in tmp_path.iterdir()) == ["lock", "mine.part"]


def test_a_home_that_is_no_folder_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(HomeUnusable, match="--home"):
            Home(folder)


def test_a_lock_that_cannot_be_had_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", no_locks)
    with pytest.raises(HomeUnusable, match="No locks"):
        Home(tmp_path)


def test_a_folder_where_a_document_should_be_is_told(tmp_path: Path) -> None:
    with Home(tmp_path) as home:
        (tmp_path / "doc.json").mkdir()
        with pytest.raises(HomeUnusable, match="cannot be read"):
            home.load_json("doc.json")
        with pytest.raises(HomeUnusable, match="cannot be used"):
            home.save_json("doc.json", {})


def test_not_a_number_is_never_saved(tmp_path: Path) -> None:
    with Home(tmp_path) as home:
        with pytest.raises(ValueError):
            home.save_json("doc.json", {"x": float("nan")})
        home.save_json("doc.json", {"x": 1})
        assert json.loads((tmp_path / "doc.json").read_text()) == {"x": 1}


def test_subfolders_are_private_and_kept(tmp_path: Path) -> None:
    with Home(tmp_path) as home:
        folder = home.subfolder("manifests")
        assert folder == tmp_path / "manifests"
        assert folder.stat().st_mode & 0o777 == 0o700
        (folder / "kept").write_bytes(b"")
        assert (home.subfolder("manifests") / "kept").exists()


def test_the_environment_names_the_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MESH_HOME", str(tmp_path))
    assert default_home() == tmp_path
    monkeypatch.delenv("MESH_HOME")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    assert default_home().name == "mesh"


def test_writing_into_a_missing_folder_is_told(tmp_path: Path) -> None:
    with pytest.raises(HomeUnusable, match="cannot be used"):
        write_durably(tmp_path / "gone" / "file", b"")


# -- a home that no node has run on ---------------------------------------------------------------


def test_a_folder_made_for_models_is_a_home_for_the_node_that_comes(tmp_path: Path) -> None:
    subfolder_beside_node(tmp_path / "home", "models")
    with Home(tmp_path / "home") as home:
        assert subfolder_beside_node(home.folder, "models").is_dir(), "beside a node that runs"


def test_a_folder_of_other_things_is_left_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "letters").mkdir()
    with pytest.raises(HomeUnusable, match="holds other things"):
        subfolder_beside_node(tmp_path, "models")
    assert [path.name for path in tmp_path.iterdir()] == ["letters"]
