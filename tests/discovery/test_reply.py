"""What a joiner that reached nobody sends back by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from discovery.reply import (
    MAX_ADDRESSES,
    MAX_PLACES,
    MAX_TEXT_CHARS,
    PREFIX,
    BadReply,
    Reply,
    check,
    encode,
    ice_key,
    parse_untrusted,
    probe_key,
)
from discovery.spelling import spell
from tunnels.peer import NatKind

HASH = bytes(range(32))
OTHER_HASH = bytes(32)
REPLY = Reply(
    invite=b"invite 8",
    nonce=b"nonce  8",
    addresses=(("192.0.2.7", 4433), ("2001:db8::7", 65535)),
    nat_v4=NatKind.EASY,
    nat_v6=NatKind.NONE,
)
CODE = encode(REPLY, HASH)
AT_TURN = replace(REPLY, places=(("198.51.100.2", 49152),))


def test_a_code_comes_back_as_it_went_and_is_short() -> None:
    assert parse_untrusted(CODE) == REPLY
    assert len(CODE) < 150
    assert "\n" not in CODE


def test_a_place_at_a_turn_server_costs_a_few_letters_more() -> None:
    code = encode(AT_TURN, HASH)
    assert parse_untrusted(code) == AT_TURN
    assert check(parse_untrusted(code), HASH)
    assert len(code) - len(CODE) <= 14


def test_a_code_without_a_place_is_read_by_a_mesh_that_knows_of_none() -> None:
    assert parse_untrusted(CODE).signed[0] == 1
    assert parse_untrusted(encode(AT_TURN, HASH)).signed[0] == 2


def test_it_may_be_shouted_and_wrapped() -> None:
    wrapped = "\n  ".join(CODE.upper()[start : start + 40] for start in range(0, len(CODE), 40))
    assert parse_untrusted(wrapped) == REPLY


def test_only_who_has_the_token_can_make_one() -> None:
    assert check(parse_untrusted(CODE), HASH)
    assert not check(parse_untrusted(CODE), OTHER_HASH)
    assert not check(parse_untrusted(encode(REPLY, OTHER_HASH)), HASH)
    assert not check(REPLY, HASH), "what was never read bears no tag"


def test_another_address_under_an_old_tag_is_found_out() -> None:
    data = bytearray(parse_untrusted(CODE).signed)
    data[20] ^= 1
    forged = parse_untrusted(PREFIX + spell(bytes(data)))
    assert forged.addresses != REPLY.addresses
    assert not check(forged, HASH)


def test_each_key_is_that_of_this_code_and_of_one_use() -> None:
    for key_for in (probe_key, ice_key):
        key = key_for(HASH, REPLY.nonce)
        assert len(key) == 32
        assert key != key_for(HASH, b"another8")
        assert key != key_for(OTHER_HASH, REPLY.nonce)
    assert probe_key(HASH, REPLY.nonce) != ice_key(HASH, REPLY.nonce)


def test_more_addresses_than_there_is_room_for_are_left_out() -> None:
    many = tuple(("192.0.2.7", 1 + number) for number in range(20))
    reply = Reply(REPLY.invite, REPLY.nonce, many)
    assert parse_untrusted(encode(reply, HASH)).addresses == many[:MAX_ADDRESSES]
    crowded = replace(REPLY, places=many)
    assert parse_untrusted(encode(crowded, HASH)).places == many[:MAX_PLACES]


def test_every_wrong_letter_and_every_cut_is_told() -> None:
    for place in range(len(PREFIX), len(CODE)):
        other = "q" if CODE[place] != "q" else "p"
        for text in (CODE[:place] + other + CODE[place + 1 :], CODE[:place]):
            with pytest.raises(BadReply):
                parse_untrusted(text)


def coded(data: bytes) -> str:
    return PREFIX + spell(data)


def _body(count: int, addresses: bytes, version: int = 1) -> bytes:
    head = bytes([version]) + bytes(16) + b"\x00"
    return head + bytes([count]) + addresses + bytes(16)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("x" * (MAX_TEXT_CHARS + 1), "too long"),
        ("", "no reply code"),
        ("mesh1qqqq", "an invite token"),
        (PREFIX + "b", "cannot contain"),
        (PREFIX + "q", "length"),
        (PREFIX, "not whole"),
        (coded(b""), "newer"),
        (coded(b"\x03" + bytes(60)), "newer"),
        (coded(b"\x01" + bytes(20)), "nothing"),
        (coded(b"\x01" + bytes(17 + 16)), "nothing"),
        (coded(_body(1, b"")), "nothing"),
        (coded(_body(1, b"\x05" + bytes(6))), "nothing"),
        (coded(_body(1, b"\x04" + bytes(3))), "nothing"),
        (coded(_body(1, b"\x04\xc0\x00\x02\x01\x00\x00")), "nothing"),
        (coded(_body(9, b"\x04\xc0\x00\x02\x01\x00\x09" * 9)), "nothing"),
        (coded(_body(0, b"\x04")), "nothing"),
        (coded(_body(0, b"", version=2)), "nothing"),
        (coded(_body(0, b"\x01\x04", version=2)), "nothing"),
        (coded(_body(0, b"\x03" + b"\x04\xc0\x00\x02\x01\x00\x09" * 3, version=2)), "nothing"),
        (coded(_body(0, b"\x00\x00", version=2)), "nothing"),
    ],
)
def test_what_is_no_code_is_told_in_a_sentence(text: str, why: str) -> None:
    with pytest.raises(BadReply, match=why):
        parse_untrusted(text)


def test_a_nat_kind_of_later_is_unknown_here() -> None:
    data = bytearray(parse_untrusted(CODE).signed)
    data[17] = 0xFE
    reply = parse_untrusted(coded(bytes(data)))
    assert (reply.nat_v4, reply.nat_v6) == (NatKind.UNKNOWN, NatKind.UNKNOWN)
