"""Finding a direct path to one peer through the NATs between: the rules. Sans-IO.

Both sides run one `Probe` each, under one secret, from about the same moment on. Time and datagrams
go in, actions come out. What a side does at which moment of the search: probe_states.py.

A *way* is an address, and which of our sockets it is talked to through (0: the node's own).

- The ways known at first are the peer's candidates. An address that a genuine question comes from
  is one more (peer-reflexive, RFC 8445 section 7.3.1.3): that is how a peer is found whose NAT
  shows everybody another port.
- A way works when the answer to our question came over it, from the very address the question went
  to, under its transaction. An answer counts once and so does a question: what is recorded and said
  again is not heard.
- A question over a way that was quiet so far is returned at once (triggered check): when it came
  in, both NATs are open.
- To an address that has not answered go next to no probes (consent.py), answers counted too.
  Nobody can be made to flood a third party by naming its address, or by using it as a sender.

Where the instant cannot be agreed upon, one side has patience: it asks its candidates every
PATIENT_PAUSE_S, which keeps its NAT open towards them, until it hears the other. Its own user has
given it these addresses (a token), so that is not counted: 23 bytes a second to each.

Where nothing works yet SALVO_AFTER_S later, many more questions go out, if the plan has a salvo
(salvo.py). Those are not counted as said above, and its host may have SALVO_UNASKED_BYTES beside
them: one answer lost must not spoil a hit. The first answer ends it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tunnels.binding import Address
from tunnels.checklist import Checklist
from tunnels.consent import Consent
from tunnels.handshake import Role
from tunnels.probe_states import TRANSITIONS, Event, State
from tunnels.probe_wire import (
    NONCE_BYTES,
    PROBE_BYTES,
    TRANSACTION_BYTES,
    Kind,
    Message,
    Way,
    direction_key,
)
from tunnels.salvo import NO_SALVO, Salvo, Volley

NOMINATE_TIMES_S = (0.0, 0.1, 0.2, 0.4, 0.7, 1.1, 1.6)
MUTE_AFTER_S = 2.2  # since the first nomination
SETTLE_S = 0.15
GIVE_UP_S = 6.0  # after the agreed instant
LISTENS_LONGER_S = 1.0  # the listener, so that it does not go while it is being nominated
MAX_HEARD = 4096  # questions; more are not heard

SALVO_AFTER_S = 0.6
SALVO_UNASKED_BYTES = 4096


@dataclass(frozen=True)
class Send:
    datagram: bytes
    way: Way


@dataclass(frozen=True)
class Found:
    """seen: our own address, as the other side sees it on this way."""

    way: Way
    rtt_s: float | None  # None: the listener's own question is still on the way
    seen: Address


@dataclass(frozen=True)
class Failed:
    reason: str


Action = Send | Found | Failed


@dataclass(frozen=True)
class Plan:
    """What one side sets out with.

    starts_s: the agreed instant. candidates: the peer's addresses, the likeliest first. may_fire:
    asked when it comes to a salvo. patience_s: how long to wait for a side that begins whenever
    somebody has told it to.
    """

    role: Role
    starts_s: float
    candidates: Sequence[Address]
    salvo: Salvo | None = None
    may_fire: Callable[[], bool] = lambda: True
    patience_s: float = 0.0


@dataclass(frozen=True)
class _Asked:
    way: Way
    at_s: float
    kind: Kind


@dataclass(frozen=True)
class _Answer:
    rtt_s: float
    seen: Address


class Probe:
    """I find a direct path to one peer. Time goes in, actions come out.

    secret: of this search alone, see probe_wire.py. allows: whether the address policy lets us
    send to a host; holds for candidates and for senders.
    """

    def __init__(
        self,
        secret: bytes,
        plan: Plan,
        allows: Callable[[str], bool],
        entropy: Callable[[int], bytes],
    ) -> None:
        self.state = State.WAITING
        self._plan = plan
        self._allows = allows
        self._entropy = entropy
        self._incoming = direction_key(secret, plan.role)
        self._outgoing = direction_key(secret, plan.role.other)
        self._actions: list[Action] = []
        self._checklist = Checklist(allows)
        self._asked: dict[bytes, _Asked] = {}
        self._heard: set[bytes] = set()
        self._works: dict[Way, _Answer] = {}
        self._consent = Consent()
        self._volley = Volley(plan.salvo or NO_SALVO)
        self._choose_at_s = math.inf
        self._nominated: Way | None = None
        self._nominate_at_s: list[float] = []
        self._mute_at_s = math.inf
        self._gives_up_after_s = GIVE_UP_S
        if plan.role is Role.LISTENER:
            self._gives_up_after_s += LISTENS_LONGER_S
        self._over_at_s = plan.starts_s + plan.patience_s + self._gives_up_after_s

    @property
    def label(self) -> bytes:
        """What datagrams for me begin with, after their first byte."""
        return self._incoming.label

    @property
    def is_over(self) -> bool:
        return self.state in (State.FOUND, State.FAILED)

    def actions(self) -> list[Action]:
        """What is to be done, once."""
        actions, self._actions = self._actions, []
        return actions

    def next_deadline(self) -> float:
        """When to call `handle_timer`; math.inf when there is nothing to wait for."""
        if self.is_over:
            return math.inf
        if self.state is State.WAITING:
            return self._plan.starts_s
        return min(
            *(self._over_at_s, self._choose_at_s, self._mute_at_s),
            *self._nominate_at_s[:1],
            *(self._volley.next_at_s, self._checklist.next_at_s()),
        )

    # --- time ---------------------------------------------------------------------------

    def handle_timer(self, now: float) -> None:
        if now < self.next_deadline():
            return
        if self.state is State.WAITING:
            self._start(now)
        if now >= self._over_at_s:
            self._step(Event.OVER)
            self._actions.append(Failed(self._reason()))
            return
        if now >= self._mute_at_s:
            self._give_nominated_up(now)
        if now >= self._choose_at_s:
            self._choose(now)
        if now >= self._volley.next_at_s:
            self._fire(now)
        self._ask_what_is_due(now)

    def _start(self, now: float) -> None:
        self._step(Event.START)
        for address in self._plan.candidates:
            self._checklist.learn(Way(address), now)
        if self._plan.salvo is not None and self._allows(self._plan.salvo.host):
            self._volley.begin(now + SALVO_AFTER_S)

    def _choose(self, now: float) -> None:
        self._step(Event.SETTLED)
        self._choose_at_s = math.inf
        self._nominated = min(self._works, key=lambda way: self._works[way].rtt_s)
        self._nominate_at_s = [now + after_s for after_s in NOMINATE_TIMES_S]
        self._mute_at_s = now + MUTE_AFTER_S

    def _give_nominated_up(self, now: float) -> None:
        self._step(Event.MUTE)
        self._mute_at_s = math.inf
        assert self._nominated is not None
        del self._works[self._nominated]
        if self._works:
            self._begin_to_choose(now)

    def _begin_to_choose(self, now: float) -> None:
        self._step(Event.WORKS)
        self._choose_at_s = now + SETTLE_S

    def _ask_what_is_due(self, now: float) -> None:
        for way, waits in self._checklist.due(now, patient=self._is_patient(now)):
            self._ask(way, Kind.PING, now, counts=not waits)
        if self._nominated is not None and self._nominate_at_s and self._nominate_at_s[0] <= now:
            self._nominate_at_s = [at_s for at_s in self._nominate_at_s if at_s > now]
            self._ask(self._nominated, Kind.NOMINATE, now)

    # --- saying -------------------------------------------------------------------------

    def _ask(self, way: Way, kind: Kind, now: float, *, counts: bool = True) -> None:
        transaction = self._entropy(TRANSACTION_BYTES)
        if not counts or self._consent.take(way.to, PROBE_BYTES):
            self._asked[transaction] = _Asked(way, now, kind)
            self._say(way, Message(kind, transaction, way.to))

    def _say(self, way: Way, message: Message) -> None:
        self._actions.append(Send(self._outgoing.seal(message, self._entropy(NONCE_BYTES)), way))

    def _fire(self, now: float) -> None:
        if self._volley.is_spent:
            if self._volley.was_fired:
                self._asked.clear()  # nobody has answered the last one
            elif not self._plan.may_fire():
                self._volley.stop()
                return
            self._volley.load()
            self._consent.allow(self._volley.host, SALVO_UNASKED_BYTES)
        for way in self._volley.fire(now, again=self._is_patient(now)):
            self._ask(way, Kind.PING, now, counts=False)

    def _is_patient(self, now: float) -> bool:
        """Whether we wait for the other side to begin."""
        return not self._heard and now < self._plan.starts_s + self._plan.patience_s

    # --- hearing ------------------------------------------------------------------------

    def receive_untrusted(self, datagram: bytes, way: Way, now: float) -> None:
        """A datagram came over this way. Raises BadFrame and nothing else, and has then not
        changed a thing."""
        message = self._incoming.open_untrusted(datagram)
        if self.state is State.FAILED:
            return
        if message.kind is Kind.PONG:
            self._hear_answer(message, way, now)
        else:
            self._hear_question(message, way, now)
        if not self.is_over:
            self._ask_what_is_due(now)

    def _hear_question(self, message: Message, way: Way, now: float) -> None:
        if message.transaction in self._heard or len(self._heard) >= MAX_HEARD:
            return
        if not self._heard:
            self._over_at_s = min(self._over_at_s, now + self._gives_up_after_s)
        self._heard.add(message.transaction)
        if not self._allows(way.to[0]):
            return
        if self.state is State.WAITING:
            self._start(now)
        if self._consent.take(way.to, PROBE_BYTES):
            self._say(way, Message(Kind.PONG, message.transaction, way.to))
        if self.is_over:
            return
        if message.kind is Kind.NOMINATE and self._plan.role is Role.LISTENER:
            answer = self._works.get(way)
            self._agree(Found(way, answer.rtt_s if answer else None, message.seen))
        else:
            self._checklist.learn(way, now)
            if way not in self._works:
                self._checklist.trigger(way, now)

    def _hear_answer(self, message: Message, way: Way, now: float) -> None:
        asked = self._asked.get(message.transaction)
        if asked is None or asked.way != way:
            return
        del self._asked[message.transaction]
        self._consent.answered(way.to)
        answer = self._works[way] = _Answer(now - asked.at_s, message.seen)
        self._volley.stop()
        self._checklist.answered(way)
        if self.state is State.NOMINATING and asked.kind is Kind.NOMINATE:
            self._agree(Found(way, answer.rtt_s, answer.seen))
        elif self.state is State.PROBING and self._plan.role is Role.DIALLER:
            self._begin_to_choose(now)

    def _agree(self, found: Found) -> None:
        self._step(Event.AGREED)
        self._actions.append(found)
        self._asked.clear()
        self._volley.stop()

    def _step(self, event: Event) -> None:
        self.state = TRANSITIONS[self.state, event]

    def _reason(self) -> str:
        if self._consent:
            return "a path was found and fell silent again"
        if self._heard:
            return "the other side's probes arrive here, but ours do not arrive there"
        return (
            f"nothing from the other side arrived within {GIVE_UP_S:.0f} s: "
            "a firewall or a NAT between drops it"
        )
