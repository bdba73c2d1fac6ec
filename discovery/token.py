"""Invite tokens: one line of text that brings a stranger into a mesh.

`mesh1` and then, spelled as in spelling.py:

====== ===== ====================================================================
offset bytes field (integers big-endian)
====== ===== ====================================================================
0      1     version: 1, or 2 where relays are named
1      2     length in bytes of all that follows the length, the checksum left out
3      32    mesh: Ed25519 public key of its root
35     32    inviter: Ed25519 public key of the node to dial
67     8     id: which invite, in the inviter's book
75     16    secret
91     1     role (`discovery.grants.ROLE_CODES`)
92     5     expires_at, unix seconds
97     2     uses
99     1     count of candidates, then each: 4 bits transport, 3 bits kind (`_TRANSPORTS`,
             `_KINDS`), 1 bit set for IPv6; 4 or 16 bytes address; 2 bytes port; of a relay, where
             version is 2, 1 byte: its place among the relays, 255 for the inviter itself
             version 2: count of relays, 1 byte, then each: Ed25519 public key, 32 bytes
last   4     CRC-32 of all before it, little-endian
====== ===== ====================================================================

The CRC is there for copying mistakes; what keeps people out is the secret.
"""

from __future__ import annotations

import hmac
import ipaddress
import re
import struct
from dataclasses import dataclass

from discovery.grants import ROLE_CODES, ROLES_BY_CODE, Role
from discovery.spelling import Misspelt, read_untrusted, spell, squeeze
from tunnels.peer import KEY_BYTES, Candidate, PeerId

PREFIX = "mesh1"
VERSION = 1
VERSION_WITH_RELAYS = 2
ID_BYTES = 8
SECRET_BYTES = 16
MAX_CANDIDATES = 16
MAX_RELAYS = 8
MAX_TEXT_CHARS = 8192
"""More than any token has, with room for the white space of a bad paste."""

_HEAD = struct.Struct(">BH")
_FIXED = struct.Struct(">32s32s8s16sB5sHB")
_PORT = struct.Struct(">H")
_TRANSPORTS = {"quic": 1, "tcp": 2, "webrtc": 3, "relay": 4}
_RELAY = "relay"
_KINDS = {"host": 0, "given": 1, "reflexive": 2, "mapped": 3, "hard": 4}
_TRANSPORT_NAMES = {code: name for name, code in _TRANSPORTS.items()}
_THE_INVITER = 255
_KIND_NAMES = {code: name for name, code in _KINDS.items()}


class BadToken(Exception):
    """The text is no token that can be used; the sentence says what is wrong with it."""


class Secret:
    """The 16 bytes that make an invite worth anything. Shows itself to no log or traceback."""

    __slots__ = ("_value",)

    def __init__(self, value: bytes) -> None:
        if len(value) != SECRET_BYTES:
            raise ValueError(f"a secret is {SECRET_BYTES} bytes")
        self._value = bytes(value)

    def reveal(self) -> bytes:
        """The bytes themselves: for the wire and for hashing, never for text."""
        return self._value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and hmac.compare_digest(self._value, other._value)

    def __hash__(self) -> int:
        return hash(self._value)

    def __repr__(self) -> str:
        return "Secret(…)"


@dataclass(frozen=True)
class Token:
    """An invite: which mesh, whom to dial and where, and what proves that one was invited.

    `expires_at` in unix seconds; `uses` as given out, the inviter counts them; `candidates` are
    the inviter's guesses, to be held against an address policy before any is dialled.
    """

    mesh: bytes
    inviter: PeerId
    id: bytes
    secret: Secret
    role: Role
    expires_at: int
    uses: int
    candidates: tuple[Candidate, ...] = ()

    @property
    def relays(self) -> tuple[PeerId, ...]:
        """Other nodes that lead to the inviter."""
        named = dict.fromkeys(one.via for one in self.candidates)
        return tuple(one for one in named if one is not None and one != self.inviter)

    @property
    def version(self) -> int:
        """The lowest that can say it: a node of before relays can read what needs none."""
        is_plain = all(one.via is None for one in self.candidates)
        return VERSION if is_plain else VERSION_WITH_RELAYS


def encode(token: Token) -> str:
    """The token's text. `ValueError` for a field out of its range.

    Candidates with an IPv6 scope are left out: they mean something on one machine only.
    """
    scopeless = [candidate for candidate in token.candidates if "%" not in candidate.host]
    if len(scopeless) > MAX_CANDIDATES or len(token.relays) > MAX_RELAYS:
        raise ValueError(f"a token has {MAX_CANDIDATES} candidates and {MAX_RELAYS} relays at most")
    if len(token.mesh) != KEY_BYTES or len(token.id) != ID_BYTES:
        raise ValueError("a mesh's key is 32 bytes, an invite's id eight")
    try:
        fixed = _FIXED.pack(
            token.mesh,
            token.inviter.key,
            token.id,
            token.secret.reveal(),
            ROLE_CODES[token.role],
            token.expires_at.to_bytes(5, "big"),
            token.uses,
            len(scopeless),
        )
    except (struct.error, OverflowError) as error:
        raise ValueError("a token's expiry or uses are out of range") from error
    body = fixed + b"".join(_pack_candidate(candidate, token) for candidate in scopeless)
    if token.version == VERSION_WITH_RELAYS:
        body += bytes([len(token.relays)]) + b"".join(one.key for one in token.relays)
    return PREFIX + spell(_HEAD.pack(token.version, len(body)) + body)


