"""The seam between sessions and the ways to carry them.

A `Link` is an encrypted connection to one peer over which channels open. QUIC makes a channel
of each bidirectional stream, TLS over TCP of a connection; WebRTC will make it of a data channel.
A new kind of link adds a line to LINK_KINDS, and one to transports.py for the `Transport` that
dials and accepts it; session, dial, resume and forward do not change.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sized
from dataclasses import dataclass
from enum import IntEnum
from typing import Protocol

import trio

from tunnels.allowance import Share
from tunnels.errors import BadFrame, HandshakeFailed, LinkClosed
from tunnels.frames import NONCE_BYTES, VERSION, Hello, Record, RecordDecoder, encode
from tunnels.handshake import Handshake, Proven, Role
from tunnels.identity import Identity, verify
from tunnels.peer import Candidate, PeerId


@dataclass(frozen=True)
class LinkKind:
    """rank: a session prefers the link with the lowest; near_rank: to a peer on the LAN."""

    name: str
    rank: int
    near_rank: int

    def rank_when(self, near: bool) -> int:
        return self.near_rank if near else self.rank


LINK_KINDS = {
    "tcp": LinkKind("tcp", rank=30, near_rank=10),
    "quic": LinkKind("quic", rank=20, near_rank=20),
    "webrtc": LinkKind("webrtc", rank=40, near_rank=40),
    "relay": LinkKind("relay", rank=50, near_rank=50),
}


class CloseCode(IntEnum):
    """Why a link is closed on purpose; every kind of link carries it with its reason."""

    SESSION_OVER = 0  # the whole session ends now, on all its links
    LINK_OVER = 1  # this link only: another one took over
    PROTOCOL_ERROR = 2  # the other side broke the wire format
    REFUSED = 3  # the handshake failed
    LOST = 4  # never sent: the link died without a word


@dataclass(frozen=True)
class Closure:
    code: CloseCode
    reason: str
    by_peer: bool


class Wire(Protocol):
    """The inside of a channel, lent to a thread (ride.py). No call waits."""

    @property
    def gone(self) -> str | None:
        """Why nothing comes of it any more."""

    @property
    def unsent(self) -> Sized:
        """What is queued."""

    def fileno(self) -> int: ...

    def pushed_back(self) -> bytes:
        """What had arrived before it was lent, decrypted; goes before all that is heard."""

    def hear(self, into: memoryview) -> int:
        """Take what has arrived, HEARD_BYTES at most; how many bytes of the channel that were.

        Raises LinkClosed at the end, and when it broke.
        """

    def write(self, data: bytes | memoryview) -> None:
        """Encrypt; `flush` sends it. Raises LinkClosed."""

    def flush(self) -> None:
        """Send what was written, as far as the network takes it. Raises LinkClosed."""

    def give_back(self) -> None:
        """In the event loop."""


class Channel(Protocol):
    """An ordered, reliable pair of byte pipes inside a link."""

    @property
    def link(self) -> Link:
        """It is part of."""

    @property
    def share(self) -> Share:
        """The link's."""

    def send(self, data: bytes) -> None:
        """Queue and transmit; never blocks. Does nothing once the channel or link is gone."""

    async def wait_writable(self) -> None:
        """Until little is queued, or the channel is gone."""

    async def receive(self) -> bytes:
        """What has arrived, at least one byte, and at most about 32 KiB; b"" at the end.

        Raises LinkClosed when the channel or its link is gone.
        """

    def finish(self) -> None:
        """No byte follows from us; what is queued still leaves."""

    def reset(self) -> None:
        """Drop both directions."""

    @property
    def can_lend(self) -> bool:
        """Whether it is something of its own, that a thread could drive."""

    async def lend(self, wake: Callable[[], None]) -> Wire | None:
        """Leave the reading and writing to a thread. wake: called when it must look up."""

    def heard(self, ago_s: float) -> None:
        """The peer was heard on it, by a thread, so long ago."""


class NeverLent:
    """What a channel inherits that is a part of something larger."""

    can_lend = False

    async def lend(self, wake: Callable[[], None]) -> Wire | None:  # noqa: ARG002
        return None

    def heard(self, ago_s: float) -> None:
        pass


