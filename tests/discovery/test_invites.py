"""The inviter's book: uses are burned once a joiner, secrets are not kept."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from discovery.grants import Role
from discovery.invites import (
    LISTED_AFTER_END_S,
    BadInviteState,
    InviteBook,
    InviteExpired,
    InviteUsedUp,
    InviteWithdrawn,
    JoinerRemoved,
    UnknownInvite,
    WrongSecret,
)
from discovery.token import Secret
from tunnels.peer import PeerId

ID = b"invite-1"
SECRET = Secret(b"sixteen bytes ok")
ANN, BEN, CAT = (PeerId(bytes([n]) * 32) for n in (1, 2, 3))
MESH = bytes(range(32))
NOW = 1000.0
MADE = 900


def book(uses: int = 2, expires_at: int = 2000) -> InviteBook:
    book = InviteBook()
    book.create(
        ID,
        SECRET,
        mesh=MESH,
        role=Role.WORKER,
        created_at=MADE,
        expires_at=expires_at,
        uses=uses,
    )
    return book


def reread(book: InviteBook) -> InviteBook:
    """The book after a restart."""
    return InviteBook.from_state_untrusted(json.loads(json.dumps(book.to_state())))


def test_each_joiner_burns_one_use_until_none_is_left() -> None:
    invites = book(uses=2)
    first = invites.redeem(ID, SECRET, ANN, NOW)
    assert (first.role, first.uses_left, first.repeated) == (Role.WORKER, 1, False)
    assert invites.redeem(ID, SECRET, BEN, NOW).uses_left == 0
    with pytest.raises(InviteUsedUp, match="used up"):
        invites.redeem(ID, SECRET, CAT, NOW)


def test_a_joiner_whose_answer_was_lost_burns_nothing_more() -> None:
    invites = book(uses=1)
    invites.redeem(ID, SECRET, ANN, NOW)
    again = reread(invites).redeem(ID, SECRET, ANN, NOW)
    assert (again.uses_left, again.repeated) == (0, True)


def test_burned_uses_survive_a_restart() -> None:
    invites = book(uses=1)
    invites.redeem(ID, SECRET, ANN, NOW)
    with pytest.raises(InviteUsedUp):
        reread(invites).redeem(ID, SECRET, BEN, NOW)


def test_each_refusal_says_which_it_is() -> None:
    with pytest.raises(UnknownInvite, match="knows no such invite"):
        book().redeem(b"another!", SECRET, ANN, NOW)
    with pytest.raises(WrongSecret, match="secret is wrong"):
        book().redeem(ID, Secret(b"x" * 16), ANN, NOW)
    with pytest.raises(InviteExpired, match="expired"):
        book().redeem(ID, SECRET, ANN, 2000.0)


def test_a_refused_try_burns_nothing() -> None:
    invites = book(uses=1)
    with pytest.raises(WrongSecret):
        invites.redeem(ID, Secret(b"x" * 16), ANN, NOW)
    assert invites.redeem(ID, SECRET, ANN, NOW).uses_left == 0


def test_an_expired_invite_is_listed_for_a_while_and_then_forgotten() -> None:
    invites = book()
    assert invites.forget_old(1999.0 + LISTED_AFTER_END_S) == 0
    with pytest.raises(InviteExpired):
        invites.redeem(ID, SECRET, ANN, 2000.0)
    assert invites.forget_old(2000.0 + LISTED_AFTER_END_S) == 1
    with pytest.raises(UnknownInvite):
        invites.redeem(ID, SECRET, ANN, NOW)


def test_a_withdrawn_invite_lets_nobody_in_also_after_a_restart() -> None:
    invites = book()
    invites.redeem(ID, SECRET, ANN, NOW)
    assert invites.withdraw(ID)
    assert not invites.withdraw(ID)
    assert not invites.withdraw(b"another!")
    for joiner in (ANN, BEN):
        with pytest.raises(InviteWithdrawn, match="withdrawn"):
            reread(invites).redeem(ID, SECRET, joiner, NOW)


def test_who_was_put_out_needs_an_invite_made_after_that() -> None:
    invites = book()
    with pytest.raises(JoinerRemoved, match="after the invite was made"):
        invites.redeem(ID, SECRET, ANN, NOW, removed_at=MADE)
    assert invites.redeem(ID, SECRET, ANN, NOW, removed_at=MADE - 1).mesh == MESH


def test_the_book_can_be_read_through() -> None:
    invites = book()
    assert [invite.id for invite in invites.invites()] == [ID]
    assert invites.get(ID) == invites.invites()[0]
    assert invites.get(b"another!") is None


def test_an_invite_is_entered_once_and_in_range() -> None:
    invites = book()
    for id, uses in ((ID, 1), (b"short", 1), (b"invite-2", 0), (b"invite-2", 65536)):
        with pytest.raises(ValueError):
            invites.create(
                id,
                SECRET,
                mesh=MESH,
                role=Role.PEER,
                created_at=MADE,
                expires_at=2000,
                uses=uses,
            )


def test_neither_state_nor_repr_hold_the_secret() -> None:
    invites = book()
    shown = json.dumps(invites.to_state()) + repr(vars(invites))
    assert SECRET.reveal().hex() not in shown
    assert "sixteen" not in shown


def state(**changes: object) -> dict[str, object]:
    saved = book().to_state()
    saved["invites"][0].update(changes)
    return saved


@pytest.mark.parametrize(
    "saved",
    [
        None,
        [],
        {},
        {"format": 9, "invites": []},
        {"format": 2},
        {"format": 2, "invites": 3},
        {"format": 1, "invites": []},
        state(mesh="00"),
        state(created_at="now"),
        {"format": 2, "invites": [3]},
        {"format": 2, "invites": ["text"]},
        state(id="zz"),
        state(id="00"),
        state(secret_hash="00"),
        state(secret_hash=None),
        state(role="king"),
        state(expires_at="soon"),
        state(uses=True),
        state(uses=65536),
        state(uses=0, redeemed_by=[str(ANN)]),
        state(redeemed_by=["someone"]),
        state(redeemed_by=[7]),
        state(redeemed_by=None),
    ],
)
def test_a_damaged_book_is_not_read(saved: object) -> None:
    with pytest.raises(BadInviteState):
        InviteBook.from_state_untrusted(saved)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner),
)
FIELDS = st.sampled_from(["id", "secret_hash", "mesh", "role", "expires_at", "uses", "redeemed_by"])


@given(JSON, st.dictionaries(FIELDS, JSON))
def test_no_state_upsets_the_reader(anything: object, changes: dict[str, object]) -> None:
    for saved in (anything, {"format": 2, "invites": anything}, state(**changes)):
        try:
            InviteBook.from_state_untrusted(saved)
        except BadInviteState:
            continue
