"""Revocations on the wire and on disk, and a node's ledger as it reads its files back."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from typing import Any

import cbor2

from discovery.grants import parse_grant_untrusted
from discovery.revocations import (
    BadRevocationState,
    RevocationBook,
    RevocationError,
    encode_revocation,
    parse_revocation_untrusted,
    revoke_peer,
    verify_revocation,
    withdraw_invite,
)
from meshnode.errors import BadMessage, HomeError
from meshnode.introduction import parse_revocation_page_untrusted, revocation_pages
from meshnode.ledger import Ledger
from meshnode.messages import parse_message_untrusted
from tests.fuzz.discovery_parsers import MESH, NOW, ROOT, grant_seeds, read_json
from tests.fuzz.meshnode_parsers import CBOR, JSON, FileHome
from tests.fuzz.parser import Parser, check
from tests.fuzz.script import scratch_folder
from tests.fuzz.tunnels_parsers import HOSTILE, US
from tunnels.identity import Identity


@functools.cache
def statements() -> tuple[bytes, ...]:
    """By the root, by a member about one it let in, and of an invite."""
    top, second, third = map(parse_grant_untrusted, grant_seeds())
    said = (
        revoke_peer(
            *(ROOT.sign,),
            mesh=MESH,
            peer=HOSTILE.peer,
            issuer=ROOT.peer,
            at=NOW,
            grant=None,
            spared=[third],
        ),
        revoke_peer(
            *(US.sign,), mesh=MESH, peer=third.peer, issuer=US.peer, at=NOW, grant=top, spared=[]
        ),
        withdraw_invite(US.sign, id=b"invite-1", at=NOW, until=NOW + 60, grant=top),
        revoke_peer(
            *(HOSTILE.sign,), mesh=MESH, peer=US.peer, issuer=HOSTILE.peer, at=NOW, grant=second
        ),
    )
    return tuple(map(encode_revocation, said))


def run_revocation(data: bytes) -> object:
    statement = parse_revocation_untrusted(data)
    check(encode_revocation(statement) == data, "a revocation has one encoding")
    verify_revocation(statement)
    check(data in statements(), "no statement holds but those that were signed")
    return statement


def run_revocations_state(data: bytes) -> object:
    book = RevocationBook.from_state_untrusted(read_json(data, BadRevocationState))
    again = RevocationBook.from_state_untrusted(json.loads(json.dumps(book.to_state())))
    check(again.to_state() == book.to_state(), "saved revocations read back")
    return book


def book_state() -> dict[str, Any]:
    book = RevocationBook()
    for data in statements()[:3]:
        book.add(parse_revocation_untrusted(data), NOW)
    return book.to_state()


class LedgerHome(FileHome):
    """The three files of a ledger, from one document."""

    def __init__(self, document: Mapping[str, Any]) -> None:
        super().__init__(scratch_folder())
        self._document = document
        self.saved: dict[str, Any] = {}

    def identity(self, name: str) -> Identity:
        return ROOT

    def load_json(self, name: str) -> dict[str, Any] | None:
        found = self._document.get(name)
        return found if isinstance(found, dict) else None

    def save_json(self, name: str, document: dict[str, Any]) -> None:
        self.saved[name] = json.loads(json.dumps(document, allow_nan=False))


def run_ledger(data: bytes) -> object:
    document = read_json(data, HomeError)
    if not isinstance(document, dict):
        raise HomeError("no object")
    home = LedgerHome(document)
    ledger = Ledger(home, US, wall_clock=lambda: float(NOW))
    ledger.save_members()
    Ledger(LedgerHome({**document, **home.saved}), US, wall_clock=lambda: float(NOW))
    return ledger


def ledger_files() -> bytes:
    home = LedgerHome({})
    ledger = Ledger(home, US, wall_clock=lambda: float(NOW))
    ledger.save_members()
    files = {**home.saved, "revocations.json": book_state()}
    return json.dumps(files).encode()


PARSERS = (
    Parser("revocation", (RevocationError,), lambda: list(statements()), run_revocation),
    Parser(
        *("revocations on disk", (BadRevocationState,)),
        lambda: [json.dumps(book_state()).encode()],
        run_revocations_state,
        format=JSON,
    ),
    Parser(
        *("page of revocations", (BadMessage,)),
        lambda: [
            cbor2.dumps(page)
            for page in revocation_pages(map(parse_revocation_untrusted, statements()))
        ],
        lambda data: parse_revocation_page_untrusted(parse_message_untrusted(data)),
        format=CBOR,
    ),
    Parser("ledger's files", (HomeError,), lambda: [ledger_files()], run_ledger, format=JSON),
)
