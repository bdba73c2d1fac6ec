"""The operator's key: made once, for its owner alone, and never a weak one."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
from click.testing import CliRunner

from meshnode.cli.commands import cli
from meshnode.errors import HomeError
from meshnode.operator_key import KEY_FILE, load_or_make_key


def test_it_is_made_once_and_for_its_owner_alone(tmp_path: Path) -> None:
    key = load_or_make_key(tmp_path)
    assert load_or_make_key(tmp_path) == key
    assert (tmp_path / KEY_FILE).stat().st_mode & 0o777 == 0o600
    assert [path.name for path in tmp_path.iterdir()] == [KEY_FILE]
    (tmp_path / KEY_FILE).unlink()
    assert load_or_make_key(tmp_path) != key


def test_processes_that_make_it_at_once_agree(tmp_path: Path) -> None:
    made: list[str] = []
    threads = [
        threading.Thread(target=lambda: made.append(load_or_make_key(tmp_path))) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 8
    assert len(set(made)) == 1


@pytest.mark.parametrize("content", [b"", b"secret", b"mesh-key-short", b"\xff" * 60])
def test_a_key_that_is_none_is_refused_and_left(tmp_path: Path, content: bytes) -> None:
    (tmp_path / KEY_FILE).write_bytes(content)
    (tmp_path / KEY_FILE).chmod(0o600)
    with pytest.raises(HomeError, match="damaged"):
        load_or_make_key(tmp_path)
    assert (tmp_path / KEY_FILE).read_bytes() == content


def test_a_key_that_others_can_read_is_none_any_more(tmp_path: Path) -> None:
    load_or_make_key(tmp_path)
    (tmp_path / KEY_FILE).chmod(0o644)
    with pytest.raises(HomeError, match="others"):
        load_or_make_key(tmp_path)


def test_a_pipe_in_its_place_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / KEY_FILE)
    with pytest.raises(HomeError, match="no file"):
        load_or_make_key(tmp_path)
    (tmp_path / KEY_FILE).unlink()


def test_mesh_key_prints_it_and_nothing_else(tmp_path: Path) -> None:
    home = tmp_path / "home"
    shown = CliRunner().invoke(cli, ["key", "--home", str(home)])
    assert shown.exit_code == 0, shown.output
    assert shown.output == f"{load_or_make_key(home)}\n"
