"""What is worth following of what nodes announce on the local network. Sans-IO.

Anyone on the network can announce anything. Kept are words that members of a mesh of ours have
signed, the newest of each, for `LIFETIME_S`; of nodes that we have not met, `MAX_UNMET` at most,
and `MAX_UNMET_A_HOST` of them at one address. Whoever turned out to be no member is not heard again
for `TURNED_DOWN_S`. All else is forgotten at once, so that a flood fills nothing.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum

from discovery.announcement import Announcement, parse_announcement_untrusted
from tunnels.errors import BadFrame
from tunnels.peer import Candidate, PeerId

LIFETIME_S = 2 * 3600
"""A node that is there is heard once an hour at least: `mdns.LAST_QUERY_INTERVAL_S`."""
MAX_UNMET = 32
MAX_UNMET_A_HOST = 4
TURNED_DOWN_S = 60.0
MAX_TURNED_DOWN = 256


class Refusal(Enum):
    """Why an announcement is not followed, where that is worth a line in the log."""

    MALFORMED = "it is not in the form that nodes of this version announce themselves"
    FORGED = "it is not signed by the node that it names"
    CROWDED = "too many nodes that this one has not met say that they are members"


@dataclass(frozen=True)
class Hint:
    """A member of some of our `meshes` says where it is."""

    peer: PeerId
    name: str
    places: tuple[Candidate, ...]
    meshes: frozenset[bytes]


@dataclass
class _Heard:
    record: bytes
    seq: int
    hosts: frozenset[str]
    at_s: float


class HintBook:
    """I keep what members say on the local network, and only that."""

    def __init__(
        self, us: PeerId, meshes: Iterable[bytes], is_met: Callable[[PeerId], bool]
    ) -> None:
        """meshes: those that we are a member of. is_met: whether a peer is in our roster."""
        self._us = us
        self._meshes = frozenset(meshes)
        self._is_met = is_met
        self._heard: dict[PeerId, _Heard] = {}
        self._turned_down: OrderedDict[PeerId, float] = OrderedDict()

    def __len__(self) -> int:
        return len(self._heard)

    def hear_untrusted(self, record: bytes, now: float) -> Hint | Refusal | None:
        """What is new in a TXT record that somebody sent; None where that is nothing."""
        try:
            said = parse_announcement_untrusted(record)
        except BadFrame:
            return Refusal.MALFORMED
        meshes = frozenset(mesh for mesh in self._meshes if said.is_of(mesh))
        if said.peer == self._us or not meshes:
            return None
        before = self._heard.get(said.peer)
        if before is not None and before.record == record:
            before.at_s = now
            return None
        if before is not None and said.seq <= before.seq and now - before.at_s < LIFETIME_S:
            return None  # an old one, repeated
        self._expire(now)
        is_met = self._is_met(said.peer)
        if not is_met and said.peer in self._turned_down:
            return None
        if not is_met and before is None and self._is_crowded(said):
            return Refusal.CROWDED
        if not said.is_signed():
            return Refusal.FORGED
        hosts = frozenset(place.host for place in said.places)
        self._heard[said.peer] = _Heard(record, said.seq, hosts, now)
        return Hint(said.peer, said.name, said.places, meshes)

    def turn_down(self, peer: PeerId, now: float) -> None:
        """The peer could not be met, or is no member after all: it is not heard for a while."""
        self._heard.pop(peer, None)
        self._turned_down.pop(peer, None)
        self._turned_down[peer] = now
        if len(self._turned_down) > MAX_TURNED_DOWN:
            self._turned_down.popitem(last=False)

    def _expire(self, now: float) -> None:
        for peer in [one for one, heard in self._heard.items() if now - heard.at_s >= LIFETIME_S]:
            del self._heard[peer]
        while self._turned_down:
            oldest_s = next(iter(self._turned_down.values()))
            if now - oldest_s < TURNED_DOWN_S:
                return
            self._turned_down.popitem(last=False)

    def _is_crowded(self, said: Announcement) -> bool:
        unmet = [heard for peer, heard in self._heard.items() if not self._is_met(peer)]
        hosts = {place.host for place in said.places}
        return len(unmet) >= MAX_UNMET or any(
            sum(host in heard.hosts for heard in unmet) >= MAX_UNMET_A_HOST for host in hosts
        )
