"""STUN over the node's one UDP socket: our questions, repeated until answered, and others'.

Servers are asked how we look from outside; any address, whether a node is there (`knock`), with a
question of 64 bytes: QUIC's first datagram has 1,200, is repeated, and would go to whomever a peer
names.
"""

from __future__ import annotations

import secrets
from collections import Counter
from dataclasses import dataclass, field

import trio

from tunnels.binding import Address
from tunnels.consent import Knocks
from tunnels.demux import SharedSocket
from tunnels.errors import BadFrame
from tunnels.stun import (
    SOFTWARE,
    TRANSACTION_BYTES,
    Failure,
    Request,
    Responder,
    Success,
    Transactions,
    is_request,
    parse_untrusted,
)


@dataclass
class _Question:
    over: trio.Event = field(default_factory=trio.Event)
    answer: Success | Failure | None = None


class StunPort:
    """I ask servers for our address, and tell anybody theirs."""

    def __init__(self, socket: SharedSocket) -> None:
        """Answers from now on; asks while it runs."""
        self.local = socket.local
        self._socket = socket
        self._transactions = Transactions()
        self._questions: dict[bytes, _Question] = {}
        self._asked = trio.Event()
        self._knocks = Knocks()
        self._doors: Counter[Address] = Counter()  # being knocked at
        self._responder = Responder(trio.current_time())
        socket.on_stun = self._on_stun

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            now = trio.current_time()
            turn = self._transactions.advance(now)
            for datagram, server in turn.sends:
                if server not in self._doors or self._knocks.take(server, len(datagram), now):
                    self._socket.send([datagram], server)
            for transaction in turn.silent:
                self._close(transaction, None)
            with trio.move_on_at(self._transactions.next_deadline()):
                await self._asked.wait()
            self._asked = trio.Event()

    async def ask(self, server: Address) -> Address | None:
        """What it saw; None when it is silent, or says that it will not answer."""
        answer = await self._answer(server)
        return answer.mapped if isinstance(answer, Success) else None

    async def knock(self, address: Address) -> bool:
        """Until somebody answers there; whether that is a node."""
        answer = None
        self._doors[address] += 1
        try:
            while answer is None:
                answer = await self._answer(address, SOFTWARE)
        finally:
            self._doors -= Counter((address,))
            if address not in self._doors:
                now = trio.current_time()
                self._knocks.over(address, now, answered=answer is not None)
        return isinstance(answer, Success) and answer.software == SOFTWARE

    async def _answer(self, server: Address, software: bytes = b"") -> Success | Failure | None:
        transaction = secrets.token_bytes(TRANSACTION_BYTES)
        question = self._questions[transaction] = _Question()
        self._transactions.ask(server, transaction, trio.current_time(), software)
        self._asked.set()
        try:
            await question.over.wait()
        finally:
            del self._questions[transaction]
            self._transactions.forget(transaction)
        return question.answer

    def _close(self, transaction: bytes, answer: Success | Failure | None) -> None:
        question = self._questions.get(transaction)
        if question is not None:  # else who asked has given up
            question.answer = answer
            question.over.set()

    def _on_stun(self, datagram: bytes, sender: Address) -> None:
        if is_request(datagram):
            answer = self._responder.answer_untrusted(datagram, sender, trio.current_time())
            if answer is not None:
                self._socket.send([answer], sender)
            return
        try:
            said = parse_untrusted(datagram)
        except BadFrame:
            return
        if not isinstance(said, Request) and self._transactions.settle(said, sender):
            self._close(said.transaction, said)
