"""What others say of tensors makes up a root as told; a lie spoils that and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest

from meshnode.models.store.document import parse_untrusted, to_bytes
from meshnode.models.store.hearsay import Difference, contradicted, note_told, told_root
from meshnode.models.store.slice import Slice, open_slice
from meshnode.models.store.store import Store
from meshnode.models.store.writer import SliceWriter
from tests.meshnode.models.store.slices import Whole, holds_the_right_bytes, pull

LIE = bytes(32)
LAST = "blk.2.ffn_up.weight"


@pytest.fixture
def part(tmp_path: Path, whole: Whole) -> Slice:
    """Holds layer 0."""
    made = whole.create(Store(tmp_path / "models"))
    with SliceWriter(made.folder) as writer:
        pull(writer, whole, whole.names("blk.0."))
    return open_slice(made.folder)


def tell(part: Slice, whole: Whole, who: str, *parts: str, **lies: bytes) -> list[Difference]:
    """lies: by tensor, with _ for . in the names."""
    names = whole.names(*parts)
    digests = {name: lies.get(name.replace(".", "_"), whole.digests[name]) for name in names}
    return list(note_told(part.folder, who, digests))


def test_what_all_say_together_is_the_root_as_told(part: Slice, whole: Whole) -> None:
    assert told_root(part) is None
    assert tell(part, whole, "ben", "blk.1.", "blk.2.") == []
    assert told_root(open_slice(part.folder)) is None, "nobody spoke of the output"
    assert tell(part, whole, "carl", "output", "token_embd") == []
    found = open_slice(part.folder)
    told = told_root(found)
    assert told is not None
    assert (told.root, told.tellers) == (whole.manifest.root, ("ben", "carl"))
    assert found.identity.root is None, "it is nothing but said"
    assert not found.identity.is_named(told.root)
    assert found.document.digests.keys() == set(whole.names("blk.0."))
    assert parse_untrusted(to_bytes(found.document)) == found.document


def test_a_lie_about_what_nobody_else_has_spoils_the_root_as_told_alone(
    part: Slice, whole: Whole
) -> None:
    rest = ("blk.1.", "blk.2.", "output", "token_embd")
    assert tell(part, whole, "liar", *rest, blk_2_ffn_up_weight=LIE) == []
    told = told_root(open_slice(part.folder))
    assert told is not None
    assert told.root != whole.manifest.root
    assert told.tellers == ("liar",)
    with SliceWriter(part.folder) as writer:
        pull(writer, whole, whole.all_names)
    found = open_slice(part.folder)
    assert found.complete, "no right byte was refused"
    assert found.identity.root == whole.manifest.root
    assert (found.document.told, told_root(found)) == ({}, None)
    assert holds_the_right_bytes(found, whole)


def test_of_two_words_that_differ_neither_is_kept(part: Slice, whole: Whole) -> None:
    tell(part, whole, "liar", "blk.2.", blk_2_ffn_up_weight=LIE)
    assert tell(part, whole, "carl", "blk.2.") == [Difference(LAST, "carl", "liar")]
    told = open_slice(part.folder).document.told
    assert LAST not in told
    assert {who for _, who in told.values()} == {"liar"}, "where they agree, who came first"
    assert tell(part, whole, "liar", "blk.2.", blk_2_ffn_up_weight=LIE) == []
    again = tell(part, whole, "liar", "blk.2.")
    assert again == [Difference(LAST, "liar", "liar")], "it contradicts itself"


def test_a_word_against_what_was_read_here_is_not_kept(part: Slice, whole: Whole) -> None:
    name = "blk.0.ffn_up.weight"
    found = tell(part, whole, "liar", "blk.0.", blk_0_ffn_up_weight=LIE)
    assert found == [Difference(name, "liar", None)]
    assert open_slice(part.folder).document == part.document


def test_a_word_that_was_kept_is_held_against_what_is_read_later(part: Slice, whole: Whole) -> None:
    tell(part, whole, "liar", "blk.2.", blk_2_ffn_up_weight=LIE)
    told = open_slice(part.folder).document.told
    assert contradicted(told, {}) == ()
    assert contradicted(told, whole.digests) == (Difference(LAST, "liar", None),)


def test_a_damaged_document_tells_nothing_of_others(part: Slice, whole: Whole) -> None:
    tell(part, whole, "ben", "blk.1.")
    document = open_slice(part.folder).document
    assert document.told
    damaged = to_bytes(document).replace(b"etag:1", b"etag:2")
    assert parse_untrusted(damaged).told == {}
