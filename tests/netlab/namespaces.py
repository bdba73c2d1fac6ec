"""Hosts of our own: network namespaces joined by a veth pair, with counters nobody can fool."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from tests.conftest import require

NETWORK = "10.77.0"


@dataclass(frozen=True)
class Host:
    """One namespace with one interface."""

    namespace: str
    interface: str
    address: str

    @property
    def prefix(self) -> tuple[str, ...]:
        """What to put before a command to run it here."""
        ip = shutil.which("ip")
        assert ip is not None
        return (ip, "netns", "exec", self.namespace)

    def sent_bytes(self) -> int:
        """Bytes the kernel sent out of the interface, headers and all."""
        done = _ip("-n", self.namespace, "-s", "-j", "link", "show", "dev", self.interface)
        return int(json.loads(done)[0]["stats64"]["tx"]["bytes"])


@contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """Two machines on one cable. Needs root and iproute2."""
    usable = os.geteuid() == 0 and shutil.which("ip") is not None
    require("namespaces", usable, "needs root and iproute2 (./just setup)")
    number = os.getpid()
    hosts = tuple(
        Host(f"mesh-{side}-{number}", f"m{side}{number}", f"{NETWORK}.{index}")
        for index, side in enumerate("ab", start=1)
    )
    left, right = hosts
    try:
        for host in hosts:
            _ip("netns", "add", host.namespace)
        _ip(
            *("link", "add", left.interface, "netns", left.namespace, "type", "veth"),
            *("peer", "name", right.interface, "netns", right.namespace),
        )
        for host in hosts:
            inside = ("-n", host.namespace)
            _ip(*inside, "addr", "add", f"{host.address}/24", "dev", host.interface)
            _ip(*inside, "link", "set", host.interface, "up")
            _ip(*inside, "link", "set", "lo", "up")
        yield left, right
    finally:
        for host in hosts:
            subprocess.run(("ip", "netns", "del", host.namespace), check=False, capture_output=True)


def _ip(*arguments: str) -> str:
    done = subprocess.run(("ip", *arguments), check=False, capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout
