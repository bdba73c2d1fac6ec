"""What a stranger says of itself is taken in its known shape or refused."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from discovery.grants import Role, encode_grant, issue_root
from meshnode.errors import BadMessage
from meshnode.introduction import MAX_HELLO_GRANTS, parse_grants_untrusted, parse_member_untrusted
from tunnels.identity import Identity
from tunnels.peer import Candidate, PeerId

ANN = PeerId(bytes(32))
PLACE = ["quic", "fe80::1%eth0", 4433]


def said(**changes: object) -> dict[str, object]:
    return {"name": "ann", "seq": 5, "candidates": [PLACE], **changes}


def test_what_a_member_says_is_kept() -> None:
    member = parse_member_untrusted(ANN, said(), 7.9)
    assert member.candidates == (Candidate("quic", "fe80::1%eth0", 4433),)
    assert (member.name, member.seq, member.last_seen) == ("ann", 5, 7)


def test_a_name_is_made_fit_to_be_shown() -> None:
    assert parse_member_untrusted(ANN, said(name="\x1b[2Jann"), 0).name == "[2Jann"
    assert parse_member_untrusted(ANN, said(name="\x1b"), 0).name == ANN.short
    assert len(parse_member_untrusted(ANN, said(name="x" * 100), 0).name) == 64


@pytest.mark.parametrize(
    "row",
    [
        ["quic", "fe80::1%\x1b[2J", 4433],
        ["\x1b[2J", "11.0.0.1", 4433],
        ["quic", 7, 4433],
        ["quic", "nowhere", 4433],
        ["quic", "11.0.0.1"],
        "quic",
    ],
)
def test_an_address_that_cannot_be_dialled_or_shown_is_refused(row: object) -> None:
    with pytest.raises(BadMessage, match="an address that is none"):
        parse_member_untrusted(ANN, said(candidates=[row]), 0)


@pytest.mark.parametrize("changes", [{"name": 7}, {"seq": "5"}, {"candidates": None}])
def test_another_shape_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(BadMessage, match="unknown shape"):
        parse_member_untrusted(ANN, said(**changes), 0)


def test_grants_are_read_and_bad_ones_refused() -> None:
    root = Identity.generate()
    grant = issue_root(
        root.sign, mesh=root.peer.key, peer=ANN, role=Role.PEER, issued_at=9, may_invite=False
    )
    row = encode_grant(grant)
    assert parse_grants_untrusted({"grants": [row]}) == [grant]
    for rows in (None, [row] * (MAX_HELLO_GRANTS + 1)):
        with pytest.raises(BadMessage, match="unknown shape"):
            parse_grants_untrusted({"grants": rows})
    for bad in (b"", row[:-1], 7):
        with pytest.raises(BadMessage, match="a bad grant"):
            parse_grants_untrusted({"grants": [bad]})


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8) | st.binary(max_size=8),
    lambda inner: st.lists(inner, max_size=4),
)


@given(st.fixed_dictionaries({}, optional=dict.fromkeys((*said(), "grants"), ANYTHING)))
def test_no_introduction_upsets_the_reader(message: dict[str, Any]) -> None:
    for parse in (parse_grants_untrusted, lambda given: parse_member_untrusted(ANN, given, 0)):
        try:
            parse(message)
        except BadMessage:
            continue
