"""What is no JSON object is told so, in a sentence, before llama-server sees it."""

from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshnode.gateway.body import check_json, declared_bytes
from meshnode.gateway.refusal import Refusal


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"", "Expecting value"),
        (b"{", "line 1, column 2"),
        (b'{"a": 1,}', "column"),
        (b"[1]", "an object"),
        (b'"text"', "an object"),
        (b"null", "an object"),
        (b'{"a": NaN}', "NaN"),
        (b'{"a": -Infinity}', "-Infinity"),
        (b'{"a": "\xff"}', "not UTF-8 at byte 7"),
        (b'{"a": "\\ud800"}', "surrogate"),
        (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
        (b'{"a": ' + b"9" * 5000 + b"}", "digits"),
        (b'{"a": 1} {"b": 2}', "Extra data"),
    ],
)
def test_what_is_wrong_is_named(body: bytes, reason: str) -> None:
    with pytest.raises(Refusal) as refused:
        check_json(body)
    assert refused.value.status == 400
    assert refused.value.code == "invalid_json"
    assert reason in refused.value.message
    assert "\n" not in refused.value.message


@pytest.mark.parametrize("body", [b"{}", '{"a": "ü\\ud83d\\ude00"}'.encode(), b' {"a":[1e9]}\n'])
def test_an_object_passes(body: bytes) -> None:
    check_json(body)


@given(st.binary(max_size=60))
def test_whatever_comes_is_taken_or_refused(body: bytes) -> None:
    with suppress(Refusal):
        check_json(body)


@pytest.mark.parametrize("given", ["", "-1", "1e3", "1_000", "\u0663", "9" * 21, "9" * 5000])
def test_a_length_that_is_none_is_told(given: str) -> None:
    with pytest.raises(Refusal) as refused:
        declared_bytes(given)
    assert (refused.value.status, refused.value.code) == (400, "bad_length")
    assert "no number of bytes" in refused.value.message
    assert len(refused.value.message) < 200


def test_a_length_is_read() -> None:
    assert declared_bytes("007") == 7
    assert declared_bytes("9" * 20) == 10**20 - 1
