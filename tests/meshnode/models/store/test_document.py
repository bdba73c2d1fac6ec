"""slice.cbor comes back as it was, or as what a damaged disk has left of it: no traceback."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import cbor2
import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from meshnode.models.store.document import (
    BadDocument,
    SliceDocument,
    is_file_name,
    parse_untrusted,
    to_bytes,
)

DOCUMENT = SliceDocument(
    files=(("m-00001-of-00002.gguf", 100), ("m-00002-of-00002.gguf", 50)),
    source="https://example.org/m.gguf",
    validator="etag:1",
    header_digest=b"h" * 32,
    layout=b"l" * 32,
    root="ab" * 32,
    tensor_count=2,
    weight_bytes=120,
    held_bytes=20,
    digests={"a": b"a" * 32, "b": b"b" * 32},
    held=frozenset(("a", "b")),
    stamps=((1, 2), (3, 4)),
    vouched=True,
)
BODY_START = len(b"mesh-slice 1\n") + 32


def sealed(body: bytes) -> bytes:
    return b"mesh-slice 1\n" + blake3(body).digest() + body


def changed(**fields: Any) -> bytes:
    known = cbor2.loads(to_bytes(DOCUMENT)[BODY_START:])
    return sealed(cbor2.dumps({**known, **fields}))


def test_it_comes_back_as_it_was() -> None:
    assert parse_untrusted(to_bytes(DOCUMENT)) == DOCUMENT
    fresh = replace(DOCUMENT, source=None, root=None, held=frozenset(), digests={}, stamps=())
    assert parse_untrusted(to_bytes(fresh)) == fresh
    older = cbor2.loads(to_bytes(DOCUMENT)[BODY_START:])
    del older["vouched"]
    assert parse_untrusted(sealed(cbor2.dumps(older))) == replace(DOCUMENT, vouched=False)
    assert DOCUMENT.size_bytes == 150
    assert DOCUMENT.complete
    assert not fresh.complete
    assert not replace(DOCUMENT, held=frozenset("a")).complete


def test_a_broken_seal_leaves_claims_to_be_looked_into() -> None:
    data = to_bytes(DOCUMENT).replace(b"a" * 32, b"a" * 31 + b"x")
    found = parse_untrusted(data)
    assert not found.sealed
    assert found.held == DOCUMENT.held
    assert (found.source, found.root, found.stamps) == (None, None, ())
    assert not found.vouched


def test_what_is_held_without_a_digest_is_not_held() -> None:
    assert parse_untrusted(changed(held=["a", "c"])).held == {"a"}


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"mesh-slice 1\n",
        sealed(b""),
        sealed(cbor2.dumps([])),
        sealed(cbor2.dumps({})),
        changed(files=[]),
        changed(files=7),
        changed(files=[["../m.gguf", 1]]),
        changed(files=[["m.gguf", 1], ["m.gguf", 1]]),
        changed(files=[["m.gguf", -1]]),
        changed(files=[["m.gguf", True]]),
        changed(files=[["m.gguf"]]),
        changed(source=7),
        changed(validator=None),
        changed(header=b"short"),
        changed(layout=b"short"),
        changed(root="text"),
        changed(digests=[]),
        changed(digests={"a": b"short"}),
        changed(digests={"": bytes(32)}),
        changed(digests={"a\nb": bytes(32)}),
        changed(held=[7]),
        changed(stamps=[[1]]),
        changed(tensors=2**64),
    ],
)
def test_what_makes_no_sense_is_refused(data: bytes) -> None:
    with pytest.raises(BadDocument):
        parse_untrusted(data)


@given(st.binary(max_size=200), st.integers(0, 10**6))
def test_no_bytes_upset_the_parser(noise: bytes, seed: int) -> None:
    mutated = bytearray(to_bytes(DOCUMENT))
    rng = random.Random(seed)
    for _ in range(3):
        mutated[rng.randrange(len(mutated))] = rng.randrange(256)
    for data in (noise, sealed(noise), bytes(mutated), bytes(mutated[: seed % len(mutated)])):
        try:
            parse_untrusted(data)
        except BadDocument:
            continue


@pytest.mark.parametrize(
    ("name", "fits"),
    [
        ("m.gguf", True),
        ("模型.gguf", True),
        ("", False),
        ("..", False),
        (".m.gguf", False),
        ("a/b.gguf", False),
        ("a\nb.gguf", False),
        ("n" * 256, False),
        ("\ud800.gguf", False),
    ],
)
def test_names_stay_in_their_folder(name: str, fits: bool) -> None:
    assert is_file_name(name) is fits
