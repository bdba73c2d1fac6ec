"""The WebRTC link as trio sees it: one channel a data channel, the stack below on the island.

aiortc buffers sends without bound and hands on whatever arrives: `wait_writable`, the bound on what
is held (`taken_bytes`), and the credit of resume.py hold a peer back.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

import trio

from tunnels.allowance import WAKE_S, Share
from tunnels.errors import LinkClosed
from tunnels.frames import clip_reason
from tunnels.handshake import Role
from tunnels.link import LINK_KINDS, CloseCode, Closure
from tunnels.multiplexed import MultiplexedChannel
from tunnels.peer import format_address

if TYPE_CHECKING:  # aiortc is heavy, and comes with the first link
    from tunnels.webrtc_stack import Pipe, Stack

UNSENT_BYTES = 128 << 10  # written to a channel, and not yet given to SCTP: beyond, writers wait
UNPROVEN_BYTES = 64 << 10  # all a stranger may send before it has proven its key
MAX_UNACCEPTED = 256  # channels the peer opened that wait for the session
DEAF_AT_MOST_S = 0.02  # a link in debt, before its debt is looked at again
MAX_REASON_BYTES = 300

log = logging.getLogger(__name__)


class WebRtcChannel(MultiplexedChannel["WebRtcLink"]):
    """One data channel."""

    def __init__(self, link: WebRtcLink, pipe: Pipe) -> None:
        super().__init__(link)
        self._pipe = pipe
        pipe.ashore = self

    def send(self, data: bytes) -> None:
        if self._finished:
            return
        self._written += len(data)
        self.share.earn(len(data))
        self._link.call(lambda: self._pipe.send(data))

    def finish(self) -> None:
        if not self._finished:
            self._finished = True
            self._link.call(self._pipe.finish)

    def reset(self) -> None:
        self.lose("the channel was reset")
        self._taken(self.held_bytes)
        self.held_bytes = 0
        self._arrived.clear()
        self._link.call(self._pipe.reset)

    # --- told by the island -------------------------------------------------------------

    def feed(self, data: bytes, end: bool = False) -> None:
        if self._gone is not None:
            self._taken(len(data))
        super().feed(data, end)

    def lose(self, reason: str) -> None:
        super().lose(reason)
        self._link.forget(self)

    def _has_room(self) -> bool:
        return self._written - self._pipe.sent <= UNSENT_BYTES

    def _taken(self, count: int) -> None:
        self._link.taken_bytes += count


class WebRtcLink:
    """One ICE, DTLS and SCTP connection. What the peer's stack did, the island tells."""

    kind = "webrtc"
    rank = LINK_KINDS["webrtc"].rank

    def __init__(self, stack: Stack, role: Role, share: Share) -> None:
        self.stack = stack
        stack.link = self
        stack.may_hear_bytes = UNPROVEN_BYTES
        self.role = role
        self.share = share
        self.binding = b""
        self.closed = trio.Event()
        self.closure: Closure | None = None
        self.last_heard_s = trio.current_time()
        self.taken_bytes = 0
        self._trusted = False
        self._channels: set[WebRtcChannel] = set()
        self._accepted: deque[WebRtcChannel] = deque()
        self._acceptors = trio.lowlevel.ParkingLot()

    @property
    def bytes_in(self) -> int:
        return self.stack.ice.bytes_in

    @property
    def bytes_out(self) -> int:
        return self.stack.ice.bytes_out

    @property
    def trusted(self) -> bool:
        return self._trusted

    @trusted.setter
    def trusted(self, proven: bool) -> None:
        self._trusted = proven
        if proven:
            self.stack.may_hear_bytes = float("inf")

    @property
    def remote(self) -> str:
        path = self.stack.ice.path
        if path is None:
            return "nowhere"
        return format_address(path[0], path[1])

    @property
    def is_relayed(self) -> bool:
        """Through a TURN server, ours or the peer's."""
        path = self.stack.ice.path
        return path is not None and path[2]

    # --- the link protocol --------------------------------------------------------------

    async def open_channel(self) -> WebRtcChannel:
        from tunnels.webrtc_stack import Pipe

        self._check_open()
        pipe = Pipe(self.stack)
        channel = WebRtcChannel(self, pipe)
        self._channels.add(channel)
        self.call(lambda: self.stack.open(pipe))
        return channel

    async def accept_channel(self) -> WebRtcChannel:
        while not self._accepted:
            self._check_open()
            await self._acceptors.park()
        return self._accepted.popleft()

    def close(self, code: CloseCode, reason: str) -> None:
        if self.closed.is_set():
            return
        clipped = reason.encode("utf-8")[:MAX_REASON_BYTES].decode("utf-8", "ignore")
        self.stack.island.call(lambda: self.stack.leave(code, clipped))
        self._end(Closure(code, reason, by_peer=False))

    def call(self, function: Callable[[], object]) -> None:
        """On the island, while the link stands."""
        if not self.closed.is_set():
            self.stack.island.call(function)

    def forget(self, channel: WebRtcChannel) -> None:
        self._channels.discard(channel)

    # --- told by the island -------------------------------------------------------------

    def on_channel(self, pipe: Pipe) -> None:
        channel = WebRtcChannel(self, pipe)
        if self.closed.is_set():
            channel.lose("the link is closed")
            return
        self._channels.add(channel)
        self._accepted.append(channel)
        self._acceptors.unpark_all()
        if len(self._accepted) > MAX_UNACCEPTED:
            self.close(CloseCode.PROTOCOL_ERROR, "channels are opened faster than they are taken")

    def on_gone(self, code: CloseCode, reason: str, by_peer: bool) -> None:
        self._end(Closure(code, clip_reason(reason) or "the connection was closed", by_peer))

    def on_spent(self, spent_s: float, *, heard: bool) -> None:
        now = trio.current_time()
        if heard:
            self.last_heard_s = now
        self.share.charge(spent_s + WAKE_S, now)
        if wait_s := self.share.wait_s(now):
            self.stack.deaf_until_s = now + min(wait_s, DEAF_AT_MOST_S)

    def _check_open(self) -> None:
        if self.closure is not None:
            raise LinkClosed(self.closure.reason)

    def _end(self, closure: Closure) -> None:
        if self.closed.is_set():
            return
        self.closure = closure
        self.closed.set()
        for channel in list(self._channels):
            channel.lose(closure.reason)
        self._channels.clear()
        self._acceptors.unpark_all()
