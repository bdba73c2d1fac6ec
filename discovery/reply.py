"""Reply codes: what a joiner that reached nobody sends back by hand.

Where both machines are behind routers that let nobody in, a token alone opens no way: somebody must
send at the same time from the other side, and for that must know whereto. The joiner prints

`meshr1` and then, spelled as in spelling.py:

====== ===== ====================================================================
offset bytes field (integers big-endian)
====== ===== ====================================================================
0      1     version, 1; 2 where places at a TURN server follow
1      8     id: of the invite, in the inviter's book
9      8     nonce
17     1     NAT kind of the joiner: 4 bits of IPv4, 4 bits of IPv6 (`tunnels.peer.NatKind`)
18     1     count of addresses, then each: 1 byte, 4 or 6; 4 or 16 bytes; 2 bytes port
       1     version 2: count of places, then each as above
       16    tag: HMAC-SHA-256 of all before it, cut
last   4     CRC-32
====== ===== ====================================================================

Tag, probe key and ICE key all come of the hash of the invite's secret that the inviter's book
keeps, and of the nonce: who has not got the token can make no code, so nobody else's word makes a
node send anything anywhere. The addresses are the joiner's, where its datagrams come from; the
places are those at its TURN server, where it waits for a WebRTC link. Who it is, the handshake
shows. A code may be read by anyone: it lets nobody in.
"""

from __future__ import annotations

import hmac
import ipaddress
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field

from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from discovery.spelling import Misspelt, read_untrusted, spell, squeeze
from discovery.token import ID_BYTES
from tunnels.peer import NatKind

PREFIX = "meshr1"
VERSION = 1
VERSION_WITH_PLACES = 2
NONCE_BYTES = 8
MAX_ADDRESSES = 8
MAX_PLACES = 2
MAX_TEXT_CHARS = 2048
_HEAD = struct.Struct(f">B{ID_BYTES}s{NONCE_BYTES}sB")
_PORT = struct.Struct(">H")
_ADDRESS_BYTES = {4: 4, 6: 16}
_TAG_BYTES = 16
_KEY_BYTES = 32
_CONTEXT = b"mesh reply 1"
_NAT_KINDS = {int(kind): kind for kind in NatKind}


class BadReply(Exception):
    """The text is no reply code that can be used; the sentence says what is wrong with it."""


@dataclass(frozen=True)
class Reply:
    """Where a joiner's datagrams come from, and for which invite it wants in.

    places: at its TURN server, where it waits for a WebRTC link.
    """

    invite: bytes
    nonce: bytes
    addresses: tuple[tuple[str, int], ...]
    nat_v4: NatKind = NatKind.UNKNOWN
    nat_v6: NatKind = NatKind.UNKNOWN
    places: tuple[tuple[str, int], ...] = ()
    signed: bytes = field(default=b"", repr=False, compare=False)
    """As it was read: what the tag covers, and the tag."""


def encode(reply: Reply, secret_hash: bytes) -> str:
    """The code's text. Beyond MAX_ADDRESSES and MAX_PLACES, what is over is left out."""
    version = VERSION_WITH_PLACES if reply.places else VERSION
    nat = reply.nat_v4 << 4 | reply.nat_v6
    body = _HEAD.pack(version, reply.invite, reply.nonce, nat)
    body += _listed(reply.addresses[:MAX_ADDRESSES])
    if reply.places:
        body += _listed(reply.places[:MAX_PLACES])
    return PREFIX + spell(body + _tag(secret_hash, reply.nonce, body))


def _listed(addresses: Sequence[tuple[str, int]]) -> bytes:
    data = bytes([len(addresses)])
    for host, port in addresses:
        address = ipaddress.ip_address(host)
        data += bytes([address.version]) + address.packed + _PORT.pack(port)
    return data


def parse_untrusted(text: str) -> Reply:
    """What the code says, whoever wrote it: `check` tells. Raises BadReply."""
    if len(text) > MAX_TEXT_CHARS:
        raise BadReply("that is too long to be a reply code: paste the line that starts meshr1")
    letters = squeeze(text)
    if not letters.startswith(PREFIX):
        kind = "an invite token" if letters.startswith("mesh1") else "no reply code"
        raise BadReply(f"that is {kind}: paste the whole line that starts with meshr1")
    try:
        data, whole = read_untrusted(letters[len(PREFIX) :])
    except Misspelt as error:
        raise BadReply(f"the reply code {error}") from error
    if not whole:
        raise BadReply("the reply code is not whole, or a character in it is wrong: copy it again")
    return _parse(data)


def check(reply: Reply, secret_hash: bytes) -> bool:
    """Whether it was made by someone who has the invite's token."""
    body, tag = reply.signed[:-_TAG_BYTES], reply.signed[-_TAG_BYTES:]
    return hmac.compare_digest(tag, _tag(secret_hash, reply.nonce, body))


def probe_key(secret_hash: bytes, nonce: bytes) -> bytes:
    """What both sides seal their probes with: 32 bytes."""
    return _keys(secret_hash, nonce)[_KEY_BYTES : 2 * _KEY_BYTES]


def ice_key(secret_hash: bytes, nonce: bytes) -> bytes:
    """Of which both sides make the names and passwords of their ICE checks: 32 bytes."""
    return _keys(secret_hash, nonce)[2 * _KEY_BYTES :]


def _tag(secret_hash: bytes, nonce: bytes, body: bytes) -> bytes:
    return hmac.digest(_keys(secret_hash, nonce)[:_KEY_BYTES], body, "sha256")[:_TAG_BYTES]


def _keys(secret_hash: bytes, nonce: bytes) -> bytes:
    return HKDF(SHA256(), 3 * _KEY_BYTES, salt=nonce, info=_CONTEXT).derive(secret_hash)


def _parse(data: bytes) -> Reply:
    """The check was right, so what is wrong here was made wrong, or by a later mesh."""
    if not data or data[0] not in (VERSION, VERSION_WITH_PLACES):
        raise BadReply("the reply code was made by a newer mesh: update this one, then try again")
    if len(data) < _HEAD.size + _TAG_BYTES:
        raise _senseless()
    version, invite, nonce, nat = _HEAD.unpack_from(data)
    addresses, rest = _read_listed(data[_HEAD.size : -_TAG_BYTES], MAX_ADDRESSES)
    places: tuple[tuple[str, int], ...] = ()
    if version == VERSION_WITH_PLACES:
        places, rest = _read_listed(rest, MAX_PLACES)
    if rest:
        raise _senseless()
    v4, v6 = (_NAT_KINDS.get(code, NatKind.UNKNOWN) for code in (nat >> 4, nat & 15))
    return Reply(invite, nonce, addresses, v4, v6, places, signed=data)


def _read_listed(data: bytes, most: int) -> tuple[tuple[tuple[str, int], ...], bytes]:
    """A list of addresses, and what follows it."""
    count, rest = data[:1], data[1:]
    if not count or count[0] > most:
        raise _senseless()
    addresses = []
    for _ in range(count[0]):
        size = _ADDRESS_BYTES.get(rest[0] if rest else 0)
        if size is None or len(rest) < 1 + size + _PORT.size:
            raise _senseless()
        (port,) = _PORT.unpack_from(rest, 1 + size)
        if not port:
            raise _senseless()
        addresses.append((str(ipaddress.ip_address(rest[1 : 1 + size])), port))
        rest = rest[1 + size + _PORT.size :]
    return tuple(addresses), rest


def _senseless() -> BadReply:
    return BadReply("the reply code says nothing that makes sense: make a new one")