def parse_untrusted(text: str) -> Token:
    """The token in `text`, white space skipped; raises `BadToken` and nothing else."""
    if len(text) > MAX_TEXT_CHARS:
        raise BadToken("that is too long to be an invite token: paste the line that starts mesh1")
    letters = squeeze(text)
    if not letters.startswith(PREFIX):
        if re.match(r"mesh[2-9]", letters):
            raise BadToken("the token was made by a newer mesh: update this one, then try again")
        raise BadToken("that is not an invite token: paste the whole line that starts with mesh1")
    try:
        checked, whole = read_untrusted(letters[len(PREFIX) :])
    except Misspelt as error:
        raise BadToken(f"the token {error}") from error
    version, length = _HEAD.unpack_from(checked.ljust(_HEAD.size, b"\0"))
    if not whole:
        missing = len(checked) < _HEAD.size + length
        raise BadToken(_TRUNCATED if missing else _CORRUPTED)
    if version not in (VERSION, VERSION_WITH_RELAYS):
        raise BadToken("the token was made by a newer mesh: update this one, then try again")
    return _parse_body(checked[_HEAD.size :], length, version)


_TRUNCATED = "the token's end is missing: copy the whole line again"
_CORRUPTED = "the token is corrupted, a character in it is wrong: copy it again"


def _parse_body(body: bytes, length: int, version: int) -> Token:
    """The checksum was right, so what is wrong here was made wrong."""
    if len(body) != length or length < _FIXED.size:
        raise BadToken(_CORRUPTED)
    mesh, inviter, id, secret, role, expires_at, uses, count = _FIXED.unpack_from(body)
    if role not in ROLES_BY_CODE or not uses or count > MAX_CANDIDATES:
        raise BadToken("the token asks for something this mesh does not know: update it")
    places, rest = _parse_places(body[_FIXED.size :], count, version)
    relays, rest = _parse_relays(rest) if version == VERSION_WITH_RELAYS else ((), rest)
    if rest:
        raise BadToken(_CORRUPTED)
    return Token(
        mesh=mesh,
        inviter=PeerId(inviter),
        id=id,
        secret=Secret(secret),
        role=ROLES_BY_CODE[role],
        expires_at=int.from_bytes(expires_at, "big"),
        uses=uses,
        candidates=_candidates(places, relays, PeerId(inviter)),
    )


def _pack_candidate(candidate: Candidate, token: Token) -> bytes:
    try:
        code = _TRANSPORTS[candidate.transport] << 4 | _KINDS[candidate.kind] << 1
    except KeyError as error:
        raise ValueError(f"a token cannot carry {candidate}") from error
    if (candidate.transport == _RELAY) != (candidate.via is not None):
        raise ValueError("a candidate that leads through a relay names it, and no other does")
    address = ipaddress.ip_address(candidate.host)
    packed = bytes([code | (address.version == 6)]) + address.packed + _PORT.pack(candidate.port)
    if candidate.via is None:
        return packed
    is_inviter = candidate.via == token.inviter
    return packed + bytes([_THE_INVITER if is_inviter else token.relays.index(candidate.via)])


@dataclass(frozen=True)
class _Place:
    """A candidate as the token spells it. relay: which of the token's, for a relay's."""

    transport: str | None
    kind: str | None
    host: str
    port: int
    relay: int | None


def _parse_places(data: bytes, count: int, version: int) -> tuple[list[_Place], bytes]:
    """The candidates, and what follows them."""
    found: list[_Place] = []
    for _ in range(count):
        address_bytes = 16 if data[:1] and data[0] & 1 else 4
        transport = _TRANSPORT_NAMES.get(data[0] >> 4) if data else None
        names_relay = transport == _RELAY and version == VERSION_WITH_RELAYS
        size = 1 + address_bytes + _PORT.size + names_relay
        if len(data) < size:
            raise BadToken(_CORRUPTED)
        kind = _KIND_NAMES.get(data[0] >> 1 & 7)
        host = str(ipaddress.ip_address(data[1 : 1 + address_bytes]))
        (port,) = _PORT.unpack_from(data, 1 + address_bytes)
        found.append(_Place(transport, kind, host, port, data[size - 1] if names_relay else None))
        data = data[size:]
    return found, data


def _parse_relays(data: bytes) -> tuple[tuple[PeerId, ...], bytes]:
    """The relays, and what follows them."""
    count = data[0] if data else MAX_RELAYS + 1
    end = 1 + count * KEY_BYTES
    if count > MAX_RELAYS or len(data) < end:
        raise BadToken(_CORRUPTED)
    starts = range(1, end, KEY_BYTES)
    return tuple(PeerId(data[start : start + KEY_BYTES]) for start in starts), data[end:]


def _candidates(
    places: list[_Place], relays: tuple[PeerId, ...], inviter: PeerId
) -> tuple[Candidate, ...]:
    """Those of a transport and kind we know: a later mesh may offer more."""
    found: list[Candidate] = []
    for place in places:
        via: PeerId | None = None
        if place.relay is not None:
            if place.relay != _THE_INVITER and place.relay >= len(relays):
                raise BadToken(_CORRUPTED)
            via = inviter if place.relay == _THE_INVITER else relays[place.relay]
        if (
            place.transport
            and place.kind
            and place.port
            and (place.transport == _RELAY) == bool(via)
        ):
            found.append(Candidate(place.transport, place.host, place.port, place.kind, via))
    return tuple(found)
