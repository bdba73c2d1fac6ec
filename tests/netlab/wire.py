"""Cables with a length: packets between two TUN interfaces, late, lost, limited or out of order.

`python -m tests.netlab.wire` is a process with any number of them; it takes a JSON object a line
and answers each with a line:

    {"add": "home", "ends": [["/run/netns/a", "wan"], ["/run/netns/b", "s1"]]}
    {"set": "home", "delay_s": 0.01, "jitter_s": 0, "loss": 0, "bytes_per_s": 1e6, "cut": false}

What `set` leaves out is as it was. Each direction: a packet is lost with probability `loss`, waits
until the ones before it have gone (`bytes_per_s`; more than QUEUE_S of them is dropped), then takes
`delay_s` and up to `jitter_s`, which changes the order of packets. `Wires` is its other end.
"""

from __future__ import annotations

import fcntl
import heapq
import json
import math
import os
import random
import select
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tests.netlab.netns import Namespace

QUEUE_S = 0.2
_PACKET_BYTES = 65535
_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
_ROOT = Path(__file__).parent.parent.parent


@dataclass(frozen=True)
class Weather:
    """delay_s: one way, as all of this is."""

    delay_s: float = 0.0
    jitter_s: float = 0.0
    loss: float = 0.0
    bytes_per_s: float = math.inf
    cut: bool = False


@dataclass
class Direction:
    """weather: asked for each packet, so that it may change. dice: in [0, 1)."""

    weather: Callable[[], Weather]
    dice: Callable[[], float]
    _sent_until_s: float = field(default=0.0, init=False)

    def arrival(self, size_bytes: int, now: float) -> float | None:
        """When a packet that is sent now gets there; None: never."""
        weather = self.weather()
        if weather.cut or (weather.loss and self.dice() < weather.loss):
            return None
        start_s = max(now, self._sent_until_s)
        if start_s - now > QUEUE_S:
            return None
        self._sent_until_s = start_s + size_bytes / weather.bytes_per_s
        jitter_s = weather.jitter_s * self.dice() if weather.jitter_s else 0.0
        return self._sent_until_s + weather.delay_s + jitter_s


def open_tun(path: str, name: str) -> int:
    """The descriptor of a new interface in the namespace at `path`; the two go together."""
    with Namespace(Path(path).name).entered():
        tun = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(tun, _TUNSETIFF, struct.pack("16sH22x", name.encode(), _IFF_TUN | _IFF_NO_PI))
    return tun


class DelayLine:
    """All the wires of one process."""

    def __init__(self) -> None:
        self._weather: dict[str, Weather] = {}
        self._ways: dict[int, tuple[int, Direction]] = {}  # by descriptor: where to, and how
        self._flying: list[tuple[float, int, int, bytes]] = []  # arrival, number, to, packet
        self._number = 0

    def obey(self, line: str) -> None:
        command: dict[str, Any] = json.loads(line)
        if name := command.pop("add", None):
            self._weather[name] = Weather()
            one, other = (open_tun(*end) for end in command["ends"])
            for source, to in ((one, other), (other, one)):
                dice = random.Random(f"{name} {source < to}").random
                self._ways[source] = (to, Direction(lambda: self._weather[name], dice))
        else:
            name = command.pop("set")
            for source in self._ways:  # what was sent before had the weather before
                self._take_off(source)
            self._weather[name] = replace(self._weather[name], **command)

    def run(self) -> None:
        """Until standard input ends."""
        commands = sys.stdin.fileno()
        while True:
            wait_s = None
            if self._flying:
                wait_s = max(0.0, self._flying[0][0] - time.monotonic())
            ready, _, _ = select.select([commands, *self._ways], [], [], wait_s)
            self._land()
            for source in ready:
                if source != commands:
                    self._take_off(source)
                elif line := sys.stdin.readline():
                    self.obey(line)
                    print("done", flush=True)
                else:
                    return

    def _take_off(self, source: int) -> None:
        to, direction = self._ways[source]
        with suppress(OSError):  # nothing more is there, or the interface is down
            while True:
                packet = os.read(source, _PACKET_BYTES)
                arrival_s = direction.arrival(len(packet), time.monotonic())
                if arrival_s is not None:
                    self._number += 1
                    heapq.heappush(self._flying, (arrival_s, self._number, to, packet))

    def _land(self) -> None:
        now = time.monotonic()
        while self._flying and self._flying[0][0] <= now:
            _, _, to, packet = heapq.heappop(self._flying)
            with suppress(OSError):
                os.write(to, packet)


class Wires:
    """I own a process of them."""

    def __init__(self) -> None:
        command = [sys.executable, "-m", "tests.netlab.wire"]
        self._process = subprocess.Popen(
            command, cwd=_ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def add(self, name: str, one: tuple[Namespace, str], other: tuple[Namespace, str]) -> None:
        """A wire between two new interfaces, which are left down."""
        self._tell({"add": name, "ends": [[end.path, label] for end, label in (one, other)]})

    def set(self, name: str, **weather: float | bool) -> None:
        """Fields of Weather; the others stay."""
        self._tell({"set": name, **weather})

    def close(self) -> None:
        self._process.communicate(timeout=30)

    def _tell(self, command: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()
        if self._process.stdout.readline() != "done\n":
            raise OSError(f"the wires are gone, at {command}")


if __name__ == "__main__":
    DelayLine().run()
