"""What a `hello` between two nodes holds: grants, a name, addresses. Sans-IO."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

from discovery.grants import Grant, GrantError, parse_grant_untrusted
from discovery.roster import Member
from meshnode.errors import BadMessage
from tunnels.peer import Candidate, PeerId

MAX_NAME_CHARS = 64
MAX_HELLO_GRANTS = 16
MAX_CANDIDATES = 16


def parse_grants_untrusted(message: Mapping[str, Any]) -> list[Grant]:
    """The grants shown, none of them verified; raises `BadMessage` only."""
    rows = message.get("grants")
    if not isinstance(rows, list) or len(rows) > MAX_HELLO_GRANTS:
        raise BadMessage("the peer's introduction has an unknown shape")
    grants = []
    for row in rows:
        try:
            grants.append(parse_grant_untrusted(row if isinstance(row, bytes) else b""))
        except GrantError as error:
            raise BadMessage(f"the peer's introduction holds a bad grant: {error}") from None
    return grants


def _parse_candidate_untrusted(row: object) -> Candidate:
    if isinstance(row, list) and len(row) == 3:
        transport, host, port = row
        texts = isinstance(transport, str) and isinstance(host, str) and isinstance(port, int)
        if texts and transport.isprintable() and host.isprintable():  # an IPv6 scope may hold all
            with contextlib.suppress(ValueError):
                return Candidate(transport[:MAX_NAME_CHARS], host, port)
    raise BadMessage("the peer's introduction holds an address that is none")


def parse_member_untrusted(peer: PeerId, message: Mapping[str, Any], now: float) -> Member:
    """What the peer says of itself, fit to be shown; raises `BadMessage` only."""
    name, seq, rows = message.get("name"), message.get("seq"), message.get("candidates")
    if not (isinstance(name, str) and isinstance(seq, int) and isinstance(rows, list)):
        raise BadMessage("the peer's introduction has an unknown shape")
    candidates = [_parse_candidate_untrusted(row) for row in rows[:MAX_CANDIDATES]]
    shown = "".join(char for char in name[:MAX_NAME_CHARS] if char.isprintable()) or peer.short
    return Member(
        peer=peer,
        name=shown,
        candidates=tuple(candidates),
        payload=b"",
        seq=max(0, min(seq, 2**62)),
        last_seen=int(now),
    )
