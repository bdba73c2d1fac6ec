"""What a peer, or anyone who can send a datagram, says to `tunnels`."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import replace

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from tests.fuzz.mutation import SealedFormat
from tests.fuzz.parser import REJECTED, Parser, check, text_of
from tests.fuzz.script import Script, scratch_file
from tunnels import offers, stun, tcp_wire
from tunnels.credit import MAX_WINDOW_BYTES
from tunnels.dial import AddressPolicy
from tunnels.errors import BadFrame, HandshakeFailed, IdentityError
from tunnels.frames import (
    VERSION,
    Ack,
    Data,
    End,
    Hello,
    Open,
    Ping,
    Pong,
    Proof,
    Ready,
    Record,
    RecordDecoder,
    Reset,
    ResetCode,
    Resume,
    Stop,
    encode,
)
from tunnels.handshake import LABEL, Handshake, Role
from tunnels.identity import Identity, certificate_peer, verify
from tunnels.peer import Candidate, PeerId, parse_peer_id_untrusted
from tunnels.resume import StreamState


def identity(number: int) -> Identity:
    return Identity(Ed25519PrivateKey.from_private_bytes(bytes([number]) * 32))


US, HOSTILE = identity(1), identity(2)
BINDING = b"b" * 32
PLACEHOLDER = bytes(64)
"""A signature that the harness replaces by a right one: a hostile peer has a key of its own."""


def hello(who: Identity, nonce: int) -> Hello:
    return Hello(VERSION, 1 << 20, b"e" * 16, bytes([nonce]) * 32, who.peer, "quic")


RECORDS: tuple[Record, ...] = (
    *(hello(HOSTILE, 3), Proof(PLACEHOLDER), Ready(), Ping(1), Pong(2)),
    *(Open(0, 1 << 20, "rpc/abc"), Resume(3, 1000, 1 << 20), Data(0, b"some bytes of a stream")),
    *(Ack(1, 2), End(0), Stop(), Reset(ResetCode.REFUSED, "no such service")),
)


# --- values -------------------------------------------------------------------------------------


def run_peer_id(data: bytes) -> PeerId:
    text = text_of(data)
    peer = parse_peer_id_untrusted(text)
    check(parse_peer_id_untrusted(str(peer)) == peer, "a peer id reads back")
    check(str(peer) == text.lower(), "a peer has one spelling")
    return peer


def run_candidate(data: bytes) -> Candidate:
    transport, _, rest = text_of(data).partition("|")
    host, _, port = rest.rpartition("|")
    number = int(port) if port.isascii() and port.isdecimal() and len(port) < 8 else 0
    candidate = Candidate(transport, host, number)
    refusal = AddressPolicy().refusal(
        candidate.host, bound_host="192.168.1.2", own_addresses=["192.168.1.2", "127.0.0.1"]
    )
    check(refusal is not None or "127." not in host[:4], "loopback is never dialled")
    return candidate


# --- records ------------------------------------------------------------------------------------


def run_records(data: bytes) -> list[Record]:
    """Whole, and again in two pieces: where a channel is cut changes nothing."""
    records = RecordDecoder().feed_untrusted(data)
    decoder, half = RecordDecoder(), len(data) // 2
    pieces = decoder.feed_untrusted(data[:half]) + decoder.feed_untrusted(data[half:])
    check(_joined(pieces) == _joined(records), "records do not depend on how they are cut")
    whole = [record for record in records if not isinstance(record, Data)]
    again = RecordDecoder().feed_untrusted(b"".join(map(encode, whole)))
    check(again == whole, "a record reads back")
    return records


def _joined(records: Sequence[Record]) -> list[Record | tuple[int, bytes]]:
    found: list[Record | tuple[int, bytes]] = []
    for record in records:
        last = found[-1] if found else None
        if not isinstance(record, Data):
            found.append(record)
        elif isinstance(last, tuple) and last[0] + len(last[1]) == record.offset:
            found[-1] = (last[0], last[1] + bytes(record.payload))
        else:
            found.append((record.offset, bytes(record.payload)))
    return found


# --- the connections of a tcp link --------------------------------------------------------------


LINK_MESSAGES: tuple[tcp_wire.Message, ...] = (
    *(tcp_wire.Begin(), tcp_wire.Join(b"l" * 16, 4, b"p" * 32), tcp_wire.Control(b"some bytes")),
    *(tcp_wire.Secret(b"l" * 16, b"s" * 32), tcp_wire.Dial(7), tcp_wire.Close(1, "enough")),
)


def run_link_messages(data: bytes) -> list[tcp_wire.Message]:
    whole, halves = tcp_wire.MessageDecoder(), tcp_wire.MessageDecoder()
    messages = _messages(whole, [data])
    pieces = _messages(halves, [data[: len(data) // 2], data[len(data) // 2 :]])
    check(pieces == messages, "messages do not depend on how they are cut")
    again = _messages(tcp_wire.MessageDecoder(), list(map(tcp_wire.encode, messages)))
    check(again == messages, "a message reads back")
    return messages


def _messages(decoder: tcp_wire.MessageDecoder, pieces: list[bytes]) -> list[tcp_wire.Message]:
    found = []
    for piece in pieces:
        decoder.feed(piece)
        while (message := decoder.next_untrusted()) is not None:
            found.append(message)
    return found


# --- STUN ---------------------------------------------------------------------------------------


STUN_MESSAGES: tuple[stun.Message, ...] = (
    *(stun.Request(b"t" * 12), stun.Request(b"t" * 12, fingerprint=False)),
    *(stun.Success(b"t" * 12, ("192.0.2.1", 80)), stun.Success(b"t" * 12, ("2001:db8::1", 80))),
    stun.Failure(b"t" * 12, 420, (0x24, 0x25), fingerprint=False),
)


SEALED_BIT = 0x8000
"""In the type of a body: it gets a fingerprint."""


def stun_seeds() -> list[bytes]:
    """Type and attributes: what `seal_stun` puts a right head before, and a fingerprint after."""
    bodies = []
    for said in STUN_MESSAGES:
        wire = stun.encode(replace(said, fingerprint=False))
        kind = int.from_bytes(wire[:2], "big") | SEALED_BIT * said.fingerprint
        bodies.append(kind.to_bytes(2, "big") + wire[stun.HEAD_BYTES :])
    return bodies


def seal_stun(body: bytes) -> bytes:
    kind, attributes = int.from_bytes(body[:2], "big"), body[2:] + bytes(-len(body[2:]) % 4)
    fingerprint = bool(kind & SEALED_BIT)
    head = stun.encode(stun.Request(b"t" * 12, fingerprint=False))
    size = len(attributes) + 8 * fingerprint
    wire = (kind & ~SEALED_BIT).to_bytes(2, "big") + (size & 0xFFFF).to_bytes(2, "big")
    wire += head[4:] + attributes
    if fingerprint:
        wire += b"\x80\x28\0\4" + (zlib.crc32(wire) ^ 0x5354554E).to_bytes(4, "big")
    return wire


def run_stun(data: bytes) -> stun.Message:
    said = stun.parse_untrusted(data)
    check(stun.is_stun(data), "what is parsed is told apart from what shares the port")
    if isinstance(said, stun.Request):
        for host in ("192.0.2.1", "2001:db8::1"):
            answer = stun.Responder(0.0).answer_untrusted(data, (host, 9), 0.0)
            check(answer is not None and len(answer) <= 2.2 * len(data), "no amplifier")
    else:
        check(stun.parse_untrusted(stun.encode(said)) == said, "an answer reads back")
    return said


# --- the handshake ------------------------------------------------------------------------------


def run_handshake(data: bytes) -> object:
    """One side against a stranger's bytes. First byte: which side, whom it expects."""
    flags = data[0] if data else 0
    role = Role.DIALLER if flags & 1 else Role.LISTENER
    expect = HOSTILE.peer if flags & 2 or role is Role.DIALLER else None
    mine = hello(US, 9)
    signed: list[str] = []

    def sign(label: str, payload: bytes) -> bytes:
        signed.append(label)
        return US.sign(label, payload)

    ours = Handshake(role, mine, expect=expect, binding=BINDING, sign=sign, verify=verify)
    ours.start()
    theirs: Hello | None = None
    for record in RecordDecoder().feed_untrusted(data[1:]):
        if isinstance(record, Hello):
            theirs = theirs or record
        elif isinstance(record, Proof) and record.signature == PLACEHOLDER and theirs:
            record = _proof(role.other, mine, theirs)
        ours.receive(record)
    check(set(signed) <= {LABEL}, "only the handshake's own label is signed")
    if ours.proven is None:
        return REJECTED
    check(theirs is not None and theirs.version == VERSION, "no other version is accepted")
    check(ours.proven.peer == HOSTILE.peer, "only the holder of a key proves it")
    return ours.proven


