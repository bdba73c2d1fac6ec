"""DTLS and SCTP of one WebRTC link: aiortc's own, checked before and bounded inside.

Lives on the asyncio island; imported when the first link is made.
"""

from __future__ import annotations

import hmac
import logging
import time
from collections.abc import Callable, Coroutine
from typing import Any, Protocol

from aiortc.rtcdatachannel import RTCDataChannel
from aiortc.rtcdtlstransport import RTCCertificate, RTCDtlsParameters, RTCDtlsTransport, State
from aiortc.rtcsctptransport import (
    USERDATA_MAX_LENGTH,
    WEBRTC_BINARY,
    Chunk,
    DataChunk,
    InboundStream,
    RTCSctpTransport,
    SackChunk,
)
from cryptography.hazmat.primitives import hashes

from tunnels.errors import BadFrame
from tunnels.handshake import Role
from tunnels.sctp_guard import check_packet_untrusted
from tunnels.webrtc_ice import IceConnection

SCTP_PORT = 5000
WINDOW_BYTES = 8 << 20  # of chunks that wait for others of their message, or before it
MAX_AHEAD = 8192  # chunks past the last one in order
MAX_INBOUND = 1024  # streams on which the peer has sent and that it has not reset
TIMED_EVERY = 16  # packets: to ask for processor time takes as long as to parse one
BURST_CHUNKS = 10  # for an acknowledgement, as QUIC has it (RFC 9002 section 7.7); aiortc: 4
MAX_GAPS = 240  # in an acknowledgement, which must fit into a datagram: 4 bytes each
MAX_DUPLICATES = 20
SACK_EVERY = 2  # packets (RFC 9260 section 6.2)
SACK_EVERY_OF_A_BATCH = 8  # while more wait
SACK_DELAY_S = 2e-3  # for what is to be sent anyway to take it along; the RFC allows 0.2 s
_MOD = 1 << 32
_HALF = 1 << 31

log = logging.getLogger(__name__)


class TimerHandle(Protocol):
    """asyncio's."""

    def cancel(self) -> None: ...


class _Feet:
    """What RTCDtlsTransport wants below it."""

    def __init__(self, ice: IceConnection) -> None:
        self._recv = ice.recv
        self._send = ice.send
        self.role = "controlling" if ice.ice_controlling else "controlled"


class Dtls(RTCDtlsTransport):
    """The peer's certificate is what its description says, where it says something."""

    def __init__(
        self,
        ice: IceConnection,
        role: Role,
        certificate: RTCCertificate,
        expect: bytes | None,
        on_end: Callable[[], None],
    ) -> None:
        super().__init__(_Feet(ice), [certificate])  # type: ignore[arg-type]
        self._role = "client" if role is Role.DIALLER else "server"
        self._expect = expect
        self._on_end = on_end
        self.found: bytes | None = None

    def _validate_peer_identity(self, remoteParameters: RTCDtlsParameters) -> None:  # noqa: ARG002, N803
        assert self._ssl is not None
        certificate = self._ssl.get_peer_certificate(as_cryptography=True)
        assert certificate is not None  # the handshake fails without one
        self.found = certificate.fingerprint(hashes.SHA256())
        if self._expect is not None and not hmac.compare_digest(self.found, self._expect):
            self._set_state(State.FAILED)

    def _setup_srtp(self) -> None:
        """No media."""

    def _set_state(self, state: State) -> None:
        super()._set_state(state)
        if state is State.CLOSED:
            self._on_end()


class _Bundle(Chunk):
    """Several in one packet."""

    def __init__(self, *chunks: Chunk) -> None:
        super().__init__()
        self._chunks = chunks

    def __bytes__(self) -> bytes:
        return b"".join(map(bytes, self._chunks))


