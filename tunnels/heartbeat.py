"""Is the other end of a link alive, and how far away is it?

A link that is only silent is never closed here: the silence may be the network's, and a link over
which something comes again is the quickest way back. Who has a better one decides (links.py).
"""

from __future__ import annotations

import itertools
import math
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
DOUBT_S = 0.5  # and two round trips, once there is a reason to doubt that it still leads there
DEAD_S = 120.0  # default of Endpoint(dead_after_s=...)
UNTAKEN_S = 10.0  # a peer that is heard, and takes nothing
# Of pings without an answer no more are said: links deliver, or try again by themselves, and after
# an outage all of them would come at once.
MAX_UNANSWERED = 10
PINGS = Rate(per_s=10, burst=200)  # heard of a peer; after an outage many come at once


class Heartbeat:
    """I own the control channel of a proven link: I ping, answer pings and tell silence."""

    def __init__(self, proven: ProvenLink, is_busy: Callable[[], bool]) -> None:
        """is_busy: somebody would miss the peer. `stir` when that begins."""
        self._link = proven.link
        self._control = proven.control
        self._decoder = proven.decoder
        self._backlog = list(proven.backlog)
        self._is_busy = is_busy
        self._stirred = trio.lowlevel.ParkingLot()
        self._pings = Bucket(PINGS, trio.current_time())
        self._numbers = itertools.count(1)
        self._sent: dict[int, float] = {}
        self._awaited: dict[int, trio.Event] = {}
        self._asked_s = trio.current_time()  # first, since something was heard
        self._doubted_s = -math.inf
        self.round_trips = RoundTrips()
        self.since_s = trio.current_time()

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

    # --- silence ------------------------------------------------------------------------

    @property
    def suspected(self) -> bool:
        """Nothing was heard for SUSPECT_S, or sooner where there was doubt."""
        now = trio.current_time()
        if self.doubted and now - self._doubted_s >= DOUBT_S + 2 * (self.rtt_s or 0.0):
            return True
        return self.silence_s >= SUSPECT_S

    @property
    def silence_s(self) -> float:
        """How long a peer that was asked something has said nothing."""
        heard_s = self._link.last_heard_s
        if self._asked_s <= heard_s:
            return 0.0
        # That it was not asked before is no silence of its own.
        return trio.current_time() - max(heard_s, self._asked_s - PING_INTERVAL_S)

    @property
    def doubted(self) -> bool:
        """And nothing heard since."""
        return self._link.last_heard_s < self._doubted_s

    def doubt(self) -> None:
        """Something has happened that may have cut the link: ask now."""
        self._doubted_s = trio.current_time()
        if len(self._sent) < MAX_UNANSWERED:
            self._send_ping()
        self.stir()

    def give_up_after(self, limit_s: float) -> None:
        if (silence_s := self.silence_s) >= limit_s:
            self._link.close(CloseCode.LINK_OVER, f"no answer for {silence_s:.0f} s")

    # --- the control channel ------------------------------------------------------------

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
                    if (answered := self._awaited.get(number)) is not None:
                        answered.set()
                case _:
                    raise BadFrame(f"a {type(record).__name__} record on the control channel")
        if answers:
            self._control.send(b"".join(answers))

    async def _beat(self) -> None:
        number = 0
        while True:
            if not await self._may_write():
                return
            if len(self._sent) < MAX_UNANSWERED:
                number = self._send_ping()
            await trio.sleep(PING_INTERVAL_S)
            if number > SAMPLES and number not in self._sent and not self._is_busy():
                with trio.move_on_after(CALM_INTERVAL_S - PING_INTERVAL_S):
                    await self._stirred.park()

    def _send_ping(self) -> int:
        now = trio.current_time()
        if self._asked_s <= self._link.last_heard_s:
            self._asked_s = now
        number = next(self._numbers)
        self._sent[number] = now
        self._sent.pop(number - MAX_UNANSWERED, None)
        self._control.send(encode(Ping(number)))
        return number

    async def _may_write(self) -> bool:
        """Ends the session of a peer that is heard and takes nothing of what we say."""
        with trio.move_on_after(UNTAKEN_S):
            await self._control.wait_writable()
            return True
        reason = "the other side takes nothing of what is sent"
        self._link.close(CloseCode.SESSION_OVER, reason)
        return False
