"""Who is known: the newest word wins, silence ends a record."""

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from discovery import roster as roster_module
from discovery.roster import (
    MAX_MEMBERS,
    MEMBER_LIFETIME_S,
    BadRosterState,
    Member,
    Roster,
)
from tunnels.identity import Identity
from tunnels.peer import Candidate, PeerId

ANN, BEN = (PeerId(bytes([n]) * 32) for n in (1, 2))
NEAR = b"a member"[:8]
HOME = (
    Candidate("quic", "10.0.0.1", 1),
    Candidate("quic", "2001:db8::1", 2, "given"),
    Candidate("relay", "203.0.113.5", 443, via=BEN),
)


def test_a_members_own_word_wins_and_last_seen_never_goes_back() -> None:
    roster = Roster()
    assert roster.merge(Member(ANN, "ann", HOME, b"one", seq=5, last_seen=100))
    assert roster.merge(Member(ANN, "newer", (), b"two", seq=6, last_seen=90))
    assert roster.get(ANN) == Member(ANN, "newer", (), b"two", seq=6, last_seen=100)


def test_a_member_whose_clock_was_ahead_is_heard_again() -> None:
    roster = Roster()
    roster.merge(Member(ANN, "ann", HOME, seq=2**50, last_seen=100))
    moved = Member(ANN, "ann", HOME[1:], seq=5, last_seen=200)
    assert roster.merge(moved)
    assert roster.get(ANN) == moved


def test_the_same_word_again_is_no_news() -> None:
    roster = Roster()
    roster.merge(Member(ANN, "ann", HOME, seq=5, last_seen=100))
    assert not roster.merge(Member(ANN, "ann", HOME, seq=6, last_seen=200))
    assert roster.get(ANN) == Member(ANN, "ann", HOME, seq=6, last_seen=200)


def test_of_too_many_members_the_one_heard_longest_ago_goes() -> None:
    roster = Roster()
    crowd = [PeerId(number.to_bytes(32, "big")) for number in range(MAX_MEMBERS)]
    for moment, peer in enumerate(crowd):
        roster.merge(Member(peer, "one", last_seen=float(moment + 10)))
    roster.merge(Member(ANN, "ann", last_seen=1.0))
    assert len(roster.members()) == MAX_MEMBERS
    assert roster.get(crowd[0]) is None
    assert roster.get(ANN) is not None, "the newcomer is here now, whatever the clock says"


def test_a_claim_leaves_out_what_we_saw_ourselves() -> None:
    early, late = (Member(ANN, "ann", HOME, b"one", 5, last_seen=t) for t in (1, 2))
    assert early != late
    assert early.claim() == late.claim()


def test_members_are_listed_the_one_heard_last_first() -> None:
    roster = Roster()
    roster.merge(Member(ANN, "ann", last_seen=1))
    roster.merge(Member(BEN, "ben", last_seen=1))
    assert [member.name for member in roster.members()] == ["ann", "ben"]
    roster.saw(BEN, 2.0)
    roster.saw(BEN, 1.5)
    roster.saw(PeerId(bytes(32)), 9.0)
    assert [(m.name, m.last_seen) for m in roster.members()] == [("ben", 2.0), ("ann", 1)]


def test_a_silent_member_is_dropped_in_the_end() -> None:
    roster = Roster()
    roster.merge(Member(ANN, "ann", last_seen=0))
    roster.merge(Member(BEN, "ben", last_seen=10))
    assert roster.expire(MEMBER_LIFETIME_S) == ()
    assert roster.expire(MEMBER_LIFETIME_S + 1) == (ANN,)
    assert roster.get(ANN) is None


def test_of_what_others_pass_on_the_newer_word_wins() -> None:
    roster = Roster()
    assert roster.merge_hearsay(Member(ANN, "ann", HOME, seq=5))
    assert not roster.merge_hearsay(Member(ANN, "older", seq=4))
    assert not roster.merge_hearsay(Member(ANN, "same", seq=5))
    assert roster.merge_hearsay(Member(ANN, "newer", seq=6))
    assert [member.name for member in roster.members()] == ["newer"]


def test_others_words_do_not_push_out_whom_we_have_met(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roster_module, "MAX_HEARSAY", 1)
    roster = Roster()
    roster.merge(Member(ANN, "ann", seq=5))
    assert not roster.merge_hearsay(Member(BEN, "ben"))
    assert roster.merge_hearsay(Member(ANN, "anna", seq=6))
    assert roster.merge(Member(BEN, "ben"))


