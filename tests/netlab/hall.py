"""Machines on one switch, each in a namespace, and nginx on one of them."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.conftest import require
from tests.lab.nginx import nginx_program, nginx_settings
from tests.netlab import netns
from tests.netlab.netns import Namespace
from tests.netlab.servers import Server

NETWORK = "10.78.0"
INTERFACE = "e0"
HTTP_PORT = 80


@dataclass(frozen=True)
class Machine:
    """One namespace with one interface."""

    space: Namespace
    address: str

    @property
    def prefix(self) -> tuple[str, ...]:
        return self.space.prefix

    def received_bytes(self) -> int:
        """What the kernel took from the interface, headers and all."""
        return self._count("rx")

    def sent_bytes(self) -> int:
        return self._count("tx")

    def _count(self, direction: str) -> int:
        shown = self.space.run("ip", "-s", "-j", "link", "show", "dev", INTERFACE)
        return int(json.loads(shown)[0]["stats64"][direction]["bytes"])


@contextmanager
def hall(names: Sequence[str]) -> Iterator[tuple[Machine, ...]]:
    """Needs root and iproute2."""
    require("namespaces", netns.can_be_made(), "needs root and iproute2 (./just setup)")
    number = os.getpid()
    spaces = netns.make([f"hall-{number}-switch", *(f"hall-{number}-{name}" for name in names)])
    switch, *rest = spaces
    try:
        switch.ip("link add br0 type bridge", "link set br0 up")
        machines = []
        for index, space in enumerate(rest, start=1):
            netns.cable(switch, f"p{index}", space, INTERFACE)
            switch.ip(f"link set p{index} master br0")
            machine = Machine(space, f"{NETWORK}.{index}")
            space.ip(f"addr add {machine.address}/24 dev {INTERFACE}")
            machines.append(machine)
        yield tuple(machines)
    finally:
        netns.delete(spaces)


@contextmanager
def nginx(machine: Machine, served: Path, folder: Path) -> Iterator[str]:
    """It serves the files of a folder as Debian's does; the URL of the folder."""
    program = nginx_program()
    require("nginx", program is not None, "needs nginx (./just setup)")
    assert program is not None
    folder.mkdir(exist_ok=True)
    settings = folder / "nginx.conf"
    settings.write_text(nginx_settings(served, folder, f"{machine.address}:{HTTP_PORT}"))
    command = [program, "-c", str(settings), "-p", str(folder), "-e", str(folder / "errors")]
    server = Server(machine.space, command, folder / "nginx.log")
    try:
        server.wait(lambda: _accepts(machine))
        yield f"http://{machine.address}"
    finally:
        server.close()


def _accepts(machine: Machine) -> bool:
    with machine.space.entered():
        try:
            socket.create_connection((machine.address, HTTP_PORT), 0.2).close()
        except OSError:
            return False
    return True
