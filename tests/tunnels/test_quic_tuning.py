"""What we lean on inside aioquic: each of these goes red when upstream moves it."""

from __future__ import annotations

import itertools
import ssl
from typing import Any

import pytest
from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.connection import QuicConnection
from aioquic.quic.events import StreamDataReceived
from hypothesis import given
from hypothesis import strategies as st

from tests.lab.nodes import identity
from tunnels import quic_tuning as tuning
from tunnels.identity import certificate_peer
from tunnels.quic import TIMER_SLACK_S

BOB = identity("bob")


class Wire:
    """Two connections and the datagrams between them, in steps of a millisecond."""

    def __init__(self) -> None:
        self.now = 1.0
        self.client = tuning.BoundedConnection(
            configuration=QuicConfiguration(
                is_client=True, alpn_protocols=["t"], verify_mode=ssl.CERT_NONE
            )
        )
        self.client.connect(("server", 1), now=self.now)
        server = QuicConfiguration(is_client=False, alpn_protocols=["t"])
        server.certificate, server.private_key = BOB.certificate, BOB.tls_key
        self.server = tuning.BoundedConnection(
            configuration=server,
            original_destination_connection_id=self.client.original_destination_connection_id,
        )

    def step(self, *, lose: bool = False) -> int:
        self.now += 0.001
        carried = 0
        for source, sink, address in (
            (self.client, self.server, ("client", 1)),
            (self.server, self.client, ("server", 1)),
        ):
            if tuning.can_send(source):
                for datagram, _ in source.datagrams_to_send(self.now):
                    carried += 1
                    if not lose:
                        sink.receive_datagram(datagram, address, self.now)
                timer = source.get_timer()
                if timer is not None and timer <= self.now:
                    source.handle_timer(self.now)
        return carried

    def settle(self, steps: int = 50) -> None:
        for _ in range(steps):
            self.step()


@pytest.fixture
def wire() -> Wire:
    wire = Wire()
    assert not tuning.has_started(wire.server)
    assert not tuning.can_send(wire.server)
    wire.settle()
    assert tuning.has_started(wire.server)
    return wire


def test_the_certificate_of_the_other_side_is_found(wire: Wire) -> None:
    certificate = tuning.peer_certificate(wire.client)
    assert certificate is not None
    assert certificate_peer(certificate) == BOB.peer


def test_windows_follow_delivery_and_do_not_double(wire: Wire) -> None:
    stream_id = wire.client.get_next_available_stream_id()
    for _ in range(24):
        wire.client.send_stream_data(stream_id, bytes(1 << 20))
        wire.settle(300)
    received = 0
    while (event := wire.server.next_event()) is not None:
        if isinstance(event, StreamDataReceived):
            received += len(event.data)
    assert received == 24 << 20
    assert tuning.received_stream_bytes(wire.server) == received
    assert tuning.transmitted_bytes(wire.client, stream_id) == received
    assert tuning.transmitted_bytes(wire.client, stream_id + 4) is None
    assert tuning.buffered_gap_bytes(wire.server) == 0
    window = wire.server._streams[stream_id].max_stream_data_local - received
    assert window <= tuning.STREAM_WINDOW_BYTES


def test_a_goodbye_is_seen_before_the_draining_ends(wire: Wire) -> None:
    assert tuning.closing(wire.server) is None
    wire.client.close(error_code=3, reason_phrase="tired")
    wire.step()
    seen = tuning.closing(wire.server)
    assert seen is not None
    event, by_peer = seen
    assert (event.error_code, event.reason_phrase, by_peer) == (3, "tired", True)
    ours = tuning.closing(wire.client)
    assert ours is not None
    assert ours[1] is False


def test_probes_keep_coming_during_an_outage(wire: Wire) -> None:
    stream_id = wire.client.get_next_available_stream_id()
    wire.client.send_stream_data(stream_id, b"hello")
    probes = []
    for _ in range(20_000):
        tuning.cap_backoff(wire.client)
        if wire.step(lose=True):
            probes.append(wire.now)
    gaps = [later - earlier for earlier, later in itertools.pairwise(probes)]
    assert max(gaps) <= tuning.MAX_BACKOFF_S + 0.01
    assert wire.now - probes[-1] <= tuning.MAX_BACKOFF_S + 0.01


def test_pacing_waits_in_ticks_and_not_at_all_within_the_machine() -> None:
    quic = QuicConnection(configuration=QuicConfiguration(is_client=True))
    tuning.pace(quic, same_machine=False)
    pacer = quic._loss._pacer
    assert pacer.next_send_time(now=1.0) is None  # nothing is known of the path yet
    pacer.update_rate(congestion_window=100_000, smoothed_rtt=0.05)
    pacer.update_bucket(now=1.0)
    sent = 0
    while (at := pacer.next_send_time(now=1.0)) is None:
        pacer.update_after_send(now=1.0)
        sent += 1
    assert sent >= tuning.PACING_BURST_PACKETS
    assert at >= 1.0 + tuning.PACING_TICK_S
    tuning.pace(quic, same_machine=True)
    quic._loss._pacer.update_rate(congestion_window=1, smoothed_rtt=10.0)
    assert quic._loss._pacer.next_send_time(now=1.0) is None


