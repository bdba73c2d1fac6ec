"""A network namespace: made, entered, configured, deleted."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import socket
import subprocess
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

_CLONE_NEWNET = 0x40000000
_libc = ctypes.CDLL(None, use_errno=True)


def can_be_made() -> bool:
    """Needs root, iproute2, nftables and conntrack."""
    return os.geteuid() == 0 and all(shutil.which(tool) for tool in ("ip", "nft", "conntrack"))


@dataclass(frozen=True)
class Namespace:
    name: str

    @property
    def path(self) -> str:
        return f"/run/netns/{self.name}"

    @property
    def prefix(self) -> tuple[str, ...]:
        """What to put before a command to run it here."""
        ip = shutil.which("ip")
        assert ip is not None
        return (ip, "netns", "exec", self.name)

    @contextmanager
    def entered(self) -> Iterator[None]:
        """This thread, and what it starts, is in the namespace. Nothing may be awaited in here."""
        home = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
        try:
            _enter(self.path)
            try:
                yield
            finally:
                _enter(home)
        finally:
            os.close(home)

    def run(self, *command: str, stdin: str = "") -> str:
        with self.entered():
            return run(*command, stdin=stdin)

    def ip(self, *lines: str) -> None:
        """`ip` commands, as one batch."""
        self.run("ip", "-batch", "-", stdin="\n".join(lines))

    def nft(self, rules: str) -> None:
        self.run("nft", "-f", "-", stdin=rules)

    def sysctl(self, **settings: int | str) -> None:
        """Below net, where there is such a thing; a dot is two underscores: ipv4__ip_forward."""
        with self.entered():
            for name, value in settings.items():
                with contextlib.suppress(FileNotFoundError):
                    Path("/proc/sys/net", *name.split("__")).write_text(str(value))

    def udp(self, host: str, port: int = 0) -> socket.socket:
        """A socket that stays in the namespace, wherever it is used."""
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with self.entered():
            one = socket.socket(family, socket.SOCK_DGRAM)
            one.bind((host, port))
        return one


def make(names: Iterable[str]) -> list[Namespace]:
    """All at once, with loopback up."""
    spaces = [Namespace(name) for name in names]
    run("ip", "-batch", "-", stdin="\n".join(f"netns add {one.name}" for one in spaces))
    for one in spaces:
        # An address is good at once, in both families; nothing is said that was not asked for.
        one.sysctl(ipv6__conf__default__accept_dad=0, ipv6__conf__all__accept_dad=0)
        one.sysctl(ipv6__conf__default__router_solicitations=0)
        one.ip("link set lo up")
    return spaces


def delete(spaces: Iterable[Namespace]) -> None:
    names = [f"netns del {one.name}" for one in spaces]
    with contextlib.suppress(OSError):
        run("ip", "-force", "-batch", "-", stdin="\n".join(names))


def cable(one: Namespace, name: str, other: Namespace, other_name: str) -> None:
    """Two interfaces, up, joined to each other."""
    run(
        *("ip", "link", "add", name, "netns", one.name, "type", "veth"),
        *("peer", "name", other_name, "netns", other.name),
    )
    one.ip(f"link set {name} up")
    other.ip(f"link set {other_name} up")


def run(*command: str, stdin: str = "") -> str:
    done = subprocess.run(command, input=stdin, check=False, capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"{' '.join(command)}: {done.stderr.strip()}\n{stdin}")
    return done.stdout


def _enter(where: str | int) -> None:
    opened = os.open(where, os.O_RDONLY) if isinstance(where, str) else where
    try:
        if _libc.setns(opened, _CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"cannot enter {where}")
    finally:
        if isinstance(where, str):
            os.close(opened)
