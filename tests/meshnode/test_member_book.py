"""Members come themselves, or by others' words: what is taken, and what goes with a grant."""

from __future__ import annotations

from typing import Any

import pytest

from discovery import roster
from discovery.grants import Grant, GrantError, Role, issue, issue_root
from discovery.roster import MEMBER_LIFETIME_S, Member
from meshnode.member_book import MAX_HEARD_OF_ONE, BadMemberState, Heard, MemberBook
from tests.lab.nodes import identity
from tunnels import Identity, PeerId

NOW = 1_800_000_000
FOUNDER, INVITER, ANN = identity("founder"), identity("inviter"), identity("ann")
ROOT, OTHER_ROOT = identity("mesh"), identity("another mesh")


def founded(root: Identity, at: int = NOW) -> Grant:
    """The founder's own place."""
    return issue_root(
        root.sign,
        mesh=root.peer.key,
        peer=FOUNDER.peer,
        role=Role.PEER,
        issued_at=at,
        may_invite=True,
    )


def invited(peer: PeerId, root: Identity = ROOT, at: int = NOW) -> Grant:
    return issue(
        founded(root, at), FOUNDER.sign, peer=peer, role=Role.PEER, issued_at=at, may_invite=True
    )


def word(of: Identity, seq: int = 1, name: str = "ann", last_seen: float = NOW) -> Member:
    return Member(of.peer, name, seq=seq, last_seen=last_seen).signed(of.sign)


def good(_grant: Grant, _peer: PeerId) -> None:
    """As if every grant held."""


def hear(book: MemberBook, said: Member, grant: Grant | None = None) -> Heard:
    return book.hear_of(said, grant or invited(said.peer), NOW, good)


@pytest.fixture
def book() -> MemberBook:
    return MemberBook()


def test_a_member_is_known_by_what_it_has_shown(book: MemberBook) -> None:
    grants = [invited(ANN.peer, ROOT), invited(ANN.peer, OTHER_ROOT)]
    assert book.enter(word(ANN), grants, NOW)
    assert not book.enter(word(ANN), grants, NOW + 1), "nothing new"
    assert book.proven(ANN.peer) == {ROOT.peer.key, OTHER_ROOT.peer.key}
    assert book.shown(ROOT.peer.key, ANN.peer) == grants[0]
    book.enter(word(FOUNDER), [founded(ROOT)], NOW)
    peers = [grant.peer for grant in book.of_mesh(ROOT.peer.key)]
    assert peers == sorted((ANN.peer, FOUNDER.peer))


def test_who_is_not_heard_of_any_more_is_forgotten(book: MemberBook) -> None:
    book.enter(word(ANN), [invited(ANN.peer)], NOW)
    later = NOW + MEMBER_LIFETIME_S + 1
    founder = word(FOUNDER, last_seen=later), [founded(ROOT, later)]
    book.enter(*founder, NOW)
    assert book.enter(*founder, later), "that somebody went is news, too"
    assert [grant.peer for grant in book.of_mesh(ROOT.peer.key)] == [FOUNDER.peer]


def test_a_renewed_grant_is_news_and_so_is_a_newer_word(book: MemberBook) -> None:
    assert hear(book, word(ANN)) is Heard.NEWS
    assert hear(book, word(ANN)) is Heard.OLD
    assert hear(book, word(ANN, seq=2)) is Heard.SAME
    assert hear(book, word(ANN, seq=3, name="anna")) is Heard.NEWS
    assert hear(book, word(ANN), invited(ANN.peer, at=NOW + 1)) is Heard.NEWS
    member = book.roster.get(ANN.peer)
    assert member is not None
    assert member.name == "anna", "the older word came with the newer grant"
    assert hear(book, word(ANN, seq=4), invited(ANN.peer)) is Heard.NEWS
    assert book.shown(ROOT.peer.key, ANN.peer) == invited(ANN.peer, at=NOW + 1), "nor undone"


def test_what_nobody_signed_and_what_is_too_old_is_refused(book: MemberBook) -> None:
    assert hear(book, Member(ANN.peer, "ann", seq=1, last_seen=NOW)) is Heard.REFUSED
    assert hear(book, word(ANN, last_seen=NOW - MEMBER_LIFETIME_S - 1)) is Heard.REFUSED
    assert book.roster.members() == ()


def test_a_grant_that_does_not_hold_makes_no_member(book: MemberBook) -> None:
    def refuse(_grant: Grant, _peer: PeerId) -> None:
        raise GrantError("it was revoked")

    with pytest.raises(GrantError):
        book.hear_of(word(ANN), invited(ANN.peer), NOW, refuse)
    assert book.roster.members() == ()


def test_one_inviter_makes_up_only_so_many_and_the_founder_any_number(book: MemberBook) -> None:
    inviters_own = invited(INVITER.peer)
    ghosts = [identity(f"ghost {number}") for number in range(MAX_HEARD_OF_ONE + 1)]
    became = [
        hear(
            book,
            word(ghost),
            issue(
                inviters_own,
                INVITER.sign,
                peer=ghost.peer,
                role=Role.WORKER,
                issued_at=NOW,
                may_invite=False,
            ),
        )
        for ghost in ghosts
    ]
    assert became == [Heard.NEWS] * MAX_HEARD_OF_ONE + [Heard.REFUSED]
    for ghost in ghosts:
        hear(book, word(ghost, seq=2), invited(ghost.peer, OTHER_ROOT))
    assert len(book.of_mesh(OTHER_ROOT.peer.key)) == len(ghosts)


def test_a_full_roster_takes_nobody_new_from_others(
    book: MemberBook, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(roster, "MAX_HEARSAY", 1)
    book.enter(word(FOUNDER), [founded(ROOT)], NOW)
    assert hear(book, word(ANN)) is Heard.REFUSED
    assert book.proven(ANN.peer) == frozenset()


def test_a_member_goes_with_its_last_grant(book: MemberBook) -> None:
    book.enter(word(ANN), [invited(ANN.peer, ROOT), invited(ANN.peer, OTHER_ROOT)], NOW)
    assert book.forget_void(lambda grant: grant.mesh == ROOT.peer.key)
    assert not book.forget_void(lambda grant: grant.mesh == ROOT.peer.key)
    assert book.roster.get(ANN.peer) is not None, "it is in another mesh still"
    book.forget_mesh(OTHER_ROOT.peer.key)
    assert book.roster.members() == ()


def test_the_book_survives_a_restart(book: MemberBook) -> None:
    book.enter(word(ANN), [invited(ANN.peer)], NOW)
    again = MemberBook.from_state_untrusted(book.to_state())
    assert again.of_mesh(ROOT.peer.key) == (invited(ANN.peer),)
    assert again.roster.get(ANN.peer) == word(ANN)


@pytest.mark.parametrize(
    "damage", [{"roster": {}}, {"shown": ["00"]}, {"shown": ["no"]}, {"shown": [1]}, {"shown": 1}]
)
def test_a_damaged_book_is_not_read(book: MemberBook, damage: dict[str, Any]) -> None:
    with pytest.raises(BadMemberState):
        MemberBook.from_state_untrusted(book.to_state() | damage)
    with pytest.raises(BadMemberState):
        MemberBook.from_state_untrusted({})
