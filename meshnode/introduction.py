"""What nodes tell each other of themselves and of their meshes: grants, a name, addresses, and
pages of revocations. Sans-IO."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeGuard

from discovery.digest import MAX_NUMBER
from discovery.distances import Distance
from discovery.grants import Grant, GrantError, encode_grant, parse_grant_untrusted
from discovery.revocations import (
    Revocation,
    RevocationError,
    encode_revocation,
    parse_revocation_untrusted,
)
from discovery.roster import Member
from meshnode.errors import BadMessage
from tunnels.peer import KEY_BYTES, Candidate, PeerId

MAX_NAME_CHARS = 64
MAX_HELLO_GRANTS = 16
MAX_CANDIDATES = 16
MAX_KIND_CHARS = 16
MAX_RECORDS = 12
"""Members in one message of 64 KiB: each has some 5 KB at most, and one most of the time."""
PAGE_BYTES = 32 * 1024
"""Of revocations in one message, the last of which may go beyond: a message has 64 KiB."""
MAX_PAGES = 512
"""More than the books of all shown meshes fill with anything but the largest statements."""


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
    if len({grant.mesh for grant in grants}) < len(grants):  # each would be work, and one counts
        raise BadMessage("the peer shows two grants of one mesh")
    return grants


def _is_number(value: object) -> TypeGuard[int]:
    """A whole number, and not yes or no, which Python takes for one."""
    return isinstance(value, int) and not isinstance(value, bool)


def _is_kind(value: object) -> TypeGuard[str]:
    """A word. Also one that we do not know: the member has signed it, and a later one may know
    more."""
    if not isinstance(value, str) or len(value) > MAX_KIND_CHARS:
        return False
    return value.isascii() and value.isalpha()


def _parse_candidate_untrusted(row: object) -> Candidate:
    if isinstance(row, list) and len(row) in (4, 5):
        transport, host, port, kind, *relay = row
        texts = isinstance(transport, str) and isinstance(host, str) and _is_kind(kind)
        if (
            texts and _is_number(port) and transport.isprintable() and host.isprintable()
        ):  # an IPv6 scope may hold all
            with contextlib.suppress(ValueError):
                via = PeerId(relay[0] if isinstance(relay[0], bytes) else b"") if relay else None
                return Candidate(transport[:MAX_NAME_CHARS], host, port, kind, via)
    raise BadMessage("the peer's introduction holds an address that is none")


def parse_member_untrusted(peer: PeerId, message: Mapping[str, Any], now: float) -> Member:
    """What the peer says of itself, fit to be shown; raises `BadMessage` only."""
    name, seq, rows = message.get("name"), message.get("seq"), message.get("candidates")
    signature = message.get("signature")
    if not (isinstance(name, str) and _is_number(seq) and isinstance(rows, list)):
        raise BadMessage("the peer's introduction has an unknown shape")
    candidates = [_parse_candidate_untrusted(row) for row in rows[:MAX_CANDIDATES]]
    payload, roles = message.get("payload", b""), message.get("roles", [])
    if not (isinstance(payload, bytes) and isinstance(roles, list)):
        raise BadMessage("the peer's introduction has an unknown shape")
    shown = "".join(char for char in name[:MAX_NAME_CHARS] if char.isprintable()) or peer.short
    try:
        return Member(
            peer=peer,
            name=shown,
            candidates=tuple(candidates),
            payload=payload,
            seq=max(0, min(seq, MAX_NUMBER)),
            last_seen=int(now),
            signature=signature if isinstance(signature, bytes) else b"",
            roles=tuple(role if isinstance(role, str) else "" for role in roles),
            distances=_parse_distances_untrusted(message.get("distances", [])),
        )
    except ValueError as error:
        raise BadMessage(f"the peer's introduction is none: {error}") from None


def _parse_distances_untrusted(rows: object) -> tuple[Distance, ...]:
    distances = []
    for row in rows if isinstance(rows, list) else [None]:
        tag, step = row if isinstance(row, list) and len(row) == 2 else (None, None)
        if not (isinstance(tag, bytes) and isinstance(step, int)):
            raise BadMessage("the peer's introduction holds a distance that is none")
        distances.append((tag, step))
    return tuple(distances)


def member_message(member: Member) -> dict[str, Any]:
    """What `parse_member_untrusted` reads."""
    return {
        "name": member.name,
        "seq": member.seq,
        "candidates": [_candidate_row(one) for one in member.candidates],
        "signature": member.signature,
        "payload": member.payload,
        "roles": list(member.roles),
        "distances": [list(distance) for distance in member.distances],
    }


def _candidate_row(one: Candidate) -> list[str | int | bytes]:
    through = [] if one.via is None else [one.via.key]
    return [one.transport, one.host, one.port, one.kind, *through]


def record_pages(records: Sequence[tuple[Member, Grant]]) -> list[dict[str, Any]]:
    """Messages that pass on other members' words, each with the grant that it has shown."""
    rows = [
        {"peer": member.peer.key, "grant": encode_grant(grant), **member_message(member)}
        for member, grant in records
    ]
    starts = range(0, len(rows), MAX_RECORDS)
    return [{"records": rows[start : start + MAX_RECORDS]} for start in starts]


def parse_records_untrusted(message: Mapping[str, Any], now: float) -> list[tuple[Member, Grant]]:
    """The records of one page, their signatures not checked; raises `BadMessage` only."""
    rows = message.get("records")
    if not isinstance(rows, list) or len(rows) > MAX_RECORDS:
        raise BadMessage("the peer's list of members has an unknown shape")
    records = []
    for row in rows:
        if not isinstance(row, dict) or not isinstance(row.get("peer"), bytes):
            raise BadMessage("the peer's list of members has an unknown shape")
        if len(row["peer"]) != KEY_BYTES:
            raise BadMessage("the peer's list of members holds a key that is none")
        (grant,) = parse_grants_untrusted({"grants": [row.get("grant")]})
        member = parse_member_untrusted(PeerId(row["peer"]), row, now)
        heard_s = min(now, member.seq / 1000)  # no later than it said so
        records.append((replace(member, last_seen=int(heard_s)), grant))
    return records


def revocation_pages(revocations: Iterable[Revocation]) -> list[dict[str, Any]]:
    """Messages that hold all of these; at least one. The last one says that it is."""
    pages: list[list[bytes]] = [[]]
    size_bytes = 0
    for one in revocations:
        data = encode_revocation(one)
        if size_bytes >= PAGE_BYTES:
            pages.append([])
            size_bytes = 0
        pages[-1].append(data)
        size_bytes += len(data)
    last = len(pages) - 1
    return [{"revocations": page, "more": number < last} for number, page in enumerate(pages)]


def parse_revocation_page_untrusted(message: Mapping[str, Any]) -> tuple[list[Revocation], bool]:
    """The statements of one page, none of them verified, and whether more pages follow; raises
    `BadMessage` only."""
    rows, more = message.get("revocations"), message.get("more")
    if not (isinstance(rows, list) and isinstance(more, bool)):
        raise BadMessage("the peer's list of revocations has an unknown shape")
    revocations = []
    for row in rows:
        try:
            revocations.append(parse_revocation_untrusted(row if isinstance(row, bytes) else b""))
        except RevocationError as error:
            raise BadMessage(f"the peer passes on a bad revocation: {error}") from None
    return revocations, more
