"""The only place that touches aioquic's private parts. Written against aioquic 1.2 to 1.7.

Each item says what upstream lacks; tests/tunnels/test_quic_tuning.py fails when upstream moves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from aioquic.quic.connection import (
    MAX_STREAM_DATA_FRAME_CAPACITY,
    Limit,
    QuicConnection,
    QuicConnectionState,
)
from aioquic.quic.events import ConnectionTerminated
from aioquic.quic.packet import QuicFrameType
from aioquic.quic.packet_builder import QuicPacketBuilder, QuicSentPacket
from aioquic.quic.recovery import QuicPacketPacer, QuicPacketSpace
from aioquic.quic.stream import QuicStream
from cryptography import x509
from cryptography.hazmat.backends import default_backend

# The TLS engine imports it with the first connection, when no descriptor may be left to do so.
default_backend()

STREAM_WINDOW_BYTES = 8 << 20  # above the credit of resume.py, which is what really holds a peer
LINK_WINDOW_BYTES = 8 << 20  # over all streams: what a link can make us hold
MAX_BACKOFF_S = 1.0
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
        _count_losses(self)

    def _write_connection_limits(self, builder: QuicPacketBuilder, space: QuicPacketSpace) -> None:
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


def _count_losses(quic: BoundedConnection) -> None:
    """Upstream tells its congestion control alone. What a probe timeout sends again is not taken
    for lost there (`congestion_event`), and not here."""
    forget: Callable[..., None] = quic._loss._on_packets_lost

    def counted(*, packets: Iterable[QuicSentPacket], **options: Any) -> None:
        lost = tuple(packets)
        quic.packets_lost += len(lost) if options.get("congestion_event", True) else 0
        forget(packets=lost, **options)

    quic._loss._on_packets_lost = counted  # type: ignore[method-assign]


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


def cap_backoff(quic: QuicConnection) -> None:
    """Probe at least every MAX_BACKOFF_S, so that a link resumes promptly after an outage.

    RFC 9002 (6.2.1) doubles the probe timeout without a limit: after 20 s of silence the next
    probe is up to 20 s away.
    """
    loss = quic._loss
    while loss._pto_count and loss.get_probe_timeout() * 2**loss._pto_count > MAX_BACKOFF_S:
        loss._pto_count -= 1


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
