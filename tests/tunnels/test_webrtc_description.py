"""What two nodes tell each other to begin a WebRTC link."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tunnels.errors import BadFrame
from tunnels.handshake import Role
from tunnels.webrtc_description import (
    MAX_BYTES,
    MAX_CANDIDATES,
    Credentials,
    Description,
    Place,
    PlaceKind,
    agreed,
    encode,
    fresh,
    parse_description_untrusted,
)

PLACES = (
    Place(PlaceKind.HOST, "192.0.2.7", 4433, 2130706431),
    Place(PlaceKind.REFLEXIVE, "2001:db8::7", 1, 0),
    Place(PlaceKind.RELAYED, "198.51.100.2", 65535, 0xFFFFFFFF),
)
FULL = Description(Credentials("abcd", "p" * 22), bytes(range(32)), PLACES)
BARE = Description(Credentials("a+/Z" * 8, "9" * 64), None, ())
CANDIDATES_AT = 1 + 5 + 23 + 33
"""Where FULL's count of candidates is."""


@pytest.mark.parametrize("description", [FULL, BARE])
def test_a_description_comes_back_as_it_went(description: Description) -> None:
    assert parse_description_untrusted(encode(description)) == description


def test_the_largest_fits_into_one_message() -> None:
    place = Place(PlaceKind.HOST, "2001:db8::1", 1, 1)
    most = replace(BARE, fingerprint=bytes(32), places=(place,) * 99)
    assert len(parse_description_untrusted(encode(most)).places) == MAX_CANDIDATES
    assert len(encode(most)) <= MAX_BYTES


def changed(at: int, byte: int) -> bytes:
    data = bytearray(encode(FULL))
    data[at] = byte
    return bytes(data)


@pytest.mark.parametrize(
    ("data", "why"),
    [
        pytest.param(b"", "cut short", id="nothing"),
        pytest.param(changed(0, 2), "another version", id="a later version"),
        pytest.param(changed(1, 3), "ICE credentials", id="a short fragment"),
        pytest.param(changed(2, ord("-")), "ICE credentials", id="a letter that ICE has not"),
        pytest.param(encode(replace(FULL, fingerprint=b"x")), "fingerprint", id="another hash"),
        pytest.param(changed(CANDIDATES_AT, 25), "too many", id="too many candidates"),
        pytest.param(changed(CANDIDATES_AT + 1, 3), "no sense", id="a kind that is not known"),
        pytest.param(changed(CANDIDATES_AT + 8, 5), "no sense", id="an address of 5 bytes"),
        pytest.param(encode(FULL)[:-1], "cut short", id="a cut address"),
        pytest.param(encode(FULL) + b"x", "behind its end", id="one byte too many"),
        pytest.param(
            encode(replace(FULL, places=(replace(PLACES[0], port=0),))), "no sense", id="port 0"
        ),
    ],
)
def test_anything_else_is_a_bad_frame(data: bytes, why: str) -> None:
    with pytest.raises(BadFrame, match=why):
        parse_description_untrusted(data)


def test_fresh_credentials_are_ice_chars_for_any_entropy() -> None:
    for byte in range(256):
        ours = Description(fresh(lambda size, byte=byte: bytes([byte]) * size), None, ())  # type: ignore[misc]
        assert parse_description_untrusted(encode(ours)) == ours


def test_both_sides_derive_the_same_from_a_key_and_each_its_own() -> None:
    key = b"k" * 32
    dialler, listener = agreed(key, Role.DIALLER), agreed(key, Role.LISTENER)
    assert dialler == agreed(key, Role.DIALLER)
    assert dialler != listener
    assert dialler != agreed(b"o" * 32, Role.DIALLER)
    assert parse_description_untrusted(encode(Description(dialler, None, ()))).fingerprint is None


def test_a_password_is_not_shown() -> None:
    assert FULL.credentials.password not in repr(FULL)
