"""The members of one mesh that we know: where they may be, what they say, when they were heard.

A record taken from the member itself over its proven session always replaces the one before,
whatever its sequence number: that is the member's wall clock, which may have been ahead. Members
also pass on each other's, signed by whom they are about: of those the higher number is newer. The
payload belongs to the layer above and is opaque here.

Sans-IO: `now` comes in as unix seconds.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from discovery.distances import STEPS, TAG_BYTES, Distance
from discovery.grants import Sign
from tunnels.errors import BadFrame
from tunnels.identity import verify
from tunnels.peer import Candidate, PeerId, parse_peer_id_untrusted

MEMBER_LIFETIME_S = 30 * 24 * 3600
"""A member unheard of for this long is dropped; its grant still lets it come back."""
MAX_MEMBERS = 2048
"""Of more, the ones heard longest ago are dropped: a roster is kept in memory and on disk."""
MAX_HEARSAY = MAX_MEMBERS // 2
"""Of so many, nobody new is taken from others' words: those would push out whom we have met."""
MEMBER_LABEL = "mesh member 3"
MAX_NAME_CHARS = 64
MAX_CANDIDATES = 32
MAX_PAYLOAD_BYTES = 512
MAX_ROLES = 8
MAX_ROLE_CHARS = 16
MAX_DISTANCES = 16
MAX_BODY_BYTES = 6 * 1024
"""Of a record without its grant: every member keeps and passes on those of all others."""

_FORMAT = 1
_T = TypeVar("_T", str, int)


class BadRosterState(Exception):
    """Saved state that no roster wrote."""


@dataclass(frozen=True)
class Member:
    """One member's newest word about itself. `last_seen` is ours, in unix seconds.

    roles: what it does at present, within what its grant allows. distances: to others, coarse.
    """

    peer: PeerId
    name: str
    candidates: tuple[Candidate, ...] = ()
    payload: bytes = b""
    seq: int = 0
    last_seen: float = 0.0
    signature: bytes = b""
    roles: tuple[str, ...] = ()
    distances: tuple[Distance, ...] = ()

    def __post_init__(self) -> None:
        """`ValueError` for what no member may claim: it may come from anyone."""
        if not self.name or len(self.name) > MAX_NAME_CHARS or not self.name.isprintable():
            raise ValueError(f"a name has 1 to {MAX_NAME_CHARS} printable characters")
        if len(self.candidates) > MAX_CANDIDATES or len(self.payload) > MAX_PAYLOAD_BYTES:
            raise ValueError("a member claims too many addresses or too large a payload")
        if len(self.roles) > MAX_ROLES or not all(map(_is_role, self.roles)):
            raise ValueError("a member claims too many roles, or some that are none")
        if len(self.distances) > MAX_DISTANCES or not all(map(_is_distance, self.distances)):
            raise ValueError("a member claims too many distances, or some that are none")
        if len(self.body()) > MAX_BODY_BYTES:
            raise ValueError("a member says more of itself than others pass on")
        if self.seq < 0 or not math.isfinite(self.last_seen):
            raise ValueError("a sequence number or a time out of range")

    def claim(self) -> tuple[object, ...]:
        """What the member itself says that is news where it changes, and its number."""
        return self.name, self.candidates, self.payload, self.roles, self.seq

    def body(self) -> bytes:
        """What the member's signature covers."""
        places = [_spoken(one) for one in self.candidates]
        distances = [[tag.hex(), step] for tag, step in self.distances]
        said = [str(self.peer), self.seq, self.name, places, self.payload.hex()]
        said += [list(self.roles), distances]
        return json.dumps(said, ensure_ascii=True, separators=(",", ":")).encode("ascii")

    def signed(self, sign: Sign) -> Member:
        """The same, fit to be passed on; `sign` is the member's own key."""
        return replace(self, signature=sign(MEMBER_LABEL, self.body()))

    def is_signed(self) -> bool:
        """Whether the member itself said so, whoever passed it on."""
        return verify(self.peer, MEMBER_LABEL, self.body(), self.signature)


def _is_role(role: str) -> bool:
    return 0 < len(role) <= MAX_ROLE_CHARS and role.isascii() and role.isalpha()


def _is_distance(distance: Distance) -> bool:
    tag, step = distance
    # A truth value is a number to Python, and none to who reads it back from the disk.
    return len(tag) == TAG_BYTES and type(step) is int and 0 <= step < STEPS


