"""Rights come from the root key and only shrink on their way."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from discovery.grants import (
    GRANT_LABEL,
    GRANT_LIFETIME_S,
    GRANTABLE,
    LENDERS,
    MAX_AHEAD_S,
    MAX_DEPTH,
    ROLE_CODES,
    SERVICES,
    Grant,
    GrantError,
    GrantExpired,
    Role,
    encode_grant,
    grant_digest,
    issue,
    issue_root,
    may_open,
    parse_grant_untrusted,
    renewal_due,
    verify_grant,
)
from tunnels.identity import Identity

ROOT, FOUNDER, FRIEND, COUSIN, STRANGER = (Identity.generate() for _ in range(5))
MESH = ROOT.peer.key
NOW = 1_000_000
LATER = NOW + GRANT_LIFETIME_S


def founder_grant(role: Role = Role.PEER, *, may_invite: bool = True) -> Grant:
    return issue_root(
        ROOT.sign,
        mesh=MESH,
        peer=FOUNDER.peer,
        role=role,
        issued_at=NOW,
        may_invite=may_invite,
    )


def friend_grant(role: Role = Role.PEER, issued_at: int = NOW) -> Grant:
    return issue(
        founder_grant(),
        FOUNDER.sign,
        peer=FRIEND.peer,
        role=role,
        issued_at=issued_at,
        may_invite=True,
    )


def cousin_grant() -> Grant:
    return issue(
        friend_grant(),
        FRIEND.sign,
        peer=COUSIN.peer,
        role=Role.WORKER,
        issued_at=NOW,
        may_invite=True,
    )


def resigned(grant: Grant, signer: Identity) -> Grant:
    """A forger's grant: well signed, by whoever the forger is."""
    return replace(grant, signature=signer.sign(GRANT_LABEL, grant.body()))


def test_a_chain_of_three_makes_a_member_and_ends_there() -> None:
    grant = cousin_grant()
    verify_grant(grant, mesh=MESH, peer=COUSIN.peer, now=NOW)
    assert [link.depth for link in grant.chain()] == [1, 2, MAX_DEPTH]
    assert not grant.may_invite
    with pytest.raises(GrantError, match="no right to invite"):
        issue(
            grant,
            COUSIN.sign,
            peer=STRANGER.peer,
            role=Role.WORKER,
            issued_at=NOW,
            may_invite=False,
        )


def test_a_member_who_may_not_invite_cannot() -> None:
    with pytest.raises(GrantError, match="no right to invite"):
        issue(
            founder_grant(may_invite=False),
            FOUNDER.sign,
            peer=FRIEND.peer,
            role=Role.PEER,
            issued_at=NOW,
            may_invite=False,
        )


def test_a_worker_cannot_make_an_orchestrator() -> None:
    with pytest.raises(GrantError, match="role worker cannot make anyone orchestrator"):
        issue(
            founder_grant(Role.WORKER),
            FOUNDER.sign,
            peer=FRIEND.peer,
            role=Role.ORCHESTRATOR,
            issued_at=NOW,
            may_invite=False,
        )


def test_a_grant_never_outlasts_the_one_it_hangs_on() -> None:
    later = friend_grant(issued_at=NOW + 500)
    assert later.expires_at == LATER
    longer = resigned(replace(later, expires_at=LATER + 1), FOUNDER)
    with pytest.raises(GrantError, match="outlasts"):
        verify_grant(longer, mesh=MESH, peer=FRIEND.peer, now=NOW)


def test_a_grant_ends_when_it_says() -> None:
    verify_grant(friend_grant(), mesh=MESH, peer=FRIEND.peer, now=LATER - 1)
    with pytest.raises(GrantExpired):
        verify_grant(friend_grant(), mesh=MESH, peer=FRIEND.peer, now=LATER)


def test_a_grant_of_tomorrow_is_the_fault_of_a_clock() -> None:
    verify_grant(friend_grant(), mesh=MESH, peer=FRIEND.peer, now=NOW - MAX_AHEAD_S)
    with pytest.raises(GrantError, match="set the clocks"):
        verify_grant(friend_grant(), mesh=MESH, peer=FRIEND.peer, now=NOW - MAX_AHEAD_S - 1)


