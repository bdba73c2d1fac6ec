"""What a stranger says of itself is taken in its known shape or refused."""

from __future__ import annotations

from typing import Any

import cbor2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from discovery.grants import Role, encode_grant, issue_root
from discovery.revocations import MAX_SPARED, REMEMBERED_S, Kind, Revocation
from discovery.roster import Member
from meshnode.errors import BadMessage
from meshnode.introduction import (
    MAX_CANDIDATES,
    MAX_HELLO_GRANTS,
    MAX_KIND_CHARS,
    MAX_NAME_CHARS,
    MAX_RECORDS,
    member_message,
    parse_grants_untrusted,
    parse_member_untrusted,
    parse_records_untrusted,
    parse_revocation_page_untrusted,
    record_pages,
    revocation_pages,
)
from meshnode.messages import SMALL_MESSAGE_BYTES
from tunnels.identity import Identity
from tunnels.peer import Candidate, PeerId

ANN = PeerId(bytes(32))
NEAR = b"8 bytes!"
PLACE = ["quic", "fe80::1%eth0", 4433, "host"]


def said(**changes: object) -> dict[str, object]:
    return {"name": "ann", "seq": 5, "candidates": [PLACE], **changes}


def test_what_a_member_says_is_kept() -> None:
    member = parse_member_untrusted(ANN, said(), 7.9)
    assert member.candidates == (Candidate("quic", "fe80::1%eth0", 4433),)
    assert (member.name, member.seq, member.last_seen) == ("ann", 5, 7)


def test_a_way_through_a_relay_is_kept() -> None:
    way = Candidate("relay", "203.0.113.5", 443, via=PeerId(b"r" * 32))
    word = Member(ANN, "ann", (way,), seq=5, last_seen=7)
    assert parse_member_untrusted(ANN, cbor2.loads(cbor2.dumps(member_message(word))), 7) == word


@pytest.mark.parametrize("kind", ["host", "mapped", "reflexive", "given", "ofalatermesh"])
def test_where_a_members_address_comes_from_is_kept_and_signed(kind: str) -> None:
    """That a router's port is closed says nothing of the member."""
    ann = Identity.generate()
    place = Candidate("quic", "203.0.113.9", 40000, kind)
    word = Member(ann.peer, "ann", (place,), seq=5, last_seen=7).signed(ann.sign)
    told = cbor2.loads(cbor2.dumps(member_message(word)))
    assert parse_member_untrusted(ann.peer, told, 7).candidates == (place,)
    assert parse_member_untrusted(ann.peer, told, 7).is_signed()
    told["candidates"][0][3] = "host" if kind != "host" else "mapped"
    assert not parse_member_untrusted(ann.peer, told, 7).is_signed()


def test_a_name_is_made_fit_to_be_shown() -> None:
    assert parse_member_untrusted(ANN, said(name="\x1b[2Jann"), 0).name == "[2Jann"
    assert parse_member_untrusted(ANN, said(name="\x1b"), 0).name == ANN.short
    assert len(parse_member_untrusted(ANN, said(name="x" * 100), 0).name) == 64


@pytest.mark.parametrize(
    "row",
    [
        ["quic", "fe80::1%\x1b[2J", 4433, "host"],
        ["\x1b[2J", "11.0.0.1", 4433, "host"],
        ["quic", 7, 4433, "host"],
        ["quic", "11.0.0.1", True, "host"],
        ["quic", "nowhere", 4433, "host"],
        ["quic", "11.0.0.1", 4433],
        ["quic", "11.0.0.1", 4433, 7],
        ["quic", "11.0.0.1", 4433, ""],
        ["quic", "11.0.0.1", 4433, "\x1b[2J"],
        ["quic", "11.0.0.1", 4433, "h\u00f6st"],
        ["quic", "11.0.0.1", 4433, "k" * (MAX_KIND_CHARS + 1)],
        ["relay", "11.0.0.1", 4433, bytes(32)],
        ["relay", "11.0.0.1", 4433, "host", b"short"],
        ["relay", "11.0.0.1", 4433, "host", "r" * 32],
        ["relay", "11.0.0.1", 4433, "host", bytes(32), 1],
        "quic",
    ],
)
def test_an_address_that_cannot_be_dialled_or_shown_is_refused(row: object) -> None:
    with pytest.raises(BadMessage, match="an address that is none"):
        parse_member_untrusted(ANN, said(candidates=[row]), 0)


@pytest.mark.parametrize(
    "changes", [{"name": 7}, {"seq": "5"}, {"seq": True}, {"candidates": None}]
)
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
    with pytest.raises(BadMessage, match="two grants of one mesh"):
        parse_grants_untrusted({"grants": [row, row]})


def removals(count: int) -> list[Revocation]:
    """Statements as large as they get."""
    spared = tuple(n.to_bytes(16, "big") for n in range(MAX_SPARED))
    until = 5 + REMEMBERED_S
    return [
        Revocation(bytes(32), Kind.PEER, bytes([n]) * 32, 5, until, ANN, spared, bytes(64))
        for n in range(count)
    ]


