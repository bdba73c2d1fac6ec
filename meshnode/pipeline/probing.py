"""The `probe` service: bursts of bytes, by which whoever asks for them measures what comes in.

One stream a sounding (`sounding.py`): `{"give": bytes}`, answered with so many bytes, any number of
times until the asker closes it. To a far peer there are further ones beside the first, which share
each burst: the window of a single connection opens too slowly there. A node takes or gives one at a
time (bytes that go out hold up the acknowledgements of those that come in), and only where next to
nothing else has just gone over its links. Two that ask each other at once both give up, and one
comes back first.
"""

from __future__ import annotations

import logging
import random
import secrets
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import trio

from meshnode.errors import BadMessage, MeshError, NetworkError
from meshnode.messages import MessageStream
from meshnode.nurseries import bare_nursery
from meshnode.pipeline.sounding import (
    BURST_LIMIT_S,
    BURSTS_BYTES,
    MOST_BYTES,
    Sounding,
    Soundings,
)
from meshnode.pipeline.ways import MAX_WAYS, Way
from tunnels import Endpoint, PeerId, Session, Stream, StreamRefused, TunnelError
from tunnels.allowance import Rate
from tunnels.gate import ServiceLimits

PROBE_SERVICE = "probe"
PIECE_BYTES = 8 * 1024
STILL_S = 0.3
STILL_BYTES = 16 * 1024
"""In that time: what sessions say of themselves stays below it."""
STILL_FOR_S = 1.5
"""After which it is looked at again."""
MAX_SOUNDED = 24
"""Members, the nearest: as many as an orchestrator keeps in touch with, to borrow from."""
FAR_S, FAR_LINES = 0.002, 4
SOUNDING_LIMIT_S = 3.0
TURN_S = 0.4
"""For another sounding to end; who waits longer is told to come again."""
GOODBYE_S = 1.0
ATTEMPTS = 6
AGAIN_S = 0.5
# A plan asks for fresh rates of each link every 20 s at most, and a few times where it is busy.
GIVING = ServiceLimits(
    peer_streams=8, streams=64, peer_rate=Rate(1, burst=64), rate=Rate(16, burst=128)
)

log = logging.getLogger(__name__)


def parse_probe_untrusted(message: Mapping[str, Any]) -> int:
    """How many bytes the peer asks for. Raises `BadMessage` and nothing else."""
    size = message.get("give")
    if type(size) is not int or not 1 <= size <= BURSTS_BYTES[-1]:
        raise BadMessage("the peer asks for a burst of an unknown size")
    return size


