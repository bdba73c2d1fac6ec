"""What probes look like: sealed, of one size, good in one direction under one secret."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunnels.errors import BadFrame
from tunnels.handshake import Role
from tunnels.probe_wire import (
    LABEL_BYTES,
    NONCE_BYTES,
    PROBE_BYTES,
    Kind,
    Message,
    direction_key,
    label_of_untrusted,
)

SECRET = b"s" * 32
NONCE = b"n" * NONCE_BYTES
TO_ALICE = direction_key(SECRET, Role.DIALLER)
TO_BOB = direction_key(SECRET, Role.LISTENER)
PING = Message(Kind.PING, b"question", ("192.0.2.1", 4433))
MESSAGES = [
    PING,
    Message(Kind.PONG, b"question", ("2001:db8::1", 1)),
    Message(Kind.NOMINATE, b"question", ("255.255.255.255", 65535)),
]


@pytest.mark.parametrize("message", MESSAGES)
def test_a_probe_survives_the_wire_and_is_always_of_one_size(message: Message) -> None:
    probe = TO_BOB.seal(message, NONCE)
    assert TO_BOB.open_untrusted(probe) == message
    assert len(probe) == PROBE_BYTES
    assert label_of_untrusted(probe) == TO_BOB.label


def test_a_stranger_sees_one_known_byte_and_nothing_that_two_searches_share() -> None:
    other = direction_key(b"o" * 32, Role.LISTENER)
    probes = [
        TO_BOB.seal(PING, NONCE),
        TO_BOB.seal(PING, b"m" * NONCE_BYTES),
        other.seal(PING, NONCE),
    ]
    sealed = [probe[1 + LABEL_BYTES + NONCE_BYTES :] for probe in probes]
    assert [probe[0] for probe in probes] == [0x12] * 3
    for position in range(0, len(sealed[0]), 4):
        assert len({one[position : position + 4] for one in sealed}) == 3
    assert other.label != TO_BOB.label


def test_a_probe_opens_on_the_other_side_only() -> None:
    with pytest.raises(BadFrame):
        TO_ALICE.open_untrusted(TO_BOB.seal(PING, NONCE))
    relabelled = b"\x12" + TO_ALICE.label + TO_BOB.seal(PING, NONCE)[1 + LABEL_BYTES :]
    with pytest.raises(BadFrame, match="forged"):
        TO_ALICE.open_untrusted(relabelled)


def test_any_changed_bit_spoils_a_probe() -> None:
    probe = TO_BOB.seal(PING, NONCE)
    for bit in range(8 * len(probe)):
        changed = bytearray(probe)
        changed[bit // 8] ^= 1 << bit % 8
        with pytest.raises(BadFrame):
            TO_BOB.open_untrusted(bytes(changed))


@pytest.mark.parametrize("size", [0, 1, PROBE_BYTES - 1, PROBE_BYTES + 1])
def test_another_size_is_no_probe(size: int) -> None:
    with pytest.raises(BadFrame):
        TO_BOB.open_untrusted((TO_BOB.seal(PING, NONCE) * 2)[:size])


@pytest.mark.parametrize(("kind", "port"), [(0, 1), (4, 1), (255, 1), (1, 0)])
def test_what_means_nothing_is_refused_though_it_is_sealed_right(kind: int, port: int) -> None:
    message = Message(kind, b"question", ("192.0.2.1", port))  # type: ignore[arg-type]
    with pytest.raises(BadFrame, match="nothing"):
        TO_BOB.open_untrusted(TO_BOB.seal(message, NONCE))


@given(st.binary(max_size=PROBE_BYTES + 1))
def test_any_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(BadFrame):
        TO_BOB.open_untrusted(data)


def test_no_key_is_shown() -> None:
    assert SECRET.hex() not in repr(TO_BOB)
    assert "cipher" not in repr(TO_BOB)
