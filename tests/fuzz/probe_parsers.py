"""Probes: datagrams of anyone, and what a peer who holds the secret may say, in any order."""

from __future__ import annotations

import random
from collections import Counter

from tests.fuzz.mutation import SealedFormat
from tests.fuzz.parser import Parser, check
from tests.fuzz.script import Script
from tunnels.binding import Address
from tunnels.consent import HEADER_BYTES, UNASKED_BYTES
from tunnels.errors import BadFrame
from tunnels.handshake import Role
from tunnels.probe import MAX_HEARD, Plan, Probe, Send
from tunnels.probe_wire import (
    NONCE_BYTES,
    PROBE_BYTES,
    TRANSACTION_BYTES,
    DirectionKey,
    Kind,
    Message,
    Way,
    direction_key,
    label_of_untrusted,
)
from tunnels.salvo import Salvo

SECRET = b"s" * 32
KEY = direction_key(SECRET, Role.LISTENER)
HOSTS = ("11.0.0.1", "11.0.0.2", "2001:db8::1", "127.0.0.1")
PLACES: tuple[Address, ...] = (("11.0.0.1", 4433), ("2001:db8::1", 9))
NONCE = b"n" * NONCE_BYTES
INSIDE_BYTES = 27


def run_probe(data: bytes) -> Message:
    message = KEY.open_untrusted(data)
    check(KEY.open_untrusted(KEY.seal(message, NONCE)) == message, "a probe reads back")
    check(label_of_untrusted(data) == KEY.label, "a probe says whose it is")
    return message


def sealed(inside: bytes) -> bytes:
    """Right below the seal as well: whoever holds the secret can say anything."""
    bound = b"\x12" + KEY.label
    body = inside[:INSIDE_BYTES].ljust(INSIDE_BYTES, b"\0")
    return bound + NONCE + KEY.cipher.encrypt(NONCE, body, bound)


def probe_bodies() -> list[bytes]:
    v4 = bytes(10) + b"\xff\xff\x0b\0\0\1"
    return [bytes((kind,)) + b"question" + v4 + b"\x11\x51" for kind in Kind]


def probe_seeds() -> list[bytes]:
    return list(map(sealed, probe_bodies()))


class Search:
    """One side of a search, and what it may not be made to do."""

    def __init__(self, flags: int) -> None:
        role = Role.DIALLER if flags & 1 else Role.LISTENER
        salvo = Salvo(HOSTS[0], [Way(PLACES[0], via) for via in range(1, 9)], 400)
        plan = Plan(role, 0.0, PLACES, salvo if flags & 2 else None)
        dice = random.Random(1)
        self.side = Probe(SECRET, plan, lambda host: host != HOSTS[3], dice.randbytes)
        self._salvo_bytes = 8 * (PROBE_BYTES + 28) + 4096 if flags & 2 else 0
        self._ours: DirectionKey = direction_key(SECRET, role.other)
        self._theirs: DirectionKey = direction_key(SECRET, role)
        self._asked = [b"question"]
        self._answering: set[Address] = set()
        self._sent: Counter[str] = Counter()

    def step(self, script: Script, now: float) -> None:
        choice = script.byte()
        way = Way((HOSTS[choice >> 2 & 3], 1 + script.byte()), choice >> 7)
        kind = list(Kind)[choice % 3]
        transaction = bytes((script.byte(),)) * TRANSACTION_BYTES
        if kind is Kind.PONG:
            transaction = self._asked[script.byte() % len(self._asked)]
            way = Way(PLACES[choice >> 4 & 1], way.via) if choice & 8 else way
            self._answering.add(way.to)
        probe = self._theirs.seal(Message(kind, transaction, PLACES[0]), NONCE)
        self.side.receive_untrusted(probe, way, now)
        self.perform()

    def perform(self) -> None:
        for action in self.side.actions():
            if isinstance(action, Send):
                message = self._ours.open_untrusted(action.datagram)
                host = action.way.to[0]
                if message.kind is not Kind.PONG:
                    self._asked.append(message.transaction)
                if action.way.to not in self._answering:
                    self._sent[host] += PROBE_BYTES + HEADER_BYTES[6 if ":" in host else 4]
        check(not self._sent[HOSTS[3]], "the address policy holds for senders too")
        most = UNASKED_BYTES + self._salvo_bytes
        check(max(self._sent.values(), default=0) <= most, "who does not answer gets 1 KB")


def run_search(data: bytes) -> object:
    """First byte: our role, and whether there is a salvo; then what the peer does."""
    script = Script(data)
    search, now = Search(script.byte()), 0.0
    for _ in range(100):
        if script.over or search.side.is_over:
            break
        now += script.byte() / 500
        search.side.handle_timer(now)
        search.perform()
        search.step(script, now)
    for _ in range(MAX_HEARD):
        if search.side.is_over:
            break
        search.side.handle_timer(search.side.next_deadline())
        search.perform()
    check(search.side.is_over, "a search ends")
    return search.side.state


def search_seeds() -> list[bytes]:
    ping, pong, nominate = 0, 1, 2
    return [
        bytes((1, 5, ping, 9, 1, 5, pong | 8, 9, 1, 1, 90, pong | 8, 9, 1, 3)),
        bytes((0, 5, ping, 9, 1, 5, pong | 8 | 16, 9, 2, 90, nominate, 9, 3)),
        bytes((3, 255, ping | 128, 9, 1, 255, pong | 8 | 128, 9, 1, 7)),
        bytes((2, *[20, ping | 4, 7, 1] * 20)),
    ]


PARSERS = (
    Parser(
        *("probe", (BadFrame,), probe_bodies, run_probe),
        format=SealedFormat(sealed),
    ),
    Parser("datagram that may be a probe", (BadFrame,), probe_seeds, run_probe),
    Parser("search for a path", (), search_seeds, run_search),
)
