"""STUN over the node's one UDP socket: our questions, repeated until answered, and others'."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field

import trio

from tunnels.binding import Address
from tunnels.demux import SharedSocket
from tunnels.errors import BadFrame
from tunnels.stun import (
    TRANSACTION_BYTES,
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
    mapped: Address | None = None


class StunPort:
    """I ask servers for our address, and tell anybody theirs."""

    def __init__(self, socket: SharedSocket) -> None:
        """Answers from now on; asks while it runs."""
        self.local = socket.local
        self._socket = socket
        self._transactions = Transactions()
        self._questions: dict[bytes, _Question] = {}
        self._asked = trio.Event()
        self._responder = Responder(trio.current_time())
        socket.on_stun = self._on_stun

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            turn = self._transactions.advance(trio.current_time())
            for datagram, server in turn.sends:
                self._socket.send([datagram], server)
            for transaction in turn.silent:
                self._close(transaction, None)
            with trio.move_on_at(self._transactions.next_deadline()):
                await self._asked.wait()
            self._asked = trio.Event()

    async def ask(self, server: Address) -> Address | None:
        """What it saw; None when it is silent, or says that it will not answer."""
        transaction = secrets.token_bytes(TRANSACTION_BYTES)
        question = self._questions[transaction] = _Question()
        self._transactions.ask(server, transaction, trio.current_time())
        self._asked.set()
        try:
            await question.over.wait()
        finally:
            del self._questions[transaction]
        return question.mapped

    def _close(self, transaction: bytes, mapped: Address | None) -> None:
        question = self._questions.get(transaction)
        if question is not None:  # else who asked has given up
            question.mapped = mapped
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
            self._close(said.transaction, said.mapped if isinstance(said, Success) else None)
