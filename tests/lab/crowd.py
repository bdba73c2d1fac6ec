"""A mesh of many nodes that gossip, in one process: the core of the real ones, a clock of its own.

What is real: who keeps a session with whom, who tells whom what and when, and each message, encoded
as on the wire. What is put in as a figure: a record's size, what a stream costs besides its bytes,
and what a session costs that nobody uses. `tests/tunnels/test_calm.py` holds the last two to what
two real endpoints send, over the kind of link that costs more.
"""

from __future__ import annotations

import hashlib
import heapq
import random
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import cbor2

from discovery.digest import pack_keys
from discovery.gossip import Gossip, Talk
from discovery.neighbourhood import neighbourhood
from tunnels.peer import PeerId

RECORD_BYTES = 1000  # a member's record with its grant
STREAM_BYTES = 1150  # of each side: over TCP, a connection of its own, and a ping that it stirs up
CALM_BYTES_PER_S = 25  # of each side, for a session that nobody uses
FASTEST_S, SLOWEST_S = 0.01, 0.08  # one way, between two nodes
MESSAGE_HEADER_BYTES = 4


@dataclass
class Node:
    """sent_bytes, received_bytes: on streams, without what its sessions cost by themselves."""

    peer: PeerId
    gossip: Gossip
    secret: bytes
    sent_bytes: float = 0.0
    received_bytes: float = 0.0
    is_up: bool = True
    wakes_at_s: float = field(default=float("inf"))


