"""Two sides of a search, connected by a network that each test invents; or one, and the test."""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections.abc import Callable, Sequence

from tunnels.binding import Address
from tunnels.handshake import Role
from tunnels.probe import Action, Failed, Found, Plan, Probe, Send
from tunnels.probe_wire import PROBE_BYTES, Kind, Message, Way, direction_key
from tunnels.salvo import Salvo

SECRET = b"s" * 32
ALICE, BOB = ("11.0.0.1", 4001), ("11.0.0.2", 4002)
STRANGER = ("11.0.0.66", 66)
DIALLER, LISTENER = Role.DIALLER, Role.LISTENER
ON_WIRE_BYTES = PROBE_BYTES + 28
DELAY_S = 0.02
Sight = Callable[[Role, Way, float], Way | None]
"""The way over which the other side sees a probe come; None: it does not arrive."""


def in_the_open(sender: Role, way: Way, now: float) -> Way | None:
    return {(DIALLER, BOB): Way(ALICE), (LISTENER, ALICE): Way(BOB)}.get((sender, way.to))


def probe(
    role: Role,
    candidates: Sequence[Address] = (),
    *,
    starts_s: float = 0.0,
    salvo: Salvo | None = None,
    patience_s: float = 0.0,
    may_fire: Callable[[], bool] = lambda: True,
    allows: Callable[[str], bool] = lambda host: True,
) -> Probe:
    plan = Plan(role, starts_s, candidates, salvo, may_fire, patience_s)
    return Probe(SECRET, plan, allows, random.Random(role.value).randbytes)


class Search:
    """I carry probes between two sides; what they decide ends up in `decided`."""

    def __init__(self, dialler: Probe, listener: Probe, sight: Sight = in_the_open) -> None:
        self.sides = {DIALLER: dialler, LISTENER: listener}
        self.sight = sight
        self.now = 0.0
        self.decided: dict[Role, Found | Failed] = {}
        self.decided_at_s: dict[Role, float] = {}
        self.sent: dict[Role, list[tuple[float, Way]]] = {DIALLER: [], LISTENER: []}
        self._flights: list[tuple[float, int, Role, bytes, Way]] = []
        self._numbers = itertools.count()

    def run(self, until_s: float = 60.0) -> None:
        while True:
            due = min(side.next_deadline() for side in self.sides.values())
            lands = self._flights[0][0] if self._flights else math.inf
            if min(due, lands) > until_s:
                return
            self.now = max(self.now, min(due, lands))
            if lands <= due:
                _, _, receiver, datagram, way = heapq.heappop(self._flights)
                self.sides[receiver].receive_untrusted(datagram, way, self.now)
            else:
                for side in self.sides.values():
                    side.handle_timer(self.now)
            for role, side in self.sides.items():
                self._perform(role, side.actions())

    def _perform(self, role: Role, actions: list[Action]) -> None:
        for action in actions:
            if not isinstance(action, Send):
                self.decided[role] = action
                self.decided_at_s[role] = self.now
                continue
            self.sent[role].append((self.now, action.way))
            if (seen := self.sight(role, action.way, self.now)) is not None:
                flight = (role.other, action.datagram, seen)
                heapq.heappush(self._flights, (self.now + DELAY_S, next(self._numbers), *flight))

    def found(self, role: Role) -> Found:
        found = self.decided[role]
        assert isinstance(found, Found), found
        return found

    def failed(self, role: Role) -> str:
        failed = self.decided[role]
        assert isinstance(failed, Failed), failed
        return failed.reason

    def bytes_to(self, host: str) -> int:
        ways = itertools.chain(*self.sent.values())
        return ON_WIRE_BYTES * sum(way.to[0] == host for _, way in ways)


def search(sight: Sight = in_the_open) -> Search:
    both = Search(probe(DIALLER, [BOB]), probe(LISTENER, [ALICE]), sight)
    both.run()
    return both


# --- one side, and a test that plays the other --------------------------------------------------


class Alone:
    """One side; the test is the other one, who holds the secret and says what it likes."""

    def __init__(self, side: Probe, role: Role) -> None:
        self.side = side
        self._hears, self._says = direction_key(SECRET, role.other), direction_key(SECRET, role)
        self._nonces = itertools.count()
        self.outcome: Found | Failed | None = None

    def said(self) -> list[tuple[Way, Message]]:
        found = []
        for action in self.side.actions():
            if isinstance(action, Send):
                found.append((action.way, self._hears.open_untrusted(action.datagram)))
            else:
                self.outcome = action
        return found

    def asked(self, kind: Kind = Kind.PING) -> dict[Address, Message]:
        return {way.to: message for way, message in self.said() if message.kind is kind}

    def say(self, message: Message, sender: Address, now: float, via: int = 0) -> bytes:
        datagram = self._says.seal(message, next(self._nonces).to_bytes(12, "big"))
        self.side.receive_untrusted(datagram, Way(sender, via), now)
        return datagram

    def ask(self, number: int, sender: Address, now: float, kind: Kind = Kind.PING) -> bytes:
        return self.say(Message(kind, number.to_bytes(8, "big"), ALICE), sender, now)

    def answer(self, question: Message, sender: Address, now: float, via: int = 0) -> None:
        self.say(Message(Kind.PONG, question.transaction, ALICE), sender, now, via)


def alone(role: Role, candidates: Sequence[Address] = (BOB,), **options: object) -> Alone:
    found = Alone(probe(role, candidates, **options), role)  # type: ignore[arg-type]
    found.side.handle_timer(0.0)
    return found


NEAR = ("192.168.1.2", 2)
