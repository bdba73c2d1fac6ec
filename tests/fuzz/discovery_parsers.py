"""Tokens, grants, revocations, and what `discovery` reads back from disk."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

from discovery import reply
from discovery.grants import (
    GrantError,
    Role,
    encode_grant,
    issue,
    issue_root,
    parse_grant_untrusted,
    verify_grant,
)
from discovery.invites import BadInviteState, InviteBook, InviteRefused
from discovery.roster import BadRosterState, Member, Roster
from discovery.spelling import read_untrusted, spell
from discovery.token import (
    PREFIX,
    SECRET_BYTES,
    BadToken,
    Secret,
    Token,
    encode,
    parse_untrusted,
)
from tests.fuzz.mutation import JsonFormat, SealedFormat
from tests.fuzz.parser import Parser, check, text_of
from tests.fuzz.script import Script
from tests.fuzz.tunnels_parsers import HOSTILE, US, identity
from tunnels.peer import Candidate, PeerId

NOW = 1_800_000_000
ROOT = identity(5)
MESH = ROOT.peer.key
SECRET = Secret(bytes(range(16)))


# --- tokens -------------------------------------------------------------------------------------


def token(*ways: Candidate) -> Token:
    return Token(
        mesh=MESH,
        inviter=US.peer,
        id=b"invite-1",
        secret=SECRET,
        role=Role.PEER,
        expires_at=NOW + 3600,
        uses=8,
        candidates=(
            Candidate("quic", "192.0.2.1", 4242),
            Candidate("quic", "2001:db8::1", 4242, "given"),
            *ways,
        ),
    )


def token_bodies() -> list[bytes]:
    """Payloads under the checksum: of a plain token, and of one with relays."""
    through = Candidate("relay", "192.0.2.9", 443, via=PeerId(bytes(range(32))))
    mark = Candidate("relay", "192.0.2.1", 4242, via=US.peer)
    tokens = token(), token(through, mark)
    return [read_untrusted(encode(one)[len(PREFIX) :])[0] for one in tokens]


def seal_token(body: bytes) -> bytes:
    """The right checksum over a wrong body, spelled as a token is."""
    return (PREFIX + spell(body)).encode()


def run_token(data: bytes) -> Token:
    found = parse_untrusted(text_of(data))
    check(parse_untrusted(encode(found)) == found, "a token reads back")
    check("secret=Secret(…)" in repr(found), "a token's repr hides its secret")
    return found


# --- reply codes --------------------------------------------------------------------------------

INVITE_HASH = bytes(range(32))


def reply_bodies() -> list[bytes]:
    """Of a code, and of one with a place at a TURN server."""
    addresses = (("192.0.2.1", 9), ("2001:db8::1", 7))
    plain = reply.Reply(b"invite-1", b"nonce--1", addresses)
    at_turn = replace(plain, places=(("198.51.100.2", 49152),))
    codes = [reply.encode(one, INVITE_HASH) for one in (plain, at_turn)]
    return [read_untrusted(code[len(reply.PREFIX) :])[0] for code in codes]


def seal_reply(body: bytes) -> bytes:
    return (reply.PREFIX + spell(body)).encode()


def run_reply(data: bytes) -> reply.Reply:
    found = reply.parse_untrusted(text_of(data))
    again = reply.parse_untrusted(reply.encode(found, INVITE_HASH))
    check(again == found, "a reply code reads back")
    check(
        not reply.check(found, INVITE_HASH) or found.signed in reply_bodies(),
        "nobody without the secret makes a code that holds",
    )
    return found


# --- grants -------------------------------------------------------------------------------------


def grant_seeds() -> list[bytes]:
    top = issue_root(
        ROOT.sign, mesh=MESH, peer=US.peer, role=Role.PEER, issued_at=NOW, may_invite=True
    )
    second = issue(top, US.sign, peer=HOSTILE.peer, role=Role.PEER, issued_at=NOW, may_invite=True)
    third = issue(
        second,
        HOSTILE.sign,
        peer=identity(6).peer,
        role=Role.WORKER,
        issued_at=NOW,
        may_invite=False,
    )
    return [encode_grant(one) for one in (top, second, third)]


def run_grant(data: bytes) -> object:
    grant = parse_grant_untrusted(data)
    check(encode_grant(grant) == data, "a grant has one encoding")
    verify_grant(grant, mesh=MESH, peer=grant.peer, now=NOW)
    check(data in _HONEST_GRANTS, "no grant holds but those that were signed")
    return grant


_HONEST_GRANTS = frozenset(grant_seeds())


# --- state on disk ------------------------------------------------------------------------------


def _json(value: Any) -> bytes:
    return json.dumps(value).encode()


def _invite_book() -> InviteBook:
    book = InviteBook()
    for number in range(2):
        book.create(
            *(bytes([number]) * 8, SECRET),
            mesh=MESH,
            role=Role.PEER,
            created_at=NOW,
            expires_at=NOW + 3600,
            uses=2,
        )
    book.redeem(bytes(8), SECRET, HOSTILE.peer, NOW)
    return book


def run_invite_state(data: bytes) -> InviteBook:
    book = InviteBook.from_state_untrusted(read_json(data, BadInviteState))
    again = InviteBook.from_state_untrusted(json.loads(json.dumps(book.to_state())))
    check(again.to_state() == book.to_state(), "saved invites read back")
    return book


def run_redemption(data: bytes) -> object:
    """A joiner's request against a book of two invites."""
    script = Script(data)
    book = _invite_book()
    for _ in range(1 + script.byte() % 4):
        id, secret = script.bytes(8), Secret(script.bytes(SECRET_BYTES))
        joiner = PeerId(script.bytes(32))
        done = book.redeem(id, secret, joiner, NOW + script.number())
        check(secret == SECRET and id in (bytes(8), b"\1" * 8), "only a secret redeems")
        check(done.uses_left >= 0, "no more uses than were given")
    return done


