"""The orchestrator's side of the ring: workers with layers one after the other push to each other.

Each pair is set up by itself, while the model is being loaded. What does not stand in time goes
through this node, as everything did before there was a ring.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import trio

from meshnode.errors import NetworkError
from meshnode.events import Emit, Event, Kind
from meshnode.nurseries import bare_nursery
from meshnode.pipeline import pushing
from meshnode.pipeline.borrow import Borrowed, PushEnd, PushRefused
from meshnode.pipeline.protocol import PushFrom, PushTo
from meshnode.state import write_durably
from tunnels import PeerId, Session, TunnelError

SETUP_S = pushing.SETUP_S + 2.0
"""For every pair, from the last grant on: the workers give up first, so that no way stands of which
this node knows nothing. The engine goes through this node until then."""
PARTED_S = 600.0
"""For which a pair whose way was lost in use goes through this node."""
NEWS_S = 5.0
"""How long a lost way waits for the news that a worker's death was the cause: the better word."""

SILENT_S = 10.0
"""How long two workers that do not hear each other are waited for, while this node hears both: as
long again as they have waited. Else a hang of two minutes would come of what passed through here
unharmed before."""

log = logging.getLogger(__name__)


class RingLost(NetworkError):
    """Two workers that pushed to each other can no longer."""

    def __init__(self, text: str, pair: Pair) -> None:
        super().__init__(text)
        self.pair = pair


@dataclass(frozen=True)
class Member:
    """A worker with its lease. `endpoint`: as llama-server knows it."""

    name: str
    session: Session
    endpoint: str
    borrowed: Borrowed

    @property
    def peer(self) -> PeerId:
        return self.session.peer


Pair = tuple[Member, Member]


class Partings:
    """I remember for a while which pairs lost their way while it was in use, and which had none."""

    def __init__(self) -> None:
        self._until_s: dict[tuple[PeerId, PeerId], float] = {}
        self._apart: dict[tuple[PeerId, PeerId], float] = {}

    def note(self, pair: Pair) -> None:
        self._until_s[_peers(pair)] = trio.current_time() + PARTED_S

    def recent(self, pair: Pair) -> bool:
        return self._until_s.get(_peers(pair), 0.0) > trio.current_time()

    def tried(self, pair: Pair, *, joined: bool) -> None:
        """Where they did not join, they are asked again by the next deployment that has them side
        by side: plans only avoid that."""
        self._apart.pop(_peers(pair), None)
        if not joined:
            self._apart[_peers(pair)] = trio.current_time() + PARTED_S

    def apart(self, one: PeerId, two: PeerId) -> bool:
        """Whether what the one computes would go to the other through this node."""
        until_s = (known.get((one, two), 0.0) for known in (self._until_s, self._apart))
        return max(until_s) > trio.current_time()


class Ring:
    """I join the pairs of one deployment, and watch those that stand.

    chain: its workers in the order of their layers; None for one that takes no part, a bare
    rpc-server. file: what llama-server reads them from, when it is there.
    """

    def __init__(
        self, chain: Sequence[Member | None], file: Path, partings: Partings, emit: Emit
    ) -> None:
        self._pairs = tuple(_pairs(chain))
        self._file = file
        self._partings = partings
        self._emit = emit
        self.loss: RingLost | None = None
        """What `run` raises in a moment."""

    @property
    def file(self) -> Path | None:
        """None where no two workers could push to each other."""
        return self._file if self._pairs else None

    async def run(self) -> None:
        """Joins, writes the file, and watches for as long as pairs stand. Raises `RingLost`."""
        if not self._pairs:
            return
        joined: dict[Pair, PushEnd] = {}
        with trio.move_on_after(SETUP_S):
            async with trio.open_nursery() as nursery:
                for pair in self._pairs:
                    nursery.start_soon(self._join, pair, joined)
        standing = {pair: joined[pair] for pair in self._pairs if pair in joined}
        for pair in self._pairs:
            if not self._partings.recent(pair):
                self._partings.tried(pair, joined=pair in standing)
        lines = (f"{one.endpoint}\t{two.endpoint}\n" for one, two in standing)
        write_durably(self._file, "".join(lines).encode())
        self._tell(standing)
        async with bare_nursery() as nursery:
            for pair, end in standing.items():
                nursery.start_soon(self._watch, pair, end)

    async def _join(self, pair: Pair, joined: dict[Pair, PushEnd]) -> None:
        one, two = pair
        if self._partings.recent(pair):
            return
        try:
            await two.borrowed.order(PushFrom(one.peer))
            order = PushTo(two.peer, two.borrowed.granted.lease)
            joined[pair] = await one.borrowed.order(order)
        except (PushRefused, TunnelError) as error:
            log.info("%s does not push to %s: %s", one.name, two.name, error)

    async def _watch(self, pair: Pair, end: PushEnd) -> None:
        reason = await _until_lost(pair, end)
        one, two = pair
        self.loss = RingLost(
            f"{one.name} lost its way to {two.name}: {reason}; what it computes goes through "
            "this node next",
            pair,
        )
        await trio.sleep(NEWS_S)
        raise self.loss

    def _tell(self, standing: dict[Pair, PushEnd]) -> None:
        for pair in self._pairs:
            one, two = (member.name for member in pair)
            text = f"{one} sends what it computes straight to {two}"
            if pair not in standing:
                text = f"what {one} computes goes to {two} through this node: they do not connect"
            data = {"from": one, "to": two, "straight": pair in standing}
            self._emit(Event(Kind.LEASE, text, data))


async def _until_lost(pair: Pair, end: PushEnd) -> str:
    """Why the way is of no use any more. Where a worker is silent here too, its outage is waited
    for, as any other (decision 9)."""
    while not end.over.is_set():
        if not end.silent:
            await end.changed.wait()
            continue
        with trio.move_on_after(SILENT_S):
            await end.changed.wait()
            continue
        if not any(member.session.suspected for member in pair):
            return "they do not hear each other, though this node hears both"
    return end.reason


def _pairs(chain: Sequence[Member | None]) -> Iterator[Pair]:
    """Neighbours that both know the ring. An rpc-server pushes to one and is pushed to by one."""
    pushing, taking = set[PeerId](), set[PeerId]()
    for one, two in pairwise(chain):
        if one is None or two is None or one.peer in pushing or two.peer in taking:
            continue
        if one.borrowed.granted.ring and two.borrowed.granted.ring:
            pushing.add(one.peer)
            taking.add(two.peer)
            yield one, two


def _peers(pair: Pair) -> tuple[PeerId, PeerId]:
    return pair[0].peer, pair[1].peer
