"""STUN (RFC 8489), the part that tells somebody its own address. Sans-IO.

One question, Binding, asked over the very socket whose address is wanted:

    head         type u16 | length u16 of what follows | magic cookie u32 | transaction 12
    attribute    type u16 | length u16 | value, padded to a multiple of four

    XOR-MAPPED-ADDRESS   0 | family u8 (1: IPv4, 2: IPv6) | port u16 | address; port and address
                         XORed with the cookie and the transaction (section 14.2), lest a NAT
                         that looks for its own address in packets "corrects" it
    ERROR-CODE           0 u16 | hundreds u8 | rest u8 | words        (section 14.8)
    UNKNOWN-ATTRIBUTES   types u16                                    (section 14.13)
    FINGERPRINT          CRC-32 of all before it, XORed with 0x5354554e; always last (14.7)

An answer counts when it comes from the address that was asked and bears the transaction, 96 random
bits: so whoever is not on the path cannot make one up. Whoever is may lie; an address learnt here
is a guess that a dial still has to prove.

The responder answers each question once and with at most twice its bytes (an IPv6 address, to
somebody who sent nothing but a head: 2.2 times), and few of one network, so that a sender who
forges another's address gains nothing by it.
"""

from __future__ import annotations

import ipaddress
import math
import struct
import zlib
from dataclasses import dataclass
from enum import IntEnum

from tunnels.allowance import Bucket, Buckets, Rate
from tunnels.binding import Address
from tunnels.door import network_of
from tunnels.errors import BadFrame
from tunnels.peer import format_address

MAGIC_COOKIE = 0x2112A442
TRANSACTION_BYTES = 12
HEAD_BYTES = 20
DEFAULT_PORT = 3478
MAX_MESSAGE_BYTES = 548  # section 6.1: fits IPv4 where nothing is known of the path
UNKNOWN_ATTRIBUTE = 420

FIRST_WAIT_S = 0.25  # half of section 6.2.1's: a far server only gets the question twice
TRIES = 4
LAST_WAIT_S = 2.0
MAX_OPEN = 256
SOFTWARE = b"mesh"
"""What nodes say of themselves to each other, in question and answer: that QUIC is welcome there
cannot be said of a public server of STUN."""

PER_NETWORK = Rate(per_s=8, burst=32)  # answers
IN_ALL = Rate(per_s=500, burst=500)  # as many as QUIC's Retry answers: newcomers knock by this

_HEAD = struct.Struct(f">HHI{TRANSACTION_BYTES}s")
_ATTRIBUTE = struct.Struct(">HH")
_FINGERPRINT_BYTES = 8
_FINGERPRINT_MASK = 0x5354554E
_OPTIONAL_FROM = 0x8000  # section 14: attributes from here on may be skipped by who knows them not
_ADDRESS_BYTES = {1: 4, 2: 16}  # by family


class Type(IntEnum):
    REQUEST = 0x0001
    SUCCESS = 0x0101
    FAILURE = 0x0111


class Attribute(IntEnum):
    """Those that section 18.3 requires everybody to understand; most of them say something of
    credentials, which nobody needs here."""

    MAPPED_ADDRESS = 0x0001
    USERNAME = 0x0006
    MESSAGE_INTEGRITY = 0x0008
    ERROR_CODE = 0x0009
    UNKNOWN_ATTRIBUTES = 0x000A
    REALM = 0x0014
    NONCE = 0x0015
    MESSAGE_INTEGRITY_SHA256 = 0x001C
    PASSWORD_ALGORITHM = 0x001D
    USERHASH = 0x001E
    XOR_MAPPED_ADDRESS = 0x0020
    SOFTWARE = 0x8022
    FINGERPRINT = 0x8028


_KNOWN = frozenset(Attribute)


@dataclass(frozen=True)
class Request:
    """`unknown`: attributes in it that its sender wants understood, and that are not. `software`:
    what its sender calls itself (section 14.14)."""

    transaction: bytes
    unknown: tuple[int, ...] = ()
    fingerprint: bool = True
    software: bytes = b""


@dataclass(frozen=True)
class Success:
    transaction: bytes
    mapped: Address  # the sender of the request as the server saw it
    fingerprint: bool = True
    software: bytes = b""


@dataclass(frozen=True)
class Failure:
    """`code`: 300 to 699 (section 14.8). `unknown`: what a 420 complains of."""

    transaction: bytes
    code: int
    unknown: tuple[int, ...] = ()
    fingerprint: bool = True


Message = Request | Success | Failure


@dataclass(frozen=True)
class Server:
    """Somebody who answers. host: a name or an address."""

    host: str
    port: int

    def __str__(self) -> str:
        return format_address(self.host, self.port)


