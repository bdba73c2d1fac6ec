"""A token survives being copied by people, and says what is wrong when it did not."""

import binascii
import random
import string
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from discovery.grants import Role
from discovery.token import BadToken, Secret, Token, encode, parse_untrusted
from tunnels.peer import Candidate, PeerId

ALPHABET = "qpzry9x8gf2tvdw0s3jn54khce6mua7l"


def make_token(**changes: Any) -> Token:
    rng = random.Random(7)
    fields: dict[str, Any] = {
        "mesh": rng.randbytes(32),
        "inviter": PeerId(rng.randbytes(32)),
        "id": rng.randbytes(8),
        "secret": Secret(rng.randbytes(16)),
        "role": Role.PEER,
        "expires_at": 1_900_000_000,
        "uses": 8,
        "candidates": (
            Candidate("quic", "192.168.1.20", 41641),
            Candidate("quic", "2001:db8::7", 41641, "given"),
        ),
    }
    return Token(**(fields | changes))


TOKEN = make_token()
TEXT = encode(TOKEN)


def test_a_token_comes_back_whole_and_is_short() -> None:
    assert parse_untrusted(TEXT) == TOKEN
    assert TEXT.startswith("mesh1")
    assert len(TEXT) < 300


def test_a_pasted_token_may_be_wrapped_indented_or_shouted() -> None:
    wrapped = "  " + "\n  ".join(TEXT[i : i + 40] for i in range(0, len(TEXT), 40)) + "\r\n"
    assert parse_untrusted(wrapped) == TOKEN
    assert parse_untrusted(TEXT.upper()) == TOKEN


def test_every_single_wrong_character_is_noticed() -> None:
    for place in range(len(TEXT)):
        for letter in string.ascii_lowercase + string.digits:
            if letter != TEXT[place]:
                with pytest.raises(BadToken):
                    parse_untrusted(TEXT[:place] + letter + TEXT[place + 1 :])


def test_every_pair_of_swapped_neighbours_is_noticed() -> None:
    for place in range(len(TEXT) - 1):
        a, b = TEXT[place], TEXT[place + 1]
        if a != b:
            with pytest.raises(BadToken):
                parse_untrusted(TEXT[:place] + b + a + TEXT[place + 2 :])


@pytest.mark.parametrize("kept", range(len(TEXT)))
def test_a_token_cut_anywhere_is_refused(kept: int) -> None:
    with pytest.raises(BadToken, match=r"end is missing|piece is missing|not an invite|corrupted"):
        parse_untrusted(TEXT[:kept])


def test_a_token_cut_short_is_told_apart_from_a_corrupted_one() -> None:
    with pytest.raises(BadToken, match="end is missing"):
        parse_untrusted(encode(make_token(candidates=()))[: 5 + 8 * 12])
    other = "q" if TEXT[50] != "q" else "p"
    with pytest.raises(BadToken, match="corrupted"):
        parse_untrusted(TEXT[:50] + other + TEXT[51:])


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "not an invite token"),
        ("hello", "not an invite token"),
        ("https://example.org/mesh1qqq", "not an invite token"),
        ("me\u017fh1" + TEXT[5:], "not an invite token"),
        ("mesh2" + TEXT[5:], "newer mesh"),
        ("mesh1", "end is missing"),
        ("mesh1qqqq", "end is missing"),
        (TEXT[:30] + "b" + TEXT[31:], "cannot contain 'b'"),
        (TEXT[:30] + "é" + TEXT[31:], "cannot contain 'é'"),
        (TEXT + "q" * 8, "corrupted"),
        ("mesh1" + "q" * 9000, "too long"),
    ],
)
def test_what_is_wrong_is_said(text: str, reason: str) -> None:
    with pytest.raises(BadToken, match=reason):
        parse_untrusted(text)


def test_set_padding_bits_are_noticed() -> None:
    with_padding = next(
        text
        for count in range(5)
        if len(text := encode(make_token(candidates=TOKEN.candidates[:1] * count))) % 8 != 5
    )
    last = ALPHABET.index(with_padding[-1])
    with pytest.raises(BadToken, match="corrupted"):
        parse_untrusted(with_padding[:-1] + ALPHABET[last | 1])