def _proof(signer: Role, mine: Hello, theirs: Hello) -> Proof:
    """The hostile peer's proof, made by an honest handshake of its own."""
    there = Handshake(
        *(signer, replace(theirs, peer=HOSTILE.peer)),
        expect=None,
        binding=BINDING,
        sign=HOSTILE.sign,
        verify=lambda *_: True,
    )
    answers = there.receive(mine)
    if signer is Role.DIALLER:
        answers = there.receive(Proof(PLACEHOLDER))
    return next(answer for answer in answers if isinstance(answer, Proof))


def handshake_seeds() -> list[bytes]:
    theirs, proof = encode(hello(HOSTILE, 3)), encode(Proof(PLACEHOLDER))
    return [
        b"\0" + theirs + proof,
        b"\2" + theirs + proof,
        b"\1" + theirs + proof + encode(Ready()),
        b"\0" + encode(hello(US, 9)) + proof,
        b"\1" + encode(replace(hello(HOSTILE, 3), kind="tcp")) + proof,
    ]


# --- one stream ---------------------------------------------------------------------------------


def run_stream(data: bytes) -> object:
    """A stream's user who keeps the rules, and a peer who says anything, in any order."""
    script = Script(data)
    state = StreamState(send_limit=script.number())
    decoder = RecordDecoder()
    granted = 0
    for _ in range(200):
        if script.over:
            break
        _stream_step(state, script)
        sent = decoder.feed_untrusted(b"".join(state.outgoing()))
        granted = max([granted, *(record.limit for record in sent if isinstance(record, Ack))])
        check(state.readable_bytes <= MAX_WINDOW_BYTES, "what waits is within the window")
        check(state.kept_bytes <= MAX_WINDOW_BYTES, "what is kept is within the window")
        check(state.sendable_bytes >= 0, "credit is never negative")
    return state.finished


