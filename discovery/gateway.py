"""The router that leads to the internet: where the default route of this machine points to."""

from __future__ import annotations

import ipaddress
import shutil
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import trio

_PROC_ROUTE = Path("/proc/net/route")
_RTF_UP_GATEWAY = 0x3  # linux/route.h
_COMMANDS = (("route", "-n", "get", "default"), ("netstat", "-rn"))
COMMAND_TIMEOUT_S = 5.0
_ANY_PORT = 9  # "connecting" a UDP socket sends nothing


@dataclass(frozen=True)
class Gateway:
    """IPv4 literals. ours: the address by which this machine talks to it."""

    address: str
    ours: str


async def find_gateway() -> Gateway | None:
    """None without a default route for IPv4, or where it leads into a tunnel without a router."""
    if sys.platform == "linux":
        address = _read_linux()
    else:
        address = await trio.to_thread.run_sync(_ask_system)
    ours = None if address is None else _our_address_towards(address)
    return None if address is None or ours is None else Gateway(address, ours)


def _read_linux() -> str | None:
    try:
        return parse_proc_route(_PROC_ROUTE.read_text(encoding="ascii"))
    except OSError:
        return None


def parse_proc_route(text: str) -> str | None:
    """The gateway of the default route with the lowest metric, in proc(5)'s /proc/net/route."""
    best: tuple[int, str] | None = None
    for line in text.splitlines()[1:]:
        words = line.split()
        if len(words) < 8 or words[1] != "00000000" or words[7] != "00000000":
            continue
        if int(words[3], 16) & _RTF_UP_GATEWAY != _RTF_UP_GATEWAY:
            continue
        # The number is as the kernel holds it in memory: in network order.
        packed = int(words[2], 16).to_bytes(4, sys.byteorder)
        found = int(words[6]), str(ipaddress.IPv4Address(packed))
        best = found if best is None else min(best, found)
    return None if best is None else best[1]


def _ask_system() -> str | None:
    """`route` of the BSDs and macOS, then `netstat`, which Windows has too."""
    for command in _COMMANDS:
        if shutil.which(command[0]) is None:
            continue
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, check=False, timeout=COMMAND_TIMEOUT_S
            )
        except (OSError, subprocess.TimeoutExpired):
            continue
        if (found := parse_routes(done.stdout)) is not None:
            return found
    return None


def parse_routes(text: str) -> str | None:
    """The default gateway in what `route -n get default` or `netstat -rn` print."""
    for line in text.splitlines():
        words = line.split()
        match words:
            case ["gateway:", gateway]:
                pass
            case ["default", gateway, *_]:
                pass
            case ["0.0.0.0", "0.0.0.0", gateway, *_]:  # noqa: S104 - as Windows prints it
                pass
            case _:
                continue
        try:
            return str(ipaddress.IPv4Address(gateway))
        except ValueError:
            continue  # "link#4", "On-link", an IPv6 one
    return None


def _our_address_towards(address: str) -> str | None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((address, _ANY_PORT))
        except OSError:
            return None
        return str(probe.getsockname()[0])
