"""The only place that touches aioquic's private parts. Written against aioquic 1.2 to 1.7.

Each item says what upstream lacks; tests/tunnels/test_quic_tuning.py fails when upstream moves.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, Protocol

from aioquic.quic.congestion.base import create_congestion_control
from aioquic.quic.connection import (
    MAX_STREAM_DATA_FRAME_CAPACITY,
    Limit,
    QuicConnection,
    QuicConnectionState,
    QuicNetworkPath,
)
from aioquic.quic.events import ConnectionTerminated
from aioquic.quic.packet import QuicFrameType, QuicPacketType
from aioquic.quic.packet_builder import QuicDeliveryState, QuicPacketBuilder, QuicSentPacket
from aioquic.quic.rangeset import RangeSet
from aioquic.quic.recovery import QuicPacketPacer, QuicPacketSpace
from aioquic.quic.stream import QuicStream
from aioquic.tls import Epoch
from cryptography import x509
from cryptography.hazmat.backends import default_backend

from tunnels.pmtu import BASE_BYTES

# The TLS engine imports it with the first connection, when no descriptor may be left to do so.
default_backend()

STREAM_WINDOW_BYTES = 8 << 20  # above the credit of resume.py, which is what really holds a peer
LINK_WINDOW_BYTES = 8 << 20  # over all streams: what a link can make us hold
MAX_BACKOFF_S = 1.0
# Upstream acknowledges after 1 ms, and never in a packet that leaves before: an answer that takes
# less would have been the acknowledgement too.
ACK_DELAY_S = 0.005
JUST_BEFORE_S = 1e-6
KNOWN_BACKOFF_S = 0.25  # to an address where somebody answered before
PACING_TICK_S = 0.002
PACING_BURST_PACKETS = 40


class _TakenLimit(Limit):
    """The connection's window. Upstream's assignments, which double it, change nothing."""

    def __init__(self, limit: Limit) -> None:
        self._value = LINK_WINDOW_BYTES
        super().__init__(limit.frame_type, limit.name, self._value)

    @property
    def value(self) -> int:
        return self._value

    @value.setter
    def value(self, wanted: int) -> None:
        pass

    def follow(self, taken: int) -> None:
        wanted = taken + LINK_WINDOW_BYTES
        if wanted - self._value >= LINK_WINDOW_BYTES // 4:
            self._value = wanted


class BoundedConnection(QuicConnection):
    """A QuicConnection whose windows follow what was taken out of it.

    Upstream doubles a window whenever half of it is used, so that after a long transfer a peer
    may open a gap of gigabytes that must be buffered; and it counts as delivered what nobody has
    read. `held_bytes` is asked for that: of one stream, or of all for None.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._local_max_data: Limit = _TakenLimit(self._local_max_data)
        self.held_bytes: Callable[[int | None], int] = lambda _stream_id: 0
        self.packets_lost = 0
        self.large_packets: LargePackets | None = None
        _count_losses(self)
        _watch_answers(self)
        self._ack_delay = ACK_DELAY_S

    def _write_application(
        self, builder: QuicPacketBuilder, network_path: QuicNetworkPath, now: float
    ) -> None:
        due_at = self._spaces[Epoch.ONE_RTT].ack_at
        if due_at is not None and (due_at <= now or self._sends_data(now)):
            acknowledge_now(self, now)
        super()._write_application(builder, network_path, now)

    def _sends_data(self, now: float) -> bool:
        return self.has_data() and self._loss._pacer.next_send_time(now) is None

    def has_data(self) -> bool:
        return any(not stream.sender.buffer_is_empty for stream in self._streams_queue)

    def _write_connection_limits(self, builder: QuicPacketBuilder, space: QuicPacketSpace) -> None:
        if builder._packets:
            return  # upstream asks for every packet; what there was to say was in the first
        limit = self._local_max_data
        assert isinstance(limit, _TakenLimit)
        if limit.used + LINK_WINDOW_BYTES // 2 > limit.value:
            limit.follow(limit.used - buffered_gap_bytes(self) - self.held_bytes(None))
        super()._write_connection_limits(builder, space)

    def _write_stream_limits(
        self,
        builder: QuicPacketBuilder,
        space: QuicPacketSpace,  # noqa: ARG002 - upstream's signature
        stream: QuicStream,
    ) -> None:
        if builder._packets:
            return
        wanted = stream.receiver.starting_offset() + STREAM_WINDOW_BYTES
        if wanted - stream.max_stream_data_local >= STREAM_WINDOW_BYTES // 2:
            wanted -= self.held_bytes(stream.stream_id)
        if wanted - stream.max_stream_data_local >= STREAM_WINDOW_BYTES // 2:
            stream.max_stream_data_local = wanted
        if stream.max_stream_data_local_sent == stream.max_stream_data_local:
            return
        buffer = builder.start_frame(
            QuicFrameType.MAX_STREAM_DATA,
            capacity=MAX_STREAM_DATA_FRAME_CAPACITY,
            handler=self._on_max_stream_data_delivery,
            handler_args=(stream,),
        )
        buffer.push_uint_var(stream.stream_id or 0)
        buffer.push_uint_var(stream.max_stream_data_local)
        stream.max_stream_data_local_sent = stream.max_stream_data_local