class Roster:
    """I keep the newest record of each member of one mesh."""

    def __init__(self) -> None:
        self._members: dict[PeerId, Member] = {}

    def merge(self, member: Member) -> bool:
        """Takes a member's own word; says whether it is news, the moment and number left out."""
        known = self._members.get(member.peer)
        if known is not None:
            member = replace(member, last_seen=max(known.last_seen, member.last_seen))
        self._members[member.peer] = member
        if len(self._members) > MAX_MEMBERS:
            others = (one for one in self._members.values() if one.peer != member.peer)
            del self._members[min(others, key=lambda one: one.last_seen).peer]
        return known is None or known.claim()[:-1] != member.claim()[:-1]

    def merge_hearsay(self, member: Member) -> bool:
        """Takes what another member passed on, its signature checked; says whether it is news."""
        known = self._members.get(member.peer)
        if known is None and len(self._members) >= MAX_HEARSAY:
            return False
        return self.is_older_than(member) and self.merge(member)

    def is_older_than(self, member: Member) -> bool:
        """Whether the member is not known, or its number is higher than that of what is."""
        known = self._members.get(member.peer)
        return known is None or known.seq < member.seq

    def saw(self, peer: PeerId, now: float) -> None:
        """The peer was heard from at `now`; nothing for one that is no member."""
        known = self._members.get(peer)
        if known is not None:
            self._members[peer] = replace(known, last_seen=max(known.last_seen, now))

    def forget(self, peer: PeerId) -> None:
        """The peer is no member any more; nothing for one that is not known."""
        self._members.pop(peer, None)

    def get(self, peer: PeerId) -> Member | None:
        return self._members.get(peer)

    def members(self) -> tuple[Member, ...]:
        """Every member, the one heard from last first; equals by PeerId."""
        return tuple(
            sorted(self._members.values(), key=lambda member: (-member.last_seen, member.peer))
        )

    def expire(self, now: float) -> tuple[PeerId, ...]:
        """Drops those unheard of for `MEMBER_LIFETIME_S` and names them."""
        gone = tuple(
            member.peer
            for member in self._members.values()
            if now - member.last_seen > MEMBER_LIFETIME_S
        )
        for peer in gone:
            del self._members[peer]
        return gone

    def to_state(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"format": _FORMAT, "members": [_to_entry(member) for member in self.members()]}

    @classmethod
    def from_state_untrusted(cls, state: object) -> Roster:
        """The roster `to_state` gave; raises `BadRosterState` and nothing else."""
        roster = cls()
        try:
            if not isinstance(state, Mapping) or state["format"] != _FORMAT:
                raise BadRosterState("the saved members are in a format this mesh does not know")
            for entry in state["members"]:
                roster.merge(_from_entry(entry))
        except (KeyError, TypeError, ValueError, OverflowError, BadFrame) as error:
            raise BadRosterState("the saved members are damaged") from error
        return roster


def _spoken(place: Candidate) -> list[str | int]:
    """A place as its member signs it, and as it is kept."""
    through = [] if place.via is None else [str(place.via)]
    return [place.transport, place.host, place.port, place.kind, *through]


def _to_entry(member: Member) -> dict[str, Any]:
    return {
        "peer": str(member.peer),
        "name": member.name,
        "candidates": [_spoken(candidate) for candidate in member.candidates],
        "payload": base64.b64encode(member.payload).decode("ascii"),
        "seq": member.seq,
        "last_seen": member.last_seen,
        "signature": member.signature.hex(),
        "roles": list(member.roles),
        "distances": [[tag.hex(), step] for tag, step in member.distances],
    }


def _from_entry(entry: Mapping[str, Any]) -> Member:
    return Member(
        peer=parse_peer_id_untrusted(_typed(entry["peer"], str)),
        name=_typed(entry["name"], str),
        candidates=tuple(
            Candidate(
                _typed(transport, str),
                _typed(host, str),
                _typed(port, int),
                _typed(kind, str),
                parse_peer_id_untrusted(_typed(via[0], str)) if via else None,
            )
            for transport, host, port, kind, *via in entry["candidates"]
        ),
        payload=base64.b64decode(_typed(entry["payload"], str), validate=True),
        seq=_typed(entry["seq"], int),
        last_seen=float(entry["last_seen"]),
        signature=bytes.fromhex(_typed(entry.get("signature", ""), str)),
        roles=tuple(_typed(role, str) for role in entry.get("roles", ())),
        distances=tuple(
            (bytes.fromhex(_typed(tag, str)), _typed(step, int))
            for tag, step in entry.get("distances", ())
        ),
    )


def _typed(value: object, kind: type[_T]) -> _T:
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ValueError("a value of the wrong kind")
    return value