def test_a_word_is_the_members_own_or_nobodys() -> None:
    ann, ben = Identity.generate(), Identity.generate()
    said = Member(ann.peer, "ann", HOME, b"more", 5, roles=("lend",), distances=((NEAR, 3),))
    word = said.signed(ann.sign)
    assert word.is_signed()
    assert replace(word, last_seen=9.0).is_signed(), "when we heard it is not part of it"
    for changed in (
        replace(word, name="anna"),
        replace(word, seq=6),
        replace(word, candidates=HOME[:1]),
        replace(word, candidates=(replace(HOME[0], kind="mapped"), *HOME[1:])),
        replace(word, candidates=(*HOME[:2], replace(HOME[2], via=ann.peer))),
        replace(word, candidates=(*HOME[:2], replace(HOME[2], via=None))),
        replace(word, payload=b""),
        replace(word, roles=()),
        replace(word, distances=((NEAR, 4),)),
        replace(word, peer=ben.peer),
        replace(word, signature=b""),
        word.signed(ben.sign),
    ):
        assert not changed.is_signed()


def test_other_roles_are_news_and_other_distances_are_not() -> None:
    roster = Roster()
    roster.merge(Member(ANN, "ann", seq=1))
    assert roster.merge(Member(ANN, "ann", seq=2, roles=("lend",)))
    assert not roster.merge(Member(ANN, "ann", seq=3, roles=("lend",), distances=((NEAR, 1),)))


def test_a_roster_of_before_roles_is_read() -> None:
    saved = state()
    members = saved["members"]
    assert isinstance(members, list)
    for key in ("roles", "distances", "signature"):
        del members[0][key]
    (member,) = Roster.from_state_untrusted(saved).members()
    assert (member.roles, member.distances) == ((), ())


def test_who_is_no_member_any_more_is_forgotten_at_once() -> None:
    roster = Roster()
    roster.merge(Member(ANN, "ann"))
    roster.forget(ANN)
    roster.forget(ANN)
    assert roster.members() == ()


def test_a_roster_survives_a_restart() -> None:
    roster = Roster()
    places = (*HOME, Candidate("relay", "10.0.0.2", 3, "host", BEN))
    roles, distances = ("lend", "relay"), ((NEAR, 0), (b"8 bytes!", 13))
    roster.merge(Member(ANN, "ann", places, b"\0\xff", 3, 1.5, b"", roles, distances))
    roster.merge(Member(BEN, "ben"))
    again = Roster.from_state_untrusted(json.loads(json.dumps(roster.to_state())))
    assert again.members() == roster.members()


@pytest.mark.parametrize(
    "claim",
    [
        {"name": ""},
        {"name": "x" * 65},
        {"name": "two\nlines"},
        {"name": "\x1b[2J"},
        {"candidates": HOME * 17},
        {"payload": bytes(513)},
        {"roles": ("lend",) * 9},
        {"roles": ("",)},
        {"roles": ("x" * 17,)},
        {"roles": ("l3nd",)},
        {"roles": ("ländt",)},
        {"distances": ((bytes(8), 1),) * 17},
        {"distances": ((bytes(7), 1),)},
        {"distances": ((bytes(8), -1),)},
        {"distances": ((bytes(8), 14),)},
        {"candidates": (Candidate("quic" * 60, "10.0.0.1", 1),) * 32},
        {"seq": -1},
        {"last_seen": float("inf")},
        {"last_seen": float("nan")},
    ],
)
def test_a_member_may_not_claim_just_anything(claim: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        Member(**{"peer": ANN, "name": "ann", **claim})


def state(**changes: object) -> dict[str, object]:
    roster = Roster()
    roster.merge(Member(ANN, "ann", HOME, b"one", seq=5, last_seen=100))
    saved = roster.to_state()
    saved["members"][0].update(changes)
    return saved


@pytest.mark.parametrize(
    "saved",
    [
        None,
        {"format": 2, "members": []},
        {"format": 1},
        {"format": 1, "members": [None]},
        state(peer="nobody"),
        state(peer=3),
        state(name=["a"]),
        state(candidates=[["quic", 1, 1, "host"]]),
        state(candidates=[["quic", "10.0.0.1", 1.5, "host"]]),
        state(candidates=[["quic", "10.0.0.1", 0, "host"]]),
        state(candidates=[["quic"]]),
        state(payload="%"),
        state(seq=True),
        state(roles=[3]),
        state(distances=[["zz", 1]]),
        state(distances=[[7, 1]]),
        state(candidates=[["relay", "10.0.0.1", 1, "host", "nobody"]]),
        state(last_seen="long ago"),
        state(last_seen=10**400),
    ],
)
def test_a_damaged_roster_is_not_read(saved: object) -> None:
    with pytest.raises(BadRosterState):
        Roster.from_state_untrusted(saved)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner),
)
FIELDS = st.sampled_from(["peer", "name", "candidates", "payload", "seq", "last_seen"])


@given(JSON, st.dictionaries(FIELDS, JSON))
def test_no_state_upsets_the_reader(anything: object, changes: dict[str, object]) -> None:
    for saved in (anything, {"format": 1, "members": anything}, state(**changes)):
        try:
            Roster.from_state_untrusted(saved)
        except BadRosterState:
            continue
