"""What anyone on the local network may say: announcements, and sequences of them."""

from __future__ import annotations

import base64

from discovery.announcement import (
    ANNOUNCEMENT_LABEL,
    ENTROPY_BYTES,
    MAX_NAME_CHARS,
    MAX_PLACES,
    MAX_TAGS,
    encode_announcement,
    parse_announcement_untrusted,
)
from discovery.hints import MAX_UNMET, Hint, HintBook
from tests.fuzz.discovery_parsers import MESH, NOW
from tests.fuzz.mutation import SealedFormat
from tests.fuzz.parser import REJECTED, Parser, check
from tests.fuzz.script import Script
from tests.fuzz.tunnels_parsers import HOSTILE, US, identity
from tunnels.errors import BadFrame
from tunnels.peer import Candidate

PLACES = (Candidate("quic", "192.0.2.1", 4242), Candidate("quic", "2001:db8::1", 4242))
FRIEND = identity(7)
LISTENER = identity(8)


def announcement(number: int = 0) -> bytes:
    return encode_announcement(
        US.sign,
        peer=US.peer,
        seq=NOW * 1000 + number,
        version="0.1.0",
        name="somebody",
        places=PLACES,
        meshes=(MESH, bytes(32)),
        entropy=bytes(range(ENTROPY_BYTES)),
    )


def lines_of(record: bytes) -> bytes:
    """The strings under their lengths, the signature left out."""
    lines = []
    while record:
        lines.append(record[1 : 1 + record[0]])
        record = record[1 + record[0] :]
    return b"\n".join(lines[:-1])


def seal(lines: bytes) -> bytes:
    """Right lengths, and a right signature by the seeds' key, over wrong words."""
    body = b"".join(bytes([len(one[:255])]) + one[:255] for one in lines.split(b"\n"))
    signature = base64.urlsafe_b64encode(US.sign(ANNOUNCEMENT_LABEL, body)).rstrip(b"=")
    return body + bytes([4 + len(signature)]) + b"sig=" + signature


def run_announcement(data: bytes) -> object:
    said = parse_announcement_untrusted(data)
    check(1 <= len(said.name) <= MAX_NAME_CHARS and said.name.isprintable(), "a name can be shown")
    check(len(said.places) <= MAX_PLACES and len(said.tags) <= MAX_TAGS, "bounds are kept")
    check(not said.is_signed() or said.peer == US.peer, "only who has the key has signed")
    return said


def run_heard(data: bytes) -> object:
    """Announcements, true and damaged, one after another, to a node that knows one other."""
    script = Script(data)
    book = HintBook(LISTENER.peer, (MESH,), {FRIEND.peer}.__contains__)
    now, hints = 0.0, 0
    for _ in range(6):
        now += script.number()
        who = (US, FRIEND, HOSTILE, LISTENER)[script.byte() % 4]
        signer = HOSTILE if script.byte() < 64 else who
        record = bytearray(
            encode_announcement(
                signer.sign,
                peer=who.peer,
                seq=script.number() % 2**53,
                version="0.1.0",
                name="somebody",
                places=PLACES[: script.byte() % 3],
                meshes=(MESH,),
                entropy=bytes(ENTROPY_BYTES),
            )
        )
        if script.byte() < 64:
            record[script.number() % len(record)] = script.byte()
        heard = book.hear_untrusted(bytes(record), now)
        if isinstance(heard, Hint):
            hints += 1
            check(heard.peer == signer.peer != LISTENER.peer, "only what a member signed is heard")
            check(heard.meshes == {MESH}, "only of a mesh of ours")
        elif script.byte() < 32:
            book.turn_down(who.peer, now)
        check(len(book) <= MAX_UNMET + 1, "the book is bounded")
    return hints or REJECTED


def heard_seeds() -> list[bytes]:
    honest = bytes((1, 0, 200, 5, 2, 200, 200))
    moved = bytes((1, 1, 200, 6, 1, 200, 200))
    forged = bytes((1, 1, 0, 9, 1, 200, 200))
    damaged = bytes((1, 0, 200, 9, 1, 0, 60, 7, 0))
    return [honest, honest + moved + forged, forged + honest, damaged + moved]


PARSERS = (
    Parser(
        *("announcement", (BadFrame,)),
        lambda: [lines_of(announcement()), lines_of(announcement(1))],
        run_announcement,
        format=SealedFormat(seal),
    ),
    Parser("announcements heard", (), heard_seeds, run_heard),
)
