"""Real servers of the lab: coturn, which tells hosts their addresses, and routers' miniupnpd."""

from __future__ import annotations

import shutil
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from tests.netlab.netns import Namespace

UP_WITHIN_S = 30.0
_COTURN = "-n --no-cli --no-tls --no-dtls --no-rfc5780 --log-file=stdout -m 1"
TURN_USER, TURN_PASSWORD = "lab", "correct horse"
_TURN = ("-a", "-r", "lab", "-u", f"{TURN_USER}:{TURN_PASSWORD}")
_UPNP_TABLE = """
table inet upnp {
 chain forward {
  type filter hook forward priority filter - 1
  jump miniupnpd
 }
 chain prerouting {
  type nat hook prerouting priority dstnat - 1
  jump prerouting_miniupnpd
 }
 chain postrouting {
  type nat hook postrouting priority srcnat - 1
  jump postrouting_miniupnpd
 }
 chain miniupnpd {
 }
 chain prerouting_miniupnpd {
 }
 chain postrouting_miniupnpd {
 }
}
"""


class Server:
    """A program in a namespace."""

    def __init__(self, space: Namespace, command: list[str], log: Path) -> None:
        with log.open("wb") as file:
            self._process = subprocess.Popen(
                [*space.prefix, *command], stdout=file, stderr=subprocess.STDOUT
            )
        self._log = log

    def wait(self, is_up: Callable[[], bool]) -> None:
        """Raises OSError when it has ended."""
        until_s = time.monotonic() + UP_WITHIN_S
        while not is_up():
            if self._process.poll() is not None or time.monotonic() > until_s:
                raise OSError(self._log.read_text())
            time.sleep(0.02)

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


def can_run(*programs: str) -> bool:
    return all(_program(name) for name in programs)


def coturn(
    space: Namespace, hosts: list[str], port: int, folder: Path, *, carries: bool = False
) -> Server:
    """It answers STUN on all of `hosts`. carries: TURN too, for TURN_USER; at the first also on
    port 443, where those come who are let out nowhere else."""
    listen = [option for host in hosts for option in ("-L", host)]
    files = [f"--userdb={folder / 'turn.db'}", f"--pidfile={folder / 'turn.pid'}"]
    serves = (*_TURN, f"--aux-server={hosts[0]}:443") if carries else ("--stun-only",)
    command = [_program("turnserver"), *_COTURN.split(), *serves, "-p", str(port), *listen, *files]
    server = Server(space, command, folder / "coturn.log")
    server.wait(lambda: all(_answers(space, host, port) for host in hosts))
    return server


def miniupnpd(router: Namespace, folder: Path) -> Server:
    """It maps ports of `wan` for hosts on `lan`: UPnP, NAT-PMP and PCP."""
    router.nft(_UPNP_TABLE)
    name = router.name
    settings = folder / f"{name}.conf"
    settings.write_text(
        "ext_ifname=wan\nlistening_ip=lan\nenable_natpmp=yes\nenable_upnp=yes\nsecure_mode=yes\n"
        "upnp_table_name=upnp\nupnp_nat_table_name=upnp\nmin_lifetime=120\nmax_lifetime=86400\n"
        "allow 1-65535 0.0.0.0/0 1-65535\n"
    )
    command = [_program("miniupnpd"), "-d", "-f", str(settings), "-P", str(folder / f"{name}.pid")]
    server = Server(router, command, folder / f"{name}.log")
    server.wait(lambda: _listens(router, 5351))
    return server


def _program(name: str) -> str:
    return shutil.which(name) or shutil.which(name, path="/usr/sbin:/sbin") or ""


def _answers(space: Namespace, host: str, port: int) -> bool:
    """A Binding request is answered."""
    with space.udp(host) as asking:
        asking.settimeout(0.2)
        asking.sendto(bytes.fromhex("000100002112a442") + bytes(12), (host, port))
        try:
            return asking.recv(2000)[:2] == b"\x01\x01"
        except OSError:
            return False


def _listens(space: Namespace, port: int) -> bool:
    with space.entered(), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
        try:
            one.bind(("0.0.0.0", port))
        except OSError:
            return True
    return False
