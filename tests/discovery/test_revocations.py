"""What is taken back stays so, and takes with it what hangs on it, but for what is spared."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace
from itertools import permutations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from discovery import revocations
from discovery.grants import (
    GRANT_LABEL,
    GRANT_LIFETIME_S,
    Grant,
    Role,
    grant_digest,
    issue,
    issue_root,
)
from discovery.revocations import (
    MAX_SPARED,
    REMEMBERED_S,
    REVOCATION_LABEL,
    BadRevocationState,
    Kind,
    Revocation,
    RevocationBook,
    RevocationError,
    encode_revocation,
    parse_revocation_untrusted,
    revoke_peer,
    withdraw_invite,
)
from tunnels.identity import Identity

ROOT, FOUNDER, FRIEND, COUSIN, OTHER, STRANGER = (Identity.generate() for _ in range(6))
MESH = ROOT.peer.key
NOW = 1_000_000
INVITE = b"invite-1"


def founder() -> Grant:
    return issue_root(
        ROOT.sign, mesh=MESH, peer=FOUNDER.peer, role=Role.PEER, issued_at=NOW, may_invite=True
    )


def under(
    parent: Grant,
    inviter: Identity,
    invited: Identity,
    *,
    at: int = NOW,
    since: int | None = None,
    role: Role = Role.PEER,
) -> Grant:
    return issue(
        parent,
        inviter.sign,
        peer=invited.peer,
        role=role,
        issued_at=at,
        since=since,
        may_invite=role is Role.PEER,
    )


FRIENDS = under(founder(), FOUNDER, FRIEND)
COUSINS = under(FRIENDS, FRIEND, COUSIN)
OTHERS = under(founder(), FOUNDER, OTHER)


def by_root(whom: Identity = FRIEND, at: int = NOW, spared: Iterable[Grant] = ()) -> Revocation:
    return revoke_peer(
        ROOT.sign,
        mesh=MESH,
        peer=whom.peer,
        issuer=ROOT.peer,
        at=at,
        grant=None,
        spared=spared,
    )


def by_member(
    grant: Grant, member: Identity, whom: Identity, at: int = NOW, spared: Iterable[Grant] = ()
) -> Revocation:
    return revoke_peer(
        member.sign,
        mesh=MESH,
        peer=whom.peer,
        issuer=member.peer,
        at=at,
        grant=grant,
        spared=spared,
    )


def withdrawn(grant: Grant = FRIENDS, member: Identity = FRIEND) -> Revocation:
    return withdraw_invite(member.sign, id=INVITE, at=NOW, until=NOW + 1000, grant=grant)


def book_of(*said: Revocation) -> RevocationBook:
    book = RevocationBook()
    for one in said:
        assert book.add(one, NOW)
    return book


def holds(grant: Grant, *said: Revocation) -> bool:
    return book_of(*said).void_by(grant) is None


# -- what voids what ------------------------------------------------------------------------------


def test_what_nobody_spoke_against_holds() -> None:
    assert holds(COUSINS)
    assert holds(FRIENDS, by_root(OTHER))


def test_the_founder_puts_anyone_out() -> None:
    assert not holds(FRIENDS, by_root(FRIEND))
    assert not holds(COUSINS, by_root(COUSIN))


def test_an_inviter_puts_out_whom_it_invited_and_nobody_else() -> None:
    by_friend = by_member(FRIENDS, FRIEND, COUSIN)
    assert not holds(COUSINS, by_friend)
    assert holds(OTHERS, by_member(FRIENDS, FRIEND, OTHER))
    assert holds(FRIENDS, by_member(OTHERS, OTHER, FRIEND))
    assert holds(founder(), by_member(FRIENDS, FRIEND, FOUNDER))


def test_the_same_member_invited_by_somebody_else_stays() -> None:
    assert holds(under(founder(), FOUNDER, COUSIN), by_member(FRIENDS, FRIEND, COUSIN))


def test_a_member_leaves_by_its_own_word() -> None:
    assert not holds(COUSINS, by_member(COUSINS, COUSIN, COUSIN))


def test_a_removed_inviter_takes_its_invitees_with_it_but_for_the_spared() -> None:
    assert not holds(COUSINS, by_root(FRIEND))
    assert holds(COUSINS, by_root(FRIEND, spared=[COUSINS]))
    assert not holds(FRIENDS, by_root(FRIEND, spared=[FRIENDS, COUSINS])), "the removed itself"


def test_a_revoked_inviters_later_grants_are_void_also_under_an_earlier_date() -> None:
    removal = by_root(FRIEND, at=NOW + 100, spared=[COUSINS])
    for at in (NOW, NOW + 50, NOW + 200):
        assert not holds(under(FRIENDS, FRIEND, STRANGER, at=at), removal)
    assert not holds(under(FRIENDS, FRIEND, COUSIN, at=NOW + 1), removal), "not the spared one"


def test_every_statement_must_spare() -> None:
    both = (by_root(FRIEND, spared=[COUSINS]), by_root(FRIEND, at=NOW + 1))
    assert not holds(COUSINS, *both)
    assert holds(COUSINS, both[0], by_root(FRIEND, at=NOW + 1, spared=[COUSINS]))


def test_who_is_let_in_again_later_is_in() -> None:
    book = book_of(by_root(FRIEND, at=NOW + 10), by_member(FRIENDS, FRIEND, FRIEND, at=NOW + 20))
    assert book.newest_against(FRIEND.peer, founder()) == NOW + 20
    assert book.removed_at(FRIEND.peer, founder()) == NOW + 10
    assert book.void_by(under(founder(), FOUNDER, FRIEND, at=NOW + 20)) is not None
    assert book.void_by(under(founder(), FOUNDER, FRIEND, at=NOW + 21)) is None


def test_what_does_not_bear_on_a_grant_does_not_delay_it() -> None:
    book = book_of(by_member(OTHERS, OTHER, COUSIN, at=2**40), by_root(STRANGER, at=NOW + 5))
    assert book.newest_against(COUSIN.peer, FRIENDS) == 0
    assert book.removed_at(COUSIN.peer, FRIENDS) == 0
    assert book.newest_removal(FRIENDS) == NOW + 5
    assert RevocationBook().newest_removal(FRIENDS) == 0


def test_a_renewal_by_a_node_that_had_not_heard_does_not_bring_anyone_back() -> None:
    renewed = under(founder(), FOUNDER, FRIEND, at=NOW + 500, since=NOW)
    assert not holds(renewed, by_root(FRIEND, at=NOW + 100))


def test_a_mesh_is_no_concern_of_another() -> None:
    other_root = Identity.generate()
    elsewhere = issue_root(
        other_root.sign,
        mesh=other_root.peer.key,
        peer=FRIEND.peer,
        role=Role.PEER,
        issued_at=NOW,
        may_invite=True,
    )
    assert holds(elsewhere, by_root(FRIEND))


CHAINS = [
    (founder(), FRIENDS, COUSINS),
    (founder(), OTHERS),
    (founder(), FRIENDS, under(FRIENDS, FRIEND, OTHER)),
]
STATEMENTS = [
    by_root(FRIEND),
    by_root(FRIEND, at=NOW + 5, spared=[COUSINS]),
    by_root(COUSIN),
    by_member(FRIENDS, FRIEND, COUSIN),
    by_member(FRIENDS, FRIEND, OTHER),
    by_member(OTHERS, OTHER, OTHER),
    by_member(FRIENDS, FRIEND, FRIEND, spared=[COUSINS]),
    withdrawn(),
]


@settings(derandomize=True)
@given(st.lists(st.sampled_from(STATEMENTS), unique=True, max_size=5), st.randoms())
def test_all_members_come_to_one_view_in_whatever_order_they_hear(
    said: list[Revocation], order: object
) -> None:
    views = set()
    for heard in list(permutations(said))[:24]:
        book = RevocationBook()
        for one in heard:
            book.add(one, NOW)
        views.add(tuple(book.void_by(chain[-1]) is None for chain in CHAINS))
    assert len(views) == 1


@settings(derandomize=True)
@given(st.lists(st.sampled_from(STATEMENTS), max_size=8))
def test_nothing_heard_later_brings_a_grant_back(said: list[Revocation]) -> None:
    book = RevocationBook()
    void: set[bytes] = set()
    for one in said:
        book.add(one, NOW)
        now_void = {grant_digest(c[-1]) for c in CHAINS if book.void_by(c[-1]) is not None}
        assert void <= now_void
        void = now_void


# -- who may state what ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "forged",
    [
        replace(by_root(), issuer=STRANGER.peer),
        replace(by_root(), at=NOW + 1, until=NOW + 1 + REMEMBERED_S),
        by_member(under(founder(), FOUNDER, OTHER, role=Role.WORKER), OTHER, FRIEND),
        replace(by_member(FRIENDS, FRIEND, COUSIN), grant=None),
        replace(by_member(FRIENDS, FRIEND, COUSIN), grant=OTHERS),
        withdraw_invite(
            OTHER.sign,
            id=INVITE,
            at=NOW,
            until=NOW + 1,
            grant=under(founder(), FOUNDER, OTHER, role=Role.WORKER),
        ),
    ],
    ids=["stranger", "changed", "worker", "no-grant", "foreign-grant", "workers-invite"],
)
def test_who_has_no_right_is_not_heard(forged: Revocation) -> None:
    with pytest.raises(RevocationError):
        RevocationBook().add(forged, NOW)


def test_a_root_key_withdraws_no_invites() -> None:
    draft = Revocation(MESH, Kind.INVITE, INVITE, NOW, NOW + 1, ROOT.peer)
    signed = replace(draft, signature=ROOT.sign(REVOCATION_LABEL, draft.body()))
    with pytest.raises(RevocationError, match="no right"):
        RevocationBook().add(signed, NOW)


def test_a_worker_may_leave() -> None:
    workers = under(founder(), FOUNDER, OTHER, role=Role.WORKER)
    assert not holds(workers, by_member(workers, OTHER, OTHER))


def test_what_was_said_in_time_holds_for_who_hears_it_late() -> None:
    late = NOW + GRANT_LIFETIME_S + 5
    assert RevocationBook().add(by_member(FRIENDS, FRIEND, COUSIN), late)


# -- the book -------------------------------------------------------------------------------------


def test_the_same_again_is_no_news() -> None:
    book = book_of(by_root(at=NOW + 5))
    assert not book.add(by_root(at=NOW + 5), NOW)
    assert not book.add(by_root(), NOW), "it says less"
    assert book.add(by_root(at=NOW + 6), NOW)
    assert [one.at for one in book.of_mesh(MESH)] == [NOW + 6], "and the one that said less goes"


def test_who_spares_less_says_more() -> None:
    book = book_of(by_root(spared=[COUSINS]))
    assert book.add(by_root(), NOW)
    assert not book.add(by_root(spared=[COUSINS]), NOW)
    assert len(book.of_mesh(MESH)) == 1


def test_it_is_forgotten_when_all_that_it_voids_has_expired() -> None:
    book = book_of(by_root(), withdrawn())
    assert book.expire(NOW + 999) == 0
    assert book.expire(NOW + 1000) == 1
    assert book.withdrawn(FRIEND.peer) == ()
    assert book.expire(NOW + REMEMBERED_S) == 1
    assert book.of_mesh(MESH) == ()
    assert not book.add(by_root(), NOW + REMEMBERED_S)


def test_two_about_one_member_are_forgotten_one_by_one() -> None:
    book = book_of(by_root(spared=[COUSINS]), by_root(at=NOW + 9, spared=[OTHERS]))
    assert book.expire(NOW + REMEMBERED_S) == 1
    assert [one.at for one in book.of_mesh(MESH)] == [NOW + 9]


def test_invites_withdrawn_are_told_by_their_inviter() -> None:
    book = book_of(withdrawn(), by_root(OTHER))
    assert [one.subject for one in book.withdrawn(FRIEND.peer)] == [INVITE]
    assert book.withdrawn(OTHER.peer) == ()
    assert book.void_by(COUSINS) is None


def test_one_members_words_are_bounded_and_leave_room_for_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(revocations, "MAX_BY_MEMBER", 2)
    monkeypatch.setattr(revocations, "MAX_BY_MEMBERS", 3)
    monkeypatch.setattr(revocations, "MAX_BY_ROOT", 1)
    many = [Identity.generate() for _ in range(4)]
    left = [under(FRIENDS, FRIEND, one) for one in many]
    by_friends = [by_member(left[n], many[n], many[n]) for n in range(3)]
    book = book_of(*by_friends[:2])
    with pytest.raises(RevocationError, match="too many"):
        book.add(by_friends[2], NOW)  # said of itself: it counts on its inviter's account
    with pytest.raises(RevocationError, match="too many"):
        book.add(by_member(FRIENDS, FRIEND, COUSIN), NOW)
    assert book.add(by_member(OTHERS, OTHER, COUSIN), NOW)
    with pytest.raises(RevocationError, match="too many"):
        book.add(by_member(OTHERS, OTHER, STRANGER), NOW)
    assert book.add(by_root(OTHER), NOW), "the founder has room of its own"
    with pytest.raises(RevocationError, match="too many"):
        book.add(by_root(FRIEND), NOW)
    assert book.add(by_root(OTHER, at=NOW + 1), NOW), "in place of what said less"


def test_members_made_up_by_an_inviter_have_no_accounts_of_their_own() -> None:
    made_up = Identity.generate()
    generous = replace(under(FRIENDS, FRIEND, made_up), may_invite=True)
    generous = replace(generous, signature=FRIEND.sign(GRANT_LABEL, generous.body()))
    with pytest.raises(RevocationError, match="no right"):
        RevocationBook().add(by_member(generous, made_up, COUSIN), NOW)


def test_more_than_can_be_spared_are_cut() -> None:
    grants = [replace(COUSINS, issued_at=n) for n in range(MAX_SPARED + 1)]
    assert len(by_root(spared=grants).spared) == MAX_SPARED


# -- bytes and state ------------------------------------------------------------------------------


@pytest.mark.parametrize("said", STATEMENTS)
def test_a_statement_survives_its_encoding(said: Revocation) -> None:
    again = parse_revocation_untrusted(encode_revocation(said))
    assert again == said
    assert again.digest == said.digest


def changed(offset: int, data: bytes, said: Revocation = STATEMENTS[1]) -> bytes:
    whole = bytearray(encode_revocation(said))
    whole[offset : offset + len(data)] = data
    return bytes(whole)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "format"),
        (changed(0, b"\x02"), "format"),
        (encode_revocation(STATEMENTS[0])[:100], "format"),
        (encode_revocation(STATEMENTS[0])[:-1], "damaged"),
        (changed(33, b"\x07"), "damaged"),
        (changed(114, b"\xff\xff"), "damaged"),
        (changed(66, b"\xff"), "canonical"),
        (changed(81, b"\x00"), "canonical"),
        (changed(65, b"\x01", withdrawn()), "canonical"),
        (encode_revocation(by_root(spared=[COUSINS, OTHERS]))[:116] + bytes(96), "canonical"),
        (encode_revocation(STATEMENTS[0]) + b"x", "bad grant"),
    ],
    ids=[
        "empty",
        "newer",
        "cut",
        "cut-signature",
        "kind",
        "count",
        "at",
        "until",
        "padding",
        "order",
        "grant",
    ],
)
def test_a_damaged_statement_is_told(data: bytes, reason: str) -> None:
    with pytest.raises(RevocationError, match=reason):
        parse_revocation_untrusted(data)


@given(st.binary(max_size=400) | st.binary(min_size=115, max_size=400).map(lambda b: b"\x01" + b))
def test_no_bytes_upset_the_parser(data: bytes) -> None:
    try:
        said = parse_revocation_untrusted(data)
    except RevocationError:
        return
    assert encode_revocation(said) == data


@settings(derandomize=True)
@given(st.integers(min_value=0, max_value=8 * len(encode_revocation(STATEMENTS[3])) - 1))
def test_any_flipped_bit_spoils_a_statement(bit: int) -> None:
    data = bytearray(encode_revocation(STATEMENTS[3]))
    data[bit // 8] ^= 1 << bit % 8
    with pytest.raises(RevocationError):
        RevocationBook().add(parse_revocation_untrusted(bytes(data)), NOW)


def test_a_book_survives_a_restart() -> None:
    book = book_of(*STATEMENTS)
    again = RevocationBook.from_state_untrusted(json.loads(json.dumps(book.to_state())))
    assert again.of_mesh(MESH) == book.of_mesh(MESH)
    assert again.void_by(COUSINS) is not None


def saved(*said: object) -> dict[str, object]:
    return {"format": 1, "revocations": list(said)}


@pytest.mark.parametrize(
    "state",
    [
        None,
        {},
        {"format": 9, "revocations": []},
        {"format": 1},
        {"format": 1, "revocations": 3},
        saved(3),
        saved("zz"),
        saved("00"),
        saved(encode_revocation(replace(by_root(), signature=bytes(64))).hex()),
    ],
)
def test_a_damaged_book_is_not_read(state: object) -> None:
    with pytest.raises(BadRevocationState):
        RevocationBook.from_state_untrusted(state)
