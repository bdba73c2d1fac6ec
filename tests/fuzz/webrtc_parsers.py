"""What a peer says to begin a WebRTC link, and inside one below its channels."""

from __future__ import annotations

import struct
from dataclasses import replace

from aiortc import rtcsctptransport
from google_crc32c import value as crc32c

from tests.fuzz.parser import REJECTED, Parser, check
from tunnels import sctp_guard
from tunnels.errors import BadFrame
from tunnels.webrtc_description import (
    MAX_CANDIDATES,
    Credentials,
    Description,
    Place,
    PlaceKind,
    encode,
    parse_description_untrusted,
)


def run_description(data: bytes) -> Description:
    found = parse_description_untrusted(data)
    check(encode(found) == data, "a description has one spelling")
    check(len(found.places) <= MAX_CANDIDATES, "a few candidates")
    return found


def description_seeds() -> list[bytes]:
    places = (
        Place(PlaceKind.HOST, "192.0.2.1", 9, 1),
        Place(PlaceKind.RELAYED, "2001:db8::1", 7, 0xFFFFFFFF),
    )
    full = Description(Credentials("abcd", "p" * 22), bytes(range(32)), places)
    return [encode(full), encode(replace(full, fingerprint=None, places=()))]


SCTP_HEAD = struct.pack("!HHL", 5000, 5000, 1)
"""Before the checksum, which aiortc tests and the harness makes right."""


def run_sctp(data: bytes) -> object:
    """What passes the guard is parsed by aiortc, within the time that any input has."""
    packet = SCTP_HEAD + bytes(4) + data
    sctp_guard.check_packet_untrusted(packet)
    sealed = SCTP_HEAD + struct.pack("<L", crc32c(packet)) + data
    try:
        chunks = rtcsctptransport.parse_packet(sealed)[3]
    except (ValueError, struct.error):  # the link ends
        return REJECTED
    counted = [
        sum(last - first + 1 for first, last in one.gaps)
        for one in chunks
        if isinstance(one, rtcsctptransport.SackChunk)
    ]
    check(all(span <= sctp_guard.MAX_GAP_SPAN for span in counted), "gaps are soon counted")
    return chunks


def sctp_seeds() -> list[bytes]:
    init = struct.pack("!BBHLLHHL", 1, 0, 34, 1, 1 << 20, 99, 99, 7)
    return [
        struct.pack("!BBHLHHL", 0, 3, 20, 7, 2, 0, 53) + b"data",
        struct.pack("!BBHLLHHHHL", 3, 0, 24, 9, 1 << 20, 1, 1, 2, 3, 8),
        init + struct.pack("!HHHHBB", 0xC000, 4, 0x8008, 6, 192, 130),
        struct.pack("!BBHHH", 4, 0, 12, 1, 8) + b"beat",
        struct.pack("!BBHHHLLLHH", 130, 0, 24, 13, 20, 1, 2, 3, 4, 6),
        struct.pack("!BBHHHLL", 130, 0, 16, 16, 12, 1, 1),
        struct.pack("!BBH", 10, 0, 28) + bytes(24) + struct.pack("!BBH", 11, 0, 4),
        struct.pack("!BBHL", 7, 0, 8, 1),
        struct.pack("!BBHHHHH", 9, 0, 12, 3, 8, 0, 0),
    ]


PARSERS = (
    Parser("webrtc description", (BadFrame,), description_seeds, run_description),
    Parser("sctp packet", (BadFrame,), sctp_seeds, run_sctp),
)
