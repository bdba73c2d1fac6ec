"""Wire format of everything that travels inside a channel. This docstring is the spec.

A channel is an ordered, reliable pair of byte pipes. Both directions carry records, back to
back; integers are big-endian:

    type u8 | length u24 | body (length bytes)

The first channel of a link is its control channel. The dialler opens it:

    HELLO  0x01  version u8 | window u32 | epoch 16 | nonce 32 | peer key 32 | link kind, UTF-8
    PROOF  0x02  Ed25519 signature 64             (what is signed: see handshake.py)
    READY  0x03  empty: the listener has verified the dialler
    PING   0x10  id u64
    PONG   0x11  id u64 of the PING it answers

`epoch` is random per process: a peer with a new epoch has restarted and knows none of our
streams. `window` is how many bytes the opener of a stream may send before it hears an ACK.

Every other channel carries one stream. Its opener sends one header, then records follow:

    OPEN   0x20  stream u64 | limit u64 | service, UTF-8, 1 to 255 bytes
    RESUME 0x21  stream u64 | received u64 | limit u64 | service, as in OPEN, or nothing

    DATA   0x30  offset u64 | 1 to 65536 bytes
    ACK    0x31  received u64 | limit u64
    END    0x32  offset u64: no byte follows
    STOP   0x33  empty: its sender reads no more; the other side answers END
    RESET  0x34  code u8 | reason, UTF-8, at most 512 bytes: the stream failed, both ways

Stream numbers are chosen by the opener, counting from 0 in each session; the two sides' numbers
are apart. Offsets count the stream's bytes from 0, each direction for itself. `received` is
the number of units that arrived without a gap: every byte is one unit and END is one more, as
TCP counts FIN. `limit` is the first offset that may not be sent yet; it never shrinks.

A reader sends an ACK at the latest when 65536 bytes have arrived since its last: a sender keeps no
more than twice that of a stream whose other side acknowledges nothing.

After RESUME the side that accepted the stream answers ACK with its own position; then each side
sends again all that the other has not received. A stream it does not know is answered RESET. An
opener that has heard nothing of its stream names the service: the OPEN may have been lost with its
channel, and then this is it.

Records of types not listed, lengths beyond the limits and text that is not UTF-8 are errors
that end the link: a later version says so in HELLO.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum

from tunnels.errors import BadFrame
from tunnels.peer import KEY_BYTES, PeerId

VERSION = 1
NONCE_BYTES = 32
EPOCH_BYTES = 16
SIGNATURE_BYTES = 64
MAX_DATA_BYTES = 65536
MAX_BODY_BYTES = 1024  # of every record but DATA
MAX_SERVICE_BYTES = 255
MAX_KIND_BYTES = 32
MAX_REASON_BYTES = 512
MAX_OFFSET = 2**63

_HEAD_BYTES = 4
_OFFSET_BYTES = 8
DATA_HEAD_BYTES = _HEAD_BYTES + _OFFSET_BYTES
_HELLO = struct.Struct(f">BI{EPOCH_BYTES}s{NONCE_BYTES}s{KEY_BYTES}s")
_U64 = struct.Struct(">Q")
_TWO_U64 = struct.Struct(">QQ")
_THREE_U64 = struct.Struct(">QQQ")


class Type(IntEnum):
    HELLO = 0x01
    PROOF = 0x02
    READY = 0x03
    PING = 0x10
    PONG = 0x11
    OPEN = 0x20
    RESUME = 0x21
    DATA = 0x30
    ACK = 0x31
    END = 0x32
    STOP = 0x33
    RESET = 0x34


class ResetCode(IntEnum):
    FAILED = 0  # one side gave the stream up
    REFUSED = 1  # the service is unknown here or not for this peer
    LOST = 2  # the stream to resume is not known here


@dataclass(frozen=True)
class Hello:
    version: int
    window_bytes: int
    epoch: bytes
    nonce: bytes
    peer: PeerId
    kind: str


@dataclass(frozen=True)
class Proof:
    signature: bytes


@dataclass(frozen=True)
class Ready:
    pass


@dataclass(frozen=True)
class Ping:
    id: int


@dataclass(frozen=True)
class Pong:
    id: int


@dataclass(frozen=True)
class Open:
    stream: int
    limit: int
    service: str


@dataclass(frozen=True)
class Resume:
    stream: int
    received: int
    limit: int
    service: str = ""  # when it may not be open yet


@dataclass(frozen=True)
class Data:
    """A piece of a DATA record: a decoder hands out what has arrived, not only whole records."""

    offset: int
    payload: bytes | memoryview


@dataclass(frozen=True)
class Ack:
    received: int
    limit: int


@dataclass(frozen=True)
class End:
    offset: int


@dataclass(frozen=True)
class Stop:
    pass


@dataclass(frozen=True)
class Reset:
    code: ResetCode
    reason: str


Record = Hello | Proof | Ready | Ping | Pong | Open | Resume | Data | Ack | End | Stop | Reset


def encode(record: Record) -> bytes:
    """The bytes of one record. The caller keeps to the limits of the spec."""
    kind, body = _ENCODERS[type(record)](record)
    return bytes((kind,)) + len(body).to_bytes(3, "big") + body


def encode_data(offset: int, payload: bytes | memoryview) -> bytes:
    """`encode(Data(offset, payload))` without the detours: the one record that must be fast."""
    return b"".join((data_head(offset, len(payload)), payload))


def data_head(offset: int, size: int) -> bytes:
    """What goes before a payload of `size` bytes in its DATA record."""
    return b"\x30" + (_OFFSET_BYTES + size).to_bytes(3, "big") + _U64.pack(offset)


def clip_reason(reason: str) -> str:
    """`reason` fit to send and to show: what no terminal should see is a `?`, and it is cut
    between characters to what a RESET carries."""
    shown = "".join(char if char.isprintable() else "?" for char in reason)
    return shown.encode("utf-8")[:MAX_REASON_BYTES].decode("utf-8", "ignore")


class RecordDecoder:
    """I cut the bytes of one direction of a channel into records."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._data_offset = 0
        self._data_left = 0  # bytes of the current DATA record still to come

    def feed_untrusted(self, data: bytes | memoryview) -> list[Record]:
        """The records that `data` completes. Raises BadFrame and nothing else.

        The payloads of DATA are views of `data`: they hold as long as it does.
        """
        records: list[Record] = []
        at = self._finish_begun(data, records) if self._buffer else 0
        view = memoryview(data)
        while at < len(view):
            if self._data_left:
                piece = view[at : at + self._data_left]
                records.append(Data(self._data_offset, piece))
                self._data_offset += len(piece)
                self._data_left -= len(piece)
                at += len(piece)
                continue
            size = _HEAD_BYTES
            if len(view) - at >= size:
                size = self._size_untrusted(view[at : at + size])
            if len(view) - at < size:
                self._buffer += view[at:]
                break
            self._take(bytes(view[at : at + size]), records)
            at += size
        return records

    @property
    def mid_record(self) -> bool:
        """True when the channel must not end here."""
        return bool(self._buffer) or self._data_left > 0

    def _finish_begun(self, data: bytes | memoryview, records: list[Record]) -> int:
        """Complete the record, or head of a DATA record, that an earlier call began; how many
        bytes of `data` that took."""
        buffer, taken, size = self._buffer, 0, _HEAD_BYTES
        if len(buffer) >= _HEAD_BYTES:
            size = self._size_untrusted(buffer)
        while len(buffer) < size:
            more = data[taken : taken + size - len(buffer)]
            if not more:
                return taken
            buffer += more
            taken += len(more)
            if len(buffer) >= _HEAD_BYTES:
                size = self._size_untrusted(buffer)
        self._buffer = bytearray()
        self._take(bytes(buffer), records)
        return taken

    def _size_untrusted(self, head: bytearray | memoryview) -> int:
        """Of a whole record, or of a DATA record's head, by its first _HEAD_BYTES."""
        size = int.from_bytes(head[1:_HEAD_BYTES], "big")
        if head[0] == Type.DATA:
            if not _OFFSET_BYTES < size <= _OFFSET_BYTES + MAX_DATA_BYTES:
                raise BadFrame(f"a DATA record of {size} bytes")
            return DATA_HEAD_BYTES
        if size > MAX_BODY_BYTES:
            raise BadFrame(f"a record of type {head[0]:#04x} with {size} bytes")
        return _HEAD_BYTES + size

    def _take(self, whole: bytes, records: list[Record]) -> None:
        if whole[0] == Type.DATA:
            (self._data_offset,) = _U64.unpack_from(whole, _HEAD_BYTES)
            self._data_left = int.from_bytes(whole[1:_HEAD_BYTES], "big") - _OFFSET_BYTES
        else:
            records.append(parse_record_untrusted(whole[0], whole[_HEAD_BYTES:]))


