"""Names of peers and places."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunnels.errors import BadFrame, DialFailed, WrongPeer
from tunnels.peer import Candidate, PeerId, format_address, parse_peer_id_untrusted

ONE = PeerId(bytes(range(32)))
TWO = PeerId(bytes(32))


@given(st.binary(min_size=32, max_size=32))
def test_every_peer_has_one_spelling_of_52_letters(key: bytes) -> None:
    text = str(PeerId(key))
    assert len(text) == 52
    assert text == text.lower()
    assert parse_peer_id_untrusted(text) == PeerId(key)
    assert parse_peer_id_untrusted(text.upper()) == PeerId(key)


@given(st.text(max_size=60))
def test_any_text_is_a_peer_or_a_bad_frame(text: str) -> None:
    with contextlib.suppress(BadFrame):
        assert str(parse_peer_id_untrusted(text)) == text.lower()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a" * 44,
        "a" * 51,
        "a" * 53,
        "é" * 52,
        "1" * 52,
        "a" * 51 + "b",
        str(ONE) + "=",
        " " + str(ONE),
    ],
)
def test_other_spellings_are_refused(text: str) -> None:
    with pytest.raises(BadFrame):
        parse_peer_id_untrusted(text)


def test_a_peer_id_is_32_bytes() -> None:
    with pytest.raises(ValueError, match="32 bytes"):
        PeerId(b"short")


def test_people_see_eight_letters() -> None:
    assert ONE.short == str(ONE)[:8]
    assert repr(ONE) == f"PeerId({ONE.short})"
    assert TWO < ONE


def test_a_candidate_is_an_address_literal_with_a_port() -> None:
    assert str(Candidate("quic", "192.0.2.1", 80)) == "quic 192.0.2.1:80"
    assert str(Candidate("quic", "2001:db8::1", 80)) == "quic [2001:db8::1]:80"
    assert format_address("::1", 5) == "[::1]:5"
    for transport, host, port in (
        ("quic", "example.org", 80),
        ("quic", "192.0.2.1", 0),
        ("quic", "192.0.2.1", 65536),
        ("", "192.0.2.1", 80),
    ):
        with pytest.raises(ValueError):
            Candidate(transport, host, port)


def test_errors_say_what_was_tried_and_what_to_do() -> None:
    place = Candidate("quic", "192.0.2.1", 80)
    failed = DialFailed(ONE, [(place, "nobody answered")])
    assert failed.failures == ((place, "nobody answered"),)
    assert "quic 192.0.2.1:80: nobody answered" in str(failed)
    assert "fresh invite" in str(DialFailed(ONE, []))
    assert TWO.short in str(WrongPeer(ONE, TWO))
    assert "another kind of key" in str(WrongPeer(ONE, None))
