"""What may reach aiortc, and what a hostile peer would like to."""

from __future__ import annotations

import struct

import pytest
from aiortc import rtcsctptransport as aiortc

from tunnels.errors import BadFrame
from tunnels.sctp_guard import ChunkType, check_packet_untrusted

HEADER = struct.pack("!HHLL", 5000, 5000, 1, 0)
INIT_BODY = struct.pack("!LLHHL", 1, 1 << 20, 65535, 65535, 7)


def chunk(kind: int, body: bytes = b"", flags: int = 0) -> bytes:
    head = struct.pack("!BBH", kind, flags, 4 + len(body))
    return head + body + bytes(-len(body) % 4)


def data(stream_id: int = 2, payload: bytes = b"x", flags: int = 3) -> bytes:
    return chunk(ChunkType.DATA, struct.pack("!LHHL", 1, stream_id, 0, 53) + payload, flags)


def parameter(name: int, value: bytes = b"") -> bytes:
    return struct.pack("!HH", name, 4 + len(value)) + value + bytes(-len(value) % 4)


def sack(gaps: list[tuple[int, int]], duplicates: int = 0) -> bytes:
    body = struct.pack("!LLHH", 9, 1 << 20, len(gaps), duplicates)
    body += b"".join(struct.pack("!HH", *gap) for gap in gaps) + bytes(4 * duplicates)
    return chunk(ChunkType.SACK, body)


def reset_out(streams: int) -> bytes:
    return parameter(13, bytes(12 + 2 * streams))


HONEST = {
    "data": data(),
    "two chunks": data() + sack([]),
    "a sack with gaps": sack([(2, 3), (5, 9)], duplicates=2),
    "an init": chunk(
        ChunkType.INIT, INIT_BODY + parameter(0xC000) + parameter(0x8008, b"\xc0\x82")
    ),
    "an answer to it": chunk(ChunkType.INIT_ACK, INIT_BODY + parameter(7, b"c" * 24)),
    "a cookie": chunk(ChunkType.COOKIE_ECHO, b"c" * 24),
    "its acknowledgement": chunk(ChunkType.COOKIE_ACK),
    "a heartbeat": chunk(ChunkType.HEARTBEAT, parameter(1, b"now")),
    "a reset": chunk(ChunkType.RECONFIG, reset_out(135)),
    "its answer": chunk(ChunkType.RECONFIG, parameter(16, bytes(8))),
    "an abort": chunk(ChunkType.ABORT),
    "a shutdown": chunk(ChunkType.SHUTDOWN, bytes(4)),
    "one that aiortc skips": chunk(77, b"whatever"),
    "a few bytes behind the last": data() + b"\0\0",
}


@pytest.mark.parametrize("name", HONEST)
def test_what_stacks_say_passes(name: str) -> None:
    check_packet_untrusted(HEADER + HONEST[name])


HOSTILE = {
    "nothing": (b"", "without a chunk"),
    "a chunk shorter than its head": (struct.pack("!BBHL", 0, 3, 3, 0), "impossible length"),
    "a chunk longer than the packet": (struct.pack("!BBHL", 0, 3, 99, 0), "impossible length"),
    "data without any": (data(payload=b""), "without data"),
    "unordered data": (data(flags=7), "unordered"),
    "an init with more": (chunk(ChunkType.INIT, INIT_BODY) + data(), "stand alone"),
    "an init behind another": (data() + chunk(ChunkType.INIT, INIT_BODY), "stand alone"),
    "a short init": (chunk(ChunkType.INIT, INIT_BODY[:-1]), "cut short"),
    "a parameter without end": (chunk(ChunkType.HEARTBEAT, bytes(8)), "impossible length"),
    "a parameter past the end": (chunk(ChunkType.ABORT, b"\0\1\0\x09" + bytes(4)), "impossible"),
    "a short reset": (chunk(ChunkType.RECONFIG, parameter(13, bytes(11))), "cut short"),
    "an odd reset": (chunk(ChunkType.RECONFIG, parameter(13, bytes(13))), "too many streams"),
    "a reset of all": (chunk(ChunkType.RECONFIG, reset_out(257)), "too many streams"),
    "growth": (chunk(ChunkType.RECONFIG, parameter(17, bytes(8))), "wants to grow"),
    "a short sack": (chunk(ChunkType.SACK, bytes(11)), "cut short"),
    "a sack without its gaps": (chunk(ChunkType.SACK, bytes(10) + b"\1\0"), "cut short"),
    "a gap from nowhere": (sack([(0, 1)]), "a gap that is none"),
    "a gap backwards": (sack([(5, 4)]), "a gap that is none"),
    "gaps to count for ever": (sack([(1, 65535)] * 200), "too wide"),
    "dropped data": (chunk(ChunkType.FORWARD_TSN, bytes(4)), "drop nothing"),
    "a short shutdown": (chunk(ChunkType.SHUTDOWN, b""), "cut short"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_no_stack_says_does_not(name: str) -> None:
    wire, why = HOSTILE[name]
    with pytest.raises(BadFrame, match=why):
        check_packet_untrusted(HEADER + wire)


def test_what_our_own_stack_sends_passes() -> None:
    """As aiortc writes it: the guard must not know better than the stack it guards."""
    init = aiortc.InitChunk()
    init.params = [(aiortc.SCTP_PRSCTP_SUPPORTED, b""), (aiortc.SCTP_SUPPORTED_CHUNK_EXT, b"\x82")]
    some = aiortc.DataChunk(flags=3)
    some.user_data = b"x" * aiortc.USERDATA_MAX_LENGTH
    acknowledged = aiortc.SackChunk()
    acknowledged.gaps = [(2, 2), (7, 1000)]
    request = aiortc.ReconfigChunk()
    request.params = [(13, bytes(aiortc.StreamResetOutgoingParam(1, 2, 3, list(range(135)))))]
    for one in (init, some, acknowledged, request, aiortc.CookieAckChunk(), aiortc.AbortChunk()):
        check_packet_untrusted(aiortc.serialize_packet(5000, 5000, 1, one))