@pytest.mark.parametrize(
    "dates",
    [
        {"expires_at": LATER + 1},
        {"since": NOW + 1},
        {"expires_at": NOW},
        {"issued_at": NOW - 1, "since": NOW - 1},
    ],
    ids=["too-long", "since-after-issue", "never-good", "too-long-by-backdating"],
)
def test_dates_that_contradict_each_other_are_refused(dates: dict[str, Any]) -> None:
    forged = resigned(replace(founder_grant(), **dates), ROOT)
    with pytest.raises(GrantError, match="dates contradict"):
        verify_grant(forged, mesh=MESH, peer=FOUNDER.peer, now=NOW)


def test_a_renewal_is_due_when_half_the_time_is_over() -> None:
    half_s = NOW + GRANT_LIFETIME_S // 2
    assert not renewal_due(friend_grant(), half_s)
    assert renewal_due(friend_grant(), half_s + 1)


def test_a_renewed_grant_keeps_the_day_its_holder_was_let_in() -> None:
    renewed = issue(
        founder_grant(),
        FOUNDER.sign,
        peer=FRIEND.peer,
        role=Role.PEER,
        issued_at=NOW + 500,
        since=NOW,
        may_invite=True,
    )
    verify_grant(renewed, mesh=MESH, peer=FRIEND.peer, now=NOW)
    assert (renewed.since, renewed.issued_at) == (NOW, NOW + 500)
    assert grant_digest(renewed) != grant_digest(friend_grant())


def test_a_grant_is_good_for_one_mesh_and_one_node() -> None:
    with pytest.raises(GrantError, match="another mesh"):
        verify_grant(friend_grant(), mesh=STRANGER.peer.key, peer=FRIEND.peer, now=NOW)
    with pytest.raises(GrantError, match="another node"):
        verify_grant(friend_grant(), mesh=MESH, peer=STRANGER.peer, now=NOW)


@pytest.mark.parametrize(
    ("forged", "reason"),
    [
        (resigned(replace(founder_grant(), issuer=STRANGER.peer), STRANGER), "root key"),
        (resigned(replace(founder_grant(), depth=2), ROOT), "root key"),
        (resigned(founder_grant(), STRANGER), "not its issuer's"),
        (replace(founder_grant(), may_invite=False), "not its issuer's"),
        (replace(founder_grant(), role=Role.CLIENT), "not its issuer's"),
    ],
    ids=["self-made", "odd-depth", "foreign-signature", "changed-right", "changed-role"],
)
def test_a_root_grant_nobody_signed_is_refused(forged: Grant, reason: str) -> None:
    with pytest.raises(GrantError, match=reason):
        verify_grant(forged, mesh=MESH, peer=FOUNDER.peer, now=NOW)


@pytest.mark.parametrize(
    "change",
    [
        {
            "parent": issue_root(
                ROOT.sign,
                mesh=MESH,
                peer=STRANGER.peer,
                role=Role.PEER,
                issued_at=NOW,
                may_invite=True,
            )
        },
        {"depth": 3},
        {"parent": founder_grant(may_invite=False)},
        {"parent": founder_grant(Role.CLIENT)},
    ],
    ids=["other-parent", "skipped-depth", "parent-may-not", "role-grows"],
)
def test_a_member_cannot_stretch_its_chain(change: dict[str, Any]) -> None:
    forged = resigned(replace(friend_grant(), **change), FOUNDER)
    with pytest.raises(GrantError):
        verify_grant(forged, mesh=MESH, peer=FRIEND.peer, now=NOW)


def test_a_third_link_that_claims_the_right_to_invite_is_refused() -> None:
    """A founder would renew it as a second link, which has that right."""
    generous = resigned(replace(cousin_grant(), role=Role.PEER, may_invite=True), FRIEND)
    with pytest.raises(GrantError, match="right to invite beyond"):
        verify_grant(generous, mesh=MESH, peer=COUSIN.peer, now=NOW)
    fourth = Grant(
        MESH, STRANGER.peer, Role.PEER, NOW, NOW, LATER, False, 4, COUSIN.peer, b"", generous
    )
    with pytest.raises(GrantError, match="right to invite"):
        verify_grant(resigned(fourth, COUSIN), mesh=MESH, peer=STRANGER.peer, now=NOW)