class Link(Protocol):
    kind: str
    rank: int  # of LINK_KINDS: a session prefers the lowest
    role: Role
    binding: bytes  # see handshake.py
    closed: trio.Event
    closure: Closure | None  # set with `closed`
    last_heard_s: float  # trio clock
    share: Share

    @property
    def bytes_in(self) -> int:
        """On the wire, so far."""

    @property
    def bytes_out(self) -> int: ...

    @property
    def trusted(self) -> bool: ...

    @trusted.setter
    def trusted(self, proven: bool) -> None:
        """Set once the peer has proven its key: lifts the limits for strangers."""

    @property
    def remote(self) -> str:
        """The address of the other end, for display."""

    async def open_channel(self) -> Channel:
        """Raises LinkClosed."""

    async def accept_channel(self) -> Channel:
        """Raises LinkClosed."""

    def close(self, code: CloseCode, reason: str) -> None:
        """Say goodbye with a reason and be gone. Never blocks; closing twice is closing once."""


class Transport(Protocol):
    """Makes links of one kind."""

    @property
    def port(self) -> int | None:
        """Where peers may dial it, at each of our addresses; None when that is not how."""

    async def run(self) -> None:
        """Accept links until cancelled."""

    async def dial(self, candidate: Candidate, expect: PeerId) -> Link:
        """An encrypted link whose far end holds `expect`'s key. Raises TunnelError."""


Accept = Callable[[Link], Awaitable[None]]


@dataclass(frozen=True)
class ProvenLink:
    """A link over which both sides have proven their keys, and its control channel."""

    link: Link
    control: Channel
    decoder: RecordDecoder
    backlog: tuple[Record, ...]  # control records that came with the last of the handshake
    proven: Proven
    own_epoch: bytes = b""  # ours, as we told it

    @property
    def peer(self) -> PeerId:
        return self.proven.peer


@dataclass(frozen=True)
class Introduction:
    """What we tell of ourselves on every link. epoch_for: as it is for that peer."""

    identity: Identity
    epoch_for: Callable[[PeerId], bytes]
    window_bytes: int


async def prove(
    link: Link, us: Introduction, *, expect: PeerId | None, entropy: Callable[[int], bytes]
) -> ProvenLink:
    """Run the handshake over the control channel of a fresh link.

    Raises HandshakeFailed, WrongPeer, LinkClosed; the link is then closed with the reason.
    """
    try:
        return await _prove(link, us, expect, entropy(NONCE_BYTES))
    except BadFrame as error:
        link.close(CloseCode.PROTOCOL_ERROR, str(error))
        raise HandshakeFailed(f"the handshake broke: {error}") from error
    except HandshakeFailed as error:
        link.close(CloseCode.REFUSED, str(error))
        raise
    except BaseException:
        link.close(CloseCode.REFUSED, "the handshake was given up")
        raise


async def _prove(link: Link, us: Introduction, expect: PeerId | None, nonce: bytes) -> ProvenLink:
    dials = link.role is Role.DIALLER
    control = await (link.open_channel if dials else link.accept_channel)()

    def begin(peer: PeerId) -> tuple[Handshake, bytes]:
        epoch = us.epoch_for(peer)
        hello = Hello(VERSION, us.window_bytes, epoch, nonce, us.identity.peer, link.kind)
        handshake = Handshake(
            link.role,
            hello,
            expect=expect,
            binding=link.binding,
            sign=us.identity.sign,
            verify=verify,
        )
        _send(control, handshake.start())
        return handshake, epoch

    begun = begin(expect) if dials and expect is not None else None
    decoder = RecordDecoder()
    while True:
        data = await control.receive()
        if not data:
            raise LinkClosed("the other side ended the handshake")
        records = decoder.feed_untrusted(data)
        for position, record in enumerate(records):
            # A listener learns from the HELLO whom it talks to.
            begun = begun or begin(record.peer if isinstance(record, Hello) else us.identity.peer)
            handshake, epoch = begun
            _send(control, handshake.receive(record))
            if handshake.proven is not None:
                backlog = tuple(records[position + 1 :])
                return ProvenLink(link, control, decoder, backlog, handshake.proven, epoch)


def _send(channel: Channel, records: list[Record]) -> None:
    if records:
        channel.send(b"".join(encode(record) for record in records))
