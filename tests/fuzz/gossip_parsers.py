"""What members tell each other of members: records, and the talk about them."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable

import cbor2

from discovery.digest import pack_bits, pack_cells, pack_entries, pack_keys
from discovery.gossip import MAX_ENTRIES, MAX_SENT, Gossip, Talk
from discovery.grants import parse_grant_untrusted
from discovery.roster import MAX_BODY_BYTES, Member, Roster
from meshnode.errors import BadMessage
from meshnode.introduction import parse_records_untrusted, record_pages
from meshnode.messages import parse_message_untrusted
from tests.fuzz.discovery_parsers import NOW, grant_seeds
from tests.fuzz.meshnode_parsers import CBOR
from tests.fuzz.parser import Parser, check
from tests.fuzz.tunnels_parsers import HOSTILE, US
from tunnels.errors import BadFrame
from tunnels.peer import Candidate, PeerId

PEERS = [PeerId(bytes([number]) * 32) for number in range(1, 9)]


@functools.cache
def records() -> tuple[bytes, ...]:
    places = (
        Candidate("quic", "192.0.2.1", 4242, "mapped"),
        Candidate("relay", "2001:db8::1", 443, via=HOSTILE.peer),
    )
    said = Member(
        US.peer, "a worker", places, b"more", NOW * 1000, 0, b"", ("lend",), ((b"8 bytes!", 5),)
    )
    word = said.signed(US.sign)
    pairs = [(word, parse_grant_untrusted(grant)) for grant in grant_seeds()]
    return tuple(cbor2.dumps(page) for one in (pairs[:1], pairs) for page in record_pages(one))


def run_records(data: bytes) -> object:
    found = parse_records_untrusted(parse_message_untrusted(data), NOW)
    for member, _grant in found:
        check(len(member.body()) <= MAX_BODY_BYTES, "a record is small")
        check(member.name.isprintable(), "what is shown is printable")
        check(member.last_seen <= NOW, "nobody is heard from later than now")
    roster = Roster()
    for member, _grant in found:
        roster.merge(member)
    state = json.loads(json.dumps(roster.to_state(), allow_nan=False))
    saved = Roster.from_state_untrusted(state).members()
    check([one.body() for one in saved] == [one.body() for one in roster.members()], "it is kept")
    for page in record_pages(found):
        parse_records_untrusted(parse_message_untrusted(cbor2.dumps(page)), NOW)
    return found


def gossip() -> Gossip:
    one = Gossip(US.peer, lambda _below: 0, 0.0)
    for number, peer in enumerate(PEERS):
        one.put(peer, number, 0.0)
    one.meet(HOSTILE.peer)
    return one


def run_gossip(data: bytes) -> object:
    """The same message in each place where one may come."""
    message = parse_message_untrusted(data)
    one, taken = gossip(), 0
    talk, told = Talk(HOSTILE.peer, {}), Talk(HOSTILE.peer, {PEERS[0]: 0})
    places: tuple[Callable[[], int], ...] = (
        lambda: len(one.hear_untrusted(HOSTILE.peer, message, 0.0)),
        lambda: sum(map(len, one.compare_untrusted(HOSTILE.peer, message, 0.0))),
        lambda: len(one.narrow_untrusted(message) or ()),
        lambda: len(one.wanted_untrusted(told, message, 0.0)),
        lambda: len(one.compared_untrusted(talk, message, 0.0)[0]),
    )
    for hear in places:
        try:
            count = hear()
        except BadFrame:
            continue
        taken += 1
        check(count <= 2 * MAX_SENT, "no more is asked for or sent than is bounded")
    check(len(one) == len(PEERS), "nothing is known by talk alone")
    check(len(one._asked) <= MAX_ENTRIES, "what is asked for is bounded")
    if not taken:
        raise BadFrame("no message anywhere")
    return taken


def talk_seeds() -> list[bytes]:
    one = gossip()
    digest = one._digest
    entries = pack_entries(dict.fromkeys(PEERS, 9))
    return [
        cbor2.dumps(message)
        for message in (
            {"mesh": bytes(32), "news": entries},
            {"mesh": bytes(32), "root": one.root()},
            {"cells": pack_cells(digest.cells())},
            {"cells": pack_cells(bytes(8) for _ in range(64))},
            {"of": pack_bits(range(0, 64, 3)), "entries": entries},
            {"want": pack_keys(PEERS), "pages": 3},
        )
    ]


PARSERS = (
    Parser("records of members", (BadMessage,), lambda: list(records()), run_records, format=CBOR),
    Parser("gossip", (BadMessage, BadFrame), talk_seeds, run_gossip, format=CBOR),
)
