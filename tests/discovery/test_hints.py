"""Of all that is announced, what members of our meshes have signed is followed."""

from __future__ import annotations

from typing import Any

import pytest

from discovery import hints
from discovery.announcement import ENTROPY_BYTES, encode_announcement
from discovery.hints import Hint, HintBook, Refusal
from tests.lab.nodes import identity
from tunnels.identity import Identity
from tunnels.peer import Candidate, PeerId

US, BOB, EVE = (identity(name) for name in ("us", "bob", "eve"))
MESH, OTHER_MESH = (bytes([n]) * 32 for n in (1, 2))


def said(who: Identity = BOB, *, host: str = "192.0.2.7", seq: int = 5, **changes: Any) -> bytes:
    fields: dict[str, Any] = {
        "sign": who.sign,
        "peer": who.peer,
        "seq": seq,
        "version": "0.1.0",
        "name": "somebody",
        "places": (Candidate("quic", host, 4433),),
        "meshes": (MESH,),
        "entropy": bytes(ENTROPY_BYTES),
    }
    return encode_announcement(**(fields | changes))


def book(*met: Identity, meshes: tuple[bytes, ...] = (MESH,)) -> HintBook:
    known = {one.peer for one in met}
    return HintBook(US.peer, meshes, known.__contains__)


def test_a_member_is_heard_once() -> None:
    ours = book(BOB)
    hint = ours.hear_untrusted(said(), 0)
    assert hint == Hint(
        BOB.peer, "somebody", (Candidate("quic", "192.0.2.7", 4433),), frozenset((MESH,))
    )
    assert ours.hear_untrusted(said(), 1) is None


def test_a_member_that_moved_is_heard_again_and_its_old_word_is_not() -> None:
    ours = book(BOB)
    ours.hear_untrusted(said(), 0)
    moved = ours.hear_untrusted(said(host="192.0.2.8", seq=6), 1)
    assert isinstance(moved, Hint)
    assert moved.places[0].host == "192.0.2.8"
    assert ours.hear_untrusted(said(), 2) is None, "repeated by somebody"


def test_strangers_and_we_ourselves_are_nothing_to_us() -> None:
    ours = book(BOB)
    assert ours.hear_untrusted(said(EVE, meshes=(OTHER_MESH,)), 0) is None
    assert ours.hear_untrusted(said(US), 0) is None
    assert len(ours) == 0


def test_of_a_mesh_that_is_not_ours_nothing_is_told() -> None:
    hint = book(BOB).hear_untrusted(said(meshes=(MESH, OTHER_MESH)), 0)
    assert isinstance(hint, Hint)
    assert hint.meshes == {MESH}


def test_what_no_node_says_is_malformed() -> None:
    assert book().hear_untrusted(b"\x03v=1", 0) is Refusal.MALFORMED


def test_another_address_in_bobs_name_is_forged_and_bob_is_heard_after_it() -> None:
    ours = book(BOB)
    forged = said(sign=EVE.sign, host="192.0.2.66", seq=99)
    assert ours.hear_untrusted(forged, 0) is Refusal.FORGED
    assert isinstance(ours.hear_untrusted(said(), 1), Hint)
    assert ours.hear_untrusted(forged, 2) is Refusal.FORGED
    assert ours.hear_untrusted(said(), 3) is None, "still known"


def crowd(count: int, *, host: str = "192.0.2.{}", first: int = 0) -> list[tuple[Identity, bytes]]:
    people = [identity(f"crowd {number}") for number in range(first, first + count)]
    return [(one, said(one, host=host.format(n % 250))) for n, one in enumerate(people)]


def test_of_nodes_not_met_only_so_many_are_kept_and_members_come_through() -> None:
    ours = book(BOB)
    verdicts = [ours.hear_untrusted(record, 0) for _, record in crowd(hints.MAX_UNMET + 5)]
    assert verdicts.count(Refusal.CROWDED) == 5
    assert len(ours) == hints.MAX_UNMET
    assert isinstance(ours.hear_untrusted(said(), 0), Hint)


def test_one_address_is_not_a_crowd() -> None:
    ours = book()
    people = crowd(hints.MAX_UNMET_A_HOST + 1, host="192.0.2.66")
    verdicts = [ours.hear_untrusted(record, 0) for _, record in people]
    assert verdicts[-1] is Refusal.CROWDED
    assert Refusal.CROWDED not in verdicts[:-1]
    assert isinstance(ours.hear_untrusted(said(BOB), 0), Hint), "elsewhere there is room"


def test_who_was_met_makes_room() -> None:
    met: set[PeerId] = set()
    ours = HintBook(US.peer, (MESH,), met.__contains__)
    people = crowd(hints.MAX_UNMET)
    for _, record in people:
        ours.hear_untrusted(record, 0)
    assert ours.hear_untrusted(said(), 0) is Refusal.CROWDED
    met.add(people[0][0].peer)
    assert isinstance(ours.hear_untrusted(said(), 0), Hint)


def test_who_was_turned_down_is_not_heard_for_a_while() -> None:
    ours = book()
    ours.hear_untrusted(said(), 0)
    ours.turn_down(BOB.peer, 1)
    assert ours.hear_untrusted(said(seq=6), 1 + hints.TURNED_DOWN_S - 0.1) is None
    assert isinstance(ours.hear_untrusted(said(seq=7), 1 + hints.TURNED_DOWN_S), Hint)


def test_who_was_turned_down_and_is_a_member_since_is_heard() -> None:
    met: set[PeerId] = set()
    ours = HintBook(US.peer, (MESH,), met.__contains__)
    ours.turn_down(BOB.peer, 0)
    met.add(BOB.peer)
    assert isinstance(ours.hear_untrusted(said(), 1), Hint)


def test_of_many_turned_down_the_first_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hints, "MAX_TURNED_DOWN", 2)
    ours = book()
    for who in (BOB, EVE, BOB, identity("carol")):
        ours.turn_down(who.peer, 0)
    assert isinstance(ours.hear_untrusted(said(EVE), 1), Hint)
    assert ours.hear_untrusted(said(BOB), 1) is None


def test_a_node_unheard_of_for_long_is_forgotten_and_one_that_repeats_itself_is_not() -> None:
    ours = book(BOB, EVE)
    ours.hear_untrusted(said(BOB), 0)
    ours.hear_untrusted(said(EVE), 0)
    ours.hear_untrusted(said(EVE), hints.LIFETIME_S - 1)
    late = hints.LIFETIME_S + 10.0
    assert ours.hear_untrusted(said(EVE, seq=4), late) is None, "older, and still known"
    again = ours.hear_untrusted(said(BOB, seq=4), late)
    assert isinstance(again, Hint), "its clock may have been set back"
    assert len(ours) == 2


def test_what_expired_leaves_the_book() -> None:
    ours = book(BOB)
    ours.hear_untrusted(said(EVE), 0)
    ours.hear_untrusted(said(BOB), hints.LIFETIME_S)
    assert len(ours) == 1