def is_stun(datagram: bytes) -> bool:
    """Whether it is for this module, of those that share a port (RFC 9443 section 3)."""
    return len(datagram) >= HEAD_BYTES and datagram[0] < 4 and datagram[4:8] == _COOKIE


def is_request(datagram: bytes) -> bool:
    """Of those that `is_stun`."""
    return datagram[:2] == _REQUEST


_COOKIE = MAGIC_COOKIE.to_bytes(4, "big")
_REQUEST = Type.REQUEST.to_bytes(2, "big")


# --- the wire -----------------------------------------------------------------------------------


def encode(message: Message) -> bytes:
    """A request goes out without what its `unknown` names."""
    transaction = message.transaction
    if isinstance(message, Request):
        kind, body = Type.REQUEST, _software(message)
    elif isinstance(message, Success):
        kind = Type.SUCCESS
        mapped = _xored(message.mapped, transaction)
        body = _attribute(Attribute.XOR_MAPPED_ADDRESS, mapped) + _software(message)
    else:
        kind = Type.FAILURE
        code = bytes((0, 0, message.code // 100, message.code % 100))
        body = _attribute(Attribute.ERROR_CODE, code)
        if message.unknown:
            types = struct.pack(f">{len(message.unknown)}H", *message.unknown)
            body += _attribute(Attribute.UNKNOWN_ATTRIBUTES, types)
    size = len(body) + _FINGERPRINT_BYTES * message.fingerprint
    data = _HEAD.pack(kind, size, MAGIC_COOKIE, transaction) + body
    if message.fingerprint:
        data += _attribute(Attribute.FINGERPRINT, _fingerprint(data))
    return data


def _software(message: Request | Success) -> bytes:
    return _attribute(Attribute.SOFTWARE, message.software) if message.software else b""


def _attribute(kind: int, value: bytes) -> bytes:
    return _ATTRIBUTE.pack(kind, len(value)) + value + bytes(-len(value) % 4)


def _xored(mapped: Address, transaction: bytes) -> bytes:
    host, port = mapped
    packed = ipaddress.ip_address(host).packed
    family = 1 if len(packed) == _ADDRESS_BYTES[1] else 2
    return struct.pack(">BBH", 0, family, port ^ MAGIC_COOKIE >> 16) + _masked(packed, transaction)


def _masked(packed: bytes, transaction: bytes) -> bytes:
    return bytes(one ^ mask for one, mask in zip(packed, _COOKIE + transaction, strict=False))


def _fingerprint(before: bytes) -> bytes:
    return (zlib.crc32(before) ^ _FINGERPRINT_MASK).to_bytes(4, "big")


def parse_untrusted(data: bytes) -> Message:
    """One Binding message; raises BadFrame for all else, and on any input nothing but that."""
    if not HEAD_BYTES <= len(data) <= MAX_MESSAGE_BYTES:
        raise BadFrame(f"a STUN message has {HEAD_BYTES} to {MAX_MESSAGE_BYTES} bytes")
    kind, size, cookie, transaction = _HEAD.unpack_from(data)
    if cookie != MAGIC_COOKIE or size != len(data) - HEAD_BYTES or size % 4:
        raise BadFrame("this is no STUN message, or a piece of one")
    found = _attributes_untrusted(data)
    unknown = tuple(one for one in found if one < _OPTIONAL_FROM and one not in _KNOWN)
    fingerprint = Attribute.FINGERPRINT in found
    software = found.get(Attribute.SOFTWARE, b"")
    if kind == Type.REQUEST:
        return Request(transaction, unknown, fingerprint, software)
    if unknown:
        raise BadFrame("the answer holds an attribute that must be understood, and is not")
    if kind == Type.SUCCESS:
        mapped = _parse_mapped_untrusted(found, transaction)
        return Success(transaction, mapped, fingerprint, software)
    if kind == Type.FAILURE:
        return Failure(transaction, *_parse_failure_untrusted(found), fingerprint)
    raise BadFrame(f"a STUN message of type {kind:#06x} has no use here")


def _attributes_untrusted(data: bytes) -> dict[int, bytes]:
    """By type; of several of one type the first counts (section 14)."""
    found: dict[int, bytes] = {}
    offset = HEAD_BYTES
    while offset < len(data):  # by four, as is the length: an attribute's head is always whole
        kind, size = _ATTRIBUTE.unpack_from(data, offset)
        start = offset + _ATTRIBUTE.size
        value = data[start : start + size]
        if len(value) < size:
            raise BadFrame("a STUN attribute reaches beyond its message")
        if kind == Attribute.FINGERPRINT:
            last = offset + _FINGERPRINT_BYTES == len(data)
            if not last or value != _fingerprint(data[:offset]):
                raise BadFrame("the fingerprint of a STUN message is wrong: it was damaged")
        found.setdefault(kind, value)
        offset = start + size + -size % 4
    return found


def _parse_mapped_untrusted(found: dict[int, bytes], transaction: bytes) -> Address:
    value = found.get(Attribute.XOR_MAPPED_ADDRESS, b"")
    if len(value) < 4 or len(value) - 4 != _ADDRESS_BYTES.get(value[1]):
        raise BadFrame("the STUN answer holds no address")
    port = int.from_bytes(value[2:4], "big") ^ MAGIC_COOKIE >> 16
    if port == 0:
        raise BadFrame("the address in the STUN answer has no port")
    address = ipaddress.ip_address(_masked(value[4:], transaction))
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped  # of a server with one socket for both
    return str(address), port


def _parse_failure_untrusted(found: dict[int, bytes]) -> tuple[int, tuple[int, ...]]:
    value = found.get(Attribute.ERROR_CODE, b"")
    if len(value) < 4 or not 3 <= value[2] & 7 <= 6 or value[3] > 99:
        raise BadFrame("the STUN answer says that it failed, and not how")
    types = found.get(Attribute.UNKNOWN_ATTRIBUTES, b"")
    unknown = struct.unpack(f">{len(types) // 2}H", types[: len(types) // 2 * 2])
    return (value[2] & 7) * 100 + value[3], unknown


# --- asking -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Turn:
    """What there is to do now. sends: datagrams with their targets. silent: questions to which no
    answer will count any more."""

    sends: tuple[tuple[bytes, Address], ...]
    silent: tuple[bytes, ...]


@dataclass
class _Question:
    server: Address
    datagram: bytes
    due_at_s: float
    asked: int = 0


class Transactions:
    """I keep the questions under way and repeat them (section 6.2.1) until each is answered or
    given up, 3.75 s after it was asked."""

    def __init__(self) -> None:
        self._open: dict[bytes, _Question] = {}
        self._dropped: list[bytes] = []

    def ask(self, server: Address, transaction: bytes, now: float, software: bytes = b"") -> None:
        """Out with the next `advance`. transaction: 12 bytes that nobody can guess. Of more than
        MAX_OPEN questions the oldest are given up."""
        while len(self._open) >= MAX_OPEN:
            oldest = next(iter(self._open))
            del self._open[oldest]
            self._dropped.append(oldest)
        question = encode(Request(transaction, software=software))
        self._open[transaction] = _Question(server, question, now)

    def forget(self, transaction: bytes) -> None:
        """Nobody waits for the answer any more."""
        self._open.pop(transaction, None)

    def advance(self, now: float) -> Turn:
        sends: list[tuple[bytes, Address]] = []
        silent, self._dropped = self._dropped, []
        for transaction, question in list(self._open.items()):
            if now < question.due_at_s:
                continue
            if question.asked == TRIES:
                del self._open[transaction]
                silent.append(transaction)
                continue
            question.asked += 1
            last = question.asked == TRIES
            wait_s = LAST_WAIT_S if last else FIRST_WAIT_S * 2 ** (question.asked - 1)
            question.due_at_s = now + wait_s
            sends.append((question.datagram, question.server))
        return Turn(tuple(sends), tuple(silent))

    def next_deadline(self) -> float:
        """When to `advance`; math.inf when nothing is under way."""
        return min((one.due_at_s for one in self._open.values()), default=math.inf)

    def settle(self, answer: Success | Failure, sender: Address) -> bool:
        """Whether this answers a question of ours, which then is closed."""
        question = self._open.get(answer.transaction)
        if question is None or question.server != sender:
            return False
        del self._open[answer.transaction]
        return True


# --- answering ----------------------------------------------------------------------------------


class Responder:
    """I tell strangers their addresses, each once, and not too many."""

    def __init__(self, now: float) -> None:
        self._per_network = Buckets(PER_NETWORK)
        self._in_all = Bucket(IN_ALL, now)

    def answer_untrusted(self, datagram: bytes, sender: Address, now: float) -> bytes | None:
        """None for what is no request, and for a network, or a crowd, that has had enough: of
        those it is not even read."""
        if not self._per_network.take(network_of(sender[0]), now) or not self._in_all.take(now):
            return None
        try:
            request = parse_untrusted(datagram)
        except BadFrame:
            return None
        if not isinstance(request, Request):
            return None
        transaction, fingerprint = request.transaction, request.fingerprint
        if request.unknown:  # section 6.3.1
            return encode(Failure(transaction, UNKNOWN_ATTRIBUTE, request.unknown, fingerprint))
        software = SOFTWARE if request.software == SOFTWARE else b""
        return encode(Success(transaction, sender, fingerprint, software))
