"""One peer: the links to it, the best one, the streams over them.

A session outlives its links. When one dies, the side that opened a stream moves it to another that
stands, or comes to stand (RESUME), and both ends replay. A peer that says nothing is suspected
after SUSPECT_S and given up after `dead_after_s`; meanwhile redial.py looks for a new link, and
whoever opens or sends waits. The other side of a session that ends learns the reason from the
link's goodbye.
"""

from __future__ import annotations

import logging
import math
import secrets
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TypeVarTuple

import trio

from tunnels.allowance import OPENING_S, Bucket, Rate
from tunnels.credit import Pool, ReceiveWindow
from tunnels.errors import BadFrame, LinkClosed, SessionClosed, TunnelError
from tunnels.frames import (
    EPOCH_BYTES,
    MAX_SERVICE_BYTES,
    Ack,
    Open,
    RecordDecoder,
    Reset,
    ResetCode,
    Resume,
    encode,
)
from tunnels.handshake import Role
from tunnels.heartbeat import Heartbeat
from tunnels.link import LINK_KINDS, Channel, CloseCode, Link, ProvenLink
from tunnels.links import MAX_LINKS, Links, Remote
from tunnels.opening import first_records, hear_header, refuse
from tunnels.peer import PeerId
from tunnels.resume import StreamState
from tunnels.stats import LinkStats, SessionStats, link_stats
from tunnels.stream import Stream

MAX_STREAMS = 100  # open at once in one session; a QUIC link carries 128 channels each way
QUIET_SERVICES = frozenset({"reserve"})  # held open for days; a peer is not watched for it
INTRODUCTION_RANK = 90  # of a link of another kind than those that may carry streams
INTRODUCTION_S = 30.0  # how long a stream waits for one of these
RESUME_WITHIN_S = 5.0  # for our stream to go on over another link; then over yet another
# In all, while the peer is heard all the time: it may have to find out first that the link is gone.
RESUMED_WITHIN_S = 30.0
LINGER_S = 1.0
SEE_OFF_S = 30.0  # for the other side to acknowledge more of a stream that was closed here
REMEMBERED_STREAMS = 1024  # finished ones: a late RESUME is told so
REMEMBERED_PEERS = 4096  # whose sessions ended
CHANNELS = Rate(per_s=50, burst=256)  # that the peer opens; beyond, they wait

Given = TypeVarTuple("Given")
Handler = Callable[[Stream], Awaitable[None]]

