"""A home router that maps ports when asked: NAT by the kernel, the asking heard by miniupnpd."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.conftest import require
from tests.netlab.netns import Namespace, cable, can_be_made, delete, make

INSIDE, ROUTER, WAN, OUTSIDE = "192.168.79.20", "192.168.79.1", "11.0.79.1", "11.0.79.2"
_UUID = "7c1f2f6e-0000-4000-8000-000000000079"
_RULES = """
table inet upnp {
 chain forward {
  type filter hook forward priority filter; policy drop
  ct state established,related accept
  iifname "lan" accept
  jump miniupnpd
 }
 chain miniupnpd { }
 chain prerouting {
  type nat hook prerouting priority dstnat
  jump prerouting_miniupnpd
 }
 chain prerouting_miniupnpd { }
 chain postrouting {
  type nat hook postrouting priority srcnat
  jump postrouting_miniupnpd
  oifname "wan" masquerade
 }
 chain postrouting_miniupnpd { }
 chain input {
  type filter hook input priority filter
  iifname "wan" ct state new drop
 }
}
"""
# NAT-PMP and PCP share a port; the first byte of a question is its version.
_WITHOUT = {"PCP": "udp dport 5351 @th,64,8 2 drop", "NAT-PMP": "udp dport 5351 @th,64,8 0 drop"}


@dataclass
class UpnpRouter:
    """Three machines: one inside, the router, one outside. speaks: the ways of asking it takes."""

    inside: Namespace
    router: Namespace
    outside: Namespace
    folder: Path
    speaks: tuple[str, ...] = ("PCP", "NAT-PMP", "UPnP")
    _daemon: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Or start again, with nothing left of what was mapped."""
        self.stop()
        rules = _RULES
        for way, rule in _WITHOUT.items():
            if way not in self.speaks:
                rules = rules.replace('iifname "wan" ct', f'{rule}\n  iifname "wan" ct')
        self.router.nft("flush ruleset\n" + rules)
        upnp = "yes" if "UPnP" in self.speaks else "no"
        config = self.folder / "miniupnpd.conf"
        config.write_text(
            "ext_ifname=wan\nlistening_ip=lan\nhttp_port=0\n"
            f"enable_natpmp=yes\nenable_upnp={upnp}\nsecure_mode=yes\nmin_lifetime=2\n"
            "upnp_table_name=upnp\nupnp_nat_table_name=upnp\nipv6_disable=yes\n"
            f"uuid={_UUID}\nallow 1024-65535 0.0.0.0/0 1024-65535\n"
        )
        program = shutil.which("miniupnpd", path=f"{os.environ['PATH']}:/usr/sbin")
        assert program is not None
        command = [*self.router.prefix, program, "-d", "-f", str(config)]
        command += ["-P", str(self.folder / "pid")]
        with (self.folder / "miniupnpd.log").open("ab") as log:
            self._daemon = subprocess.Popen(command, stdout=log, stderr=log)

    def stop(self) -> None:
        if self._daemon is not None:
            self._daemon.terminate()
            self._daemon.wait(10)
            self._daemon = None

    def mapped(self) -> str:
        """What leads inside now, in nft's words."""
        chain = ("list", "chain", "inet", "upnp", "prerouting_miniupnpd")
        return "\n".join(
            line.strip() for line in self.router.run("nft", *chain).splitlines() if "dnat" in line
        )


@contextmanager
def upnp_router(folder: Path) -> Iterator[UpnpRouter]:
    """Not yet started: call `start`. Needs root, iproute2, nftables, conntrack and miniupnpd."""
    require("namespaces", can_be_made(), "needs root and iproute2, nft, conntrack (./just setup)")
    found = shutil.which("miniupnpd", path=f"{os.environ['PATH']}:/usr/sbin")
    require("miniupnpd", found is not None, "needs miniupnpd (./just setup)")
    names = [f"upnp{os.getpid()}{side}" for side in ("in", "router", "out")]
    spaces = make(names)
    try:
        inside, router, outside = spaces
        cable(inside, "e0", router, "lan")
        cable(outside, "e0", router, "wan")
        router.sysctl(ipv4__ip_forward=1)
        router.ip(f"addr add {ROUTER}/24 dev lan", f"addr add {WAN}/24 dev wan")
        inside.ip(f"addr add {INSIDE}/24 dev e0", f"route add default via {ROUTER}")
        outside.ip(f"addr add {OUTSIDE}/24 dev e0")
        lab = UpnpRouter(inside, router, outside, folder)
        try:
            yield lab
        finally:
            lab.stop()
    finally:
        delete(spaces)
