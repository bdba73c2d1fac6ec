"""Commands in places where they cannot work: one sentence, the documented exit code, no waiting."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from discovery.grants import Role
from meshnode.cli import members
from meshnode.cli.checks import Verdict
from meshnode.cli.doctor import examine
from meshnode.control import ask_node
from meshnode.engine import cache
from meshnode.errors import EngineError, HomeError, UsageError
from meshnode.gateway.server import GatewayListenFailed, _listen
from meshnode.state import Home, HomeUnusable
from tests.lab.parties import parties

MEMBERS = {"op": "members"}


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A home in which a node has lived."""
    folder = tmp_path / "home"
    with Home(folder) as opened:
        opened.identity("node.key")
    members.ask(folder, MEMBERS)
    return folder


# -- homes ----------------------------------------------------------------------------------------


def test_a_home_that_is_a_loop_of_links(tmp_path: Path) -> None:
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    with pytest.raises(HomeError, match="--home"):
        members.ask(loop, MEMBERS)


def test_a_home_with_a_name_too_long(tmp_path: Path) -> None:
    with pytest.raises(HomeError, match="--home"):
        members.ask(tmp_path / ("a" * 300), MEMBERS)


def test_a_home_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(HomeError, match="no node runs"):
        members.ask(tmp_path / "file", MEMBERS)


@pytest.mark.skipif(os.getuid() != 0, reason="root alone can become somebody else")
def test_the_home_of_another_user(home: Path) -> None:
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
            members.ask(home, MEMBERS)
        except HomeError as error:
            code = 0 if "name a home of your own" in str(error) else 2
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0


@pytest.mark.parametrize(
    "name", ["node.key", "root.key", "membership.json", "invites.json", "revocations.json"]
)
def test_a_pipe_in_a_files_place_is_not_waited_for(home: Path, name: str) -> None:
    assert "file" in refusal_with_a_pipe_at(home / name, lambda: members.ask(home, MEMBERS))


def test_a_pipe_in_the_place_of_the_sockets_record(home: Path) -> None:
    asks = partial(ask_node, home, MEMBERS)
    assert "file" in refusal_with_a_pipe_at(home / "runtime", asks)


def refusal_with_a_pipe_at(path: Path, ask: Callable[[], object]) -> str:
    """What `ask` is refused with, while a pipe lies at `path`."""
    said: list[str] = []

    def run() -> None:
        try:
            ask()
        except HomeError as error:
            said.append(str(error))

    path.unlink(missing_ok=True)
    os.mkfifo(path)
    asker = threading.Thread(target=run, daemon=True)
    try:
        asker.start()
        asker.join(20)
    finally:
        path.unlink()  # whoever reads all files of this run is not to wait for it
    return said[0]


def test_a_link_to_a_disk_that_is_not_there_is_not_a_fresh_start(home: Path) -> None:
    (home / "revocations.json").symlink_to(home / "unmounted" / "revocations.json")
    with pytest.raises(HomeUnusable, match="link to nothing"):
        members.ask(home, MEMBERS)
    assert (home / "revocations.json").is_symlink()


# -- a home that is busy --------------------------------------------------------------------------


def test_a_command_waits_for_another_that_has_the_home(home: Path) -> None:
    busy = Home(home)
    release = threading.Timer(0.5, busy.close)
    release.start()
    try:
        assert members.ask(home, MEMBERS)["meshes"]
    finally:
        release.join()


def test_a_node_that_does_not_answer_yet_is_not_waited_for_without_end(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(members, "PATIENCE_S", 0.3)
    with Home(home), pytest.raises(HomeError, match="starts or stops"):
        members.ask(home, MEMBERS)


# -- what is shown --------------------------------------------------------------------------------


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
@pytest.mark.parametrize("arguments", [["members"], ["members", "--json"], ["--help"]])
def test_an_output_that_is_full(home: Path, arguments: list[str]) -> None:
    environment = {**os.environ, "MESH_HOME": str(home)}
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "meshnode.cli.main", *arguments],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
            env=environment,
            check=False,
        )
    assert done.returncode == 1
    (sentence,) = done.stderr.splitlines()
    assert "redirect it elsewhere" in sentence


def test_doctor_looks_past_a_key_that_is_a_link_to_nothing(home: Path) -> None:
    (home / "old.key").symlink_to(home / "gone")
    found = {check.name: check.verdict for check in examine(home)}
    assert found["home"] is Verdict.OK


def test_an_engine_cache_that_cannot_be_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "engine").symlink_to(tmp_path / "engine")
    monkeypatch.setattr(cache, "engine_cache_dir", lambda: tmp_path / ("a" * 300))
    with pytest.raises(EngineError, match="MESH_CACHE"):
        list(cache.finished_engines())


# -- names ----------------------------------------------------------------------------------------


async def test_a_chat_address_that_no_host_can_have() -> None:
    with pytest.raises(GatewayListenFailed, match="--http"):
        await _listen("a..b", 0)


async def test_the_remedy_for_several_meshes_is_one_that_the_command_takes(tmp_path: Path) -> None:
    async with parties(tmp_path, "ann", "ben", "me") as (ann, ben, me):
        for node in (ann, ben, me):
            node.run_connections()
        await me.connections.join(ann.invite(Role.PEER))
        await me.connections.join(ben.invite(Role.PEER))
        with pytest.raises(UsageError, match="`mesh leave ID`"):
            me.desk.answer({"op": "leave"})
