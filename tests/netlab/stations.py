"""Machines of the lab with a peer process on each, used again from try to try."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trio

from tests.netlab.expected import NEIGHBOURS, Cell
from tests.netlab.netns import Namespace
from tests.netlab.servers import coturn, miniupnpd
from tests.netlab.topology import STUN, STUN6, STUN_PORT, Internet, Site

_ROOT = Path(__file__).parent.parent.parent
RELAY_PORT = 443  # where even a network that lets out web pages only lets through
_ANSWER_S = 120.0  # no command takes that long


class Failed(Exception):
    """A command to a peer came to nothing; its own sentence."""


class Station:
    """One host, and the process there (peer.py). Its log is the file `log`.

    has_upnp: its router forwards ports when it is asked.
    """

    has_upnp = False

    def __init__(self, host: Namespace, process: trio.Process, log: Path) -> None:
        self.host = host
        self.log = log
        self._process = process
        self._heard = b""
        self._numbers = itertools.count()

    async def ask(self, command: str, **arguments: Any) -> dict[str, Any]:
        """Raises Failed with the peer's sentence."""
        assert self._process.stdin is not None
        number = next(self._numbers)
        line = json.dumps({"id": number, "do": command, **arguments}).encode() + b"\n"
        answer: dict[str, Any] = {"id": None}
        with trio.fail_after(_ANSWER_S):
            await self._process.stdin.send_all(line)
            while answer["id"] != number:  # of a question that nobody waits for any more
                answer = json.loads(await self._line())
        if "error" in answer:
            raise Failed(answer["error"])
        return answer

    async def _line(self) -> bytes:
        assert self._process.stdout is not None
        while b"\n" not in self._heard:
            piece = await self._process.stdout.receive_some()
            if not piece:
                raise OSError(f"the peer has ended: {self.log.read_text()[-2000:]}")
            self._heard += piece
        line, _, self._heard = self._heard.partition(b"\n")
        return line


@dataclass
class Place:
    """A site, and a station on each of its hosts."""

    site: Site
    stations: list[Station]


class Stations:
    """I make places as they are needed, and keep those that are free. STUN is answered.

    relay: the token of the one that all can reach.
    """

    relay: dict[str, Any]

    def __init__(self, net: Internet, logs: Path) -> None:
        self.net = net
        self._logs = logs
        self._free: dict[str, list[Place]] = defaultdict(list)
        self._processes: list[trio.Process] = []
        stun = [*STUN, *STUN6]
        self._servers = [coturn(net.servers, stun, STUN_PORT, logs)]

    @asynccontextmanager
    async def pair(self, cell: Cell) -> AsyncIterator[tuple[list[Site], Station, Station]]:
        """The cell's sites, its printer and its joiner, ours alone."""
        kinds = [cell.printer] if cell.printer in NEIGHBOURS else [cell.printer, cell.joiner]
        places = [await self._take(kind) for kind in kinds]
        printer, joiner = (station for place in places for station in place.stations)
        try:
            yield [place.site for place in places], printer, joiner
        finally:
            for kind, place in zip(kinds, places, strict=True):
                self._free[kind].append(place)

    async def station(self, host: Namespace) -> Station:
        log = self._logs / f"{host.name}.log"
        with log.open("wb") as file:
            process = await trio.lowlevel.open_process(
                [*host.prefix, sys.executable, "-m", "tests.netlab.peer"],
                cwd=_ROOT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
            )
        self._processes.append(process)
        return Station(host, process, log)

    async def start_relay(self) -> None:
        station = await self.station(self.net.relay)
        self.relay = await station.ask("start", stun=[], relays_at=RELAY_PORT)

    async def close(self) -> None:
        for process in self._processes:
            process.kill()
            await process.wait()
        for server in self._servers:
            server.close()

    async def _take(self, kind: str) -> Place:
        if self._free[kind]:
            return self._free[kind].pop()
        site = self.net.site(kind)
        stations = [await self.station(host) for host in site.hosts]
        if kind == "upnp":
            self._servers.append(miniupnpd(site.routers[0], self._logs))
            stations[0].has_upnp = True
        return Place(site, stations)


@asynccontextmanager
async def open_stations(net: Internet, logs: Path) -> AsyncIterator[Stations]:
    stations = Stations(net, logs)
    try:
        await stations.start_relay()
        yield stations
    finally:
        with trio.CancelScope(shield=True):
            await stations.close()