def test_a_forged_link_in_the_middle_spoils_the_chain() -> None:
    forged = replace(cousin_grant(), parent=resigned(friend_grant(), STRANGER))
    with pytest.raises(GrantError, match="not its issuer's"):
        verify_grant(forged, mesh=MESH, peer=COUSIN.peer, now=NOW)


def test_a_chain_through_another_mesh_is_refused() -> None:
    other = replace(founder_grant(), mesh=STRANGER.peer.key)
    forged = resigned(replace(friend_grant(), parent=other), FOUNDER)
    with pytest.raises(GrantError):
        verify_grant(forged, mesh=MESH, peer=FRIEND.peer, now=NOW)


def test_roles_pass_on_no_service_they_lack() -> None:
    for role, children in GRANTABLE.items():
        for child in children:
            assert SERVICES[child] <= SERVICES[role]
            assert child not in LENDERS or role in LENDERS
    assert set(GRANTABLE) == set(SERVICES) == set(ROLE_CODES) == set(Role)


@pytest.mark.parametrize(
    ("role", "service", "allowed"),
    [
        (Role.PEER, "control", True),
        (Role.PEER, "rpc/7f", True),
        (Role.PEER, "rpc/", False),
        (Role.PEER, "rpc", False),
        (Role.PEER, "control/x", False),
        (Role.PEER, "admin", False),
        (Role.PEER, "", False),
        (Role.WORKER, "rpc/7f", False),
        (Role.WORKER, "control", False),
        (Role.PEER, "pull", True),
        (Role.WORKER, "store", True),
        (Role.WORKER, "pull", False),
        (Role.WORKER, "push/7f", True),
        (Role.WORKER, "probe", True),
        (Role.ORCHESTRATOR, "probe", True),
        (Role.CLIENT, "probe", False),
        (Role.RELAY, "probe", False),
        (Role.ORCHESTRATOR, "rpc/7f/x", True),
        (Role.ORCHESTRATOR, "push/7f", False),
        (Role.ORCHESTRATOR, "pull", True),
        (Role.CLIENT, "http", True),
        (Role.CLIENT, "store", False),
        (Role.CLIENT, "pull", False),
        (Role.RELAY, "http", False),
    ],
)
def test_a_role_opens_its_services_and_no_other(role: Role, service: str, allowed: bool) -> None:
    assert may_open(role, service) is allowed


def test_joining_is_open_to_every_role() -> None:
    assert all(may_open(role, "join") and may_open(role, "hello") for role in Role)


def test_a_grant_survives_its_encoding() -> None:
    for grant in (founder_grant(), friend_grant(Role.RELAY), cousin_grant()):
        assert parse_grant_untrusted(encode_grant(grant)) == grant


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "format"),
        (b"\x01" + encode_grant(founder_grant())[1:], "format"),
        (b"\x02", "length"),
        (encode_grant(founder_grant()) + b"x", "length"),
        (encode_grant(cousin_grant()) + encode_grant(founder_grant())[1:], "length"),
        (
            encode_grant(founder_grant())[:90] + b"\x02" + encode_grant(founder_grant())[91:],
            "damaged",
        ),
    ],
    ids=["empty", "newer", "no-link", "extra-byte", "four-links", "odd-flag"],
)
def test_a_damaged_grant_is_told(data: bytes, reason: str) -> None:
    with pytest.raises(GrantError, match=reason):
        parse_grant_untrusted(data)


def test_an_unknown_role_is_told() -> None:
    data = bytearray(encode_grant(founder_grant()))
    data[1 + 64] = 99
    with pytest.raises(GrantError, match="newer mesh"):
        parse_grant_untrusted(bytes(data))


@given(st.binary(max_size=600) | st.binary(min_size=187, max_size=187).map(lambda b: b"\x02" + b))
def test_no_bytes_upset_the_parser(data: bytes) -> None:
    try:
        grant = parse_grant_untrusted(data)
    except GrantError:
        return
    assert encode_grant(grant) == data


@given(st.integers(min_value=0, max_value=8 * 561 - 1))
def test_any_flipped_bit_spoils_a_grant(bit: int) -> None:
    data = bytearray(encode_grant(cousin_grant()))
    assert len(data) == 562
    data[1 + bit // 8] ^= 1 << bit % 8
    with pytest.raises(GrantError):
        verify_grant(parse_grant_untrusted(bytes(data)), mesh=MESH, peer=COUSIN.peer, now=NOW)
