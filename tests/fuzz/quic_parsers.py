"""What anyone who can send a datagram says before a connection stands, and frames on one that does.

Initial keys follow from the connection id, so a stranger can encrypt whatever it likes: bodies are
damaged below the encryption. Frames of a standing connection are given to the QUIC engine as they
are after decryption, in a fresh one each time.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import trio
import trio.testing
from aioquic.buffer import encode_uint_var
from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.connection import (
    QuicConnection,
    QuicConnectionError,
    QuicConnectionState,
    QuicNetworkPath,
    QuicReceiveContext,
)
from aioquic.quic.crypto import CryptoPair
from aioquic.tls import Epoch

from tests.fuzz.mutation import SealedFormat
from tests.fuzz.parser import REJECTED, Parser, check
from tests.fuzz.tunnels_parsers import US
from tunnels import quic_tuning as tuning
from tunnels.allowance import Budget
from tunnels.binding import Address, KnownAddresses
from tunnels.door import Door
from tunnels.link import Link
from tunnels.quic_transport import ALPN, CID_BYTES, QUIC_VERSION, QuicTransport

STRANGER: Address = ("192.0.2.77", 4242)
CID, THEIR_CID = b"c" * CID_BYTES, b"t" * CID_BYTES
PADDED_BYTES = 1162  # of plain payload: the datagram then has 1200 or more
AMPLIFICATION = 3  # RFC 9000, section 8.1
CLIENT_HELLO = Path(__file__).parent / "client_hello.bin"
"""The CRYPTO frame of a node that dials, as recorded once: random numbers are in it."""


class SilentSocket:
    """I count what is answered."""

    on_unreachable: Any = None
    local: Address = ("192.0.2.1", 1)
    answered = KnownAddresses()

    def __init__(self) -> None:
        self.sent_bytes = 0

    def send(self, datagrams: Sequence[bytes], to: Address) -> None:
        self.sent_bytes += sum(map(len, datagrams))


class NoNursery:
    """Nothing that would go on after an input is started."""

    def start_soon(self, *_: object) -> None:
        pass


async def _never_accepted(_link: Link) -> None:
    pass


async def _never_knocks(_address: Address) -> bool:
    return False


@functools.cache
def _transport() -> tuple[QuicTransport, SilentSocket]:
    socket = SilentSocket()
    transport = QuicTransport(
        *(US, cast(Any, socket), _never_knocks, cast(trio.Nursery, NoNursery()), _never_accepted),
        lambda: ["192.0.2.1"],
        Budget(trio.current_time()),
    )
    return transport, socket


async def run_first_datagram(data: bytes) -> object:
    """A datagram out of nowhere, then the same again: a stranger may repeat itself."""
    clock = trio.lowlevel.current_clock()
    assert isinstance(clock, trio.testing.MockClock)
    clock.jump(60)
    transport, socket = _transport()
    transport._door = Door(trio.current_time())
    transport._links.clear()
    socket.sent_bytes = 0
    for _ in range(2):
        link = transport._route(data, STRANGER)
        if link is not None and link.receive([data], STRANGER):
            link.pump_charged()
    links = set(transport._links.values())
    check(len(links) <= 1, "one datagram makes one connection at most")
    check(socket.sent_bytes <= 2 * AMPLIFICATION * len(data), "no answer is an attack on a third")
    for one in links:
        closure = one.closure
        check(closure is None or closure.reason != "internal error", "the QUIC engine holds")
    return links or REJECTED


@functools.cache
def _client_keys() -> CryptoPair:
    pair = CryptoPair()
    pair.setup_initial(cid=CID, is_client=True, version=QUIC_VERSION)
    return pair


def seal_initial(body: bytes) -> bytes:
    """First byte: 0 to 200 an Initial of our making; above, the body is the datagram. Second: its
    packet number."""
    if len(body) < 2 or body[0] > 200:
        return body[1:].ljust(1200, b"\0") if body[:1] > b"\xe0" else body[1:]
    payload = body[2:].ljust(PADDED_BYTES, b"\0")[:1400]
    number = body[1].to_bytes(2, "big")
    header = b"\xc1" + int(QUIC_VERSION).to_bytes(4, "big")
    header += bytes((len(CID),)) + CID + bytes((len(THEIR_CID),)) + THEIR_CID
    header += encode_uint_var(0)  # no token
    header += (0x4000 | (2 + len(payload) + 16)).to_bytes(2, "big") + number
    return _client_keys().encrypt_packet(header, payload, body[1])


def initial_seeds() -> list[bytes]:
    hello = CLIENT_HELLO.read_bytes()
    ack = b"\x02\x00\x00\x00\x00"
    close = b"\x1c\x00\x00\x03bye"
    initial = seal_initial(b"\0\0" + hello)
    return [
        b"\0\0" + hello,
        b"\0\1" + ack + hello,
        b"\0\0" + close + b"\x01",
        b"\xd0" + initial,
        b"\xd0\xc1\0\0\0\0" + initial[5:],
        b"\xd0" + initial[:700],
    ]


# --- frames -------------------------------------------------------------------------------------


@functools.cache
def _configuration() -> QuicConfiguration:
    configuration = QuicConfiguration(
        alpn_protocols=[ALPN],
        is_client=False,
        connection_id_length=CID_BYTES,
        max_data=tuning.LINK_WINDOW_BYTES,
        max_stream_data=tuning.STREAM_WINDOW_BYTES,
        supported_versions=[QUIC_VERSION],
    )
    configuration.certificate, configuration.private_key = US.certificate, US.tls_key
    return configuration


def run_frames(data: bytes) -> object:
    """One packet's frames, twice over: what a member may send at any time."""
    quic = tuning.BoundedConnection(
        configuration=_configuration(), original_destination_connection_id=CID
    )
    quic.held_bytes = lambda _stream_id: 0
    quic._version = QUIC_VERSION
    quic._initialize(THEIR_CID)
    quic._network_paths = [QuicNetworkPath(STRANGER, is_validated=True)]
    quic._peer_cid.sequence_number = 0
    quic._state = QuicConnectionState.CONNECTED
    quic._handshake_complete = quic._handshake_confirmed = True
    context = QuicReceiveContext(
        epoch=Epoch.ONE_RTT,
        host_cid=quic.host_cid,
        network_path=quic._network_paths[0],
        quic_logger_frames=None,
        time=1.0,
        version=QUIC_VERSION,
    )
    for _ in range(2):
        QuicConnection._payload_received(quic, context, data)
    while quic.next_event() is not None:
        pass
    return tuning.buffered_gap_bytes(quic)


