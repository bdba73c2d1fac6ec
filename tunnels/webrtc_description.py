"""What two nodes tell each other to begin a WebRTC link. Sans-IO.

    version        1 byte, 1
    fragment       1 byte of length, 4 to 32 ice-chars (RFC 8839 section 5.4: user name fragment)
    password       1 byte of length, 22 to 64 ice-chars
    fingerprint    1 byte of length, 0 or 32: SHA-256 of the DTLS certificate
    candidates     1 byte of count, up to MAX_CANDIDATES, each:
        kind       1 byte: 0 host, 1 server-reflexive, 2 relayed
        priority   4 bytes (RFC 8445 section 5.1.2)
        port       2 bytes, not 0
        address    1 byte of length, 4 or 16; the address

Numbers are big-endian. In place of SDP, which says a hundred other things and is parsed by nobody
the same way.

Two nodes that share a key and cannot talk yet (a reply code) know fragment and password beforehand
(`agreed`), and say nothing of fingerprints: what certificates are found is proven by the handshake
inside, as always.
"""

from __future__ import annotations

import ipaddress
import struct
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from tunnels.errors import BadFrame
from tunnels.handshake import Role

VERSION = 1
MAX_CANDIDATES = 24
MAX_BYTES = 1024
FINGERPRINT_BYTES = 32
FRAGMENT_LENGTHS = range(4, 33)
PASSWORD_LENGTHS = range(22, 65)
NEW_FRAGMENT_CHARS = 8
NEW_PASSWORD_CHARS = 24  # 6 bits each
_ICE_CHARS = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
_PLACE = struct.Struct("!BIHB")


class PlaceKind(IntEnum):
    """Where an address comes from; the values are the wire's."""

    HOST = 0
    REFLEXIVE = 1
    RELAYED = 2


@dataclass(frozen=True)
class Place:
    """An address of ours or of the peer's where ICE may meet it. host: an IP literal."""

    kind: PlaceKind
    host: str
    port: int
    priority: int


@dataclass(frozen=True)
class Credentials:
    """What ICE checks of one side prove that they know. Told to the peer alone."""

    fragment: str
    password: str

    def __repr__(self) -> str:
        return f"Credentials({self.fragment})"


@dataclass(frozen=True)
class Description:
    """One side of a link to be. fingerprint: None when it is to be found (`agreed`)."""

    credentials: Credentials
    fingerprint: bytes | None
    places: tuple[Place, ...]


def fresh(entropy: Callable[[int], bytes]) -> Credentials:
    return _credentials(entropy(NEW_FRAGMENT_CHARS + NEW_PASSWORD_CHARS))


def agreed(key: bytes, role: Role) -> Credentials:
    """What the side in `role` uses when both hold `key` (32 secret bytes, good for one link)."""
    info = b"mesh/1 webrtc credentials " + role.value.encode("ascii")
    size = NEW_FRAGMENT_CHARS + NEW_PASSWORD_CHARS
    return _credentials(HKDF(hashes.SHA256(), length=size, salt=None, info=info).derive(key))


def _credentials(random: bytes) -> Credentials:
    text = bytes(_ICE_CHARS[byte & 63] for byte in random).decode("ascii")
    return Credentials(text[:NEW_FRAGMENT_CHARS], text[NEW_FRAGMENT_CHARS:])


def encode(description: Description) -> bytes:
    """The wire form; of more than MAX_CANDIDATES places the first."""
    places = description.places[:MAX_CANDIDATES]
    pieces = [
        bytes([VERSION]),
        _sized(description.credentials.fragment.encode("ascii")),
        _sized(description.credentials.password.encode("ascii")),
        _sized(description.fingerprint or b""),
        bytes([len(places)]),
    ]
    for place in places:
        address = ipaddress.ip_address(place.host).packed
        pieces.append(_PLACE.pack(place.kind, place.priority, place.port, len(address)) + address)
    return b"".join(pieces)


def _sized(field: bytes) -> bytes:
    return bytes([len(field)]) + field


def parse_description_untrusted(data: bytes) -> Description:
    """Raises BadFrame."""
    reader = _Reader(data)
    if reader.number() != VERSION:
        raise BadFrame("the description of a link has another version: update the older node")
    fragment = _ice_text(reader.sized(), FRAGMENT_LENGTHS)
    password = _ice_text(reader.sized(), PASSWORD_LENGTHS)
    fingerprint = reader.sized()
    if len(fingerprint) not in (0, FINGERPRINT_BYTES):
        raise BadFrame("a fingerprint of another kind than SHA-256")
    count = reader.number()
    if count > MAX_CANDIDATES:
        raise BadFrame("too many candidates")
    places = tuple(_place(reader) for _ in range(count))
    reader.end()
    return Description(Credentials(fragment, password), fingerprint or None, places)


def _ice_text(field: bytes, lengths: range) -> str:
    if len(field) not in lengths or not set(field) <= set(_ICE_CHARS):
        raise BadFrame("ICE credentials of the wrong length or letters")
    return field.decode("ascii")


def _place(reader: _Reader) -> Place:
    kind, priority, port, size = _PLACE.unpack(reader.take(_PLACE.size))
    if kind not in set(PlaceKind) or port == 0 or size not in (4, 16):
        raise BadFrame("a candidate that makes no sense")
    return Place(PlaceKind(kind), str(ipaddress.ip_address(reader.take(size))), port, priority)


class _Reader:
    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def take(self, count: int) -> bytes:
        found = self._data[self._at : self._at + count]
        if len(found) != count:
            raise BadFrame("the description of a link is cut short")
        self._at += count
        return found

    def number(self) -> int:
        return self.take(1)[0]

    def sized(self) -> bytes:
        return self.take(self.number())

    def end(self) -> None:
        if self._at != len(self._data):
            raise BadFrame("the description of a link has something behind its end")