class Probing:
    """I give soundings, take them, and know what was found.

    sessions: to members that may lend or borrow.
    """

    def __init__(self, sessions: Callable[[], Iterable[Session]]) -> None:
        self._sessions = sessions
        self._piece = secrets.token_bytes(PIECE_BYTES)  # that no wire makes smaller
        self._found = Soundings()
        self._line = trio.Lock()
        self._guest: PeerId | None = None
        self._guest_bytes = 0
        self._own_bytes = 0
        self._still_until_s = 0.0
        self._wanted = trio.Event()
        self._through = trio.Event()

    # -- giving -------------------------------------------------------------------------------

    def offer(self, endpoint: Endpoint) -> None:
        endpoint.serve(PROBE_SERVICE, self.serve, GIVING)

    async def serve(self, stream: Stream) -> None:
        try:
            if stream.peer == self._guest:
                await self._give(stream)
                return
            async with self._turn():
                self._guest, self._guest_bytes = stream.peer, 0
                try:
                    await self._give(stream)
                finally:
                    self._guest = None
        except (MeshError, TunnelError) as error:
            log.info("no sounding for %s: %s", stream.peer.short, error)
            stream.reset(str(error))
        except trio.TooSlowError:
            stream.reset(f"a sounding takes {SOUNDING_LIMIT_S:.0f} s at most")

    @asynccontextmanager
    async def _turn(self) -> AsyncIterator[None]:
        """The line for one sounding. Raises `NetworkError` where it is not free soon."""
        with trio.move_on_after(TURN_S) as limit:
            await self._line.acquire()
        if limit.cancelled_caught:
            raise NetworkError("this node takes or gives another sounding: ask again")
        try:
            if not await self._is_still():
                raise NetworkError("this node is busy: ask again later")
            yield
        finally:
            self._line.release()

    async def _give(self, stream: Stream) -> None:
        messages = MessageStream(stream)
        with trio.fail_after(SOUNDING_LIMIT_S):
            while (message := await messages.receive_or_end_untrusted()) is not None:
                size = parse_probe_untrusted(message)
                self._guest_bytes += size
                if self._guest_bytes > MOST_BYTES + FAR_LINES * PIECE_BYTES:
                    raise BadMessage("the peer asks for more than a sounding is")
                self._own_bytes += size
                for start in range(0, size, PIECE_BYTES):
                    await stream.send_all(self._piece[: size - start])
            await stream.send_eof()

    # -- taking -------------------------------------------------------------------------------

    def ways(self) -> tuple[Way, ...]:
        """What is known of links now."""
        now, told = trio.current_time(), []
        for session in self._nearest():
            found = self._found.find(session.peer, _path(session))
            rate, age_s = (found.bytes_per_s, now - found.at_s) if found else (None, 0.0)
            told.append(Way(session.peer, session.rtt_s, rate, age_s))
        return tuple(told)

    def want(self) -> None:
        """Somebody plans: what is not known, or old, is measured now if that disturbs nobody."""
        if self._due():
            self._wanted.set()

    async def settle(self) -> None:
        """Returns when what was due has been tried."""
        if self._due():
            through = self._through
            self._wanted.set()
            await through.wait()

    async def run(self) -> None:
        """Takes soundings when they are wanted, one after the other."""
        while True:
            await self._wanted.wait()
            self._wanted = trio.Event()
            due, attempts = self._due(), ATTEMPTS
            while due and attempts:
                due = [session for session in due if not await self._sound(session)]
                attempts -= 1
                if due:
                    await trio.sleep(random.uniform(0, AGAIN_S))  # noqa: S311 - no secret
            self._through.set()
            self._through = trio.Event()

    def _nearest(self) -> Sequence[Session]:
        known = [one for one in self._sessions() if one.rtt_s is not None and not one.suspected]
        return sorted(known, key=lambda one: one.rtt_s or 0.0)[:MAX_WAYS]

    def _due(self) -> list[Session]:
        now, sessions = trio.current_time(), self._nearest()[:MAX_SOUNDED]
        self._found.forget_others({session.peer for session in sessions})
        return [one for one in sessions if self._found.is_due(one.peer, _path(one), now)]

    async def _sound(self, session: Session) -> bool:
        """Whether that was all that can be done now."""
        path, sounding = _path(session), Sounding()
        try:
            async with self._turn():
                with trio.move_on_after(SOUNDING_LIMIT_S):
                    await self._take(session, sounding)
        except StreamRefused as error:
            log.info("%s gives no soundings: %s", session.peer.short, error)
        except (MeshError, TunnelError) as error:
            log.info("no rate of the link to %s: %s", session.peer.short, error)
            return session.closed.is_set()
        if _path(session) == path:
            self._found.keep(session.peer, path, sounding.bytes_per_s, trio.current_time())
        return True

    async def _take(self, session: Session, sounding: Sounding) -> None:
        async with AsyncExitStack() as stack:
            lines = [await stack.enter_async_context(_opened(session))]
            while (size := sounding.next_bytes()) is not None:
                if size != BURSTS_BYTES[0] and len(lines) == 1 and (session.rtt_s or 0.0) >= FAR_S:
                    for _ in range(FAR_LINES - 1):
                        lines.append(await stack.enter_async_context(_opened(session)))
                    await self._draw(lines[1:], PIECE_BYTES * len(lines[1:]), lambda _count: None)
                sounding.ask(size, trio.current_time())
                with trio.CancelScope() as limit:

                    def arrive(count: int, limit: trio.CancelScope = limit) -> None:
                        now = trio.current_time()
                        sounding.arrive(count, now)
                        limit.deadline = min(limit.deadline, now + BURST_LIMIT_S)

                    await self._draw(lines, size, arrive)

    async def _draw(
        self, lines: Sequence[Stream], size: int, arrive: Callable[[int], None]
    ) -> None:
        """A burst, the same part of it over each line."""

        async def draw(stream: Stream, left: int) -> None:
            await MessageStream(stream).send({"give": left})
            while left:
                data = await stream.receive_some(left)
                if not data:
                    raise NetworkError("the peer gave less than it was asked for")
                left -= len(data)
                self._own_bytes += len(data)
                arrive(len(data))

        async with bare_nursery() as nursery:
            for stream in lines:
                nursery.start_soon(draw, stream, size // len(lines))

    async def _is_still(self) -> bool:
        """Whether next to nothing goes over this node's links, other soundings left out."""
        if trio.current_time() < self._still_until_s:
            return True
        sessions = list(self._sessions())
        before, own_before = _bytes(sessions), self._own_bytes
        await trio.sleep(STILL_S)
        own_bytes = 1.1 * (self._own_bytes - own_before)
        is_still = _bytes(sessions) - before < STILL_BYTES + own_bytes
        self._still_until_s = trio.current_time() + STILL_FOR_S if is_still else 0.0
        return is_still


@asynccontextmanager
async def _opened(session: Session) -> AsyncIterator[Stream]:
    stream = await session.open(PROBE_SERVICE)
    try:
        yield stream
    finally:
        with trio.move_on_after(GOODBYE_S, shield=True):
            await stream.aclose()


def _bytes(sessions: Iterable[Session]) -> int:
    return sum(one.stats.bytes_in + one.stats.bytes_out for one in sessions)


def _path(session: Session) -> str:
    """Which link is in use: another one has another rate."""
    stats = session.stats
    return f"{stats.link_kind} {stats.remote}"
