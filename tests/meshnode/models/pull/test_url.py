"""Addresses: as they are written, asked for and shown."""

from __future__ import annotations

import base64

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshnode.errors import UsageError
from meshnode.models.pull.url import Origin, parse_url


@pytest.mark.parametrize(
    ("text", "authority", "target"),
    [
        ("https://example.org/a/model.gguf", "example.org", "/a/model.gguf"),
        ("HTTPS://EXAMPLE.org:443", "example.org", "/"),
        ("http://example.org:8080/a b?x=1&y=ü", "example.org:8080", "/a%20b?x=1&y=%C3%BC"),
        ("http://[::1]:9/%41", "[::1]:9", "/%41"),
        ("https://bücher.example/x", "xn--bcher-kva.example", "/x"),
    ],
)
def test_what_goes_on_the_wire(text: str, authority: str, target: str) -> None:
    url = parse_url(text)
    assert (url.origin.authority, url.target) == (authority, target)


def test_neither_a_password_nor_a_signature_is_shown() -> None:
    url = parse_url("https://me:hunter2@example.org/model%20a.gguf?signature=s3cr3t")
    assert url.shown == "https://example.org/model%20a.gguf?…"
    assert url.file_name == "model a.gguf"
    assert url.authorization == "Basic " + base64.b64encode(b"me:hunter2").decode()
    for told in (repr(url), str(url), url.shown):
        assert "hunter2" not in told
        assert "s3cr3t" not in told


@pytest.mark.parametrize(
    ("text", "shown", "is_secret"),
    [
        ("https://a/m.gguf", "https://a/m.gguf", False),
        ("https://a/m.gguf?download=true", "https://a/m.gguf?download=true", False),
        ("https://a/m.gguf?token=x", "https://a/m.gguf?…", True),
        ("https://a/m.gguf?download=true&token=x", "https://a/m.gguf?…", True),
        ("https://me:hunter2@a/m.gguf", "https://a/m.gguf", True),
        ("https://me@a/m.gguf?download=true", "https://a/m.gguf?download=true", True),
    ],
)
def test_what_is_no_secret_is_shown_and_nothing_else(
    text: str, shown: str, is_secret: bool
) -> None:
    url = parse_url(text)
    assert (url.shown, url.is_secret, url.is_curtailed) == (shown, is_secret, False)
    assert parse_url(shown).is_curtailed == shown.endswith("?…")


def test_a_password_is_for_the_address_it_was_written_in() -> None:
    url = parse_url("https://me:hunter2@example.org/a")
    assert url.follow("/b").authorization is None
    assert url.follow("https://you:other@else.org/").authorization is None
    assert url.follow("../b?c").target == "/b?c"
    assert url.follow("//else.org/x").origin == Origin("https", "else.org", 443)


@pytest.mark.parametrize(
    "text",
    ["", "model.gguf", "ftp://a/b", "https://", "https://[::1", "http://a:0/", "http://a:x/",
     "http://a b/", "http://" + "a" * 70 + "/", "http://a\r\nX: y/"],
)  # fmt: skip
def test_what_is_no_address_is_refused_without_being_repeated(text: str) -> None:
    with pytest.raises(UsageError):
        parse_url(text)


@given(st.text(max_size=40))
def test_nothing_that_is_written_gets_onto_the_wire_unquoted(text: str) -> None:
    for written in (text, f"https://host/{text}", f"https://{text}/", f"http://host?{text}"):
        try:
            url = parse_url(written)
        except UsageError:
            continue
        for sent in (url.target, url.origin.authority):
            assert sent.isascii()
            assert sent.isprintable()
            assert " " not in sent
