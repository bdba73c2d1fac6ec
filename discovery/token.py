"""Invite tokens: one line of text that brings a stranger into a mesh.

`mesh1` and then, spelled as in spelling.py:

====== ===== ====================================================================
offset bytes field (integers big-endian)
====== ===== ====================================================================
0      1     version, 1
1      2     length in bytes of all that follows the length, the checksum left out
3      32    mesh: Ed25519 public key of its root
35     32    inviter: Ed25519 public key of the node to dial
67     8     id: which invite, in the inviter's book
75     16    secret
91     1     role (`discovery.grants.ROLE_CODES`)
92     5     expires_at, unix seconds
97     2     uses
99     1     count of candidates, then each: 4 bits transport, 3 bits kind (`_TRANSPORTS`,
             `_KINDS`), 1 bit set for IPv6; 4 or 16 bytes address; 2 bytes port
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
ID_BYTES = 8
SECRET_BYTES = 16
MAX_CANDIDATES = 16
MAX_TEXT_CHARS = 8192
"""More than any token has, with room for the white space of a bad paste."""

_HEAD = struct.Struct(">BH")
_FIXED = struct.Struct(">32s32s8s16sB5sHB")
_PORT = struct.Struct(">H")
_TRANSPORTS = {"quic": 1, "tcp": 2, "webrtc": 3, "relay": 4}
_KINDS = {"host": 0, "given": 1, "reflexive": 2, "mapped": 3}
_TRANSPORT_NAMES = {code: name for name, code in _TRANSPORTS.items()}
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
    version: int = VERSION


def encode(token: Token) -> str:
    """The token's text. `ValueError` for a field out of its range.

    Candidates with an IPv6 scope are left out: they mean something on one machine only.
    """
    scopeless = [candidate for candidate in token.candidates if "%" not in candidate.host]
    if token.version != VERSION or len(scopeless) > MAX_CANDIDATES:
        raise ValueError(f"a token has version {VERSION} and {MAX_CANDIDATES} candidates at most")
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
    body = fixed + b"".join(_pack_candidate(candidate) for candidate in scopeless)
    return PREFIX + spell(_HEAD.pack(VERSION, len(body)) + body)


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
    if version != VERSION:
        raise BadToken("the token was made by a newer mesh: update this one, then try again")
    return _parse_body(checked[_HEAD.size :], length)


_TRUNCATED = "the token's end is missing: copy the whole line again"
_CORRUPTED = "the token is corrupted, a character in it is wrong: copy it again"


def _parse_body(body: bytes, length: int) -> Token:
    """The checksum was right, so what is wrong here was made wrong."""
    if len(body) != length or length < _FIXED.size:
        raise BadToken(_CORRUPTED)
    mesh, inviter, id, secret, role, expires_at, uses, count = _FIXED.unpack_from(body)
    if role not in ROLES_BY_CODE or not uses or count > MAX_CANDIDATES:
        raise BadToken("the token asks for something this mesh does not know: update it")
    return Token(
        mesh=mesh,
        inviter=PeerId(inviter),
        id=id,
        secret=Secret(secret),
        role=ROLES_BY_CODE[role],
        expires_at=int.from_bytes(expires_at, "big"),
        uses=uses,
        candidates=_parse_candidates(body[_FIXED.size :], count),
    )


def _pack_candidate(candidate: Candidate) -> bytes:
    try:
        code = _TRANSPORTS[candidate.transport] << 4 | _KINDS[candidate.kind] << 1
    except KeyError as error:
        raise ValueError(f"a token cannot carry {candidate}") from error
    address = ipaddress.ip_address(candidate.host)
    return bytes([code | (address.version == 6)]) + address.packed + _PORT.pack(candidate.port)


def _parse_candidates(data: bytes, count: int) -> tuple[Candidate, ...]:
    """Those of a transport and kind we know: a later mesh may offer more."""
    found: list[Candidate] = []
    for _ in range(count):
        address_bytes = 16 if data[:1] and data[0] & 1 else 4
        size = 1 + address_bytes + _PORT.size
        if len(data) < size:
            raise BadToken(_CORRUPTED)
        transport = _TRANSPORT_NAMES.get(data[0] >> 4)
        kind = _KIND_NAMES.get(data[0] >> 1 & 7)
        host = str(ipaddress.ip_address(data[1 : 1 + address_bytes]))
        (port,) = _PORT.unpack_from(data, 1 + address_bytes)
        if transport and kind and port:
            found.append(Candidate(transport, host, port, kind))
        data = data[size:]
    if data:
        raise BadToken(_CORRUPTED)
    return tuple(found)