class Crowd:
    """I let `size` nodes gossip. Each can reach each; who does is the neighbourhood's to say."""

    def __init__(self, size: int, seed: int = 0) -> None:
        self.now = 0.0
        self.dice = random.Random(seed)
        self.nodes: dict[PeerId, Node] = {}
        self.talks = 0
        self._reached: Counter[tuple[PeerId, int]] = Counter()
        self._events: list[tuple[float, int, Callable[[], object]]] = []
        self._count = 0
        for number in range(size):
            self.add(f"node {seed} {number}")

    def add(self, name: str) -> Node:
        key = hashlib.sha256(name.encode()).digest()
        peer = PeerId(key)
        gossip = Gossip(peer, self.dice.randrange, self.now + self.dice.random() * 30)
        node = self.nodes[peer] = Node(peer, gossip, hashlib.sha256(key).digest())
        gossip.put(peer, 1, self.now)
        return node

    # -- who is connected ---------------------------------------------------------------------

    def all_know_all(self) -> None:
        for node in self.nodes.values():
            for peer in self.nodes:
                node.gossip.put(peer, 1, self.now)

    def connect_all(self) -> None:
        """As everybody's neighbourhood wants it."""
        for node in self.nodes.values():
            if node.is_up:
                self.settle(node)

    def settle(self, node: Node, failed: Mapping[PeerId, float] | None = None) -> None:
        known = [peer for peer in self.nodes if node.gossip.number(peer) and peer != node.peer]
        down = {peer: 0.0 for peer in known if not self.nodes[peer].is_up}
        wanted = neighbourhood(known, needed=(), failed=failed or down, secret=node.secret)
        for peer in sorted(wanted):
            if self.nodes[peer].is_up and peer not in node.gossip.neighbours():
                self.link(node, self.nodes[peer])

    def link(self, one: Node, other: Node) -> None:
        one.gossip.meet(other.peer)
        other.gossip.meet(one.peer)
        self._wake(one)
        self._wake(other)

    def stop(self, node: Node) -> None:
        node.is_up = False
        for other in self.nodes.values():
            other.gossip.part(node.peer)

    def sessions(self, node: Node) -> int:
        return len(node.gossip.neighbours())

    # -- time ---------------------------------------------------------------------------------

    def run(self, for_s: float, until: Callable[[], bool] = lambda: False) -> None:
        """For so long, or until something is so, which is looked at after each event."""
        end_s = self.now + for_s
        while self._events and self._events[0][0] <= end_s and not until():
            self.now, _, event = heapq.heappop(self._events)
            event()
        if not until():
            self.now = end_s

    def later(self, wait_s: float, event: Callable[[], object]) -> None:
        self._count += 1
        heapq.heappush(self._events, (self.now + wait_s, self._count, event))

    def _wake(self, node: Node) -> None:
        at_s = max(node.gossip.next_deadline(), self.now)
        if at_s < node.wakes_at_s:
            node.wakes_at_s = at_s
            self.later(at_s - self.now, partial(self._look, node, at_s))

    def _look(self, node: Node, at_s: float) -> None:
        if at_s != node.wakes_at_s or not node.is_up:
            return
        node.wakes_at_s = float("inf")
        for talk in node.gossip.due(self.now):
            self.talks += 1
            for one in (node, self.nodes[talk.to]):
                one.sent_bytes += STREAM_BYTES
                one.received_bytes += STREAM_BYTES
            self._open(node, talk)
        self._wake(node)

    def _say(
        self, one: Node, other: Node, message: dict[str, Any], then: Callable[[], None]
    ) -> None:
        self._carry(one, other, len(cbor2.dumps(message)) + MESSAGE_HEADER_BYTES, then)

    def _carry(self, one: Node, other: Node, count: float, then: Callable[[], None]) -> None:
        one.sent_bytes += count

        def land() -> None:
            if other.is_up and one.is_up:
                other.received_bytes += count
                then()

        self.later(self.dice.uniform(FASTEST_S, SLOWEST_S), land)

    # -- conversations ------------------------------------------------------------------------

    def _open(self, asker: Node, talk: Talk) -> None:
        listener = self.nodes[talk.to]
        opening = {"mesh": bytes(32), **asker.gossip.opening(talk)}

        def hear() -> None:
            answer = listener.gossip.hear_untrusted(asker.peer, opening, self.now)
            step = self._send_news if talk.news else self._narrow
            self._say(listener, asker, answer, lambda: step(asker, listener, talk, answer))

        self._say(asker, listener, opening, hear)

    def _send_news(
        self, asker: Node, listener: Node, talk: Talk, answer: Mapping[str, Any]
    ) -> None:
        wanted = asker.gossip.wanted_untrusted(talk, answer, self.now)
        self._send_records(asker, listener, wanted, lambda: self._over(asker, talk))

    def _narrow(self, asker: Node, listener: Node, talk: Talk, answer: Mapping[str, Any]) -> None:
        narrowed = asker.gossip.narrow_untrusted(answer)
        if narrowed is None:
            self._over(asker, talk)
            return

        def compare() -> None:
            heard = listener.gossip.compare_untrusted(asker.peer, narrowed, self.now)
            wanted, newer = heard
            second = {"want": pack_keys(wanted), "pages": len(newer)}
            self._say(
                listener,
                asker,
                second,
                lambda: self._send_records(listener, asker, newer, lambda: send(second)),
            )

        def send(second: dict[str, Any]) -> None:
            wanted, _pages = asker.gossip.compared_untrusted(talk, second, self.now)
            self._send_records(
                asker, listener, wanted, lambda: self._over(asker, talk, differed=True)
            )

        self._say(asker, listener, narrowed, compare)

    def _send_records(
        self, one: Node, other: Node, peers: list[PeerId], then: Callable[[], None]
    ) -> None:
        numbers = {peer: one.gossip.number(peer) for peer in peers}

        def take() -> None:
            for peer, number in numbers.items():
                ours = other.gossip.number(peer)
                if number is not None and (ours is None or ours < number):
                    other.gossip.put(peer, number, self.now, one.peer)
                    self._reached[peer, number] += 1
            self._wake(other)
            then()

        self._carry(one, other, RECORD_BYTES * len(numbers), take)

    def _over(self, asker: Node, talk: Talk, *, differed: bool = False) -> None:
        asker.gossip.over(talk, self.now, differed=differed)
        self._wake(asker)

    # -- what is looked at --------------------------------------------------------------------

    def change(self, node: Node) -> int:
        """The node's record changes; its number."""
        number = (node.gossip.number(node.peer) or 0) + 1
        node.gossip.put(node.peer, number, self.now)
        self._wake(node)
        return number

    def reached(self, peer: PeerId, number: int) -> int:
        """How many have this record by what they were told."""
        return self._reached[peer, number]

    def all_have(self, peer: PeerId, number: int) -> bool:
        return all(node.gossip.number(peer) == number for node in self.up())

    def up(self) -> list[Node]:
        return [node for node in self.nodes.values() if node.is_up]

    def reset_counters(self) -> None:
        for node in self.nodes.values():
            node.sent_bytes = node.received_bytes = 0.0

    def rates(self, over_s: float) -> dict[PeerId, float]:
        """Bytes a second of each node, sent and received, its sessions' own included."""
        return {
            node.peer: (node.sent_bytes + node.received_bytes) / over_s
            + 2 * CALM_BYTES_PER_S * self.sessions(node)
            for node in self.up()
        }

    def degrees(self) -> Counter[int]:
        return Counter(self.sessions(node) for node in self.up())

    def refresh_all(self, every_s: float, for_s: float) -> None:
        """For `for_s`, each node's record changes once in `every_s`, each at its own moment."""
        for node in self.up():
            first_s = self.dice.random() * every_s
            if first_s < for_s:
                self.later(first_s, partial(self.change, node))
