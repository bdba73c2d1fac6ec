"""The QUIC link: aioquic's sans-IO `QuicConnection` under trio.

Three inputs only: an API call, a datagram, a timer. Each ends in `pump`, which hands out events,
transmits and moves the one deadline. Nothing here waits for the network but `run`, the timer.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence

import trio
from aioquic.quic import events
from aioquic.quic.packet import QuicErrorCode

from tunnels import quic_tuning as tuning
from tunnels.allowance import WAKE_S, Share
from tunnels.binding import Address
from tunnels.door import network_of
from tunnels.frames import clip_reason
from tunnels.handshake import Role
from tunnels.heartbeat import DOUBT_S, SUSPECT_S
from tunnels.link import LINK_KINDS, CloseCode, Closure
from tunnels.peer import format_address
from tunnels.quic_channels import MAX_UNACCEPTED, QuicChannel, QuicChannels
from tunnels.quic_size import DatagramSize
from tunnels.stats import Losses

UNPROVEN_BYTES = 64 << 10  # all a stranger may send before it has proven its key
UNPROVEN_DATAGRAMS = 256  # heard of a stranger; an honest handshake takes ten
DATAGRAMS_AT_ONCE = 32  # taken before a link's debt is looked at again
ACKNOWLEDGED_AT_ONCE = 16  # datagrams that came together: more than a question or an answer has
DEAF_AT_MOST_S = 0.02  # a link in debt, before its debt is looked at again
GOODBYE_COPIES = 2  # a lost goodbye costs the other side its whole silence limit
MAX_REASON_BYTES = 300
# aioquic asks for a timer at `sent + delay` and then tests `sent <= now - delay`: rounding can
# make it ask for the same moment for ever.
TIMER_SLACK_S = 1e-6

# The client drops what comes from an address it does not know: ours is constant, and the real
# one underneath is the link's own business.
VIRTUAL_ADDRESS: Address = ("peer", 0)

log = logging.getLogger(__name__)
logging.getLogger("quic").addHandler(logging.NullHandler())


class _Contained:
    """Whatever a datagram provokes inside the QUIC engine ends its link, not the node."""

    def __init__(self, link: QuicLink) -> None:
        self._link = link

    def __enter__(self) -> None:
        pass

    def __exit__(self, _kind: object, error: BaseException | None, _traceback: object) -> bool:
        if not isinstance(error, Exception):
            return False
        log.error("the QUIC engine failed; the link to %s ends", self._link.remote, exc_info=error)
        self._link.end(Closure(CloseCode.PROTOCOL_ERROR, "internal error", by_peer=False))
        return True


class QuicLink:
    """One connection. The transport feeds me datagrams and runs my timer."""

    kind = "quic"
    rank = LINK_KINDS["quic"].rank

    def __init__(
        self,
        quic: tuning.BoundedConnection,
        role: Role,
        remote: Address,
        send: Callable[[Sequence[bytes], Address], None],
        share: Share,
        size: DatagramSize,
    ) -> None:
        self.quic = quic
        self._size = size
        self.role = role
        self.share = share
        self._contained = _Contained(self)
        self.binding = b""
        self.trusted = False  # its peer has proven its key: larger limits
        self.ready = trio.Event()  # TLS is complete
        self.closed = trio.Event()
        self.closure: Closure | None = None
        self.last_heard_s = trio.current_time()
        self.bytes_in = 0
        self.bytes_out = 0
        self.urgent = False  # the address is known to be the peer's
        self.on_route: Callable[[bytes, bool], None] = lambda _cid, _add: None
        self._address = remote
        self._send = send
        self._channels = QuicChannels(self, quic, role)
        self._datagrams_in = 0
        self._deaf_until_s = -math.inf
        self._taken = 0  # by our side since the last pump
        self._deadline = math.inf
        self._timer: trio.CancelScope | None = None

    @property
    def remote(self) -> str:
        return format_address(*self._address)

    @property
    def address(self) -> Address:
        return self._address

    @property
    def losses(self) -> Losses:
        return Losses(tuning.packets_sent(self.quic), self.quic.packets_lost)

    # --- the link protocol --------------------------------------------------------------

    async def open_channel(self) -> QuicChannel:
        return self._channels.open()

    async def accept_channel(self) -> QuicChannel:
        return await self._channels.accept()

    def close(self, code: CloseCode, reason: str) -> None:
        if self.closed.is_set():
            return
        clipped = reason.encode("utf-8")[:MAX_REASON_BYTES].decode("utf-8", "ignore")
        if tuning.can_send(self.quic):
            self.quic.close(error_code=code, reason_phrase=clipped)
            self._transmit(copies=GOODBYE_COPIES)
        self.end(Closure(code, reason, by_peer=False))

    # --- the three inputs ---------------------------------------------------------------

    def receive(self, datagrams: Sequence[bytes], sender: Address) -> bool:
        """Take what came together; `pump_charged` must follow. What comes while the link is over,
        or in debt (allowance.py), is dropped; False when all was."""
        if self.role is Role.DIALLER:
            sender = VIRTUAL_ADDRESS
        for start in range(0, len(datagrams), DATAGRAMS_AT_ONCE):
            if not self._take(datagrams[start : start + DATAGRAMS_AT_ONCE], sender):
                return start > 0
        if len(datagrams) >= ACKNOWLEDGED_AT_ONCE:
            tuning.acknowledge_now(self.quic, trio.current_time())
        return True

    def _take(self, datagrams: Sequence[bytes], sender: Address) -> bool:
        now = trio.current_time()
        if self.closed.is_set() or now < self._deaf_until_s:
            return False
        if wait_s := self.share.wait_s(now):
            self._deaf_until_s = now + min(wait_s, DEAF_AT_MOST_S)
            return False
        if not self.trusted:
            datagrams = datagrams[: max(UNPROVEN_DATAGRAMS - self._datagrams_in, 0)]
            self._datagrams_in += len(datagrams)
            if not datagrams:
                return False
        began_s, deadline_s = time.thread_time(), tuning.idle_deadline(self.quic)
        with self._contained:
            for datagram in datagrams:
                self.bytes_in += len(datagram)
                self.quic.receive_datagram(datagram, sender, now)
        if tuning.idle_deadline(self.quic) != deadline_s:
            self.last_heard_s = now
        self.share.charge(time.thread_time() - began_s, now)
        return True

    def hint_unreachable(self) -> None:
        """Somebody says that the other end is not there. Anyone can say so: it is believed when
        nothing is heard for a moment."""
        doubted_s = trio.current_time() - SUSPECT_S + DOUBT_S
        self.last_heard_s = min(self.last_heard_s, doubted_s)

    def write(self, stream_id: int, data: bytes, *, end: bool) -> None:
        if not self.closed.is_set():
            self.share.earn(len(data))
            with self._contained:
                self.quic.send_stream_data(stream_id, data, end_stream=end)
            self.pump()

    def reset_channel(self, stream_id: int) -> None:
        if not self.closed.is_set() and tuning.transmitted_bytes(self.quic, stream_id) is not None:
            self.quic.reset_stream(stream_id, 0)
            self.quic.stop_stream(stream_id, 0)
            self.pump()

    async def run(self) -> None:
        """The timer. Returns when the link is closed."""
        try:
            while not self.closed.is_set():
                with trio.CancelScope(deadline=self._deadline) as self._timer:
                    await self.closed.wait()
                if not self.closed.is_set() and trio.current_time() >= self._deadline:
                    began_s = time.thread_time()
                    self._handle_timer(trio.current_time())
                    self.pump()
                    spent_s = WAKE_S + time.thread_time() - began_s
                    self.share.charge(spent_s, trio.current_time())
        finally:
            self._timer = None
            self.close(CloseCode.SESSION_OVER, "the node is stopping")

    def _handle_timer(self, now: float) -> None:
        with self._contained:
            before = tuning.timeouts_in_a_row(self.quic)
            self.quic.handle_timer(now + TIMER_SLACK_S)
            if tuning.timeouts_in_a_row(self.quic) > before:
                self._size.timed_out(now)

    # --- the pump -----------------------------------------------------------------------

    def pump_charged(self) -> None:
        """`pump` for what the peer has sent, at its expense."""
        began_s = time.thread_time()
        self.pump()
        self.share.charge(time.thread_time() - began_s, trio.current_time())

    def taken(self, count: int) -> None:
        """Our side has received `count` bytes of a channel: the peer may have to be told."""
        self._taken += count
        if self._taken >= tuning.LINK_WINDOW_BYTES // 4:
            self._taken = 0
            self.pump()

    def pump(self) -> None:
        """Hand out events, transmit, move the deadline, wake writers."""
        with self._contained:
            self._dispatch()
            if self.closed.is_set():
                return
            now = trio.current_time()
            probes = self.trusted and self._size.deadline() <= now
            if probes or not tuning.only_acknowledges(self.quic, now):
                self._transmit_all()
            if (closing := tuning.closing(self.quic)) is not None:
                self.end(_closure(*closing))
                return
            self._deadline = self.quic.get_timer() or math.inf
            if self.trusted:
                self._deadline = min(self._deadline, self._size.deadline())
        if self._timer is not None:
            self._timer.deadline = self._deadline
        for channel in self._channels.by_stream.values():
            channel.wake_writers()

    def transmitted_bytes(self, stream_id: int) -> int | None:
        return tuning.transmitted_bytes(self.quic, stream_id)

    def _transmit_all(self) -> None:
        probe = self._size.update(trio.current_time()) if self.trusted else None
        if probe is not None:  # first, or it would be taken for overtaken and lost
            self._flush([probe], self._address, 1)
        self._transmit()

    def _transmit(self, copies: int = 1) -> None:
        is_known = self.trusted or self.urgent
        limit_s = tuning.KNOWN_BACKOFF_S if is_known else tuning.MAX_BACKOFF_S
        tuning.cap_backoff(self.quic, limit_s)
        self._follow(tuning.path_address(self.quic))
        batch: list[bytes] = []
        to = self._address
        for datagram, path in self.quic.datagrams_to_send(trio.current_time()):
            address = self._address if path == VIRTUAL_ADDRESS else (path[0], path[1])
            if address != to:
                self._flush(batch, to, copies)
                batch, to = [], address
            batch.append(datagram)
        self._flush(batch, to, copies)

    def _follow(self, address: Address) -> None:
        """The dialler has moved, or its NAT has."""
        if address in (VIRTUAL_ADDRESS, self._address):
            return
        log.debug("%s is at %s now", self.remote, format_address(*address))
        if address[0] != self._address[0]:
            tuning.begin_path(self.quic)
        self._address = address
        self._size.follow(address, trio.current_time())

    def _flush(self, batch: list[bytes], to: Address, copies: int) -> None:
        if batch:
            self.bytes_out += sum(map(len, batch)) * copies
            for _ in range(copies):
                self._send(batch, to)

    def _dispatch(self) -> None:
        while (event := self.quic.next_event()) is not None:
            match event:
                case events.StreamDataReceived():
                    self.last_heard_s = trio.current_time()
                    self._channels.of(event.stream_id).feed(event.data, event.end_stream)
                case events.StreamReset():
                    self._channels.of(event.stream_id).lose("the other side reset the channel")
                case events.StopSendingReceived():
                    self._channels.of(event.stream_id).stop_sending()
                case events.HandshakeCompleted():
                    self.ready.set()
                    self.share.comes_from(network_of(self._address[0]), trio.current_time())
                case events.ConnectionIdIssued():
                    self.on_route(event.connection_id, True)
                case events.ConnectionIdRetired():
                    self.on_route(event.connection_id, False)
                case events.ConnectionTerminated():
                    self.end(_closure(event, by_peer=False))
        self._check_limits()

    def _check_limits(self) -> None:
        if self.closed.is_set():
            return
        seen = tuning.received_stream_bytes(self.quic)
        if not self.trusted and self.role is Role.LISTENER and seen > UNPROVEN_BYTES:
            self.close(CloseCode.PROTOCOL_ERROR, "too much data before the handshake")
        elif len(self._channels.unaccepted) > MAX_UNACCEPTED:
            self.close(CloseCode.PROTOCOL_ERROR, "channels are opened faster than they are taken")
        elif self._channels.one_way:
            self.close(CloseCode.PROTOCOL_ERROR, "a channel has two directions")

    def end(self, closure: Closure) -> None:
        if self.closed.is_set():
            return
        self.closure = closure
        self.closed.set()
        self._channels.lose(closure.reason)


def _closure(event: events.ConnectionTerminated, by_peer: bool) -> Closure:
    ours = event.frame_type is None  # an application close, with our codes
    if ours:
        known = event.error_code in set(CloseCode)
        code = CloseCode(event.error_code) if known else CloseCode.LOST
    else:
        is_idle = event.error_code == QuicErrorCode.INTERNAL_ERROR
        code = CloseCode.LOST if is_idle else CloseCode.PROTOCOL_ERROR
    return Closure(code, clip_reason(event.reason_phrase) or "the connection was closed", by_peer)