class LargePackets(Protocol):
    """Who wants to know what becomes of packets larger than every path carries (pmtu.py)."""

    @property
    def suspects(self) -> bool: ...

    def answered(self) -> None: ...

    def large_delivered(self) -> None: ...

    def large_lost(self, now: float) -> None: ...


def _count_losses(quic: BoundedConnection) -> None:
    """Upstream tells its congestion control alone. What a probe timeout sends again is not taken
    for lost there (`congestion_event`), and not here; nor are probes of the datagrams' size."""
    forget: Callable[..., None] = quic._loss._on_packets_lost

    def counted(*, packets: Iterable[QuicSentPacket], now: float, **options: Any) -> None:
        lost = tuple(packets)
        if options.get("congestion_event", True):
            quic.packets_lost += sum(packet.in_flight for packet in lost)
            if quic.large_packets is not None and any(map(_is_large, lost)):
                quic.large_packets.large_lost(now)
        forget(packets=lost, now=now, **options)

    quic._loss._on_packets_lost = counted  # type: ignore[method-assign]


def _watch_answers(quic: BoundedConnection) -> None:
    take: Callable[..., None] = quic._loss.on_ack_received

    def watched(*, ack_rangeset: RangeSet, space: QuicPacketSpace, **options: Any) -> None:
        watcher, before = quic.large_packets, len(space.sent_packets)
        large = (
            [number for number, packet in space.sent_packets.items() if _is_large(packet)]
            if (watcher is not None and watcher.suspects)
            else ()
        )
        take(ack_rangeset=ack_rangeset, space=space, **options)
        if watcher is not None and len(space.sent_packets) < before:
            watcher.answered()
            if any(number in ack_rangeset for number in large):
                watcher.large_delivered()

    quic._loss.on_ack_received = watched  # type: ignore[method-assign]


def _is_large(packet: QuicSentPacket) -> bool:
    return packet.in_flight and packet.sent_bytes > BASE_BYTES


def set_datagram_bytes(quic: QuicConnection, size: int) -> None:
    """Upstream has one size for the whole life of a connection. The congestion window keeps its
    bytes, and grows by the size of the beginning."""
    quic._max_datagram_size = size
    quic._loss._pacer._max_datagram_size = size


def size_probe(quic: QuicConnection, size: int, now: float, told: Callable[[bool], None]) -> bytes:
    """A datagram of just this size, which nobody misses. It is acknowledged or lost like another,
    but is no sign of congestion (RFC 9000 section 14.4): it does not count as in flight."""
    builder = QuicPacketBuilder(
        host_cid=quic.host_cid,
        peer_cid=quic._peer_cid.cid,
        version=quic._version or 0,
        is_client=quic._is_client,
        max_datagram_size=size,
        packet_number=quic._packet_number,
        spin_bit=quic._spin_bit,
    )

    def tell(state: QuicDeliveryState) -> None:
        told(state is QuicDeliveryState.ACKED)

    builder.start_packet(QuicPacketType.ONE_RTT, quic._cryptos[Epoch.ONE_RTT])
    buffer = builder.start_frame(QuicFrameType.PING, handler=tell)
    buffer.push_bytes(bytes(builder.remaining_buffer_space))  # PADDING
    [datagram], [packet] = builder.flush()
    packet.in_flight = False
    packet.sent_time = now
    quic._packet_number = builder.packet_number
    quic._loss.on_packet_sent(packet=packet, space=quic._spaces[Epoch.ONE_RTT])
    quic._loss._time_of_last_sent_ack_eliciting_packet = now  # its timeout begins now
    return datagram


def timeouts_in_a_row(quic: QuicConnection) -> int:
    return quic._loss._pto_count


def packets_sent(quic: QuicConnection) -> int:
    """Packets are numbered through."""
    return quic._packet_number