def frame_seeds() -> list[bytes]:
    var = encode_uint_var
    return [
        b"\x01\x00\x02" + var(10) + var(3) + var(0) + var(10),
        b"\x0f" + var(0) + var(0) + var(4) + b"data" + b"\x0a" + var(4) + var(2) + b"xy",
        b"\x0e" + var(8) + var(5000) + b"far away",
        b"\x04" + var(0) + var(7) + var(100) + b"\x05" + var(4) + var(7),
        b"\x10" + var(1 << 20) + b"\x11" + var(0) + var(1 << 20) + b"\x12" + var(200),
        b"\x14" + var(9) + b"\x15" + var(0) + var(9) + b"\x16" + var(9),
        b"\x18" + var(1) + var(0) + b"\x08" + b"n" * 8 + b"r" * 16,
        b"\x19" + var(0) + b"\x1a" + b"p" * 8 + b"\x1b" + b"q" * 8,
        b"\x06" + var(0) + var(9) + b"\x04\x00\x00\x05hello",
        b"\x1c" + var(10) + var(6) + var(4) + b"why?",
        b"\x1d" + var(2) + var(4) + b"why?",
        b"\x07" + var(3) + b"tok\x1e",
        b"\x31" + var(3) + b"dgr",
    ]


PARSERS = (
    Parser(
        *("datagram of a stranger", (), initial_seeds),
        run_in_trio=run_first_datagram,
        format=SealedFormat(seal_initial),
    ),
    Parser("QUIC frames", (QuicConnectionError,), frame_seeds, run_frames),
)