def _stream_step(state: StreamState, script: Script) -> None:
    choice = script.byte() % 16
    position = state.position.received
    match choice:
        case 0 | 1:
            size = min(state.sendable_bytes, script.byte() * 257, 65536)
            if size:
                state.send(b"s" * size)
        case 2:
            state.end()
        case 3:
            state.stop()
        case 4:
            state.take(1 + script.byte() * 257)
        case 5:
            state.detach()
        case 6:
            state.reattach(Ack(script.number(), script.number()))
        case 7 | 8 | 9 if state.attached:  # in order, mostly
            offset = position if script.byte() % 16 else script.number()
            state.receive(Data(offset, b"r" * (1 + script.byte() * 256)))
        case 10 | 11 if state.attached:
            state.receive(Ack(script.number(), script.number()))
        case 12 if state.attached:
            state.receive(End(position if script.byte() % 4 else script.number()))
        case 13 if state.attached:
            state.receive(Stop())
        case 14 if state.attached:
            state.receive(Reset(ResetCode.FAILED, "why not"))
        case 15 if state.attached:
            state.receive(RECORDS[script.byte() % len(RECORDS)])


def stream_seeds() -> list[bytes]:
    window = (1 << 20).to_bytes(8, "big")
    return [
        b"\xff" + window + bytes((0, 40, 7, 1, 90, 4, 255, 2, 12, 1)),
        b"\xff" + window + bytes((0, 255, 0, 255, 5, 6, 10, 200, 7, 1, 1)),
        b"\xff" + window + bytes((7, 1, 255, 7, 1, 255, 3, 7, 1, 255, 12, 1, 13, 14)),
        b"\x00" + bytes(range(16)) * 4,
    ]


# --- offers -------------------------------------------------------------------------------------


def run_offer(data: bytes) -> object:
    offer = offers.parse_untrusted(data)
    again = offers.encode(offer)[offers.LENGTH.size :]
    check(offers.parse_untrusted(again) == offer, "what was read is written the same")
    return offer


def offer_seeds() -> list[bytes]:
    places = (Candidate("tcp", "192.0.2.1", 9), Candidate("quic", "2001:db8::1", 7, "reflexive"))
    full = offers.Offer(bytes(range(16)), bytes(32), candidates=places)
    bare = offers.Offer(bytes(16), bytes(32))
    return [offers.encode(one)[offers.LENGTH.size :] for one in (full, bare)]


# --- keys and certificates ----------------------------------------------------------------------


def run_certificate(data: bytes) -> object:
    """As aioquic does with what the listener shows; then ours."""
    try:
        certificate = x509.load_der_x509_certificate(data)
    except Exception:  # aioquic's to raise: the link ends
        return REJECTED
    return certificate_peer(certificate) or REJECTED


def certificate_seeds() -> list[bytes]:
    return [US.certificate.public_bytes(serialization.Encoding.DER)]


def run_key_file(data: bytes) -> PeerId:
    return Identity.load(scratch_file("node.key", data)).peer


def key_seeds() -> list[bytes]:
    key = Ed25519PrivateKey.from_private_bytes(b"\7" * 32)
    form, none = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    return [key.private_bytes(serialization.Encoding.PEM, form, none)]


PARSERS = (
    Parser("peer id", (BadFrame,), lambda: [str(US.peer).encode()], run_peer_id),
    Parser(
        *("candidate", (ValueError,)),
        lambda: [b"quic|192.0.2.1|80", b"tcp|2001:db8::1|65535", b"quic|fe80::1%eth0|9"],
        run_candidate,
    ),
    Parser("records", (BadFrame,), lambda: list(map(encode, RECORDS)), run_records),
    Parser(
        *("tcp link messages", (BadFrame,)),
        lambda: list(map(tcp_wire.encode, LINK_MESSAGES)),
        run_link_messages,
    ),
    Parser("stun", (BadFrame,), stun_seeds, run_stun, format=SealedFormat(seal_stun)),
    Parser("offer", (BadFrame,), offer_seeds, run_offer),
    Parser("handshake", (BadFrame, HandshakeFailed), handshake_seeds, run_handshake),
    Parser(
        "stream: resume and credit", (BadFrame,), stream_seeds, run_stream, memory_bytes=32 << 20
    ),
    Parser("certificate", (), certificate_seeds, run_certificate),
    Parser("key file", (IdentityError,), key_seeds, run_key_file),
)
