"""A local network of our own: namespaces on one bridge. Interfaces and addresses come and go."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from tests.conftest import require

NETWORK = "10.78.0"
_numbers = itertools.count()


@dataclass
class LanHost:
    """One namespace, with an interface `e0` on the bridge. Its addresses are in `addresses`."""

    namespace: str
    switch: str
    number: int
    addresses: list[str] = field(default_factory=list)

    @property
    def prefix(self) -> tuple[str, ...]:
        """What to put before a command to run it here."""
        ip = shutil.which("ip")
        assert ip is not None
        return (ip, "netns", "exec", self.namespace)

    def ip(self, *arguments: str) -> str:
        return _run("ip", "-n", self.namespace, *arguments)

    def plug_in(self, address: str | None = None) -> None:
        """A new cable to the switch, with this address (default: one of the network's)."""
        port = f"{self.switch[5:]}p{self.number}"
        _run(
            *("ip", "-n", self.switch, "link", "add", port, "type", "veth"),
            *("peer", "name", "e0", "netns", self.namespace),
        )
        _run("ip", "-n", self.switch, "link", "set", port, "master", "lan", "up")
        self.ip("link", "set", "e0", "up")
        self.add_address(address or f"{NETWORK}.{self.number}")

    def unplug(self) -> None:
        self.ip("link", "del", "e0")
        self.addresses.clear()

    def add_address(self, address: str) -> None:
        length = "64" if ":" in address else "24"
        options = ("nodad",) if ":" in address else ()
        self.ip("addr", "add", f"{address}/{length}", "dev", "e0", *options)
        self.addresses.append(address)

    def move_to(self, address: str) -> None:
        """Another address in place of all others."""
        self.ip("addr", "flush", "dev", "e0", "scope", "global")
        self.addresses.clear()
        self.add_address(address)

    def count(self, hook: str, port: int) -> None:
        """From now on `counted` knows of UDP datagrams to `port`; hook: "input" or "output"."""
        rules = (
            f"table inet count_{hook} {{\n chain counted {{\n type filter hook {hook} priority 0\n"
            f"udp dport {port} counter\n }}\n }}\n"
        )
        _run(*self.prefix, "nft", rules)

    def counted(self, hook: str) -> tuple[int, int]:
        """Packets and bytes since `count`."""
        rows = json.loads(
            _run(*self.prefix, "nft", "-j", "list", "chain", "inet", f"count_{hook}", "counted")
        )
        (rule,) = (row["rule"] for row in rows["nftables"] if "rule" in row)
        (counter,) = (one["counter"] for one in rule["expr"] if "counter" in one)
        return int(counter["packets"]), int(counter["bytes"])


@contextmanager
def lan(count: int) -> Iterator[list[LanHost]]:
    """`count` machines on one switch, 10.78.0.1 and so on. Needs root, iproute2 and nftables."""
    tools = all(shutil.which(tool) for tool in ("ip", "nft"))
    usable = os.geteuid() == 0 and tools
    require("namespaces", usable, "needs root, iproute2 and nftables (./just setup)")
    mark = f"{os.getpid()}x{next(_numbers)}"
    switch = f"lansw{mark}"
    hosts = [LanHost(f"lan{mark}h{number}", switch, number) for number in range(1, count + 1)]
    namespaces = [switch, *(host.namespace for host in hosts)]
    try:
        for namespace in namespaces:
            _run("ip", "netns", "add", namespace)
            _run("ip", "-n", namespace, "link", "set", "lo", "up")
        # Without snooping, as cheap switches are: with it, the first groups take seconds to show.
        bridge = ("type", "bridge", "mcast_snooping", "0", "forward_delay", "0")
        _run("ip", "-n", switch, "link", "add", "lan", *bridge)
        _run("ip", "-n", switch, "link", "set", "lan", "up")
        for host in hosts:
            host.plug_in()
        yield hosts
    finally:
        for namespace in namespaces:
            with contextlib.suppress(OSError):
                _run("ip", "netns", "del", namespace)


def _run(*command: str) -> str:
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout
