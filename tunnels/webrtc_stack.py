"""DTLS, SCTP and the data channels of one WebRTC link, by aiortc.

Lives on the asyncio island, and tells trio's side what happens; imported when the first link is
made, in a thread, since that takes half a second. A channel is a data channel: ordered, reliable,
opened in band (RFC 8832), with data behind the opening at once. An empty message is the end of one
direction; when both have ended, or one side gives up, the data channel is closed. Data channel 0 is
for words about the link: its goodbye.

aiortc's own objects do the work. What they get is checked before (sctp_guard.py), what they keep is
bounded here, and of RTCPeerConnection, SDP, RTP and media nothing is used.
"""

from __future__ import annotations

import math
from typing import Protocol

import trio
from aiortc.rtcdatachannel import RTCDataChannel, RTCDataChannelParameters
from aiortc.rtcdtlstransport import RTCCertificate, RTCDtlsFingerprint, RTCDtlsParameters
from aiortc.rtcsctptransport import RTCSctpCapabilities
from cryptography.hazmat.primitives import hashes

from tunnels._asyncio_island import Island
from tunnels.errors import HandshakeFailed, LinkClosed
from tunnels.handshake import Role
from tunnels.link import CloseCode
from tunnels.webrtc_description import Description, Place
from tunnels.webrtc_ice import IceConnection
from tunnels.webrtc_sctp import SCTP_PORT, Association, Dtls

MESSAGE_BYTES = 16 << 10  # what any stack takes; a whole one is handed on at once
UNSENT_BYTES = 128 << 10  # in a data channel, not yet given to SCTP: beyond, writers wait
HELD_BYTES = 4 << 20  # arrived on all channels and not taken by our side: beyond, nothing is heard
MAX_CHANNELS = 256  # that the peer has open
NUMBERS = 65534  # of data channels
GOODBYE_S = 1.0
CHARGE_EVERY_S = 2e-3  # of processor time, before trio's side is told
DATAGRAM_S = 30e-6  # what one costs before SCTP sees it
MAX_WORDS_BYTES = 301


class Ashore(Protocol):
    """A channel's half on trio's side."""

    def feed(self, data: bytes, end: bool = False) -> None: ...

    def lose(self, reason: str) -> None: ...

    def wake_writers(self) -> None: ...


class Listener(Protocol):
    """A link's half on trio's side."""

    taken_bytes: int  # of its channels, so far

    def on_channel(self, pipe: Pipe) -> None: ...

    def on_gone(self, code: CloseCode, reason: str, by_peer: bool) -> None: ...

    def on_spent(self, spent_s: float, *, heard: bool) -> None: ...


class Pipe:
    """The island's half of a channel."""

    def __init__(self, stack: Stack) -> None:
        self._stack = stack
        self._channel: RTCDataChannel | None = None
        self._given = 0
        self._finished = False
        self._ended = False
        self.ashore: Ashore  # set by trio's side, before anything is told

    @property
    def sent(self) -> int:
        """Bytes given to SCTP."""
        channel = self._channel
        return self._given - (0 if channel is None else channel.bufferedAmount)

    def begin(self, channel: RTCDataChannel) -> None:
        self._channel = channel
        channel.bufferedAmountLowThreshold = UNSENT_BYTES
        channel.on("message", self._on_message)
        channel.on("close", self._on_close)
        channel.on("bufferedamountlow", self._on_low)

    def send(self, data: bytes) -> None:
        if self._channel is None or self._finished:
            return
        for start in range(0, len(data), MESSAGE_BYTES):
            self._stack.send(self._channel, data[start : start + MESSAGE_BYTES])
        self._given += len(data)
        if self._channel.bufferedAmount <= UNSENT_BYTES:
            self._on_low()

    def finish(self) -> None:
        if self._channel is not None and not self._finished:
            self._finished = True
            self._stack.send(self._channel, b"")
            self._given += 1  # what aiortc counts for it
            self._close_when_over()

    def reset(self) -> None:
        self._finished = self._ended = True
        if self._channel is not None:
            self._stack.give_up(self._channel)

    def _on_message(self, data: bytes | str) -> None:
        if self._ended:
            return
        if isinstance(data, str):
            self._stack.broken("text on a channel")
        elif data:
            self._stack.heard(len(data))
            self._stack.island.tell(lambda: self.ashore.feed(data))
        else:
            self._ended = True
            self._stack.island.tell(lambda: self.ashore.feed(b"", end=True))
            self._close_when_over()

    def _on_close(self) -> None:
        self._channel = None
        self._stack.forget(self)
        self._stack.island.tell(lambda: self.ashore.lose("the other side reset the channel"))

    def _on_low(self) -> None:
        self._stack.island.tell(lambda: self.ashore.wake_writers())

    def _close_when_over(self) -> None:
        if self._finished and self._ended and self._channel is not None:
            self._channel.close()


