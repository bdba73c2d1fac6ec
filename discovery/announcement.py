"""What a node says of itself on the local network, and how its own kind recognises it there.

One DNS TXT record (RFC 6763 section 6), `<peer id>._mesh-llm._udp.local.`, holds all of it, so that
no reader ever sees half. Its strings, in this order:

    v=1         format; other formats are not read
    id=         the node's PeerId, 52 letters
    seq=        unix milliseconds by the node's own clock: the higher number is newer
    ver=        version of the program
    name=       the node's name, UTF-8
    at0=…       places where it may be reached, best first: transport, port, address, commas between
    salt=       8 bytes, base64url; new whenever the tags change
    tags=       8 bytes for each mesh, in no order, base64url; filled up with noise to a multiple of
                TAGS_STEP, so that joining a mesh does not show
    sig=        the node's signature (label ANNOUNCEMENT_LABEL) over all strings before it; the last

A tag is BLAKE2b of salt and PeerId under the mesh's id, which only those know that were told it
inside a tunnel or by a token: members see who is of their mesh; to others two nodes of one mesh
look like any two (docs/decisions/0007). Whoever copies a tag cannot use it for another PeerId, and
whoever changes a word of an announcement breaks its signature. What is left to a liar is to repeat
old ones; `seq` tells those apart. All the same these are hints: who answers is proven by handshake.

Sans-IO: entropy and numbers come in.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass

from discovery.grants import Sign
from tunnels.errors import BadFrame
from tunnels.identity import SIGNATURE_BYTES, verify
from tunnels.peer import Candidate, PeerId, parse_peer_id_untrusted

ANNOUNCEMENT_LABEL = "mesh announcement 1"
SALT_BYTES = 8
TAG_BYTES = 8
TAGS_STEP = 4
ENTROPY_BYTES = SALT_BYTES + (TAGS_STEP - 1) * TAG_BYTES
MAX_TAGS = 16
MAX_PLACES = 12
MAX_NAME_CHARS = 64
MAX_NAME_BYTES = 96
MAX_VERSION_CHARS = 32
MAX_RECORD_BYTES = 1300
"""With the records around it, one packet of an Ethernet."""
MAX_SEQ = 2**53

_FORMAT = b"1"
_TRANSPORT_CHARS = 16


@dataclass(frozen=True)
class Announcement:
    """One node's word about itself. `body` is what its signature covers."""

    peer: PeerId
    seq: int
    version: str
    name: str
    places: tuple[Candidate, ...]
    salt: bytes
    tags: frozenset[bytes]
    body: bytes
    signature: bytes

    def is_of(self, mesh: bytes) -> bool:
        """Whether the node says that it is a member of `mesh`."""
        return mesh_tag(mesh, self.peer, self.salt) in self.tags

    def is_signed(self) -> bool:
        """Whether the node itself said so. The one costly question here: ask it last."""
        return verify(self.peer, ANNOUNCEMENT_LABEL, self.body, self.signature)


def mesh_tag(mesh: bytes, peer: PeerId, salt: bytes) -> bytes:
    """What `peer` shows for its membership of `mesh`."""
    return hashlib.blake2b(
        salt + peer.key, digest_size=TAG_BYTES, key=mesh, person=b"mesh tag 1"
    ).digest()


def encode_announcement(
    sign: Sign,
    *,
    peer: PeerId,
    seq: int,
    version: str,
    name: str,
    places: Sequence[Candidate],
    meshes: Iterable[bytes],
    entropy: bytes,
) -> bytes:
    """The TXT record, signed; of places and meshes as many as go in.

    entropy: `ENTROPY_BYTES`; the same ones while the meshes stay the same.
    """
    salt, noise = entropy[:SALT_BYTES], entropy[SALT_BYTES:ENTROPY_BYTES]
    tags = [mesh_tag(mesh, peer, salt) for mesh in meshes][:MAX_TAGS]
    missing = -len(tags) % TAGS_STEP
    tags += [noise[n * TAG_BYTES : (n + 1) * TAG_BYTES] for n in range(missing)]
    strings = [
        b"v=" + _FORMAT,
        b"id=" + str(peer).encode("ascii"),
        b"seq=%d" % seq,
        b"ver=" + version[:MAX_VERSION_CHARS].encode("ascii", "replace"),
        b"name=" + _clipped(name),
        *(_place_string(number, one) for number, one in enumerate(places[:MAX_PLACES])),
        b"salt=" + _encode(salt),
        b"tags=" + _encode(b"".join(sorted(tags))),
    ]
    body = b"".join(map(_string, strings))
    return body + _string(b"sig=" + _encode(sign(ANNOUNCEMENT_LABEL, body)))