@given(st.floats(0, 1e7), st.floats(1e-3, 10))
def test_a_timer_that_fires_at_its_moment_is_never_too_early(sent_s: float, delay_s: float) -> None:
    """aioquic names the moment `sent + delay` and then asks whether `sent <= now - delay`."""
    fires_at_s = sent_s + delay_s + TIMER_SLACK_S
    assert sent_s <= fires_at_s - delay_s


def test_an_answer_is_the_acknowledgement_too() -> None:
    """Upstream sends one of each. Without the override the question is acknowledged apart."""
    wire = Wire()
    wire.settle()
    question = wire.client.get_next_available_stream_id()
    wire.client.send_stream_data(question, bytes(100))
    for datagram, _ in wire.client.datagrams_to_send(wire.now):
        wire.server.receive_datagram(datagram, ("client", 1), wire.now)
    assert tuning.only_acknowledges(wire.server, wire.now)
    wire.server.send_stream_data(question, bytes(100))
    assert not tuning.only_acknowledges(wire.server, wire.now)
    [(answer, _)] = wire.server.datagrams_to_send(wire.now)
    wire.client.receive_datagram(answer, ("server", 1), wire.now)
    assert wire.client._loss.bytes_in_flight == 0
    later = wire.now + tuning.ACK_DELAY_S
    assert wire.server.datagrams_to_send(later) == []
    assert wire.client.get_timer() == pytest.approx(later)  # for the answer, if nothing is said


def test_an_acknowledgement_alone_waits_and_can_be_hurried() -> None:
    wire = Wire()
    wire.settle()
    stream_id = wire.client.get_next_available_stream_id()
    wire.client.send_stream_data(stream_id, bytes(100))
    wire.settle()  # the server widens the window of a new stream
    wire.client.send_stream_data(stream_id, bytes(100))
    for datagram, _ in wire.client.datagrams_to_send(wire.now):
        wire.server.receive_datagram(datagram, ("client", 1), wire.now)
    assert wire.server.datagrams_to_send(wire.now) == []
    wire.server._pacing_at = wire.now  # left from another time: only sending takes it away
    assert not tuning.only_acknowledges(wire.server, wire.now)
    wire.server._pacing_at = None
    tuning.acknowledge_now(wire.server, wire.now)
    assert not tuning.only_acknowledges(wire.server, wire.now)
    assert len(wire.server.datagrams_to_send(wire.now)) == 1


def test_windows_are_spoken_of_once_in_a_flight() -> None:
    """Upstream asks before every packet whether a window is to be widened."""
    wire = Wire()
    wire.settle()
    asked: list[int] = []
    upstream = QuicConnection._write_connection_limits

    def counted(quic: QuicConnection, builder: Any, space: Any) -> None:
        asked.append(len(builder._packets))
        upstream(quic, builder, space)

    wire.client.send_stream_data(wire.client.get_next_available_stream_id(), bytes(10_000))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(QuicConnection, "_write_connection_limits", counted)
        assert len(wire.client.datagrams_to_send(wire.now)) > 1
    assert asked == [0]


def test_a_probe_of_the_size_is_lost_without_congestion_and_delivered_like_another() -> None:
    wire = Wire()
    wire.settle()
    told: list[bool] = []
    window = wire.client._loss.congestion_window
    lost = tuning.size_probe(wire.client, 1472, wire.now, told.append)
    assert len(lost) == 1472
    assert wire.client._loss.bytes_in_flight == 0
    wire.settle(400)  # its timeout
    assert told == [False]
    assert wire.client._loss.congestion_window >= window
    assert wire.client.packets_lost == 0
    assert wire.client._loss.bytes_in_flight == 0
    heard = tuning.size_probe(wire.client, 1472, wire.now, told.append)
    wire.server.receive_datagram(heard, ("client", 1), wire.now)
    wire.settle()
    assert told == [False, True]
    tuning.set_datagram_bytes(wire.client, 1472)
    wire.client.send_stream_data(wire.client.get_next_available_stream_id(), bytes(3000))
    sizes = [len(datagram) for datagram, _ in wire.client.datagrams_to_send(wire.now)]
    assert sizes[0] == 1472


class Told:
    """What a connection says of its large packets."""

    suspects = True

    def __init__(self) -> None:
        self.words: list[str] = []

    def answered(self) -> None:
        self.words.append("answered")

    def large_delivered(self) -> None:
        self.words.append("delivered")

    def large_lost(self, now: float) -> None:
        self.words.append("lost")


@pytest.mark.parametrize(
    ("size", "arrives", "words"),
    [
        (1472, True, {"answered", "delivered"}),
        (1472, False, {"answered", "lost"}),
        (1200, True, {"answered"}),
        (1200, False, {"answered"}),
    ],
)
def test_what_becomes_of_large_packets_is_told(size: int, arrives: bool, words: set[str]) -> None:
    wire = Wire()
    wire.settle()
    tuning.set_datagram_bytes(wire.client, size)
    told = wire.client.large_packets = Told()
    stream_id = wire.client.get_next_available_stream_id()
    wire.client.send_stream_data(stream_id, bytes(1400))
    for datagram, _ in wire.client.datagrams_to_send(wire.now):
        if arrives:
            wire.server.receive_datagram(datagram, ("client", 1), wire.now)
    tuning.set_datagram_bytes(wire.client, 1200)
    for _ in range(5):  # overtaken by these, it is taken for lost
        wire.client.send_stream_data(stream_id, b"x")
        wire.settle(5)
    assert set(told.words) == words