def parse_record_untrusted(kind: int, body: bytes) -> Record:
    """The record of `kind` with `body`. Raises BadFrame and nothing else, on any input."""
    parser = _PARSERS.get(kind)
    if parser is None:
        raise BadFrame(f"a record of unknown type {kind:#04x}")
    try:
        return parser(body)
    except (struct.error, ValueError) as error:
        raise BadFrame(f"a malformed record of type {kind:#04x}") from error


def _parse_hello(body: bytes) -> Hello:
    version, window, epoch, nonce, key = _HELLO.unpack_from(body)
    kind = body[_HELLO.size :]
    if len(kind) > MAX_KIND_BYTES:
        raise ValueError("link kind too long")
    return Hello(version, window, epoch, nonce, PeerId(key), kind.decode("utf-8"))


def _parse_proof(body: bytes) -> Proof:
    if len(body) != SIGNATURE_BYTES:
        raise ValueError("signature length")
    return Proof(body)


def _parse_open(body: bytes) -> Open:
    stream, limit = _TWO_U64.unpack_from(body)
    service = body[_TWO_U64.size :]
    if not 1 <= len(service) <= MAX_SERVICE_BYTES:
        raise ValueError("service name length")
    return Open(stream, _offset(limit), service.decode("utf-8"))


def _parse_resume(body: bytes) -> Resume:
    stream, received, limit = _THREE_U64.unpack_from(body)
    service = body[_THREE_U64.size :]
    if len(service) > MAX_SERVICE_BYTES:
        raise ValueError("service name length")
    return Resume(stream, _offset(received), _offset(limit), service.decode("utf-8"))


