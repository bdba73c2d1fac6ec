"""A model has a name before anybody has read it, and another one for good."""

from __future__ import annotations

import pytest

from meshnode.models.identity import Identity, provisional_identity

HEADER = bytes(32)


def test_two_pulls_of_one_file_have_one_provisional_name() -> None:
    name = provisional_identity(HEADER, [10, 20], "etag:1")
    assert name == provisional_identity(HEADER, [10, 20], "etag:1")
    assert len(name) == 64


@pytest.mark.parametrize(
    "other",
    [
        (b"\1" * 32, [10, 20], "etag:1"),
        (HEADER, [10, 21], "etag:1"),
        (HEADER, [10], "etag:1"),
        (HEADER, [10, 20], "etag:2"),
    ],
)
def test_whatever_differs_makes_another_name(other: tuple[bytes, list[int], str]) -> None:
    assert provisional_identity(*other) != provisional_identity(HEADER, [10, 20], "etag:1")


def test_the_root_is_its_name_once_it_is_known() -> None:
    before = Identity(HEADER, "ab" * 32)
    after = Identity(HEADER, "ab" * 32, "cd" * 32)
    assert (str(before), str(after)) == ("ab" * 32, "cd" * 32)
    assert before.is_named("AB" * 32)
    assert not before.is_named("cd" * 32)
    assert after.is_named("ab" * 32)
    assert after.is_named("cd" * 32)
