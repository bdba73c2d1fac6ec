"""What connections of a tcp link say about themselves, in any pieces and from anyone."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunnels.errors import BadFrame
from tunnels.tcp_wire import (
    MAX_NUMBER,
    NUMBERS_KEPT,
    Begin,
    Close,
    Control,
    Dial,
    Join,
    Message,
    MessageDecoder,
    Numbers,
    Secret,
    channel_proof,
    encode,
    is_channel_proof,
)

MESSAGES: list[Message] = [
    Begin(),
    Join(b"l" * 16, 7, b"p" * 32),
    Control(b"\x01\x02"),
    Secret(b"l" * 16, b"s" * 32),
    Dial(MAX_NUMBER),
    Close(3, "no"),
    Close(0, ""),
]


def decoded(wire: bytes, piece_bytes: int) -> list[Message]:
    decoder, found = MessageDecoder(), []
    for start in range(0, len(wire), piece_bytes):
        decoder.feed(wire[start : start + piece_bytes])
        while (message := decoder.next_untrusted()) is not None:
            found.append(message)
    assert decoder.rest == b""
    return found


@pytest.mark.parametrize("piece_bytes", [1, 3, 1000])
def test_messages_survive_the_wire_in_any_pieces(piece_bytes: int) -> None:
    assert decoded(b"".join(map(encode, MESSAGES)), piece_bytes) == MESSAGES


def test_what_follows_a_join_is_left_alone() -> None:
    decoder = MessageDecoder()
    decoder.feed(encode(MESSAGES[1]) + b"\x99anything")
    assert decoder.next_untrusted() == MESSAGES[1]
    assert decoder.rest == b"\x99anything"


@pytest.mark.parametrize(
    "wire",
    [
        pytest.param(b"\x00\x00\x00\x00", id="type 0"),
        pytest.param(b"\x01\x00\x00\x01x", id="BEGIN with a body"),
        pytest.param(b"\x02\x00\x00\x01x", id="a short JOIN"),
        pytest.param(b"\x03\x00\x00\x00", id="CONTROL without a body"),
        pytest.param(b"\x03\x01\x00\x01", id="too much CONTROL"),
        pytest.param(b"\x04\x00\x00\x02xx", id="a short SECRET"),
        pytest.param(b"\x05\x00\x00\x08" + b"\xff" * 8, id="a number out of range"),
        pytest.param(b"\x06\x00\x00\x00", id="CLOSE without a code"),
        pytest.param(b"\x06\x00\x00\x02\x00\xff", id="a reason that is no text"),
        pytest.param(b"\x06\x00\x01\x2e", id="a reason too long"),
        pytest.param(b"\x07\x00\x00\x00", id="type 7"),
    ],
)
def test_nonsense_is_refused(wire: bytes) -> None:
    decoder = MessageDecoder()
    decoder.feed(wire)
    with pytest.raises(BadFrame):
        decoder.next_untrusted()


@given(st.binary(max_size=400))
def test_any_bytes_are_messages_or_refused(wire: bytes) -> None:
    decoder = MessageDecoder()
    decoder.feed(wire)
    try:
        while decoder.next_untrusted() is not None:
            pass
    except BadFrame:
        pass


def test_a_reason_is_cut_between_characters() -> None:
    [said] = decoded(encode(Close(1, "ü" * 200 + "\x1b")), 1000)
    assert said == Close(1, "ü" * 150)


def test_the_secret_is_not_shown() -> None:
    assert "sss" not in repr(MESSAGES[3])


def test_a_proof_is_good_for_one_connection_of_one_link() -> None:
    good = {"secret": b"s" * 32, "link": b"l" * 16, "certificate": b"c" * 32, "own": b"f" * 48}
    proof = channel_proof(number=4, **good)
    assert is_channel_proof(proof, number=4, **good)
    assert not is_channel_proof(proof, number=6, **good)
    for name in good:
        other = {**good, name: good[name].upper()}
        assert not is_channel_proof(proof, number=4, **other)


def test_a_number_is_good_once() -> None:
    numbers = Numbers()
    assert numbers.use(4)
    assert numbers.use(0)  # connections overtake one another
    assert not numbers.use(4)
    assert numbers.use(4 + 2 * NUMBERS_KEPT)
    assert not numbers.use(4), "long ago"
    assert not numbers.use(2), "never came, and is too late now"
    assert numbers.use(2 + 2 * NUMBERS_KEPT)
    for number in range(10_000):
        numbers.use(number)
    assert len(numbers._used) <= NUMBERS_KEPT + 1