def test_revocations_survive_their_paging() -> None:
    pages = revocation_pages(removals(20))
    assert len(pages) > 1
    parsed = [parse_revocation_page_untrusted(page) for page in pages]
    assert [one for page, _ in parsed for one in page] == removals(20)
    assert [more for _, more in parsed] == [True] * (len(pages) - 1) + [False]
    assert all(len(cbor2.dumps(page)) < SMALL_MESSAGE_BYTES for page in pages)
    assert parse_revocation_page_untrusted(revocation_pages([])[0]) == ([], False)


@pytest.mark.parametrize("changes", [{"revocations": 7}, {"more": 1}, {"revocations": [b""]}])
def test_a_page_of_another_shape_is_refused(changes: dict[str, Any]) -> None:
    page = {"revocations": [], "more": False, **changes}
    with pytest.raises(BadMessage):
        parse_revocation_page_untrusted(page)


@pytest.mark.parametrize("row", [7, b"", b"\x01" + bytes(200)])
def test_a_bad_revocation_is_refused(row: object) -> None:
    with pytest.raises(BadMessage, match="bad revocation"):
        parse_revocation_page_untrusted({"revocations": [row], "more": False})


def record(**changes: object) -> dict[str, object]:
    root = Identity.generate()
    grant = issue_root(
        root.sign, mesh=root.peer.key, peer=ANN, role=Role.PEER, issued_at=9, may_invite=False
    )
    return said(peer=ANN.key, grant=encode_grant(grant), signature=bytes(64), **changes)


def test_records_of_others_are_read() -> None:
    ((member, grant),) = parse_records_untrusted({"records": [record(seq=7000)]}, 100)
    assert (member.peer, member.name, member.seq, member.last_seen) == (ANN, "ann", 7000, 7)
    assert member.signature == bytes(64)
    assert grant.peer == ANN
    ((late, _),) = parse_records_untrusted({"records": [record(seq=10**9)]}, 100)
    assert late.last_seen == 100, "no later than now"


def test_what_a_record_says_besides_is_read() -> None:
    more: dict[str, object] = {"payload": b"more", "roles": ["lend"], "distances": [[NEAR, 3]]}
    member = parse_member_untrusted(ANN, said(**more), 0)
    assert (member.payload, member.roles) == (b"more", ("lend",))
    assert member.distances == ((NEAR, 3),)
    assert parse_member_untrusted(ANN, member_message(member), 0) == member


@pytest.mark.parametrize(
    "changes",
    [
        {"payload": "text"},
        {"payload": bytes(513)},
        {"roles": "lend"},
        {"roles": [7]},
        {"roles": ["two words"]},
        {"distances": 7},
        {"distances": [7]},
        {"distances": [[NEAR]]},
        {"distances": [[NEAR, "3"]]},
        {"distances": [["text", 3]]},
        {"distances": [[NEAR, 10**30]]},
        {"distances": [[NEAR, False]]},
        {"seq": True},
        {"candidates": [["quic", "192.0.2.1", True, "host"]]},
    ],
)
def test_what_a_record_says_in_another_shape_is_refused(changes: dict[str, object]) -> None:
    with pytest.raises(BadMessage):
        parse_member_untrusted(ANN, said(**changes), 0)


def test_a_page_of_the_largest_records_is_one_message() -> None:
    far = "2001:db8:ffff:ffff:ffff:ffff:ffff:ffff"
    place = ["r" * MAX_NAME_CHARS, far, 65535, "k" * MAX_KIND_CHARS, bytes(32)]
    largest = record(
        name="n" * MAX_NAME_CHARS,
        candidates=[place] * MAX_CANDIDATES,
        payload=bytes(512),
        roles=["x" * 16] * 8,
        distances=[[NEAR, 13]] * 16,
        seq=2**62,
    )
    grant = largest["grant"]
    assert isinstance(grant, bytes)
    pairs = parse_records_untrusted({"records": [largest] * MAX_RECORDS}, 100)
    (page,) = record_pages(pairs)
    longer_chains = MAX_RECORDS * 2 * len(grant)
    assert len(cbor2.dumps(page)) + longer_chains < SMALL_MESSAGE_BYTES


def test_records_survive_their_paging() -> None:
    (pair,) = parse_records_untrusted({"records": [record(seq=7000)]}, 100)
    pages = record_pages([pair] * (MAX_RECORDS + 1))
    assert [len(page["records"]) for page in pages] == [MAX_RECORDS, 1]
    assert parse_records_untrusted(pages[1], 100) == [pair]
    assert record_pages([]) == []


@pytest.mark.parametrize(
    "records",
    [
        None,
        [record()] * (MAX_RECORDS + 1),
        [7],
        [{}],
        [{**record(), "peer": b"short"}],
        [{**record(), "grant": b""}],
        [{**record(), "name": 7}],
    ],
    ids=["none", "many", "row", "empty", "key", "grant", "name"],
)
def test_records_of_another_shape_are_refused(records: object) -> None:
    with pytest.raises(BadMessage):
        parse_records_untrusted({"records": records}, 100)


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