log = logging.getLogger(__name__)


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
        self.closed = trio.Event()
        self.close_reason: str | None = None
        self._window_bytes = first.proven.window_bytes
        self._setup = setup
        self._links = Links(setup.me, self.peer, self._rank_of)
        self._streams: dict[tuple[bool, int], Stream] = {}
        self._finished: OrderedDict[tuple[bool, int], None] = OrderedDict()
        self._next_number = 0
        self._streams_changed = trio.lowlevel.ParkingLot()
        self._receiving = Pool()
        self._keeping = Pool()
        self._channels = Bucket(CHANNELS, trio.current_time())
        self._is_member = False
        self.since_s = trio.current_time()
        self._link_count = 0  # ever
        self._moving: set[Stream] = set()
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
        if len(self._streams) >= MAX_STREAMS:
            raise TunnelError(
                f"{MAX_STREAMS} streams to {self.peer.short} are open already; close some first"
            )
        if not self._setup.is_introductory(service):
            await self._introduced()
        channel = await self._open_channel()
        number = self._next_number
        self._next_number += 1
        state = self._new_state(self._window_bytes)
        stream = self._add_stream(service, number, opened_here=True, state=state)
        channel.send(encode(Open(number, state.position.limit, service)))
        stream.attach(channel)
        self._spawn(self._carry, stream, channel, RecordDecoder())
        return stream

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
    def _is_busy(self) -> bool:
        return any(stream.service not in QUIET_SERVICES for stream in self._streams.values())

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
            while any(stream.lingering for stream in self._streams.values()):
                await self._streams_changed.park()
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
        beat = self._links.add(proven, lambda: self._is_busy)
        self._spawn(self._run_link, proven, beat)
        if proven.link.kind in self._setup.kinds and proven.link.role is Role.DIALLER:
            self._end_introductions()  # the other side has taken the new link already
        if self._link_count == 1:
            self._spawn(self._watch)
        for stream in self._streams.values():
            if stream.opened_here:
                self._spawn(self._improve, stream)

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
        while self.suspected and not self.closed.is_set():
            await self._links.changed.park()

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
                for stream in self._streams.values():
                    channel = stream.channel if stream.opened_here else None
                    if channel is None:
                        continue
                    if in_use is not before or self.is_silent(channel.link):
                        self._spawn(self._improve, stream)
            with trio.move_on_after(pause_s):
                await self._look_now.wait()
            self._look_now = trio.Event()

    async def _run_link(self, proven: ProvenLink, beat: Heartbeat) -> None:
        link = proven.link
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(beat.run)
                nursery.start_soon(self._accept_channels, link)
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
        self.close_reason = reason
        self.closed.set()
        for proven in self._links:
            proven.link.close(CloseCode.SESSION_OVER, reason)
        for stream in list(self._streams.values()):
            stream.lose(f"the session with {self.peer.short} ended: {reason}")
        self._streams.clear()
        self._streams_changed.unpark_all()
        self._links.changed.unpark_all()
        self._look_now.set()
        self._setup.on_end(self)

    # --- streams ------------------------------------------------------------------------

    async def _open_channel(self) -> Channel:
        while not self.closed.is_set():
            link = self.best_link
            if link is None:
                await self._links.changed.park()
                continue
            try:
                return await link.open_channel()
            except LinkClosed:
                await trio.lowlevel.checkpoint()  # its own task is about to drop it
        raise SessionClosed(
            f"the session with {self.peer.short} is over"
            + (f": {self.close_reason}" if self.close_reason else "; connect again")
        )

    def _new_state(self, send_limit: int) -> StreamState:
        window = ReceiveWindow(pool=self._receiving)
        return StreamState(send_limit=send_limit, window=window, keeping=self._keeping)

    def _add_stream(
        self, service: str, number: int, *, opened_here: bool, state: StreamState
    ) -> Stream:
        stream = Stream(
            self.peer,
            service,
            number,
            opened_here=opened_here,
            state=state,
            changed=self._settle,
        )
        self._streams[opened_here, number] = stream
        for beat in self._links.beats.values():
            beat.stir()
        return stream

    def _settle(self, stream: Stream) -> None:
        if stream.finished or self.closed.is_set():  # nobody is left to see it off then
            self._forget(stream)
        else:
            self._spawn(self._see_off, stream)

    async def _see_off(self, stream: Stream) -> None:
        """A closed stream keeps its place until its last bytes are acknowledged: by a peer that
        does not, for ever. A tunnel acknowledges by itself, whatever its user does; time in which
        the peer is not heard does not count."""
        key, kept_bytes = (stream.opened_here, stream.number), math.inf
        while self._streams.get(key) is stream and stream.kept_bytes < kept_bytes:
            await self.wait_heard()
            kept_bytes = stream.kept_bytes
            with trio.move_on_after(SEE_OFF_S):
                while self._streams.get(key) is stream:
                    await self._streams_changed.park()
            if self.suspected:
                kept_bytes = math.inf
        if self._streams.get(key) is stream:
            stream.reset("the end of the stream was not acknowledged")

    def _forget(self, stream: Stream) -> None:
        key = (stream.opened_here, stream.number)
        if self._streams.get(key) is stream:
            del self._streams[key]
            stream.release()
            self._streams_changed.unpark_all()
            self._finished[key] = None
            while len(self._finished) > REMEMBERED_STREAMS:
                self._finished.popitem(last=False)

    async def _carry(self, stream: Stream, channel: Channel, decoder: RecordDecoder) -> None:
        """Run a stream over `channel` and, when that dies, over the next one."""
        while True:
            try:
                await stream.read_channel(channel, decoder)
            except LinkClosed:
                pass
            except BadFrame as error:
                self._protocol_error(error)
            if stream.finished or stream.channel is not channel:
                if (unused := stream.take_next_channel()) is not None:
                    unused.reset()
                return  # done, or another task carries it
            stream.detach()
            if not stream.opened_here:
                await self._await_resume(stream)
                return
            moved = await self._move(stream)
            channel.reset()  # of use to nobody now, even where it still stands
            if moved is None:
                return
            channel, decoder = moved

    async def _improve(self, stream: Stream) -> None:
        """Take a stream that we opened to a better link than its own. What it has now is given up
        only once there is a channel."""
        before, best = stream.channel, self.best_link
        if before is None or best is None or before.link is best or stream in self._moving:
            return
        if stream.lingering and not self._links.is_silent(before.link):
            return
        self._moving.add(stream)
        try:
            channel = await best.open_channel()
        except LinkClosed:
            return
        finally:
            self._moving.discard(stream)
        if stream.channel is before and not stream.finished and best is self.best_link:
            stream.reroute(channel)
        else:
            channel.reset()

    async def _await_resume(self, stream: Stream) -> None:
        """For the other side to take its stream to another channel."""
        while not self.closed.is_set():
            await self.wait_heard()
            with trio.move_on_after(RESUMED_WITHIN_S):
                await stream.reattached.wait()
                return
            if self._links.heard_for_s >= RESUMED_WITHIN_S:
                break
        self._give_up(stream)

    async def _move(self, stream: Stream) -> tuple[Channel, RecordDecoder] | None:
        """Take a stream that we opened to another channel. None when it is lost."""
        began_s = trio.current_time()
        while not self.closed.is_set():
            await self.wait_heard()
            channel = stream.take_next_channel()
            with trio.move_on_after(RESUME_WITHIN_S) as patience:
                try:
                    channel = channel or await self._open_channel()
                    decoder = await self._resume(stream, channel)
                except BadFrame as error:
                    self._protocol_error(error)
                except (LinkClosed, SessionClosed):
                    await trio.lowlevel.checkpoint()
                else:
                    if decoder is not None:
                        return channel, decoder
                    break
            if channel is not None:
                channel.reset()
            tried_s = min(trio.current_time() - began_s, self._links.heard_for_s)
            if patience.cancelled_caught and tried_s >= RESUMED_WITHIN_S:
                break
        self._give_up(stream)
        return None

    async def _resume(self, stream: Stream, channel: Channel) -> RecordDecoder | None:
        """Go on over `channel`; None when the other side does not know the stream.

        Raises LinkClosed, BadFrame.
        """
        position = stream.position
        # Its OPEN may have died on the way: where nothing was heard, this is another.
        service = "" if stream.was_heard else stream.service
        channel.send(encode(Resume(stream.number, position.received, position.limit, service)))
        records, decoder = await first_records(channel)
        match records[0]:
            case Ack() as answer:
                stream.attach(channel, answer)
                stream.take_records(records[1:])
            case Reset(ResetCode.LOST):
                channel.finish()
                return None
            case Reset() as refusal if service:
                stream.attach(channel)
                stream.take_records([refusal])
            case other:
                raise BadFrame(f"a {type(other).__name__} record answers RESUME")
        return decoder

    def _give_up(self, stream: Stream) -> None:
        stream.lose(f"the link to {self.peer.short} died and no other took over the stream")
        self._forget(stream)

    def _spawn(self, task: Callable[[*Given], Awaitable[None]], *given: *Given) -> None:
        """Run a task of this session. A bug in it ends the session, not the node."""

        async def contained() -> None:
            try:
                await task(*given)
            except Exception:
                log.exception("a task of the session with %s failed", self.peer.short)
                self.end("internal error")

        self._setup.nursery.start_soon(contained)

    def _protocol_error(self, error: BadFrame) -> None:
        log.warning("peer %s broke the protocol: %s", self.peer.short, error)
        for proven in list(self._links):
            proven.link.close(CloseCode.PROTOCOL_ERROR, str(error))

    # --- channels the peer opens --------------------------------------------------------

    async def _accept_channels(self, link: Link) -> None:
        while True:
            try:
                channel = await link.accept_channel()
            except LinkClosed:
                return
            self._spawn(self._greet, channel)
            link.share.charge(OPENING_S, trio.current_time())
            self._channels.spend(trio.current_time(), 1)
            await trio.sleep(self._channels.wait_s(trio.current_time()))

    async def _greet(self, channel: Channel) -> None:
        try:
            heard = await hear_header(channel)
            if heard is None:
                return
            header, records, decoder = heard
            if isinstance(header, Open):
                stream = await self._accept_stream(header, channel)
            else:
                stream = await self._resume_stream(header, channel)
            if stream is None:
                return
            stream.take_records(records)
        except BadFrame as error:
            self._protocol_error(error)
            return
        await self._carry(stream, channel, decoder)

    async def _accept_stream(self, header: Open, channel: Channel) -> Stream | None:
        key = (False, header.stream)
        if key in self._streams or key in self._finished:
            raise BadFrame(f"stream {header.stream} was opened twice")
        answer: Handler | str = "too many streams are open; close some first"
        if len(self._streams) < MAX_STREAMS:
            answer = self._setup.answer(self.peer, header.service)
        if isinstance(answer, str):
            await refuse(channel, Reset(ResetCode.REFUSED, answer))
            return None
        state = self._new_state(header.limit)
        stream = self._add_stream(header.service, header.stream, opened_here=False, state=state)
        stream.attach(channel)
        self._spawn(_handle, answer, stream)
        return stream

    async def _resume_stream(self, header: Resume, channel: Channel) -> Stream | None:
        key = (False, header.stream)
        stream = self._streams.get(key)
        if stream is None and header.service and key not in self._finished:
            opened = Open(header.stream, header.limit, header.service)
            stream = await self._accept_stream(opened, channel)
            if stream is None:
                return None
        if stream is None:
            await refuse(channel, Reset(ResetCode.LOST, "this stream is over"))
            return None
        if (old := stream.channel) is not None and old is not channel:
            old.reset()
            stream.detach()
        stream.attach(channel, Ack(header.received, header.limit))
        return stream


async def _handle(handler: Handler, stream: Stream) -> None:
    """Run a service's handler. Its failure is the stream's, never the node's."""
    try:
        await handler(stream)
    except TunnelError as error:
        log.info("the handler of %r ended early: %s", stream.service, error)
        stream.reset("the service broke off")
    except Exception:
        log.exception("the handler of %r failed", stream.service)
        stream.reset("the service failed; its node's log says why")
    else:
        await stream.aclose()


class Epochs:
    """What tells a peer whether its session with us still stands: the same on all links of one
    session, another after a restart, and after a session that ended here, since the peer may not
    have heard of that."""

    def __init__(self) -> None:
        self._of_process = secrets.token_bytes(EPOCH_BYTES)
        self._renewed: OrderedDict[PeerId, bytes] = OrderedDict()

    def of(self, peer: PeerId) -> bytes:
        return self._renewed.get(peer, self._of_process)

    def renew(self, peer: PeerId) -> None:
        self._renewed[peer] = secrets.token_bytes(EPOCH_BYTES)
        self._renewed.move_to_end(peer)
        while len(self._renewed) > REMEMBERED_PEERS:
            self._renewed.popitem(last=False)