class Stack:
    """One link's, from gathering addresses to the goodbye.

    link: set by trio's side before `connect`. deaf_until_s (trio's time) and may_hear_bytes (of a
    stranger, on all channels) are set there too.
    """

    link: Listener
    deaf_until_s = 0.0
    may_hear_bytes: float = math.inf

    def __init__(self, island: Island, role: Role, ice: IceConnection) -> None:
        self.island = island
        self._role = role
        self.ice = ice
        self._certificate = RTCCertificate.generateCertificate()
        self._dtls: Dtls | None = None
        self._sctp: Association | None = None
        self._words: RTCDataChannel | None = None
        self._established = island.event()
        self._idle = island.event()
        self._theirs: set[Pipe] = set()
        self._heard_bytes = 0
        self._spent_s = 0.0
        self._over = False
        self._last_number = 0 if role is Role.DIALLER else 1  # 0 is the words'
        ice.is_deaf = self._is_deaf
        island.at_end.add(self._at_end)

    @property
    def fingerprint(self) -> bytes:
        """Of our certificate, made for this link alone."""
        fingerprint: bytes = self._certificate._cert.fingerprint(hashes.SHA256())
        return fingerprint

    async def gather(self) -> tuple[Place, ...]:
        """Nothing is left of it where this fails or is given up."""
        try:
            await self.ice.gather_candidates()
        except BaseException:
            await self._tear_down()
            raise
        return self.ice.places()

    async def connect(self, them: Description) -> bytes:
        """The fingerprint of the peer's certificate. Raises LinkClosed, HandshakeFailed."""
        try:
            await self.ice.meet(them)
            dtls = self._dtls = Dtls(
                self.ice, self._role, self._certificate, them.fingerprint, self._on_dtls_end
            )
            await dtls.start(RTCDtlsParameters([RTCDtlsFingerprint("sha-256", "")]))
            if dtls.found is None:
                raise LinkClosed("the two sides could not agree on encryption (DTLS)")
            if dtls.state != "connected":
                raise HandshakeFailed(
                    "another certificate than the one announced: someone may be in the middle"
                )
            await self._associate(dtls)
        except ConnectionError as error:
            raise LinkClosed(f"no path by ICE: {error}") from error
        if self._over:
            raise LinkClosed("closed by the other side")
        return dtls.found

    async def _associate(self, dtls: Dtls) -> None:
        sctp = self._sctp = Association(
            *(dtls, self.ice, self._on_state, self.broken, self._idle.set),
            *(self._charge, self._may_keep, self.island.spawn),
        )
        sctp.on("datachannel", self._on_channel)
        parameters = RTCDataChannelParameters(label="link", negotiated=True, id=0)
        self._words = RTCDataChannel(sctp, parameters)
        self._words.on("message", self._on_words)
        await sctp.start(RTCSctpCapabilities(maxMessageSize=MESSAGE_BYTES), SCTP_PORT)
        await self._established.wait()

    def leave(self, code: CloseCode, reason: str) -> None:
        """Say goodbye and be gone."""
        if not self._over:
            self._over = True
            words = bytes([code]) + reason.encode("utf-8")
            self.island.spawn(self._leave(words[:MAX_WORDS_BYTES]), is_goodbye=True)

    def _at_end(self) -> None:
        self.leave(CloseCode.LINK_OVER, "the node is stopping")

    # --- for channels -------------------------------------------------------------------

    def open(self, pipe: Pipe) -> None:
        if self._sctp is not None and not self._over:
            parameters = RTCDataChannelParameters(id=self._free_number())
            pipe.begin(RTCDataChannel(self._sctp, parameters))

    def _free_number(self) -> int:
        """Even from the dialler, odd from the listener (RFC 8832 section 6). aiortc takes the
        lowest that is free on our side; on the other it may not be yet, where packets were lost."""
        assert self._sctp is not None
        while True:
            self._last_number = (self._last_number + 2) % NUMBERS
            if self._last_number not in self._sctp._data_channels:
                return self._last_number

    def send(self, channel: RTCDataChannel, data: bytes) -> None:
        """Also on one whose opening the peer has not acknowledged yet."""
        if self._sctp is not None and channel.readyState in ("connecting", "open"):
            self._idle.clear()
            self._sctp._data_channel_send(channel, data)

    def give_up(self, channel: RTCDataChannel) -> None:
        if self._sctp is not None:
            self._sctp.drop_queued(channel)
            channel.close()

    def forget(self, pipe: Pipe) -> None:
        self._theirs.discard(pipe)

    def heard(self, count: int) -> None:
        self._heard_bytes += count
        if self._heard_bytes > self.may_hear_bytes:
            self.broken("too much data before the handshake")
        self._charge(0.0, now=True)

    def broken(self, reason: str) -> None:
        self._gone(CloseCode.PROTOCOL_ERROR, reason, by_peer=False)

    # --- what happens -------------------------------------------------------------------

    def _on_channel(self, channel: RTCDataChannel) -> None:
        plain = channel.ordered and channel.maxRetransmits is channel.maxPacketLifeTime is None
        if not plain or len(self._theirs) >= MAX_CHANNELS:
            self.broken("a channel of another kind" if not plain else "too many channels are open")
            return
        pipe = Pipe(self)
        self._theirs.add(pipe)
        self.island.tell(lambda: self.link.on_channel(pipe))
        pipe.begin(channel)

    def _on_words(self, words: bytes | str) -> None:
        if isinstance(words, bytes) and words and words[0] in set(CloseCode):
            reason = words[1:MAX_WORDS_BYTES].decode("utf-8", "replace")
            self._gone(CloseCode(words[0]), reason, by_peer=True)
        else:
            self.broken("words about the link that are none")

    def _on_state(self, established: bool) -> None:
        self._established.set()
        if not established:
            self._idle.set()  # nothing more is heard: no goodbye need wait
            self._gone(CloseCode.LOST, "the connection was closed", by_peer=True)

    def _on_dtls_end(self) -> None:
        self._idle.set()
        self._gone(CloseCode.LOST, "the connection was closed", by_peer=True)

    def _gone(self, code: CloseCode, reason: str, by_peer: bool) -> None:
        if not self._over:
            self.island.tell(lambda: self.link.on_gone(code, reason, by_peer))
            if by_peer:
                self._over = True
                self.island.spawn(self._tear_down(), is_goodbye=True)
            else:
                self.leave(code, reason)

    # --- keeping count ------------------------------------------------------------------

    def _is_deaf(self) -> bool:
        self._charge(DATAGRAM_S)
        return trio.current_time() < self.deaf_until_s

    def _may_keep(self) -> bool:
        return self._heard_bytes - self.link.taken_bytes <= HELD_BYTES

    def _charge(self, spent_s: float, *, now: bool = False) -> None:
        self._spent_s += spent_s
        if now or self._spent_s > CHARGE_EVERY_S:
            total_s, self._spent_s = self._spent_s, 0.0
            self.island.tell(lambda: self.link.on_spent(total_s, heard=now))

    # --- the end ------------------------------------------------------------------------

    async def _leave(self, words: bytes) -> None:
        sctp, channel = self._sctp, self._words
        if sctp is not None and channel is not None and channel.readyState == "open":
            sctp.drop_queued()
            sctp.say_first(channel, words)
            self._idle.clear()
            await sctp._data_channel_flush()
            await self.island.at_most(GOODBYE_S, self._idle.wait())
        await self._tear_down()

    async def _tear_down(self) -> None:
        self.island.at_end.discard(self._at_end)
        if self._sctp is not None:
            await self._sctp.stop()
        if self._dtls is not None:
            await self._dtls.stop()
        await self.island.at_most(GOODBYE_S, self.ice.close())