def _parse_data(body: bytes) -> Data:
    (offset,) = _U64.unpack_from(body)
    payload = body[_OFFSET_BYTES:]
    if not 1 <= len(payload) <= MAX_DATA_BYTES:
        raise ValueError("DATA length")
    return Data(_offset(offset), payload)


def _parse_ack(body: bytes) -> Ack:
    received, limit = _TWO_U64.unpack(body)
    return Ack(_offset(received), _offset(limit))


def _parse_reset(body: bytes) -> Reset:
    if not 1 <= len(body) <= 1 + MAX_REASON_BYTES:
        raise ValueError("RESET length")
    return Reset(ResetCode(body[0]), clip_reason(body[1:].decode("utf-8")))


def _parse_empty(record: Record) -> Callable[[bytes], Record]:
    def parse(body: bytes) -> Record:
        if body:
            raise ValueError("body not empty")
        return record

    return parse


def _offset(value: int) -> int:
    if value > MAX_OFFSET:
        raise ValueError("offset out of range")
    return value


_PARSERS: dict[int, Callable[[bytes], Record]] = {
    Type.HELLO: _parse_hello,
    Type.PROOF: _parse_proof,
    Type.READY: _parse_empty(Ready()),
    Type.PING: lambda body: Ping(*_U64.unpack(body)),
    Type.PONG: lambda body: Pong(*_U64.unpack(body)),
    Type.OPEN: _parse_open,
    Type.RESUME: _parse_resume,
    Type.DATA: _parse_data,
    Type.ACK: _parse_ack,
    Type.END: lambda body: End(_offset(*_U64.unpack(body))),
    Type.STOP: _parse_empty(Stop()),
    Type.RESET: _parse_reset,
}


def _encode_hello(hello: Hello) -> tuple[int, bytes]:
    fixed = _HELLO.pack(hello.version, hello.window_bytes, hello.epoch, hello.nonce, hello.peer.key)
    return Type.HELLO, fixed + hello.kind.encode("utf-8")


_ENCODERS: dict[type, Callable[..., tuple[int, bytes]]] = {
    Hello: _encode_hello,
    Proof: lambda r: (Type.PROOF, r.signature),
    Ready: lambda _: (Type.READY, b""),
    Ping: lambda r: (Type.PING, _U64.pack(r.id)),
    Pong: lambda r: (Type.PONG, _U64.pack(r.id)),
    Open: lambda r: (Type.OPEN, _TWO_U64.pack(r.stream, r.limit) + r.service.encode("utf-8")),
    Resume: lambda r: (
        Type.RESUME,
        _THREE_U64.pack(r.stream, r.received, r.limit) + r.service.encode("utf-8"),
    ),
    Data: lambda r: (Type.DATA, _U64.pack(r.offset) + r.payload),
    Ack: lambda r: (Type.ACK, _TWO_U64.pack(r.received, r.limit)),
    End: lambda r: (Type.END, _U64.pack(r.offset)),
    Stop: lambda _: (Type.STOP, b""),
    Reset: lambda r: (Type.RESET, bytes((r.code,)) + clip_reason(r.reason).encode("utf-8")),
}