def redemption_seeds() -> list[bytes]:
    asked = SECRET.reveal() + HOSTILE.peer.key + b"\0"
    return [b"\0" + bytes(8) + asked, b"\1" + (b"\1" * 8 + asked) * 2, b"\0" + b"\2" * 8 + asked]


def _roster() -> Roster:
    roster = Roster()
    for who, name in ((US, "one"), (HOSTILE, "two")):
        through = Candidate("relay", "192.0.2.9", 443, via=PeerId(bytes(range(32))))
        candidates = (
            Candidate("quic", "192.0.2.1", 4242),
            Candidate("quic", "fe80::1%e", 1),
            through,
        )
        roster.merge(Member(who.peer, name, candidates, b"payload", 7, float(NOW)))
    return roster


def run_roster_state(data: bytes) -> Roster:
    roster = Roster.from_state_untrusted(read_json(data, BadRosterState))
    again = Roster.from_state_untrusted(json.loads(json.dumps(roster.to_state(), allow_nan=False)))
    check(again.members() == roster.members(), "saved members read back")
    return roster


def read_json(data: bytes, declared: type[Exception]) -> object:
    """As `Home.load_json` reads it."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        raise declared("no JSON") from None


PARSERS = (
    Parser(
        *("invite token", (BadToken,), token_bodies, run_token),
        format=SealedFormat(seal_token),
    ),
    Parser(
        *("reply code", (reply.BadReply,), reply_bodies, run_reply),
        format=SealedFormat(seal_reply),
    ),
    Parser("grant", (GrantError,), grant_seeds, run_grant),
    Parser(
        *("invites on disk", (BadInviteState,)),
        lambda: [_json(_invite_book().to_state())],
        run_invite_state,
        format=JsonFormat(),
    ),
    Parser("redemption", (InviteRefused,), redemption_seeds, run_redemption),
    Parser(
        *("roster on disk", (BadRosterState,)),
        lambda: [_json(_roster().to_state())],
        run_roster_state,
        format=JsonFormat(),
    ),
)
