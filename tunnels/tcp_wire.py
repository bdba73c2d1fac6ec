"""What the connections of a tcp link say about themselves. This docstring is the spec.

A link is several TLS connections, all dialled by the same side: the first is its control
connection, each further one is a channel. Inside TLS, integers big-endian, travel messages:

    type u8 | length u24 | body (length bytes)

    BEGIN   0x01  empty                              first on the control connection, by the dialler
    JOIN    0x02  link 16 | number u64 | proof 32    first on every other one, by the dialler
    CONTROL 0x03  1 to 65536 bytes of the control channel
    SECRET  0x04  link 16 | secret 32                by the listener, once the dialler has proven
                                                     its key
    DIAL    0x05  number u64                         by the listener: it wants this channel
    CLOSE   0x06  code u8 | reason, UTF-8, at most 300 bytes: the last message on the link

After JOIN there are no messages: what follows are the channel's bytes, both ways. Its end is TCP's
(each direction by itself), its reset is TCP's reset. Neither can be forged into a loss: records
inside the channel say themselves where a stream ends.

Channels are numbered from 0 by whoever wants them: the dialler's are even, the listener's odd, each
number is good once. The proof is HMAC-SHA256 under the secret over (label, link, number, SHA-256 of
the listener's certificate, this connection's fingerprint: tls.py). So it holds on this connection
alone, and is made by no one who was not at the other end of the control connection.
"""

from __future__ import annotations

import hmac
import struct
from dataclasses import dataclass

from tunnels.errors import BadFrame
from tunnels.frames import clip_reason

ID_BYTES = 16
SECRET_BYTES = 32
PROOF_BYTES = 32
MAX_CONTROL_BYTES = 65536
MAX_REASON_BYTES = 300
MAX_NUMBER = 2**62
NUMBERS_KEPT = 1024

_HEAD_BYTES = 4
_LABEL = b"mesh/1 tcp channel"
_JOIN = struct.Struct(f">{ID_BYTES}sQ{PROOF_BYTES}s")
_SECRET = struct.Struct(f">{ID_BYTES}s{SECRET_BYTES}s")
_U64 = struct.Struct(">Q")


@dataclass(frozen=True)
class Begin:
    pass


@dataclass(frozen=True)
class Join:
    link: bytes
    number: int
    proof: bytes


@dataclass(frozen=True)
class Control:
    data: bytes


@dataclass(frozen=True, repr=False)
class Secret:
    link: bytes
    secret: bytes


@dataclass(frozen=True)
class Dial:
    number: int


@dataclass(frozen=True)
class Close:
    code: int
    reason: str


Message = Begin | Join | Control | Secret | Dial | Close


def encode(message: Message) -> bytes:
    match message:
        case Begin():
            kind, body = 1, b""
        case Join(link, number, proof):
            kind, body = 2, _JOIN.pack(link, number, proof)
        case Control(data):
            kind, body = 3, data
        case Secret(link, secret):
            kind, body = 4, _SECRET.pack(link, secret)
        case Dial(number):
            kind, body = 5, _U64.pack(number)
        case _:
            said = clip_reason(message.reason).encode("utf-8")[:MAX_REASON_BYTES]
            kind, body = 6, bytes((message.code,)) + said.decode("utf-8", "ignore").encode("utf-8")
    return bytes((kind,)) + len(body).to_bytes(3, "big") + body


class MessageDecoder:
    """I cut a connection's bytes into messages, one at a time: after a JOIN comes something else,
    which is the `rest`."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> None:
        self._buffer += data

    @property
    def rest(self) -> bytes:
        return bytes(self._buffer)

    def next_untrusted(self) -> Message | None:
        """The next message when it is whole. Raises BadFrame and nothing else."""
        buffer = self._buffer
        if len(buffer) < _HEAD_BYTES:
            return None
        kind, size = buffer[0], int.from_bytes(buffer[1:_HEAD_BYTES], "big")
        if size > (MAX_CONTROL_BYTES if kind == 3 else 1 + MAX_REASON_BYTES):
            raise BadFrame(f"a link message of type {kind:#04x} with {size} bytes")
        if len(buffer) < _HEAD_BYTES + size:
            return None
        body = bytes(buffer[_HEAD_BYTES : _HEAD_BYTES + size])
        del buffer[: _HEAD_BYTES + size]
        return _parse_untrusted(kind, body)


def _parse_untrusted(kind: int, body: bytes) -> Message:
    try:
        match kind:
            case 1 if not body:
                return Begin()
            case 2:
                link, number, proof = _JOIN.unpack(body)
                return Join(link, _number(number), proof)
            case 3 if body:
                return Control(body)
            case 4:
                return Secret(*_SECRET.unpack(body))
            case 5:
                return Dial(_number(*_U64.unpack(body)))
            case 6 if body:
                return Close(body[0], clip_reason(body[1:].decode("utf-8")))
    except (struct.error, ValueError) as error:
        raise BadFrame(f"a malformed link message of type {kind:#04x}") from error
    raise BadFrame(f"a link message of type {kind:#04x} that means nothing")


def _number(value: int) -> int:
    if value > MAX_NUMBER:
        raise ValueError("number out of range")
    return value


def channel_proof(secret: bytes, link: bytes, number: int, certificate: bytes, own: bytes) -> bytes:
    """What a JOIN carries. certificate: SHA-256 of the listener's; own: the fingerprint of the very
    connection it is said on."""
    fields = (_LABEL, link, _U64.pack(number), certificate, own)
    payload = b"".join(len(field).to_bytes(4, "big") + field for field in fields)
    return hmac.digest(secret, payload, "sha256")


def is_channel_proof(
    proof: bytes, secret: bytes, link: bytes, number: int, certificate: bytes, own: bytes
) -> bool:
    return hmac.compare_digest(proof, channel_proof(secret, link, number, certificate, own))


class Numbers:
    """Each number is good once. Those more than NUMBERS_KEPT behind the highest count as used."""

    def __init__(self) -> None:
        self._used: set[int] = set()
        self._below = 0  # all below count as used

    def use(self, number: int) -> bool:
        """False when it was used before."""
        if number < self._below or number in self._used:
            return False
        self._used.add(number)
        floor = number - NUMBERS_KEPT
        if floor > self._below:
            self._below = floor
            self._used = {one for one in self._used if one >= floor}
        return True
