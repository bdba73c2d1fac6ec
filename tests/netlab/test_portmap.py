"""A node behind a real router that maps ports: reached from outside, cleaned up after."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from discovery.mapping import EPOCH_SLACK_S
from meshnode.demo.nodes import invite_token, open_node, write_token
from tests.netlab.upnp_router import WAN, UpnpRouter, upnp_router

pytestmark = pytest.mark.netlab

ROOT = Path(__file__).parent.parent.parent
PATIENCE_S = 30.0


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[UpnpRouter]:
    with upnp_router(tmp_path) as made:
        yield made


class Mapped:
    """A program inside that has its ports mapped."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def next_status(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the program ended"
        return dict(json.loads(line))

    def stop(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        assert self._process.wait(PATIENCE_S) == 0


@contextmanager
def mapped(lab: UpnpRouter, check_s: float = 60, lifetime_s: int = 3600) -> Iterator[Mapped]:
    command = [*lab.inside.prefix, sys.executable, "-m", "tests.netlab.mapped"]
    process = subprocess.Popen(
        [*command, str(check_s), str(lifetime_s)],
        cwd=ROOT,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        yield Mapped(process)
    finally:
        process.kill()
        process.wait()


def echoed(lab: UpnpRouter, status: dict[str, Any]) -> set[str]:
    """By which of what was mapped the program is reached from outside."""
    ports = {one["transport"]: (one["host"], one["port"]) for one in status["mapped"]}
    assert {host for host, _ in ports.values()} == {WAN}
    reached = set()
    with lab.outside.udp("0.0.0.0") as udp:
        udp.settimeout(5)
        udp.sendto(b"hello", ports["udp"])
        if udp.recvfrom(100) == (b"hello", ports["udp"]):
            reached.add("udp")
    with lab.outside.entered():
        tcp = socket.socket()
    with tcp:
        tcp.settimeout(5)
        tcp.connect(ports["tcp"])
        tcp.sendall(b"hello")
        if tcp.recv(100) == b"hello":
            reached.add("tcp")
    return reached


def await_mapped(lab: UpnpRouter, count: int) -> None:
    deadline_s = time.monotonic() + PATIENCE_S
    while len(lab.mapped().splitlines()) != count:
        assert time.monotonic() < deadline_s, lab.mapped()
        time.sleep(0.1)


@pytest.mark.parametrize("way", ["PCP", "NAT-PMP", "UPnP"])
def test_a_real_router_maps_both_ports_and_has_them_back(lab: UpnpRouter, way: str) -> None:
    lab.speaks = (way,)
    lab.start()
    with mapped(lab) as program:
        status = program.next_status()
        while status["by"] is None:  # miniupnpd was not up yet
            status = program.next_status()
        assert (status["by"], status["problem"]) == (way, None)
        assert echoed(lab, status) == {"udp", "tcp"}
        await_mapped(lab, 2)
        program.stop()
    assert lab.mapped() == ""


@pytest.mark.parametrize("way", ["PCP", "NAT-PMP", "UPnP"])
def test_what_a_restarted_router_forgot_it_gets_again(lab: UpnpRouter, way: str) -> None:
    lab.speaks = (way,)
    lab.start()
    with mapped(lab, check_s=1) as program:
        while (status := program.next_status())["by"] is None:
            pass
        # From a clock younger than its tolerance nobody can tell (RFC 6887 section 8.5).
        time.sleep(EPOCH_SLACK_S + 2)
        lab.start()
        assert lab.mapped() == ""
        await_mapped(lab, 2)
        assert echoed(lab, status) == {"udp", "tcp"}


def test_a_short_lease_is_renewed(lab: UpnpRouter) -> None:
    """The router grants what is asked for, 4 s: after 12 it still stands."""
    lab.start()
    with mapped(lab, lifetime_s=4) as program:
        while (status := program.next_status())["by"] is None:
            pass
        until_s = time.monotonic() + 12
        while time.monotonic() < until_s:
            assert echoed(lab, status) == {"udp", "tcp"}
            time.sleep(0.5)


@pytest.mark.engine
async def test_a_member_outside_dials_a_node_behind_a_router_by_its_token(
    lab: UpnpRouter, tmp_path: Path, engine_bin: Path
) -> None:
    lab.start()

    def node(name: str, where: Any, *arguments: str) -> Any:
        return open_node(
            *("worker", "--threads", "1", "--no-mdns", "--no-offline", "--stun", "none"),
            *arguments,
            name=name,
            home=tmp_path / name,
            log_folder=tmp_path,
            prefix=where.prefix,
        )

    async with node("inside", lab.inside) as inside:
        told = await inside.wait_event("node", containing="port mapping")
        assert f"the router forwards UDP {WAN}:" in told["text"]
        token = write_token(tmp_path / "token", invite_token(await inside.wait_event("invite")))
        async with node("outside", lab.outside, "--join-file", str(token)) as outside:
            await outside.wait_event("peer", containing="connected to inside")
    assert lab.mapped() == ""
