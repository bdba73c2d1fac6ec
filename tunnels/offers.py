"""What two peers tell each other to find a better path, over the session that they have.

The stream of the service `paths` carries one Offer each way, then its end. Both are of this form,
integers big-endian, after their length as u16:

    version u8 | nonce 16 | X25519 public key 32 | NAT kind of IPv4 u8, of IPv6 u8 | wishes u8
    | count u8, then each: an address | transport, UTF-8, after its length u8 | kind, likewise

    an address: 4 or 6 | 4 or 16 bytes | port u16

The keys are new for each swap: the probes of hole punching are sealed with what comes of them
(probe.py). Nobody between the two can read or change an offer: the session is end to end.
"""

from __future__ import annotations

import ipaddress
import struct
from dataclasses import dataclass
from enum import IntFlag

from tunnels.errors import BadFrame
from tunnels.peer import Candidate, NatKind

VERSION = 1
NONCE_BYTES = 16
PUBLIC_KEY_BYTES = 32
MAX_CANDIDATES = 32
MAX_OFFER_BYTES = 8192
LENGTH = struct.Struct(">H")
_HEAD = struct.Struct(f">B{NONCE_BYTES}s{PUBLIC_KEY_BYTES}sBBB")
_PORT = struct.Struct(">H")
_ADDRESS_BYTES = {4: 4, 6: 16}
_NAT_KINDS = {int(kind): kind for kind in NatKind}


class Want(IntFlag):
    """What the asking side would like both to try."""

    NOTHING = 0
    PUNCH = 1


@dataclass(frozen=True)
class Offer:
    nonce: bytes
    public_key: bytes
    nat_v4: NatKind = NatKind.UNKNOWN
    nat_v6: NatKind = NatKind.UNKNOWN
    want: Want = Want.NOTHING
    candidates: tuple[Candidate, ...] = ()


def encode(offer: Offer) -> bytes:
    """Behind its length. Candidates beyond MAX_CANDIDATES, and those of relays, are left out."""
    direct = [one for one in offer.candidates if one.via is None and "%" not in one.host]
    direct = direct[:MAX_CANDIDATES]
    head = _HEAD.pack(
        VERSION, offer.nonce, offer.public_key, offer.nat_v4, offer.nat_v6, offer.want
    )
    body = head + bytes([len(direct)])
    for one in direct:
        body += _pack_address((one.host, one.port)) + _pack_text(one.transport)
        body += _pack_text(one.kind)
    return LENGTH.pack(len(body)) + body


def parse_untrusted(body: bytes) -> Offer:
    """An offer without its length. Raises BadFrame. A NAT kind or a wish that we do not know is
    taken for none, so that a later version may add some."""
    reader = _Reader(body)
    version, nonce, key, nat_v4, nat_v6, want = _HEAD.unpack(reader.take(_HEAD.size))
    if version != VERSION:
        raise BadFrame(f"an offer of version {version} is not known here")
    count = reader.byte()
    if count > MAX_CANDIDATES:
        raise BadFrame(f"an offer has {MAX_CANDIDATES} candidates at most, not {count}")
    candidates = tuple(reader.candidate() for _ in range(count))
    if reader.rest:
        raise BadFrame("an offer is followed by more")
    return Offer(
        nonce=nonce,
        public_key=key,
        nat_v4=_nat(nat_v4),
        nat_v6=_nat(nat_v6),
        want=Want(want & Want.PUNCH),
        candidates=candidates,
    )


def _nat(code: int) -> NatKind:
    return _NAT_KINDS.get(code, NatKind.UNKNOWN)


def _pack_address(address: tuple[str, int]) -> bytes:
    parsed = ipaddress.ip_address(address[0])
    return bytes([parsed.version]) + parsed.packed + _PORT.pack(address[1])


def _pack_text(text: str) -> bytes:
    data = text.encode("utf-8")
    return bytes([len(data)]) + data


class _Reader:
    """I take an offer apart from its front."""

    def __init__(self, data: bytes) -> None:
        self.rest = data

    def take(self, count: int) -> bytes:
        if len(self.rest) < count:
            raise BadFrame("an offer ends too early")
        taken, self.rest = self.rest[:count], self.rest[count:]
        return taken

    def byte(self) -> int:
        return self.take(1)[0]

    def address(self) -> tuple[str, int]:
        version = self.byte()
        if version not in _ADDRESS_BYTES:
            raise BadFrame(f"an address of IP version {version}")
        host = str(ipaddress.ip_address(self.take(_ADDRESS_BYTES[version])))
        (port,) = _PORT.unpack(self.take(_PORT.size))
        if not port:
            raise BadFrame("an address with port 0")
        return host, port

    def candidate(self) -> Candidate:
        address = self.address()
        transport, kind = self._text(), self._text()
        if not transport:
            raise BadFrame("a candidate without a transport")
        return Candidate(transport, *address, kind=kind)

    def _text(self) -> str:
        try:
            text = self.take(self.byte()).decode("utf-8")
        except UnicodeDecodeError as error:
            raise BadFrame("a name in an offer is not UTF-8") from error
        if not text.isprintable():
            raise BadFrame("a name in an offer is not printable")
        return text
