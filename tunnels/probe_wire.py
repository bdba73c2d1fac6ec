"""Sealed probes: what two nodes say to each other while they look for a direct path.

This docstring is the spec. A probe is one UDP datagram of 64 bytes, integers big-endian:

    0x12 | label 8 | nonce 12 | sealed 27 | tag 16

    sealed: kind u8 | transaction 8 | host 16 | port u16

    PING     1  is anybody there? The transaction is new and random
    PONG     2  the answer: the transaction of the question
    NOMINATE 3  a question like PING, and: let us use this path. Sent by the dialler alone

host, port: the receiver's address as the sender sees it: where a question goes to, where an
answered question came from (IPv4 in mapped form). So each side learns its own address as the other
sees it, which behind a NAT it cannot know otherwise.

Sealed is ChaCha20-Poly1305 (RFC 8439) with the first nine bytes as associated data. Key and label
are HKDF-SHA256 (RFC 5869) of a secret that both sides share, for each direction its own: a probe
thrown back at its sender opens nowhere. The label says which secret, in one look; to anyone else a
probe is its first byte and 63 random ones.

The secret is of one search alone. It comes of keys that were swapped over a session that stands
(exchange.py), or of an invite that one side has given the other by hand.
"""

from __future__ import annotations

import ipaddress
import struct
from dataclasses import dataclass
from enum import IntEnum

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from tunnels.binding import Address
from tunnels.errors import BadFrame
from tunnels.handshake import Role

PROBE_BYTES = 64
LABEL_BYTES = 8
NONCE_BYTES = 12
TRANSACTION_BYTES = 8

_FIRST = b"\x12"
_BOUND_BYTES = 1 + LABEL_BYTES
_SEALED_AT = _BOUND_BYTES + NONCE_BYTES
_INSIDE = struct.Struct(f">B{TRANSACTION_BYTES}s16sH")
_KEY_BYTES = 32
_DIRECTION_INFO = b"mesh/1 probe to the "


class Kind(IntEnum):
    PING = 1
    PONG = 2
    NOMINATE = 3


@dataclass(frozen=True)
class Way:
    """What a probe goes over: an address, and our socket: 0 is the node's own, others are those of
    a salvo (salvo.py), numbered from 1."""

    to: Address
    via: int = 0


@dataclass(frozen=True)
class Message:
    """What is inside a probe. seen: the receiver's address as the sender sees it."""

    kind: Kind
    transaction: bytes
    seen: Address


@dataclass(frozen=True, repr=False)
class DirectionKey:
    """Of the probes that go one way."""

    label: bytes
    cipher: ChaCha20Poly1305

    def seal(self, message: Message, nonce: bytes) -> bytes:
        """nonce: NONCE_BYTES random ones, never twice."""
        host, port = message.seen
        inside = _INSIDE.pack(message.kind, message.transaction, _packed(host), port)
        bound = _FIRST + self.label
        return bound + nonce + self.cipher.encrypt(nonce, inside, bound)

    def open_untrusted(self, datagram: bytes) -> Message:
        """Raises BadFrame and nothing else."""
        if label_of_untrusted(datagram) != self.label:
            raise BadFrame("a probe under another key")
        nonce, sealed = datagram[_BOUND_BYTES:_SEALED_AT], datagram[_SEALED_AT:]
        try:
            inside = self.cipher.decrypt(nonce, sealed, datagram[:_BOUND_BYTES])
        except InvalidTag:
            raise BadFrame("a forged probe") from None
        kind, transaction, host, port = _INSIDE.unpack(inside)
        if kind not in Kind.__members__.values() or not port:
            raise BadFrame("a probe that means nothing")
        return Message(Kind(kind), transaction, (_plain(host), port))


def label_of_untrusted(datagram: bytes) -> bytes:
    """Whose probe it says it is. Raises BadFrame and nothing else."""
    if len(datagram) != PROBE_BYTES or datagram[:1] != _FIRST:
        raise BadFrame(f"a probe is {PROBE_BYTES} bytes and begins with 0x12")
    return datagram[1:_BOUND_BYTES]


def direction_key(secret: bytes, receiver: Role) -> DirectionKey:
    """Of the probes that go to the side with this role."""
    info = _DIRECTION_INFO + receiver.value.encode()
    made = HKDF(SHA256(), _KEY_BYTES + LABEL_BYTES, None, info).derive(secret)
    return DirectionKey(made[_KEY_BYTES:], ChaCha20Poly1305(made[:_KEY_BYTES]))


def _packed(host: str) -> bytes:
    address = ipaddress.ip_address(host)
    if isinstance(address, ipaddress.IPv6Address):
        return address.packed
    return bytes(10) + b"\xff\xff" + address.packed


def _plain(packed: bytes) -> str:
    address = ipaddress.IPv6Address(packed)
    return str(address.ipv4_mapped or address)
