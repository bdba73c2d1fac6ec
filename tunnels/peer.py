"""Who a peer is and where it may be reached: frozen values, no behaviour.

A `PeerId` is an Ed25519 public key (32 bytes). Its text form is RFC 4648 base32 in lower case
without padding: 52 letters; the last letter carries four bits that must be zero, so that every
peer has exactly one spelling. People see the first eight letters.
"""

from __future__ import annotations

import base64
import binascii
import ipaddress
from dataclasses import dataclass
from enum import IntEnum

from tunnels.errors import BadFrame

KEY_BYTES = 32
TEXT_LETTERS = 52
SHORT_LETTERS = 8


@dataclass(frozen=True, order=True)
class PeerId:
    """An Ed25519 public key, 32 raw bytes. Ordered by those bytes."""

    key: bytes

    def __post_init__(self) -> None:
        if len(self.key) != KEY_BYTES:
            raise ValueError(f"a PeerId is {KEY_BYTES} bytes, not {len(self.key)}")

    def __str__(self) -> str:
        return base64.b32encode(self.key).decode("ascii").rstrip("=").lower()

    def __repr__(self) -> str:
        return f"PeerId({self.short})"

    @property
    def short(self) -> str:
        """Eight letters, for display only: never compare by it."""
        return str(self)[:SHORT_LETTERS]


def parse_peer_id_untrusted(text: str) -> PeerId:
    """The PeerId spelled by `text` (52 letters, case ignored); raises BadFrame otherwise."""
    try:
        key = base64.b32decode(text.encode("ascii") + b"====", casefold=True)
    except (UnicodeEncodeError, binascii.Error) as error:
        raise BadFrame("a peer id is 52 letters a-z and digits 2-7") from error
    if len(text) != TEXT_LETTERS or len(key) != KEY_BYTES:
        raise BadFrame(f"a peer id has {TEXT_LETTERS} letters")
    peer = PeerId(key)
    if str(peer) != text.lower():
        raise BadFrame("this peer id is not spelled in its one canonical form")
    return peer


@dataclass(frozen=True, order=True)
class Candidate:
    """One place where a peer may answer.

    transport: a name in `tunnels.link.LINK_KINDS` ("quic").
    host: an IPv4 or IPv6 literal; names are resolved before they get here.
    port: 1 to 65535.
    kind: where the address came from: "host" (an interface of the peer), "given" (typed by
    a person), "reflexive" (seen by others), "mapped" (its router forwards it), "hard" (seen by
    others, who each see another port: good for punching alone); for display, ranking, punching.
    via: the relay that answers there in the peer's place.
    """

    transport: str
    host: str
    port: int
    kind: str = "host"
    via: PeerId | None = None

    def __post_init__(self) -> None:
        ipaddress.ip_address(self.host)  # raises ValueError with a clear sentence
        if not 1 <= self.port <= 65535:
            raise ValueError(f"a port is 1 to 65535, not {self.port}")
        if not self.transport:
            raise ValueError("a candidate names its transport")

    def __str__(self) -> str:
        through = "" if self.via is None else f" ({self.via.short})"
        return f"{self.transport} {format_address(self.host, self.port)}{through}"


class NatKind(IntEnum):
    """How a NAT maps one socket's datagrams to several servers (RFC 4787 section 4.1)."""

    UNKNOWN = 0
    NONE = 1
    EASY = 2  # the same address for all
    HARD = 3  # another one for each
    BLOCKED = 4  # nothing comes back


def format_address(host: str, port: int) -> str:
    """`192.0.2.1:80`, `[2001:db8::1]:80`."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
