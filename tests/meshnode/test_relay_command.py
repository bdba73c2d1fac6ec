"""`mesh relay`, as a process: what it prints, whom it joins, and what a careless user is told."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from meshnode.control import ask_node
from meshnode.errors import MeshError

WELL, USAGE, NETWORK = 0, 2, 4
PATIENCE_S = 150.0
LOOK_AGAIN_S = 0.2


class Home:
    """One node's home and what runs on it."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder = folder / name
        self.log = folder / f"{name}.log"
        self.name = name

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "meshnode.cli.main", *arguments, "--home", str(self.folder)]

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(*arguments),
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
            check=False,
        )

    @contextmanager
    def relay(self, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
        """`mesh relay` while the block lasts."""
        listen = ("--listen", "127.0.0.1:0", "--no-mdns", "--log-format", "json")
        with self.log.open("ab") as log:
            command = self.command("relay", "--name", self.name, *listen, *arguments)
            process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            yield process
        finally:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(PATIENCE_S)
            finally:
                process.kill()

    def events(self) -> list[dict[str, Any]]:
        if not self.log.exists():
            return []
        lines = self.log.read_text().splitlines()
        return [json.loads(line) for line in lines if line.startswith("{")]

    def line_to_paste(self) -> str | None:
        lines = [one["line"] for one in self.events() if one.get("line")]
        return str(lines[0]) if lines else None

    def link_to(self, other: Home) -> str | None:
        with contextlib.suppress(MeshError):
            rows = ask_node(self.folder, {"op": "peers"})["peers"]
            return {row["name"]: row["link"] for row in rows}.get(other.name)
        return None


def until(what: Callable[[], object]) -> Any:
    """The first thing that is true. A process tells nobody what it does but who asks."""
    deadline_s = time.monotonic() + PATIENCE_S
    while not (found := what()):
        assert time.monotonic() < deadline_s, "it did not come about"
        time.sleep(LOOK_AGAIN_S)
    return found


@pytest.fixture
def homes(tmp_path: Path) -> list[Home]:
    return [Home(tmp_path, name) for name in ("rita", "ann", "ben")]


def test_two_nodes_meet_through_a_relay_and_again_after_it_was_killed(homes: list[Home]) -> None:
    rita, ann, ben = homes
    only = ("--transport", "relay")  # as if no packet got through between the two
    with rita.relay() as process:
        token = until(rita.line_to_paste).split()[-1]
        assert token.startswith("join=mesh1")
        with ann.relay(*only, token), ben.relay(*only, token):
            until(lambda: ann.link_to(ben) == "relay")
            until(lambda: ben.link_to(ann) == "relay")
            assert ann.link_to(rita) in ("tcp", "quic")
            process.kill()
            process.wait()
            with rita.relay():
                until(lambda: ann.link_to(rita))
                until(lambda: ann.link_to(ben) == "relay")


def test_it_lists_its_second_port_and_needs_no_engine(homes: list[Home], tmp_path: Path) -> None:
    rita = homes[0]
    with taken_port() as port:
        pass
    with rita.relay("--tcp", str(port)):
        until(rita.line_to_paste)
        [said] = [one for one in rita.events() if "listens at" in one["text"]]
        assert f"tcp 127.0.0.1:{port}" in said["text"]
        assert any("relays for the members" in one["text"] for one in rita.events())


@pytest.mark.parametrize("told", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_node_that_is_told_to_stop_has_done_well(homes: list[Home], told: signal.Signals) -> None:
    with homes[0].relay() as process:
        until(homes[0].line_to_paste)
        process.send_signal(told)
        assert process.wait(PATIENCE_S) == WELL


def test_a_port_in_use_is_told_in_a_sentence(homes: list[Home]) -> None:
    with taken_port() as port:
        finished = homes[0].run("relay", "--listen", "127.0.0.1:0", "--tcp", str(port))
    assert finished.returncode == NETWORK
    [sentence] = finished.stderr.splitlines()
    assert f"TCP 127.0.0.1:{port}: the port is in use; choose another" in sentence


@pytest.mark.skipif(not Path("/usr/bin/setpriv").exists(), reason="setpriv (util-linux) is missing")
def test_a_port_that_needs_root_is_told_with_the_remedy(homes: list[Home]) -> None:
    if int(Path("/proc/sys/net/ipv4/ip_unprivileged_port_start").read_text()) <= 443:
        pytest.skip("this system lets anybody listen on port 443")
    without = [] if os.geteuid() else ["setpriv", "--bounding-set=-net_bind_service"]
    command = homes[0].command("relay", "--listen", "127.0.0.1:0", "--tcp", "443")
    finished = subprocess.run(
        [*without, *command], capture_output=True, text=True, timeout=PATIENCE_S, check=False
    )
    assert finished.returncode == NETWORK
    [sentence] = finished.stderr.splitlines()
    assert "ports below 1024 are root's" in sentence
    assert "ip_unprivileged_port_start=443" in sentence


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--tcp", "0"), "1<=x<=65535"),
        (("--tcp", "https"), "not a valid integer"),
        (("--listen", "nowhere"), "HOST:PORT"),
        (("--model", "x.gguf"), "--model"),
        (("rpc=127.0.0.1:1",), "mesh serve"),
        (("--transport", "quic", "--tcp", "80"), "leave --tcp out"),
        (("--transport", "tcp,quic", "--turn", "turn:192.0.2.1,me"), "leave --turn out"),
    ],
)
def test_what_makes_no_sense_is_refused(
    homes: list[Home], arguments: tuple[str, ...], words: str
) -> None:
    finished = homes[0].run("relay", *arguments)
    assert finished.returncode == USAGE
    assert words in finished.stderr


@contextmanager
def taken_port() -> Iterator[int]:
    """A TCP port of 127.0.0.1 that is taken while the block lasts."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield int(server.getsockname()[1])
