"""What peers tell each other to find a better path."""

from __future__ import annotations

import pytest

from tunnels.errors import BadFrame
from tunnels.offers import (
    LENGTH,
    MAX_CANDIDATES,
    Offer,
    Want,
    encode,
    parse_untrusted,
)
from tunnels.peer import Candidate, NatKind, PeerId

FULL = Offer(
    nonce=bytes(range(16)),
    public_key=bytes(range(32)),
    nat_v4=NatKind.HARD,
    nat_v6=NatKind.NONE,
    want=Want.PUNCH,
    candidates=(
        Candidate("quic", "192.0.2.1", 1, "reflexive"),
        Candidate("tcp", "2001:db8::1", 65535),
    ),
)
BARE = Offer(nonce=bytes(16), public_key=bytes(32))


def body(offer: Offer) -> bytes:
    data = encode(offer)
    assert LENGTH.unpack(data[: LENGTH.size])[0] == len(data) - LENGTH.size
    return data[LENGTH.size :]


@pytest.mark.parametrize("offer", [FULL, BARE])
def test_an_offer_comes_back_as_it_went(offer: Offer) -> None:
    assert parse_untrusted(body(offer)) == offer


def test_relays_zones_and_more_than_there_is_room_for_are_left_out() -> None:
    relayed = Candidate("relay", "192.0.2.1", 1, via=PeerId(bytes(32)))
    zoned = Candidate("quic", "fe80::1%eth0", 1)
    many = tuple(Candidate("quic", "192.0.2.1", 1 + number) for number in range(40))
    offer = Offer(bytes(16), bytes(32), candidates=(relayed, zoned, *many))
    assert parse_untrusted(body(offer)).candidates == many[:MAX_CANDIDATES]


def test_what_a_later_version_may_add_is_taken_for_nothing() -> None:
    data = bytearray(body(BARE))
    data[49], data[50], data[51] = 99, int(NatKind.EASY), 0xF0 | Want.PUNCH
    offer = parse_untrusted(bytes(data))
    assert (offer.nat_v4, offer.nat_v6, offer.want) == (NatKind.UNKNOWN, NatKind.EASY, Want.PUNCH)


def test_every_shorter_and_every_longer_one_is_refused() -> None:
    data = body(FULL)
    for size in range(len(data)):
        with pytest.raises(BadFrame):
            parse_untrusted(data[:size])
    with pytest.raises(BadFrame):
        parse_untrusted(data + b"x")


def _candidate(data: bytes) -> bytes:
    """A bare offer with one candidate made of these bytes."""
    return body(BARE)[:-1] + b"\x01" + data


WHERE = b"\x04\xc0\x00\x02\x01\x00\x09"


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"\x02" + body(BARE)[1:], "version"),
        (_candidate(b"\x05"), "IP version"),
        (body(BARE)[:-1] + bytes([MAX_CANDIDATES + 1]), "candidates"),
        (_candidate(b"\x04\xc0\x00\x02\x01\x00\x00\x01q\x00"), "port 0"),
        (_candidate(WHERE + b"\x00\x00"), "without"),
        (_candidate(WHERE + b"\x01\xff\x00"), "UTF-8"),
        (_candidate(WHERE + b"\x01\x1b\x00"), "printable"),
    ],
)
def test_what_cannot_be_meant_is_refused(data: bytes, why: str) -> None:
    with pytest.raises(BadFrame, match=why):
        parse_untrusted(data)
