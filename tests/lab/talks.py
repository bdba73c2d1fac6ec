"""Streams that are in use while things happen to the network."""

from __future__ import annotations

import random

import trio

from tunnels import Stream


class Talk:
    """A stream to `echo` over which bytes go there and back all the time, each looked at."""

    def __init__(
        self, stream: Stream, seed: int, chunk_bytes: int = 1000, every_s: float = 0.05
    ) -> None:
        self.stream = stream
        self.heard_at_s = 0.0
        self._chunk_bytes = chunk_bytes
        self._every_s = every_s
        self._dice = random.Random(seed)
        self._sent = bytearray()
        self._received = 0
        self._more_bytes = 0
        self._news = trio.lowlevel.ParkingLot()

    def burst(self, size_bytes: int) -> None:
        """So many bytes besides, at once."""
        self._more_bytes += size_bytes

    async def run(self, until: trio.Event) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._hear)
            while not until.is_set():
                data = self._dice.randbytes(self._chunk_bytes + self._more_bytes)
                self._more_bytes = 0
                self._sent += data
                await self.stream.send_all(data)
                await trio.sleep(self._every_s)
            await self.stream.send_eof()
        assert self._received == len(self._sent), "not a byte lost or doubled"

    async def heard_after(self, moment_s: float) -> None:
        while self.heard_at_s <= moment_s:
            await self._news.park()

    async def _hear(self) -> None:
        while data := await self.stream.receive_some():
            assert data == self._sent[self._received : self._received + len(data)]
            self._received += len(data)
            self.heard_at_s = trio.current_time()
            self._news.unpark_all()