def parse_announcement_untrusted(record: bytes) -> Announcement:
    """What the record says, its signature not checked; raises `BadFrame` only."""
    if len(record) > MAX_RECORD_BYTES:
        raise BadFrame("an announcement is longer than any that a node makes")
    *strings, last = _strings(record)
    values: dict[bytes, bytes] = {}
    for string in strings:
        key, _, value = string.partition(b"=")
        values.setdefault(key, value)
    if values.get(b"v") != _FORMAT:
        raise BadFrame("an announcement in a format that this version does not know")
    if not last.startswith(b"sig="):
        raise BadFrame("an announcement does not end in its signature")
    try:
        return Announcement(
            peer=parse_peer_id_untrusted(values[b"id"].decode("ascii")),
            seq=_number(values[b"seq"], MAX_SEQ),
            version=_text(values[b"ver"], MAX_VERSION_CHARS),
            name=_text(values[b"name"], MAX_NAME_CHARS),
            places=_places(values),
            salt=_decode(values[b"salt"], (SALT_BYTES,)),
            tags=_tags(values[b"tags"]),
            body=record[: -1 - len(last)],
            signature=_decode(last[len(b"sig=") :], (SIGNATURE_BYTES,)),
        )
    except KeyError as error:
        raise BadFrame("an announcement lacks a field") from error
    except ValueError as error:
        raise BadFrame("an announcement holds a value of the wrong form") from error


def _place_string(number: int, place: Candidate) -> bytes:
    return f"at{number}={place.transport},{place.port},{place.host}".encode("ascii")


def _places(values: dict[bytes, bytes]) -> tuple[Candidate, ...]:
    """Raises ValueError."""
    places = []
    for number in range(MAX_PLACES):
        value = values.get(b"at%d" % number)
        if value is None:
            break
        transport, port, host = value.decode("ascii").split(",", 2)
        if not transport.isalnum() or len(transport) > _TRANSPORT_CHARS or "%" in host:
            raise ValueError("a place that is none")
        places.append(Candidate(transport, host, _number(port.encode("ascii"), 65535)))
    return tuple(places)


def _strings(record: bytes) -> list[bytes]:
    """The strings of a TXT record, each behind its length; at least one. Raises `BadFrame`."""
    strings = []
    at = 0
    while at < len(record):
        end = at + 1 + record[at]
        strings.append(record[at + 1 : end])
        at = end
    if at != len(record) or not strings:
        raise BadFrame("a text record that is cut short")
    return strings


def _string(content: bytes) -> bytes:
    return bytes((len(content),)) + content


def _clipped(name: str) -> bytes:
    """The name's UTF-8, cut between two characters."""
    data = name[:MAX_NAME_CHARS].encode("utf-8")[:MAX_NAME_BYTES]
    return data.decode("utf-8", "ignore").encode("utf-8")


def _text(data: bytes, most_chars: int) -> str:
    """Text that is fit to be shown; raises ValueError where nothing of it is."""
    shown = "".join(char for char in data.decode("utf-8")[:most_chars] if char.isprintable())
    if not shown:
        raise ValueError("an empty text")
    return shown


def _number(digits: bytes, most: int) -> int:
    # Sixteen digits: of thousands Python makes no number.
    if not digits.isdigit() or len(digits) > 16 or int(digits) > most:
        raise ValueError("a number out of range")
    return int(digits)


def _tags(text: bytes) -> frozenset[bytes]:
    """Raises ValueError."""
    tags = _decode(text, range(0, MAX_TAGS * TAG_BYTES + 1, TAG_BYTES))
    return frozenset(tags[start : start + TAG_BYTES] for start in range(0, len(tags), TAG_BYTES))


def _encode(data: bytes) -> bytes:
    return base64.urlsafe_b64encode(data).rstrip(b"=")


def _decode(text: bytes, sizes: Container[int]) -> bytes:
    """Bytes of one of these sizes; raises ValueError, also for a second spelling of the same."""
    data = base64.urlsafe_b64decode(text + b"=" * (-len(text) % 4))
    if _encode(data) != text or len(data) not in sizes:
        raise ValueError("not bytes in their one canonical form, or not as many as there must be")
    return data
