"""What the command line refuses, and what it says when it fails, without an engine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from meshnode.cli import demo, node
from meshnode.cli.node import Launch
from meshnode.cli.settings import (
    OFFLINE_VARIABLE,
    Invocation,
    read_settings,
    refuse_beyond,
    take_invocation,
)
from meshnode.config import Address, NodeConfig
from meshnode.errors import AccessError, HomeError, UsageError
from tunnels.stun import Server

USAGE, ENGINE, ACCESS, HOME = 2, 3, 5, 8
# `status` meets an error that nobody foresaw.
DEFECT = """
import sys
import meshnode.cli.commands as command
from meshnode.cli.main import main
def ask_node(*_):
    raise RuntimeError("not foreseen")
command.ask_node = ask_node
main(["status"])
"""


def run(*argv: str, cache: Path, stdin: str = "", **env: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "MESH_CACHE": str(cache), "MESH_HOME": str(cache / "home"), **env}
    return subprocess.run(
        argv, input=stdin, capture_output=True, text=True, timeout=60, env=environment, check=False
    )


def mesh(*arguments: str, cache: Path, **env: str) -> subprocess.CompletedProcess[str]:
    return run(sys.executable, "-m", "meshnode.cli.main", *arguments, cache=cache, **env)


# -- errors that nobody foresaw -------------------------------------------------------------------


def test_a_defect_is_one_sentence_and_the_file_it_names_has_the_rest(tmp_path: Path) -> None:
    finished = run(sys.executable, "-c", DEFECT, cache=tmp_path / "cache")
    log = tmp_path / "cache" / "mesh.log"
    assert finished.returncode == 1
    (sentence,) = finished.stderr.splitlines()
    assert "RuntimeError" in sentence
    assert str(log) in sentence
    assert "Traceback" in log.read_text()
    assert "not foreseen" in log.read_text()


def test_a_defect_that_cannot_be_logged_names_no_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    finished = run(sys.executable, "-c", DEFECT, cache=tmp_path / "file")
    (sentence,) = finished.stderr.splitlines()
    assert "could not be written" in sentence


# -- standard input -------------------------------------------------------------------------------


def test_a_token_from_a_standard_input_that_is_closed(tmp_path: Path) -> None:
    command = (sys.executable, "-m", "meshnode.cli.main", "worker", "join=-")
    finished = run("/bin/sh", "-c", 'exec "$@" <&-', "sh", *command, cache=tmp_path)
    assert finished.returncode == ACCESS
    (sentence,) = finished.stderr.splitlines()
    assert "standard input" in sentence


def test_a_token_from_a_standard_input_that_cannot_be_read(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\n")
    with (tmp_path / "bytes").open(encoding="utf-8") as file:
        monkeypatch.setattr(sys, "stdin", file)
        with pytest.raises(AccessError, match="standard input"):
            read_settings(["join=-"], join=(), join_file=())


# -- options that would do nothing ----------------------------------------------------------------


@pytest.mark.parametrize("command", ["worker", "status", "demo"])
def test_engine_options_where_no_llama_server_is_started(command: str, tmp_path: Path) -> None:
    finished = mesh(command, "--", "--no-repack", cache=tmp_path)
    assert finished.returncode == USAGE
    assert "mesh serve" in finished.stderr


def test_serve_takes_what_follows_the_bare_dashes() -> None:
    own, invocation = take_invocation(["serve", "--ctx", "512", "--", "--no-repack", "--"])
    assert own == ["serve", "--ctx", "512"]
    assert invocation.engine_options == ("--no-repack", "--")
    assert take_invocation(["worker", "--"]) == (["worker"], Invocation())


@pytest.mark.parametrize("option", [("--memory", "1G"), ("--device", "CPU")])
def test_a_limit_on_lending_where_nothing_is_lent(option: tuple[str, str], tmp_path: Path) -> None:
    finished = mesh("serve", *option, cache=tmp_path)
    assert finished.returncode == USAGE
    assert option[0] in finished.stderr
    assert "--lend" in finished.stderr


# -- how far a node reaches -----------------------------------------------------------------------


def launched(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> NodeConfig:
    """What `mesh worker ARGUMENTS` would start."""
    started: list[Launch] = []
    monkeypatch.setattr(node, "_run", lambda launch, _log_format: started.append(launch))
    node.worker.main(list(arguments), obj=Invocation(), standalone_mode=False)
    return started[0].node


def test_nodes_of_tests_stay_within_their_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    assert launched(monkeypatch).offline
    assert not launched(monkeypatch, "--no-offline").offline
    monkeypatch.setenv(OFFLINE_VARIABLE, "0")
    assert not launched(monkeypatch).offline
    monkeypatch.delenv(OFFLINE_VARIABLE)
    assert not launched(monkeypatch).offline
    assert launched(monkeypatch, "--offline").offline


def test_stun_servers_are_asked_unless_none_are_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(launched(monkeypatch).stun) == 3
    assert launched(monkeypatch, "--stun", "none").stun == ()
    assert launched(monkeypatch, "--stun", "192.0.2.1").stun == (Server("192.0.2.1", 3478),)


def test_offline_no_source_is_fetched_for_an_engine(tmp_path: Path) -> None:
    """pip would find an index there, and the build would go on."""
    index = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path), "MESH_ENGINE_SOURCE": ""}
    for command in ("worker", "serve", "demo", "engine build", "engine check-patches"):
        finished = mesh(*command.split(), "--offline", cache=tmp_path / "cache", **index)
        assert finished.returncode == ENGINE, finished.stderr
        (sentence,) = finished.stderr.splitlines()
        assert "mesh engine build --no-offline" in sentence
        assert "MESH_ENGINE_SOURCE" in sentence
    assert not list((tmp_path / "cache" / "engine" / "sources").glob("*"))


@pytest.mark.parametrize("place", ["rpc=1.1.1.1:50052", "rpc=tower.example:50052"])
def test_offline_no_engine_beyond_is_asked(place: str, tmp_path: Path) -> None:
    finished = mesh("serve", "--offline", place, cache=tmp_path)
    assert finished.returncode == USAGE
    assert "--offline" in finished.stderr


def test_offline_no_name_is_looked_up_for_the_endpoint(tmp_path: Path) -> None:
    finished = mesh("serve", "--offline", "--http", "tower.example:8090", cache=tmp_path)
    assert finished.returncode == USAGE
    assert "no name is looked up" in finished.stderr
    refuse_beyond([Address("127.0.0.1", 50052)], Address("localhost", 8090))
    refuse_beyond([], Address(None, 8090))


# -- a token in the environment -------------------------------------------------------------------


def test_what_we_start_does_not_inherit_the_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MESH_JOIN", "mesh1qsecret")
    _own, invocation = take_invocation(["engine", "build"])
    assert "MESH_JOIN" not in os.environ
    assert invocation.join_text == "mesh1qsecret"
    assert "secret" not in repr(invocation)


def test_the_token_in_the_environment_is_read_where_no_other_is_given(tmp_path: Path) -> None:
    finished = mesh("worker", cache=tmp_path, MESH_JOIN="hello")
    assert finished.returncode == ACCESS
    with pytest.raises(UsageError, match="once"):
        read_settings(["join=-", "join=-"], join=(), join_file=(), join_text="hello")


# -- the demo that stays up -----------------------------------------------------------------------


@pytest.fixture
def record(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("MESH_CACHE", str(tmp_path))
    monkeypatch.setattr(demo, "ensure_engine", lambda *, offline: None)
    return tmp_path / "demo.pid"


def record_of(process: psutil.Process) -> str:
    return f"{process.pid} {process.create_time()}\n"


def test_a_second_demo_leaves_the_first_ones_record(record: Path) -> None:
    record.write_text(record_of(psutil.Process()))
    with pytest.raises(HomeError, match="just stop"):
        demo._stay("127.0.0.1:0", offline=True)
    assert record.read_text() == record_of(psutil.Process())


def test_a_demo_that_ends_removes_its_own_record_and_no_other(
    record: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []

    async def stay_a_moment(_http: str, _say: object) -> None:
        seen.append(record.read_text())

    async def lose_the_record(_http: str, _say: object) -> None:
        record.write_text("somebody else's")

    record.write_text("4194304 1.0\n")  # a demo that was killed long ago
    monkeypatch.setattr(demo, "stay", stay_a_moment)
    demo._stay("127.0.0.1:0", offline=True)
    assert seen == [record_of(psutil.Process())]
    assert not record.exists()
    monkeypatch.setattr(demo, "stay", lose_the_record)
    demo._stay("127.0.0.1:0", offline=True)
    assert record.read_text() == "somebody else's"


def test_stopping_a_demo_that_is_gone_says_so(record: Path) -> None:
    record.write_text("4194304 1.0\n")
    with pytest.raises(HomeError, match="just local"):
        demo._stop()
    assert not record.exists()


def test_stopping_ends_the_recorded_process(record: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE
    ) as process:
        record.write_text(record_of(psutil.Process(process.pid)))
        demo._stop()
        assert not psutil.pid_exists(process.pid)