class Association(RTCSctpTransport):
    """on_state(established or closed). on_broken: the peer broke the rules. on_idle: all that was
    sent is acknowledged. on_spent: processor time, for a packet. may_keep: whether more of its data
    may be kept. spawn: a task of its own."""

    def __init__(
        self,
        dtls: Dtls,
        ice: IceConnection,
        on_state: Callable[[bool], None],
        on_broken: Callable[[str], None],
        on_idle: Callable[[], None],
        on_spent: Callable[[float], None],
        may_keep: Callable[[], bool],
        spawn: Callable[[Coroutine[Any, Any, None]], None],
    ) -> None:
        super().__init__(dtls, SCTP_PORT)
        self._ice = ice
        self._on_state = on_state
        self._on_broken = on_broken
        self._on_idle = on_idle
        self._on_spent = on_spent
        self._may_keep = may_keep
        self._spawn = spawn
        self._advertised_rwnd = WINDOW_BYTES
        self._unsacked = 0
        self._sack_later: TimerHandle | None = None
        self._packets = 0
        self._looks_back = False  # chunks in flight may have to be sent again

    async def _handle_data(self, data: bytes) -> None:
        self._packets += 1
        is_timed = self._packets % TIMED_EVERY == 0
        began_s = time.thread_time() if is_timed else 0.0
        try:
            check_packet_untrusted(data)
            await super()._handle_data(data)
            if is_timed:
                self._on_spent((time.thread_time() - began_s) * TIMED_EVERY)
        except BadFrame as error:
            self._on_broken(str(error))
        except ConnectionError:
            raise
        except Exception as error:
            log.debug("aiortc did not take a packet", exc_info=error)
            self._on_broken("the rules of data channels are broken")

    async def _transmit(self) -> None:
        """aiortc's own looks through all that is in flight, for each acknowledgement, for what has
        to be sent again: a fifth of what a transfer costs, and needless where nothing was lost."""
        if self._looks_back or self._fast_recovery_exit is not None:
            await super()._transmit()
            self._looks_back = any(one._retransmit for one in self._sent_queue)
            return
        room = min(self._flight_size + BURST_CHUNKS * USERDATA_MAX_LENGTH, self._cwnd)
        while self._outbound_queue and self._flight_size < room:
            chunk = self._outbound_queue.popleft()
            self._sent_queue.append(chunk)
            self._flight_size_increase(chunk)
            chunk._sent_count += 1
            chunk._sent_time = time.time()
            await self._send_chunk(chunk)
            if not self._t3_handle:
                self._t3_start()

    def _t3_expired(self) -> None:
        self._looks_back = True
        super()._t3_expired()

    async def _receive_sack_chunk(self, chunk: SackChunk) -> None:
        self._looks_back = self._looks_back or bool(chunk.gaps)
        await super()._receive_sack_chunk(chunk)
        if self.has_sent_all:
            self._on_idle()

    async def _receive_data_chunk(self, chunk: DataChunk) -> None:
        if self._last_received_tsn is None:
            raise BadFrame("SCTP data before its association")
        ahead = (chunk.tsn - self._last_received_tsn) % _MOD
        too_far = MAX_AHEAD < ahead < _HALF
        if too_far or self._advertised_rwnd < len(chunk.user_data) or not self._may_keep():
            self._sack_needed = True  # at once: what is not acknowledged comes again
            self._unsacked = SACK_EVERY_OF_A_BATCH
            return
        await super()._receive_data_chunk(chunk)

    def _get_inbound_stream(self, stream_id: int) -> InboundStream:
        if stream_id not in self._inbound_streams and len(self._inbound_streams) >= MAX_INBOUND:
            raise BadFrame("more SCTP streams than a session has")
        return super()._get_inbound_stream(stream_id)

    async def _send_sack(self) -> None:
        """One for several packets that came in order, and not alone if something follows soon (RFC
        9260 section 6.2): half of what a transfer costs otherwise."""
        self._sack_needed = False
        self._unsacked += 1
        in_order = not (self._sack_misordered or self._sack_duplicates)
        enough = SACK_EVERY_OF_A_BATCH if self._ice.has_waiting else SACK_EVERY
        if not in_order or self._unsacked >= enough:
            await self._send_chunk(self._take_sack())
        elif self._sack_later is None:
            assert self._loop is not None
            self._sack_later = self._loop.call_later(SACK_DELAY_S, self._sack_is_late)

    def _sack_is_late(self) -> None:
        self._sack_later = None
        if self._unsacked:
            self._spawn(self._send_chunk(self._take_sack()))

    async def _send_chunk(self, chunk: Chunk) -> None:
        """aiortc's own sends an acknowledgement in a packet of its own."""
        if self._unsacked and isinstance(chunk, DataChunk):
            chunk = _Bundle(self._take_sack(), chunk)
        await super()._send_chunk(chunk)

    def _take_sack(self) -> SackChunk:
        assert self._last_received_tsn is not None
        sack = SackChunk()
        sack.cumulative_tsn = self._last_received_tsn
        sack.advertised_rwnd = max(0, self._advertised_rwnd)
        sack.duplicates = self._sack_duplicates[:MAX_DUPLICATES]
        sack.gaps = self._gaps()
        self._sack_duplicates.clear()
        self._unsacked = 0
        return sack

    def _gaps(self) -> list[tuple[int, int]]:
        """Of what came early as much as an acknowledgement has room for, nearest first."""
        assert self._last_received_tsn is not None
        base = self._last_received_tsn
        gaps: list[tuple[int, int]] = []
        for ahead in sorted((tsn - base) % _MOD for tsn in self._sack_misordered):
            if gaps and ahead == gaps[-1][1] + 1:
                gaps[-1] = (gaps[-1][0], ahead)
            elif len(gaps) < MAX_GAPS:
                gaps.append((ahead, ahead))
            else:
                break
        return gaps

    def _set_state(self, state: RTCSctpTransport.State) -> None:
        super()._set_state(state)
        if state is self.State.ESTABLISHED:
            self._on_state(True)
        elif state is self.State.CLOSED:
            if self._sack_later is not None:
                self._sack_later.cancel()
            self._on_state(False)

    def drop_queued(self, channel: RTCDataChannel | None = None) -> None:
        """What has not been given to SCTP: of one channel, or of all."""
        kept = [one for one in self._data_channel_queue if channel not in (None, one[0])]
        self._data_channel_queue.clear()
        self._data_channel_queue.extend(kept)

    def say_first(self, channel: RTCDataChannel, words: bytes) -> None:
        channel._addBufferedAmount(len(words))
        self._data_channel_queue.appendleft((channel, WEBRTC_BINARY, words))

    @property
    def has_sent_all(self) -> bool:
        return not (self._data_channel_queue or self._outbound_queue or self._sent_queue)
