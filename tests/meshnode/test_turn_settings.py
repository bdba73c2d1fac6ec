"""`--turn`: where its password comes from, and where it does not go."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from discovery.grants import Role, may_open
from meshnode.cli.settings import TURN_PASSWORD_VARIABLE, read_turn
from meshnode.errors import AccessError, UsageError
from tunnels.webrtc_transport import SERVICE

SECRET = "hunter2 hunter2"


@pytest.mark.parametrize("role", Role)
def test_a_member_of_any_role_may_begin_a_webrtc_link(role: Role) -> None:
    assert may_open(role, SERVICE)


@pytest.fixture
def variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TURN_PASSWORD_VARIABLE, SECRET)


@pytest.mark.usefixtures("variable")
def test_a_password_in_the_environment_is_not_inherited_by_what_the_node_starts() -> None:
    server = read_turn("turn:a.example,me", None)
    assert server is not None
    assert server.password == SECRET
    assert TURN_PASSWORD_VARIABLE not in os.environ
    assert SECRET not in repr(server)


@pytest.mark.usefixtures("variable")
def test_without_a_server_it_is_forgotten() -> None:
    assert read_turn(None, None) is None
    assert TURN_PASSWORD_VARIABLE not in os.environ


def test_a_file_holds_it_with_a_line_end(tmp_path: Path) -> None:
    (tmp_path / "password").write_text(SECRET + "\n")
    server = read_turn("turn:a.example,me", tmp_path / "password")
    assert server is not None
    assert server.password == SECRET


def test_a_file_that_is_not_there_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(AccessError, match="cannot be read: No such file"):
        read_turn("turn:a.example,me", tmp_path / "none")


def test_no_password_names_both_places_for_it() -> None:
    with pytest.raises(UsageError, match="MESH_TURN_PASSWORD, or --turn-password-file"):
        read_turn("turn:a.example,me", None)


@pytest.mark.usefixtures("variable")
def test_one_in_the_argument_is_refused_and_not_repeated() -> None:
    with pytest.raises(UsageError, match="does not belong there") as error:
        read_turn(f"turn:a.example,me,{SECRET}", None)
    assert SECRET not in str(error.value)
