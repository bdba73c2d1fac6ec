"""Is the other end of a link alive, and how far away is it?"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable

import trio

from tunnels.allowance import WAKE_S, Bucket, Rate
from tunnels.errors import BadFrame, LinkClosed
from tunnels.frames import Ping, Pong, Record, encode
from tunnels.link import CloseCode, ProvenLink
from tunnels.roundtrips import SAMPLES, RoundTrips

PING_INTERVAL_S = 1.0
CALM_INTERVAL_S = 10.0
"""Between pings on a session without streams whose peer answers: nothing waits there, and a node
has many such. Less than the 30 s after which the hastiest common NATs forget a mapping."""
SUSPECT_S = 3.0
DEAD_S = 10.0  # default of Endpoint(dead_after_s=...)
MAX_UNANSWERED = 10  # pings whose answers are still of interest
PINGS = Rate(per_s=10, burst=200)  # heard of a peer; after an outage many come at once


class Heartbeat:
    """I own the control channel of a proven link: I ping, answer pings and give the link up."""

    def __init__(
        self, proven: ProvenLink, dead_after_s: float, is_busy: Callable[[], bool]
    ) -> None:
        """is_busy: somebody would miss the peer. `stir` when that begins."""
        self._link = proven.link
        self._control = proven.control
        self._decoder = proven.decoder
        self._backlog = list(proven.backlog)
        self._dead_after_s = dead_after_s
        self._is_busy = is_busy
        self._stirred = trio.lowlevel.ParkingLot()
        self._pings = Bucket(PINGS, trio.current_time())
        self._numbers = itertools.count(1)
        self._sent: dict[int, float] = {}
        self._awaited: dict[int, trio.Event] = {}
        self.round_trips = RoundTrips()
        self.since_s = trio.current_time()
        self.suspected = False

    @property
    def rtt_s(self) -> float | None:
        return self.round_trips.least_s

    def stir(self) -> None:
        """The peer is asked at once whether it is there, where it was not just now."""
        self._stirred.unpark_all()

    async def ping(self) -> float:
        """One round trip over this link, in seconds. Waits for its answer, which may not come."""
        sent_at = trio.current_time()
        number = self._send_ping()
        answered = self._awaited[number] = trio.Event()
        try:
            await answered.wait()
        finally:
            del self._awaited[number]
        return trio.current_time() - sent_at

    async def run(self) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._listen)
            nursery.start_soon(self._beat)

    async def _listen(self) -> None:
        try:
            self._take(self._backlog)
            while data := await self._control.receive():
                began_s = time.thread_time()
                self._take(self._decoder.feed_untrusted(data))
                spent_s = WAKE_S + time.thread_time() - began_s
                self._link.share.charge(spent_s, trio.current_time())
            raise BadFrame("the control channel was ended")
        except BadFrame as error:
            self._link.close(CloseCode.PROTOCOL_ERROR, str(error))
        except LinkClosed:
            # The channel alone may be gone: without it the link is of no use.
            self._link.close(CloseCode.LINK_OVER, "the control channel is gone")

    def _take(self, records: list[Record]) -> None:
        answers = []
        for record in records:
            match record:
                case Ping(id=number):
                    if not self._pings.take(trio.current_time()):
                        raise BadFrame("pings come without end")
                    answers.append(encode(Pong(number)))
                case Pong(id=number):
                    if (sent_at := self._sent.pop(number, None)) is not None:
                        self.round_trips.add(trio.current_time() - sent_at)
                        self.suspected = False
                    if (answered := self._awaited.get(number)) is not None:
                        answered.set()
                case _:
                    raise BadFrame(f"a {type(record).__name__} record on the control channel")
        if answers:
            self._control.send(b"".join(answers))

    async def _beat(self) -> None:
        last_beat_s = trio.current_time()
        while True:
            now = trio.current_time()
            if now - last_beat_s > SUSPECT_S:
                # This process was asleep or calm, not the peer: its silence counts from now.
                self._link.last_heard_s = now
            last_beat_s = now
            silence_s = now - self._link.last_heard_s
            self.suspected = silence_s >= SUSPECT_S
            if silence_s >= self._dead_after_s:
                self._link.close(CloseCode.LINK_OVER, f"no answer for {silence_s:.0f} s")
                return
            if not await self._may_write():
                return
            number = self._send_ping()
            await trio.sleep(PING_INTERVAL_S)
            if number > SAMPLES and number not in self._sent and not self._is_busy():
                with trio.move_on_after(CALM_INTERVAL_S - PING_INTERVAL_S):
                    await self._stirred.park()

    def _send_ping(self) -> int:
        number = next(self._numbers)
        self._sent[number] = trio.current_time()
        self._sent.pop(number - MAX_UNANSWERED, None)
        self._control.send(encode(Ping(number)))
        return number

    async def _may_write(self) -> bool:
        """Closes the link of a peer that is heard and takes nothing of what we say."""
        with trio.move_on_after(self._dead_after_s):
            await self._control.wait_writable()
            return True
        self._link.close(CloseCode.LINK_OVER, "the other side takes nothing of what is sent")
        return False
