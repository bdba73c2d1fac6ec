"""Heads of answers, one by one: which bodies may be used, and what is said of the others."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshnode.models.pull.answers import (
    Asked,
    Described,
    Head,
    Marks,
    check,
    describe,
    marks_of,
    refusal,
)
from meshnode.models.pull.source import SourceChanged, SourceError, SourceFault

HASH = "0123456789abcdef" * 4
FILE = Described(1000, Marks('"x"'), has_ranges=True)
ASKED = Asked("http://host/x", 100, 200, FILE)


def head(status: int, **headers: str) -> Head:
    return Head(status, tuple((name.replace("_", "-"), value) for name, value in headers.items()))


def test_what_a_hub_says_before_it_sends_on_is_the_file_s_digest() -> None:
    hub = head(302, x_linked_etag=f'"{HASH}"', etag='"of the link"')
    storage = head(206, etag='"abc"', last_modified="yesterday")
    marks = marks_of([hub, storage])
    assert marks == Marks('"abc"', "yesterday", HASH)
    assert marks.validator(5) == f"sha256:{HASH}"
    assert marks.condition == '"abc"'


def test_a_weak_etag_says_nothing_of_the_bytes() -> None:
    marks = marks_of([head(200, etag='W/"abc"', last_modified="yesterday")])
    assert marks.validator(5) == "modified:yesterday 5"
    assert marks.condition == "yesterday"
    assert Marks().validator(5) == "length:5"
    assert Marks().condition is None


def test_headers_that_contradict_each_other_say_nothing() -> None:
    twice = Head(206, (("etag", '"a"'), ("etag", '"b"')))
    assert twice.get("etag") is None
    assert head(206, content_length="-5").number("content-length") is None


@pytest.mark.parametrize("length", [None, "0", "x"])
def test_a_file_of_unknown_length_or_none_is_refused(length: str | None) -> None:
    told = {} if length is None else {"content_length": length}
    with pytest.raises(SourceError, match="empty, or does not say"):
        describe([head(200, **told)], "x")


def test_a_compressed_file_is_refused_at_the_first_look() -> None:
    with pytest.raises(SourceError, match="compressed"):
        describe([head(206, content_range="bytes 0-0/5", content_encoding="gzip")], "x")
    describe([head(206, content_range="bytes 0-0/5", content_encoding="identity")], "x")


def test_a_part_of_the_same_file_beyond_its_end_is_the_server_s_fault() -> None:
    with pytest.raises(SourceError, match="no bytes where it said") as caught:
        check(head(416, content_range="bytes */1000"), ASKED)
    assert not isinstance(caught.value, SourceChanged)
    with pytest.raises(SourceChanged):
        check(head(416, content_range="bytes */999"), ASKED)


def test_a_part_need_not_say_how_long_the_whole_is_once_that_is_known() -> None:
    assert check(head(206, content_range="bytes 100-199/*"), ASKED) == 0
    with pytest.raises(SourceChanged):
        check(head(206, content_range="bytes 100-199/1001"), ASKED)


def test_a_whole_file_is_used_only_of_a_server_that_knows_no_parts() -> None:
    whole = head(200, content_length="1000")
    with pytest.raises(SourceFault, match="was sent whole"):
        check(whole, ASKED)
    assert check(whole, Asked("x", 100, 200, Described(1000, Marks(), has_ranges=False))) == 100
    with pytest.raises(SourceChanged):
        check(head(200, content_length="1001"), ASKED)
    with pytest.raises(SourceChanged):
        check(head(412), ASKED)


def test_refusals_are_told_apart() -> None:
    assert "gated" in str(refusal(head(403, x_error_code="GatedRepo"), "x"))
    assert "not for everybody" in str(refusal(head(403), "x"))
    with pytest.raises(SourceError, match="no x"):
        check(head(404), Asked("x", 0, 1, FILE))
    busy = refusal(head(429, retry_after="999999"), "x")
    assert isinstance(busy, SourceFault)
    assert busy.retry_after_s == 3600
    assert isinstance(refusal(head(503, retry_after="soon"), "x"), SourceFault)


NAMES = st.sampled_from(
    ["etag", "last-modified", "content-length", "content-range", "content-encoding",
     "x-linked-etag", "retry-after", "x-error-code", "location"]
)  # fmt: skip
HEADS = st.builds(
    Head,
    st.integers(100, 599),
    st.lists(st.tuples(NAMES, st.text(max_size=30) | st.just("bytes 0-0/9")), max_size=6).map(
        tuple
    ),
)


@given(st.lists(HEADS, min_size=1, max_size=3))
def test_whatever_a_server_says_ends_in_use_or_in_a_sentence(heads: list[Head]) -> None:
    try:
        described = describe(heads, "x")
    except (SourceError, SourceFault):
        described = FILE
    assert described.size_bytes > 0
    try:
        skip_bytes = check(heads[-1], Asked("x", 100, 200, described))
    except (SourceError, SourceFault):
        return
    assert skip_bytes in (0, 100)
