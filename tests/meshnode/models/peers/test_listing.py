"""Members say which models they have, and a user's word means one of them, or is told why not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import cbor2
import pytest

from meshnode.errors import AmbiguousModel, BadMessage, NoSuchModel
from meshnode.models.facts import read_facts
from meshnode.models.manifest import digest_model
from meshnode.models.peers.listing import (
    MAX_FURTHER_NAMES,
    MAX_LISTED,
    Listed,
    Told,
    choose,
    parse_digests_untrusted,
    parse_listing_untrusted,
    proven,
    to_message,
)
from tests.engine.synthetic import make_model

PART, OTHER_PART = "1a" * 32, "1b" * 32
ROOT, OTHER_ROOT = "2a" * 32, "2b" * 32
GLM = Listed("glm-4", ("org/repo/glm-4",), PART, None, 1000, 400)
WHOLE = Listed("GLM-4", (), OTHER_PART, ROOT, 1000, 1000)


def over_the_wire(message: dict[str, Any]) -> dict[str, Any]:
    arrived: dict[str, Any] = cbor2.loads(cbor2.dumps(message))
    return arrived


def test_a_list_survives_the_wire_and_is_bounded() -> None:
    assert parse_listing_untrusted(over_the_wire(to_message([GLM, WHOLE]))) == (GLM, WHOLE)
    long = replace(GLM, name="x" * 1000, further_names=("y" * 1000,) * 9)
    (clipped,) = parse_listing_untrusted(over_the_wire(to_message([long])))
    assert (len(clipped.name), len(clipped.further_names)) == (255, MAX_FURTHER_NAMES)
    assert len(to_message([GLM] * 5000)["models"]) == MAX_LISTED


def test_what_a_later_version_says_besides_is_passed_over() -> None:
    message = to_message([GLM])
    message["models"][0].append("more")
    assert parse_listing_untrusted(message | {"more": 1}) == (GLM,)


def test_a_name_cannot_move_the_cursor() -> None:
    (shown,) = parse_listing_untrusted(to_message([replace(GLM, name="a\x1b[2Jb")]))
    assert shown.name == "a?[2Jb"


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (0, ""),
        (0, b"glm"),
        (0, "x" * 256),
        (1, None),
        (1, [""]),
        (1, ["x"] * (MAX_FURTHER_NAMES + 1)),
        (2, bytes(31)),
        (2, b""),
        (3, bytes(31)),
        (3, None),
        (4, -1),
        (4, True),
        (5, 2**63),
        (5, "1"),
    ],
)
def test_a_model_that_cannot_be_is_refused(place: int, value: object) -> None:
    message = to_message([GLM])
    message["models"][0][place] = value
    with pytest.raises(BadMessage):
        parse_listing_untrusted(message)


@pytest.mark.parametrize("rows", [None, {}, [1], [[]], [["a"] * 5], [[]] * (MAX_LISTED + 1)])
def test_a_list_that_cannot_be_is_refused(rows: object) -> None:
    with pytest.raises(BadMessage):
        parse_listing_untrusted({"models": rows})


@pytest.mark.parametrize("digests", [None, "00", bytes(31)])
def test_digests_that_cannot_be_are_refused(digests: object) -> None:
    with pytest.raises(BadMessage):
        parse_digests_untrusted({"digests": digests})


def test_digests_that_make_up_the_root_are_proven_and_no_others(tmp_path: Path) -> None:
    facts = read_facts(make_model(tmp_path / "m.gguf", layers=2, width=64, ffn=128))
    manifest = digest_model(facts)
    told = b"".join(entry.digest for entry in manifest.tensors)
    digests = parse_digests_untrusted({"digests": told})
    assert proven(facts, manifest.root, digests) == {e.name: e.digest for e in manifest.tensors}
    assert proven(facts, manifest.root, digests[:-1]) is None
    assert proven(facts, manifest.root, (bytes(32), *digests[1:])) is None
    assert proven(facts, ROOT, digests) is None


# -- what a name means --------------------------------------------------------------------------


def test_a_name_means_the_model_that_members_call_so() -> None:
    told = [Told("ann", GLM), Told("ben", replace(GLM, held_bytes=900))]
    for word in ("glm-4", "GLM-4", "org/repo/glm-4", PART, PART.upper()):
        choice = choose(word, told)
        assert (choice.provisionals, choice.root) == ((PART,), None)
        assert choice.members == ("ben", "ann"), "who has more comes first"
        assert choice.identity == PART


def test_files_of_several_dates_are_one_model_where_their_root_is_known() -> None:
    told = [Told("ann", replace(WHOLE, provisional=PART)), Told("ben", WHOLE)]
    choice = choose("glm-4", told)
    assert (set(choice.provisionals), choice.root) == ({PART, OTHER_PART}, ROOT)
    assert choice.identity == ROOT
    assert choose(ROOT, told) == choice
    assert choose(PART, told).root == ROOT


def test_a_part_is_of_the_model_whose_files_it_is_of() -> None:
    choice = choose("glm-4", [Told("ann", GLM), Told("ben", replace(WHOLE, provisional=PART))])
    assert (choice.provisionals, choice.root) == ((PART,), ROOT)
    assert choice.members == ("ben", "ann")


def test_two_models_of_one_name_are_told_apart_by_identity() -> None:
    told = [Told("ann", GLM), Told("ben", WHOLE), Told("cy", replace(GLM, held_bytes=1))]
    with pytest.raises(AmbiguousModel) as error:
        choose("glm-4", told)
    assert f"mesh:{PART} (on ann, cy)" in str(error.value)
    assert f"mesh:{ROOT} (on ben)" in str(error.value)
    assert choose(PART, told).members == ("ann", "cy")


def test_a_member_that_says_whose_files_these_are_confuses_nobody_who_names_the_root() -> None:
    honest = replace(WHOLE, provisional=PART)
    told = [Told("ann", honest), Told("mallory", replace(honest, root=OTHER_ROOT)), Told("cy", GLM)]
    with pytest.raises(AmbiguousModel, match="different models"):
        choose("glm-4", told)
    assert choose(ROOT, told).root == ROOT


def test_a_name_that_nobody_has_is_answered_by_what_there_is() -> None:
    told = [Told("ann", replace(GLM, name=f"m{i}")) for i in range(9)] + [Told("ben", GLM)]
    with pytest.raises(NoSuchModel) as error:
        choose("glm4", told, ["cy"])
    said = str(error.value)
    assert "there are glm-4 (on ben), m4 (on ann), m0 (on ann)" in said
    assert "and 5 more" in said
    assert "cy did not say" in said
    with pytest.raises(NoSuchModel, match=r"they have none; name a source on the web"):
        choose("glm-4", [])


def test_a_long_list_of_members_is_cut_short() -> None:
    with pytest.raises(NoSuchModel, match=r"on a0, a1, a2, a3, a4 and 3 more\)$"):
        choose("x", [Told(f"a{i}", GLM) for i in range(8)])
