"""What this node says of itself: one record, signed anew when it changes, and now and then."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from dataclasses import replace

from discovery.distances import Distance, step_of, tag
from discovery.roster import MAX_DISTANCES, Member
from meshnode.discretion import fit_for_all
from meshnode.introduction import MAX_CANDIDATES
from meshnode.ledger import Ledger
from tunnels import Candidate, PeerId

REFRESH_S = 3600.0
REFRESH_S_A_MEMBER = 36.0
"""A mesh of N refreshes N records in the longer of an hour and N times this: what a node hears of
it does not grow with the mesh. A record lives for a month (`MEMBER_LIFETIME_S`)."""
CHANGES_EVERY_S = 5.0
"""What is told to all changes no more often; who introduces itself says what holds just then."""

RoundTrips = Iterable[tuple[PeerId, float]]
"""Peers connected, and how many seconds a round trip takes."""


class OwnRecord:
    """I keep this node's word.

    roles, payload: what it does, and what it says to the layer above; may be set at any time.
    """

    def __init__(self, ledger: Ledger, name: Callable[[], str]) -> None:
        self.roles: tuple[str, ...] = ()
        self.payload = b""
        self.round_trips: Callable[[], RoundTrips] = lambda: ()
        self._ledger = ledger
        self._name = name
        self._word: Member | None = None
        self._stands_on: object = None
        self._signed_at = 0.0
        self._steps: dict[bytes, int] = {}

    def current(self, candidates: Iterable[Candidate], *, at_leisure: bool = False) -> Member:
        """The word that holds now, with these places. at_leisure: the last one will do, where it
        is no older than CHANGES_EVERY_S."""
        places = fit_for_all(self._ledger, candidates)[:MAX_CANDIDATES]
        stands_on = (self._name(), places, self.roles, self.payload, self._ledger.own_grants())
        word, age_s = self._word, abs(self._ledger.now() - self._signed_at)
        if word is not None:
            is_newest = word.seq >= self._ledger.own_number
            is_right = is_newest and stands_on == self._stands_on and age_s < self._refresh_s
            if is_right or (at_leisure and age_s < CHANGES_EVERY_S):
                return word
        return self._sign(places, stands_on)

    @property
    def _refresh_s(self) -> float:
        return max(REFRESH_S, REFRESH_S_A_MEMBER * len(self._ledger.members.roster.members()))

    def _sign(self, places: tuple[Candidate, ...], stands_on: object) -> Member:
        self._signed_at, self._stands_on = self._ledger.now(), stands_on
        draft = Member(
            peer=self._ledger.identity.peer,
            name=self._name(),
            candidates=places,
            payload=self.payload,
            seq=self._ledger.next_number(),
            roles=self.roles,
        )
        with contextlib.suppress(ValueError):  # addresses of the longest kind may leave no room
            draft = replace(draft, distances=self._distances())
        self._word = draft.signed(self._ledger.identity.sign)
        return self._word

    def _distances(self) -> tuple[Distance, ...]:
        """To the nearest of those connected, in each mesh that is shared with them."""
        near = sorted(self.round_trips(), key=lambda one: one[1])
        pairs = [
            (tag(mesh, peer), s) for peer, s in near for mesh in self._ledger.members.proven(peer)
        ]
        before, self._steps = self._steps, {}
        for name, seconds in pairs[:MAX_DISTANCES]:
            self._steps[name] = step_of(seconds, before.get(name))
        return tuple(sorted(self._steps.items()))
