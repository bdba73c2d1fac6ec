"""One peer: the links to it, and the streams over them.

A session outlives its links. When one dies, its streams are handed over to another that stands, or
comes to stand. A peer that says nothing is suspected after SUSPECT_S and given up after
`dead_after_s`; meanwhile redial.py looks for a new link, and whoever opens or sends waits. The
other side of a session that ends learns the reason from the link's goodbye.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial

import trio

from tunnels.acceptor import Acceptor
from tunnels.errors import TunnelError
from tunnels.frames import MAX_SERVICE_BYTES, Open, RecordDecoder, encode
from tunnels.handover import Handover
from tunnels.handshake import Role
from tunnels.heartbeat import Heartbeat
from tunnels.link import LINK_KINDS, CloseCode, Link, ProvenLink
from tunnels.links import MAX_LINKS, Links, Remote
from tunnels.peer import PeerId
from tunnels.session_tasks import SessionTasks
from tunnels.stats import LinkStats, SessionStats, link_stats
from tunnels.stream import Handler, Stream
from tunnels.streams import MAX_STREAMS, Streams

INTRODUCTION_RANK = 90  # of a link of another kind than those that may carry streams
INTRODUCTION_S = 30.0  # how long a stream waits for one of these
LINGER_S = 1.0


@dataclass(frozen=True)
class SessionSetup:
    """What a session needs from its endpoint.

    answer(peer, service): the handler, or the sentence why there is none.
    nursery: the endpoint's, for the session's tasks.
    kinds: of links that carry streams here. Others stand only until one of these does, and carry
    what is needed for that: is_introductory(service).
    """

    answer: Callable[[PeerId, str], Handler | str]
    nursery: trio.Nursery
    on_end: Callable[[Session], None]
    me: PeerId
    dead_after_s: float
    kinds: Collection[str] = tuple(LINK_KINDS)
    is_introductory: Callable[[str], bool] = lambda _service: True


class Session:
    """All there is between this node and one running process of a peer."""

    def __init__(self, first: ProvenLink, setup: SessionSetup) -> None:
        self.peer = first.peer
        self.epoch = first.proven.epoch
        self.since_s = trio.current_time()
        self._setup = setup
        self._tasks = tasks = SessionTasks(self.peer, setup.nursery, self.end)
        self._links = links = Links(setup.me, self.peer, self._rank_of)
        self._streams = Streams(self.peer, links, tasks, first.proven.window_bytes)
        self._handover = Handover(links, self._streams)
        answer = partial(setup.answer, self.peer)
        self._acceptor = Acceptor(links, self._streams, self._handover, tasks, answer)
        self._is_member = False
        self._link_count = 0  # ever
        self._look_now = trio.Event()

    def __repr__(self) -> str:
        return f"Session({self.peer.short})"

    # --- for users ----------------------------------------------------------------------

    async def open(self, service: str) -> Stream:
        """A stream to the peer's `service`. Data may follow at once; a refusal comes later. While
        no link stands this waits for one, as long as the session lives.

        Raises SessionClosed, TunnelError (too many streams).
        """
        if not 1 <= len(service.encode("utf-8")) <= MAX_SERVICE_BYTES:
            raise ValueError(f"a service name has 1 to {MAX_SERVICE_BYTES} bytes")
        if self._streams.are_full:
            raise TunnelError(
                f"{MAX_STREAMS} streams to {self.peer.short} are open already; close some first"
            )
        if not self._setup.is_introductory(service):
            await self._introduced()
        channel = await self._links.open_channel()
        stream = self._streams.open(service)
        channel.send(encode(Open(stream.number, stream.position.limit, service)))
        stream.attach(channel)
        self._tasks.spawn(self._handover.carry, stream, channel, RecordDecoder())
        return stream

    @property
    def closed(self) -> trio.Event:
        return self._links.closed

    @property
    def close_reason(self) -> str | None:
        """Once it has ended."""
        return self._links.close_reason

    @property
    def rtt_s(self) -> float | None:
        """Round trip over the link in use, measured by pings; None before the first answer."""
        return self._links.rtt_s

    @property
    def suspected(self) -> bool:
        """True when nothing was heard on any link for SUSPECT_S, or no link is left."""
        return self._links.suspected

    @property
    def silence_s(self) -> float:
        """How long nothing was heard of the peer."""
        return self._links.silence_s

    @property
    def stats(self) -> SessionStats:
        best = self.best_link
        return SessionStats(
            bytes_in=self._links.bytes_in,
            bytes_out=self._links.bytes_out,
            link_kind=best.kind if best else None,
            remote=best.remote if best else None,
        )

    @property
    def streams(self) -> int:
        """Open at present, of both sides."""
        return len(self._streams)

    def links(self) -> list[LinkStats]:
        """Each link that stands, the one in use first."""
        best = self.best_link
        beats = sorted(self._links.beats.items(), key=lambda one: one[0] is not best)
        return [link_stats(link, beat, in_use=link is best) for link, beat in beats]

    async def ping(self, answered: Callable[[LinkStats, float], None]) -> None:
        """One round trip over each link, all at once; `answered` is told how many seconds each
        took. Returns when all have answered, which a dead one never does."""
        best = self.best_link

        async def measure(link: Link, beat: Heartbeat) -> None:
            took_s = await beat.ping()
            answered(link_stats(link, beat, in_use=link is best), took_s)

        async with trio.open_nursery() as nursery:
            for link, beat in self._links.beats.items():
                nursery.start_soon(measure, link, beat)

    def welcome(self) -> None:
        """The peer is a member of something here: its links get a member's share of this node."""
        self._is_member = True
        for proven in self._links:
            proven.link.share.welcome(self.peer)

    async def aclose(self, reason: str = "") -> None:
        """End the session; the peer is told `reason`.

        Streams that were closed before get up to LINGER_S for their last bytes to arrive.
        """
        with trio.move_on_after(LINGER_S):
            await self._streams.wait_arrived()
        self.end(reason or "closed by the other side")
        await trio.lowlevel.checkpoint()

    # --- links --------------------------------------------------------------------------

    @property
    def best_link(self) -> Link | None:
        return self._links.best

    @property
    def rank(self) -> int | None:
        """Of the best link: a lower one is better; None while none stands."""
        best = self.best_link
        return None if best is None else self._rank_of(best)

    def _rank_of(self, link: Link) -> int:
        return link.rank if link.kind in self._setup.kinds else INTRODUCTION_RANK

    async def _introduced(self) -> None:
        """Until a link stands that may carry streams. Raises TunnelError when none comes."""
        with trio.move_on_after(INTRODUCTION_S):
            while self.rank == INTRODUCTION_RANK and not self.closed.is_set():
                await self._links.changed.park()
            return
        raise TunnelError(
            f"no link to {self.peer.short} over {' or '.join(self._setup.kinds)} came about in "
            f"{INTRODUCTION_S:.0f} s; allow other kinds with --transport"
        )

    @property
    def standing(self) -> Sequence[Link]:
        return [proven.link for proven in self._links]

    def is_silent(self, link: Link) -> bool:
        """Nothing was heard on it for a while, or it is gone."""
        return self._links.is_silent(link)

    @property
    def remotes(self) -> list[Remote]:
        """Where the peer is, or was last."""
        return self._links.remotes

    def add_link(self, proven: ProvenLink) -> None:
        """Take a proven link of this peer and epoch into use, in place of those that are silent."""
        standing = [one for one in self._links if not self._links.is_silent(one.link)]
        if len(standing) >= MAX_LINKS or self.closed.is_set():
            proven.link.close(CloseCode.LINK_OVER, "enough links stand already")
            return
        if proven.link.kind not in self._setup.kinds and not self._needs_introduction():
            proven.link.close(CloseCode.LINK_OVER, "the other side uses other kinds of links")
            return
        self._link_count += 1
        if self._is_member:
            proven.link.share.welcome(self.peer)
        self._links.close_silent("a new link took its place")
        if proven.link.role is Role.LISTENER:
            self.doubt()  # the peer dials, as if it heard nothing on the others
        beat = self._links.add(proven, lambda: self._streams.are_busy)
        self._tasks.spawn(self._run_link, proven, beat)
        if proven.link.kind in self._setup.kinds and proven.link.role is Role.DIALLER:
            self._end_introductions()  # the other side has taken the new link already
        if self._link_count == 1:
            self._tasks.spawn(self._watch)
        for stream in self._streams:
            if stream.opened_here:
                self._tasks.spawn(self._handover.follow_best, stream)

    def _needs_introduction(self) -> bool:
        return self.rank in (None, INTRODUCTION_RANK) or self.suspected

    def _end_introductions(self) -> None:
        for other in self._links:
            if other.link.kind not in self._setup.kinds:
                other.link.close(CloseCode.LINK_OVER, "the other side uses other kinds of links")

    async def wait_links_changed(self) -> None:
        """Until a link is added, or lost; all have fallen silent, or one is heard again; or the
        session has ended."""
        if not self.closed.is_set():
            await self._links.changed.park()

    async def wait_heard(self) -> None:
        """Until the peer is not suspected, or the session has ended."""
        await self._links.wait_heard()

    def doubt(self) -> None:
        """The network has changed: links that do not answer at once count as silent."""
        self._links.doubt()
        self._look_now.set()

    async def _watch(self) -> None:
        """Give up a peer that is silent for too long; take streams away from a link that is, or
        that another has become clearly better than."""
        in_use = self.best_link
        while not self.closed.is_set():
            pause_s = self._links.look()
            silence_s = self._links.silence_s
            if silence_s >= self._setup.dead_after_s:
                self.end(f"no answer for {silence_s:.0f} s")
                return
            before, in_use = in_use, self.best_link
            if not self.suspected:
                for stream in self._streams:
                    channel = stream.channel if stream.opened_here else None
                    if channel is None:
                        continue
                    if in_use is not before or self.is_silent(channel.link):
                        self._tasks.spawn(self._handover.follow_best, stream)
            with trio.move_on_after(pause_s):
                await self._look_now.wait()
            self._look_now = trio.Event()

    async def _run_link(self, proven: ProvenLink, beat: Heartbeat) -> None:
        link = proven.link
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(beat.run)
                nursery.start_soon(self._acceptor.accept_from, link)
                await link.closed.wait()
                nursery.cancel_scope.cancel()
        finally:
            self._drop_link(proven)

    def _drop_link(self, proven: ProvenLink) -> None:
        """The session goes on without it, unless it was closed for what ends the whole session."""
        link = proven.link
        link.close(CloseCode.SESSION_OVER, "the node is stopping")
        self._links.remove(proven)
        self._look_now.set()
        closure = link.closure
        assert closure is not None
        never_was = closure.code is CloseCode.REFUSED and self._link_count == 1
        broken = closure.code is CloseCode.PROTOCOL_ERROR or never_was
        if closure.code is CloseCode.SESSION_OVER or (broken and not self._links):
            self.end(closure.reason)

    def end(self, reason: str) -> None:
        """Close every link with `reason` and fail what streams are left. Ends once."""
        if self.closed.is_set():
            return
        self._links.end(reason)
        self._streams.end(f"the session with {self.peer.short} ended: {reason}")
        self._look_now.set()
        self._setup.on_end(self)
