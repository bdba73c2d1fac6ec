"""The wire format: what is written is what is read, and nothing else is read."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunnels.errors import BadFrame
from tunnels.frames import (
    MAX_DATA_BYTES,
    MAX_OFFSET,
    Ack,
    Data,
    End,
    Hello,
    Open,
    Ping,
    Pong,
    Proof,
    Ready,
    Record,
    RecordDecoder,
    Reset,
    ResetCode,
    Resume,
    Stop,
    Type,
    clip_reason,
    encode,
    encode_data,
    parse_record_untrusted,
)
from tunnels.peer import PeerId

RECORDS: list[Record] = [
    Hello(1, 1 << 20, b"e" * 16, b"n" * 32, PeerId(b"k" * 32), "quic"),
    Proof(b"s" * 64),
    Ready(),
    Ping(7),
    Pong(2**64 - 1),
    Open(3, 1 << 20, "rpc/läuft"),
    Resume(3, 17, MAX_OFFSET),
    Resume(3, 0, 1 << 20, "rpc/läuft"),
    Ack(17, 1 << 20),
    End(0),
    Stop(),
    Reset(ResetCode.REFUSED, "nein, ö"),
    Reset(ResetCode.FAILED, ""),
]


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: type(record).__name__)
def test_every_record_survives_the_wire_in_any_pieces(record: Record) -> None:
    wire = encode(record)
    assert RecordDecoder().feed_untrusted(wire) == [record]
    decoder = RecordDecoder()
    read: list[Record] = []
    for byte in wire:
        read += decoder.feed_untrusted(bytes((byte,)))
    assert read == [record]
    assert not decoder.mid_record


def test_data_is_handed_out_as_it_arrives() -> None:
    wire = encode_data(100, b"hello") + encode(End(105))
    assert wire.startswith(encode(Data(100, b"hello")))
    decoder = RecordDecoder()
    assert decoder.feed_untrusted(wire[:14]) == [Data(100, b"he")]
    assert decoder.mid_record
    assert decoder.feed_untrusted(b"") == []
    assert decoder.feed_untrusted(wire[14:]) == [Data(102, b"llo"), End(105)]
    assert not decoder.mid_record


def test_a_header_cut_anywhere_waits_for_the_rest() -> None:
    wire = encode_data(100, b"x")
    for cut in range(1, len(wire)):
        decoder = RecordDecoder()
        assert decoder.feed_untrusted(wire[:cut]) == []
        assert decoder.mid_record
        assert decoder.feed_untrusted(wire[cut:]) == [Data(100, b"x")]


def head(kind: int, size: int) -> bytes:
    return bytes((kind,)) + size.to_bytes(3, "big")


@pytest.mark.parametrize(
    "wire",
    [
        pytest.param(head(Type.DATA, 8), id="empty DATA"),
        pytest.param(head(Type.DATA, 9 + MAX_DATA_BYTES), id="DATA too long"),
        pytest.param(head(Type.PING, 1025), id="any other too long"),
        pytest.param(head(0x7F, 0), id="unknown type"),
        pytest.param(head(Type.PING, 7) + bytes(7), id="PING too short"),
        pytest.param(head(Type.PING, 9) + bytes(9), id="PING too long"),
        pytest.param(head(Type.PROOF, 63) + bytes(63), id="PROOF too short"),
        pytest.param(head(Type.READY, 1) + bytes(1), id="READY with a body"),
        pytest.param(head(Type.HELLO, 10) + bytes(10), id="HELLO too short"),
        pytest.param(head(Type.HELLO, 118) + bytes(118), id="HELLO kind too long"),
        pytest.param(head(Type.HELLO, 86) + bytes(85) + b"\xff", id="HELLO kind not UTF-8"),
        pytest.param(head(Type.OPEN, 16) + bytes(16), id="OPEN without service"),
        pytest.param(head(Type.OPEN, 272) + bytes(272), id="OPEN service too long"),
        pytest.param(head(Type.OPEN, 17) + bytes(16) + b"\xff", id="OPEN not UTF-8"),
        pytest.param(head(Type.RESUME, 23) + bytes(23), id="RESUME too short"),
        pytest.param(head(Type.RESUME, 280) + bytes(280), id="RESUME service too long"),
        pytest.param(head(Type.ACK, 16) + b"\xff" * 16, id="ACK beyond all offsets"),
        pytest.param(head(Type.RESET, 0), id="RESET without code"),
        pytest.param(head(Type.RESET, 1) + b"\x09", id="RESET code unknown"),
        pytest.param(head(Type.RESET, 514) + bytes(514), id="RESET reason too long"),
        pytest.param(head(Type.RESET, 2) + b"\x00\xff", id="RESET not UTF-8"),
    ],
)
def test_what_the_spec_does_not_allow_is_a_bad_frame(wire: bytes) -> None:
    with pytest.raises(BadFrame):
        RecordDecoder().feed_untrusted(wire)


@pytest.mark.parametrize("size", [0, 8, 9 + MAX_DATA_BYTES])
def test_a_whole_data_record_has_the_same_limits(size: int) -> None:
    with pytest.raises(BadFrame):
        parse_record_untrusted(Type.DATA, bytes(size))


def test_a_whole_data_record_is_parsed() -> None:
    assert parse_record_untrusted(Type.DATA, bytes(8) + b"x") == Data(0, b"x")


@given(st.integers(0, 255), st.binary(max_size=1100))
def test_any_body_is_a_record_or_a_bad_frame(kind: int, body: bytes) -> None:
    try:
        record = parse_record_untrusted(kind, body)
    except BadFrame:
        return
    assert parse_record_untrusted(kind, encode(record)[4:]) == record


@given(st.lists(st.binary(max_size=300), max_size=8))
def test_any_bytes_are_records_or_a_bad_frame(pieces: list[bytes]) -> None:
    decoder = RecordDecoder()
    try:
        for piece in pieces:
            decoder.feed_untrusted(piece)
    except BadFrame:
        pass


@given(st.text(max_size=600))
def test_any_reason_fits_a_reset(reason: str) -> None:
    [record] = RecordDecoder().feed_untrusted(encode(Reset(ResetCode.FAILED, reason)))
    assert isinstance(record, Reset)
    assert record.reason == clip_reason(reason)


def test_no_reason_of_a_peer_can_drive_a_terminal() -> None:
    text = "\x1b[2Jgone\x07 \u202e caf\u00e9"
    wire = bytes([ResetCode.FAILED]) + text.encode()
    record = parse_record_untrusted(Type.RESET, wire)
    assert record == Reset(ResetCode.FAILED, "?[2Jgone? ? caf\u00e9")
