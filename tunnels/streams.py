"""The streams of one session: those that are open, what they share, and those that are over."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Collection, Iterator

import trio

from tunnels.credit import Pool, ReceiveWindow
from tunnels.links import Links
from tunnels.peer import PeerId
from tunnels.resume import StreamState
from tunnels.session_tasks import SessionTasks
from tunnels.stream import Stream

MAX_STREAMS = 100  # open at once in one session; a QUIC link carries 128 channels each way
QUIET_SERVICES = frozenset({"reserve"})  # held open for days; a peer is not watched for it
SEE_OFF_S = 30.0  # for the other side to acknowledge more of a stream that was closed here
REMEMBERED_STREAMS = 1024  # finished ones: a late RESUME is told so


class Streams(Collection[Stream]):
    """I know which streams take up room, and see off those that were closed here.

    Each side counts the streams that it opens: (opened here, number) is what tells one from all
    others.
    """

    def __init__(self, peer: PeerId, links: Links, tasks: SessionTasks, window_bytes: int) -> None:
        """window_bytes: what may be sent on a stream of ours before the peer allows more."""
        self._peer = peer
        self._links = links
        self._tasks = tasks
        self._window_bytes = window_bytes
        self._open: dict[tuple[bool, int], Stream] = {}
        self._finished: OrderedDict[tuple[bool, int], None] = OrderedDict()
        self._overtaken: OrderedDict[int, None] = OrderedDict()
        self._next_number = 0
        self._changed = trio.lowlevel.ParkingLot()
        self._receiving = Pool()
        self._keeping = Pool()

    # --- which --------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self._open)

    def __iter__(self) -> Iterator[Stream]:
        return iter(list(self._open.values()))

    def __contains__(self, stream: object) -> bool:
        return isinstance(stream, Stream) and self._open.get(_key(stream)) is stream

    @property
    def are_full(self) -> bool:
        return len(self._open) >= MAX_STREAMS

    @property
    def are_busy(self) -> bool:
        """Somebody would miss the peer."""
        return any(stream.service not in QUIET_SERVICES for stream in self._open.values())

    def of_peer(self, number: int) -> Stream | None:
        """The one that the peer opened under this number."""
        return self._open.get((False, number))

    def is_new(self, number: int) -> bool:
        """Whether the peer has not opened one under this number yet."""
        return (False, number) not in self._open and (False, number) not in self._finished

    def resumed_unopened(self, number: int) -> None:
        """The peer's RESUME was here before its OPEN, which it stands for as well."""
        self._overtaken[number] = None
        while len(self._overtaken) > REMEMBERED_STREAMS:
            self._overtaken.popitem(last=False)

    def opened_late(self, number: int) -> bool:
        """Whether an OPEN that comes now was overtaken by a RESUME. True once."""
        return self._overtaken.pop(number, False) is None

    # --- coming and going ---------------------------------------------------------------

    def open(self, service: str) -> Stream:
        """One of ours."""
        number = self._next_number
        self._next_number += 1
        return self._add(service, number, self._window_bytes, opened_here=True)

    def accept(self, service: str, number: int, send_limit: int) -> Stream:
        """One of the peer's."""
        return self._add(service, number, send_limit, opened_here=False)

    def _add(self, service: str, number: int, send_limit: int, *, opened_here: bool) -> Stream:
        window = ReceiveWindow(pool=self._receiving)
        stream = Stream(
            self._peer,
            service,
            number,
            opened_here=opened_here,
            state=StreamState(send_limit=send_limit, window=window, keeping=self._keeping),
            changed=self._settle,
        )
        self._open[_key(stream)] = stream
        for beat in self._links.beats.values():
            beat.stir()
        return stream

    def give_up(self, stream: Stream) -> None:
        """No channel came for it to go on over."""
        stream.lose(f"the link to {self._peer.short} died and no other took over the stream")
        self._forget(stream)

    def end(self, reason: str) -> None:
        """With the session."""
        for stream in self:
            stream.lose(reason)
        self._open.clear()
        self._changed.unpark_all()

    # --- closed ones --------------------------------------------------------------------

    async def wait_arrived(self) -> None:
        """Until all that was sent on streams that were closed here has arrived."""
        while any(stream.lingering for stream in self._open.values()):
            await self._changed.park()

    def _settle(self, stream: Stream) -> None:
        if stream.finished or self._links.closed.is_set():  # nobody is left to see it off then
            self._forget(stream)
        else:
            self._tasks.spawn(self._see_off, stream)

    async def _see_off(self, stream: Stream) -> None:
        """A closed stream keeps its place until its last bytes are acknowledged: by a peer that
        does not, for ever. A tunnel acknowledges by itself, whatever its user does; time in which
        the peer is not heard does not count."""
        kept_bytes = math.inf
        while stream in self and stream.kept_bytes < kept_bytes:
            await self._links.wait_heard()
            kept_bytes = stream.kept_bytes
            with trio.move_on_after(SEE_OFF_S):
                while stream in self:
                    await self._changed.park()
            if self._links.suspected:
                kept_bytes = math.inf
        if stream in self:
            stream.reset("the end of the stream was not acknowledged")

    def _forget(self, stream: Stream) -> None:
        if stream in self:
            del self._open[_key(stream)]
            stream.release()
            self._changed.unpark_all()
            self._finished[_key(stream)] = None
            while len(self._finished) > REMEMBERED_STREAMS:
                self._finished.popitem(last=False)


def _key(stream: Stream) -> tuple[bool, int]:
    return stream.opened_here, stream.number
