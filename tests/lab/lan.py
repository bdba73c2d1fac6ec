"""A local network made of memory: what multicast DNS is between the nodes of a test."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import trio

from discovery.announcement import Announcement, parse_announcement_untrusted
from discovery.mdns import MdnsFailed
from tests.lab.parties import Party
from tunnels import Candidate, PeerId


class FakeLan:
    """Everyone hears everyone."""

    def __init__(self) -> None:
        self.stations: list[Station] = []
        self.works = True
        self.failing_scans = self.scans = 0

    @asynccontextmanager
    async def open(self, _only_host: str | None = None) -> AsyncIterator[Station]:
        if not self.works:
            raise MdnsFailed("multicast DNS cannot be used here: the test says so")
        station = Station(self)
        self.stations.append(station)
        try:
            yield station
        finally:
            self.stations.remove(station)

    def last_word_of(self, node: Party) -> Announcement:
        words = [parse_announcement_untrusted(one.said[-1]) for one in self.stations]
        return next(word for word in words if word.peer == node.peer)

    def say(self, record: bytes) -> None:
        for station in self.stations:
            station.hear(record)


class Station:
    """One node's `Mdns`."""

    def __init__(self, lan: FakeLan) -> None:
        self.said: list[bytes] = []
        self._lan = lan
        self._send, self._receive = trio.open_memory_channel[bytes](1000)

    def hear(self, record: bytes) -> None:
        self._send.send_nowait(record)

    async def announce(self, _peer: PeerId, record: bytes, _places: Sequence[Candidate]) -> None:
        await trio.lowlevel.checkpoint()
        self.said.append(record)
        self._lan.say(record)

    async def heard(self) -> list[bytes]:
        return [await self._receive.receive()]

    async def ask(self) -> None:
        await trio.sleep_forever()

    def ask_now(self) -> None:
        for station in self._lan.stations:
            for record in station.said[-1:]:
                self.hear(record)

    async def rescan(self) -> None:
        await trio.lowlevel.checkpoint()
        self._lan.scans += 1
        if self._lan.scans <= self._lan.failing_scans:
            raise MdnsFailed("an interface has gone meanwhile")