def test_the_secret_shows_itself_nowhere() -> None:
    text = repr(TOKEN) + str(TOKEN) + repr(TOKEN.secret) + f"{TOKEN.secret}"
    assert "Secret(…)" in text
    for shown in (TOKEN.secret.reveal().hex(), repr(TOKEN.secret.reveal())[2:-1]):
        assert shown not in text


def test_secrets_compare_by_value() -> None:
    assert Secret(b"x" * 16) == Secret(b"x" * 16) != Secret(b"y" * 16)
    assert Secret(b"x" * 16) != b"x" * 16
    assert len({Secret(b"x" * 16), Secret(b"x" * 16)}) == 1
    with pytest.raises(ValueError, match="16 bytes"):
        Secret(b"short")


def test_an_address_that_means_something_on_one_machine_only_stays_there() -> None:
    local = Candidate("quic", "fe80::1%eth0", 1)
    assert parse_untrusted(encode(make_token(candidates=(local,)))).candidates == ()


@pytest.mark.parametrize(
    "changes",
    [
        {"candidates": (Candidate("quic", "10.0.0.1", 1),) * 17},
        {"candidates": (Candidate("relay", "10.0.0.1", 1),)},
        {"candidates": (Candidate("quic", "10.0.0.1", 1, via=PeerId(bytes(32))),)},
        {
            "candidates": tuple(
                Candidate("relay", "10.0.0.1", 1, via=PeerId(bytes([n] * 32))) for n in range(9)
            )
        },
        {"candidates": (Candidate("pigeon", "10.0.0.1", 1),)},
        {"candidates": (Candidate("quic", "10.0.0.1", 1, "guessed"),)},
        {"mesh": b"short"},
        {"id": b"short"},
        {"expires_at": -1},
        {"expires_at": 1 << 40},
        {"uses": -1},
        {"uses": 65536},
    ],
)
def test_a_token_out_of_range_is_not_made(changes: dict[str, object]) -> None:
    with pytest.raises(ValueError):
        encode(make_token(**changes))


def spelled(version: int, body: bytes, length: int | None = None) -> str:
    """A text with a right checksum around whatever bytes: what a stranger can hand us."""
    size = len(body) if length is None else length
    checked = bytes([version]) + size.to_bytes(2, "big") + body
    payload = checked + binascii.crc32(checked).to_bytes(4, "little")
    bits = "".join(f"{byte:08b}" for byte in payload)
    bits += "0" * (-len(bits) % 5)
    return "mesh1" + "".join(ALPHABET[int(bits[i : i + 5], 2)] for i in range(0, len(bits), 5))


def body(*, role: int = 1, uses: int = 1, count: int = 0, candidates: bytes = b"") -> bytes:
    fixed = bytes(32 + 32 + 8 + 16) + bytes([role]) + bytes(5) + uses.to_bytes(2, "big")
    return fixed + bytes([count]) + candidates


def test_the_table_in_the_docstring_is_what_is_spoken() -> None:
    token = parse_untrusted(spelled(1, body()))
    assert token == Token(
        mesh=bytes(32),
        inviter=PeerId(bytes(32)),
        id=bytes(8),
        secret=Secret(bytes(16)),
        role=Role.PEER,
        expires_at=0,
        uses=1,
    )


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (spelled(3, body()), "newer mesh"),
        (spelled(2, body()), "corrupted"),
        (spelled(2, body(candidates=b"\x09" + bytes(9 * 32))), "corrupted"),
        (spelled(2, body(candidates=b"\x01" + bytes(31))), "corrupted"),
        (spelled(2, body(candidates=b"\x00x")), "corrupted"),
        (spelled(2, body(count=1, candidates=b"\x40" + bytes(6) + b"\x00")), "corrupted"),
        (spelled(2, body(count=1, candidates=b"\x40" + bytes(8))), "corrupted"),
        (spelled(2, body(count=1, candidates=b"\x40" + bytes(6))), "corrupted"),
        (spelled(1, b""), "corrupted"),
        (spelled(1, body(), length=99), "corrupted"),
        (spelled(1, body(role=9)), "does not know"),
        (spelled(1, body(uses=0)), "does not know"),
        (spelled(1, body(count=17)), "does not know"),
        (spelled(1, body(count=1)), "corrupted"),
        (spelled(1, body(count=1, candidates=b"\x11" + bytes(17))), "corrupted"),
        (spelled(1, body(count=0, candidates=b"x")), "corrupted"),
    ],
)
def test_a_token_made_wrong_on_purpose_is_refused(text: str, reason: str) -> None:
    with pytest.raises(BadToken, match=reason):
        parse_untrusted(text)