class TickPacer(QuicPacketPacer):
    """Paces in bursts of a tick. Upstream's wakes for every packet or two.

    Waking a task costs as much as sending several packets, and a burst of PACING_TICK_S is
    below what any queue on the way notices.
    """

    def next_send_time(self, now: float) -> float | None:  # type: ignore[override]
        if self.packet_time is None:
            return None
        self.update_bucket(now=now)
        if self.bucket_time <= 0:
            return now + max(self.packet_time, PACING_TICK_S)
        return None

    def update_rate(self, congestion_window: int, smoothed_rtt: float) -> None:
        # RFC 9002 section 7.7: a little faster than the window, which then is the limit.
        super().update_rate(congestion_window * 5 // 4, smoothed_rtt)
        assert self.packet_time is not None
        burst = max(PACING_BURST_PACKETS * self.packet_time, 2 * PACING_TICK_S)
        self.bucket_max = burst


class NoPacer(QuicPacketPacer):
    """For the way through this machine's memory, which no burst can upset."""

    def next_send_time(self, now: float) -> float | None:  # type: ignore[override]  # noqa: ARG002
        return None


def pace(quic: QuicConnection, *, same_machine: bool) -> None:
    pacer = NoPacer if same_machine else TickPacer
    quic._loss._pacer = pacer(max_datagram_size=quic.configuration.max_datagram_size)


def acknowledge_now(quic: QuicConnection, now: float) -> None:
    """What is to be acknowledged at all, in the next packet. A little before now: what is due at
    this very moment upstream still holds back for its pacing, and asks for a timer at once."""
    space = quic._spaces[Epoch.ONE_RTT]
    if space.ack_at is not None:
        space.ack_at = min(space.ack_at, now - JUST_BEFORE_S)


def only_acknowledges(quic: BoundedConnection, now: float) -> bool:
    """True when there is nothing to send but an acknowledgement, which is due later, and what may
    well wait for it: a packet made for it now would be one more for both sides."""
    due_at = quic._spaces[Epoch.ONE_RTT].ack_at if quic._handshake_confirmed else None
    return (
        due_at is not None
        and due_at > now
        and quic._network_paths[0].is_validated
        and quic._close_event is None
        and quic._pacing_at is None  # its timer stands until the next transmission
        and not quic._probe_pending
        and not quic.has_data()
    )


def cap_backoff(quic: QuicConnection, most_s: float = MAX_BACKOFF_S) -> None:
    """Probe at least every `most_s`, so that a link resumes promptly after an outage.

    RFC 9002 (6.2.1) doubles the probe timeout without a limit: after 20 s of silence the next
    probe is up to 20 s away.
    """
    loss = quic._loss
    while loss._pto_count and loss.get_probe_timeout() * 2**loss._pto_count > most_s:
        loss._pto_count -= 1


def begin_path(quic: QuicConnection) -> None:
    """What was learned of the way before says nothing of the new one (RFC 9000 section 9.4)."""
    loss = quic._loss
    loss._pto_count = 0
    loss._rtt_initialized = False
    loss._rtt_latest = loss._rtt_smoothed = loss._rtt_variance = 0.0
    loss._rtt_min = math.inf
    fresh = create_congestion_control(
        quic.configuration.congestion_control_algorithm,
        max_datagram_size=quic.configuration.max_datagram_size,
    )
    fresh.bytes_in_flight = loss._cc.bytes_in_flight
    loss._cc = fresh
    loss._pacer.packet_time = None


def path_address(quic: QuicConnection) -> tuple[str, int]:
    """Where the connection's own datagrams go: upstream follows a dialler whose datagrams come
    from elsewhere and decrypt. It also sends single ones to try other ways."""
    host, port = quic._network_paths[0].addr[:2]
    return host, port


def path_is_proven(quic: QuicConnection) -> bool:
    """Whether the other side has answered from there (RFC 9000 section 8.2)."""
    return bool(quic._network_paths) and quic._network_paths[0].is_validated


def idle_deadline(quic: QuicConnection) -> float | None:
    """Moves with every datagram that decrypts."""
    return quic._close_at


def has_started(quic: QuicConnection) -> bool:
    """True once a first packet was decrypted: before, a server connection is nobody's."""
    return quic._state is not QuicConnectionState.FIRSTFLIGHT


def can_send(quic: QuicConnection) -> bool:
    """Polling a server connection before its first datagram raises, as does polling a client's
    whose start failed."""
    return bool(quic._network_paths) and bool(quic._cryptos)


def closing(quic: QuicConnection) -> tuple[ConnectionTerminated, bool] | None:
    """The reason and whether it is the peer's, as soon as it is known.

    Upstream's event comes only after the draining period.
    """
    if quic._close_event is None:
        return None
    return quic._close_event, quic._state is QuicConnectionState.DRAINING


def peer_certificate(quic: QuicConnection) -> x509.Certificate | None:
    return quic.tls._peer_certificate


def received_stream_bytes(quic: QuicConnection) -> int:
    """Sum over all streams of the highest offset seen, gaps included."""
    return quic._local_max_data.used


def buffered_gap_bytes(quic: QuicConnection) -> int:
    """What is held out of order, or was not yet seen, before the highest offset of each stream."""
    return sum(
        stream.receiver.highest_offset - stream.receiver.starting_offset()
        for stream in quic._streams.values()
        if not stream.receiver.is_finished
    )


def transmitted_bytes(quic: QuicConnection, stream_id: int) -> int | None:
    """How far a stream was sent at least once; None when its state is gone."""
    stream = quic._streams.get(stream_id)
    return None if stream is None else stream.sender.highest_offset