RITA, SAM = PeerId(b"r" * 32), PeerId(b"s" * 32)


def test_relays_that_lead_to_the_inviter_are_named_once_each() -> None:
    through = [
        Candidate("relay", "203.0.113.5", 443, via=RITA),
        Candidate("relay", "2001:db8::5", 4433, "given", via=RITA),
        Candidate("relay", "203.0.113.6", 443, via=SAM),
    ]
    token = make_token(candidates=(*through, *TOKEN.candidates))
    assert parse_untrusted(encode(token)) == token
    assert (token.version, token.relays) == (2, (RITA, SAM))
    one = encode(make_token(candidates=(*through[:1], *TOKEN.candidates)))
    assert len(one) - len(TEXT) < 70, "a relay costs little more than its key"


def test_an_inviter_that_is_a_relay_says_so_in_a_few_characters() -> None:
    mark = Candidate("relay", "203.0.113.5", 443, via=TOKEN.inviter)
    token = make_token(candidates=(mark, *TOKEN.candidates))
    assert parse_untrusted(encode(token)) == token
    assert token.relays == ()
    assert len(encode(token)) - len(TEXT) < 16


def test_a_token_without_relays_is_one_that_older_nodes_read() -> None:
    assert TOKEN.version == 1
    assert spelled(1, b"")[:6] == TEXT[:6]


def test_a_relay_that_the_first_version_could_not_name_leads_nowhere() -> None:
    nameless = bytes([0x40, 10, 0, 0, 1, 0, 80])
    assert parse_untrusted(spelled(1, body(count=1, candidates=nameless))).candidates == ()


def test_the_relays_in_the_docstring_are_what_is_spoken() -> None:
    places = bytes([0x40, 10, 0, 0, 1, 0, 80, 0]) + bytes([0x40, 10, 0, 0, 2, 0, 80, 255])
    text = spelled(2, body(count=2, candidates=places + b"\x01" + RITA.key))
    assert parse_untrusted(text).candidates == (
        Candidate("relay", "10.0.0.1", 80, via=RITA),
        Candidate("relay", "10.0.0.2", 80, via=PeerId(bytes(32))),
    )


def test_candidates_of_a_later_mesh_are_skipped() -> None:
    known = bytes([0x10, 10, 0, 0, 1, 0, 80])
    later_transport = bytes([0xF1]) + bytes(16) + b"\0\1"
    later_kind = bytes([0x1E, 10, 0, 0, 1, 0, 80])
    no_port = bytes([0x10, 10, 0, 0, 1, 0, 0])
    candidates = later_transport + known + later_kind + no_port
    token = parse_untrusted(spelled(1, body(count=4, candidates=candidates)))
    assert token.candidates == (Candidate("quic", "10.0.0.1", 80),)


@given(st.binary(max_size=200), st.integers(0, 255), st.integers(0, 255))
def test_no_checksummed_bytes_upset_the_parser(rest: bytes, role: int, count: int) -> None:
    for text in (
        spelled(1, rest),
        spelled(role, rest, length=count),
        spelled(1, body(role=role % 6, count=count % 20, candidates=rest)),
        spelled(2, body(count=count % 3, candidates=rest)),
    ):
        try:
            parse_untrusted(text)
        except BadToken:
            continue


@settings(max_examples=200)
@given(st.text(max_size=300))
def test_no_text_upsets_the_parser(text: str) -> None:
    for pasted in (text, "mesh1" + text):
        with pytest.raises(BadToken):
            parse_untrusted(pasted)


@settings(max_examples=300)
@given(st.text(alphabet=ALPHABET, max_size=400))
def test_no_spelled_bytes_upset_the_parser(letters: str) -> None:
    with pytest.raises(BadToken):
        parse_untrusted("mesh1" + letters)
