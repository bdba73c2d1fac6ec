"""A member that holds parts of a model, as a source of bytes: the asking end of `store`."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from functools import partial

import trio

from meshnode.errors import BadMessage, MeshError
from meshnode.messages import MessageStream, PeerGone
from meshnode.models.peers.protocol import (
    HOLDING_BYTES,
    MAX_READ_BYTES,
    Holding,
    HoldsRequest,
    ReadRequest,
    parse_holding_untrusted,
    parse_read_answer_untrusted,
)
from meshnode.models.peers.service import STORE_SERVICE
from meshnode.models.pull.nearness import distance_s
from meshnode.models.pull.patience import Patience, TooLittle
from meshnode.models.pull.source import SourceError, SourceFault, SourceFile, SourceGone
from meshnode.models.pull.threads import in_thread
from meshnode.models.spans import Span
from meshnode.nurseries import accompanied_by
from tunnels import BlockingEnd, PeerId, Session, TunnelError, as_socket

ANSWER_WITHIN_S = 10.0
STALL_S = 30.0
LEFT_AFTER_S = 10.0
"""A member of which nothing is heard for so long is asked for nothing more in a pull."""
PIECE_BYTES = 1 << 20

log = logging.getLogger(__name__)


class PeerSource:
    """I read a model's files at a member. See `RangeSource`."""

    is_sequential = False

    def __init__(self, session: Session, title: str, identity: str, holding: Holding) -> None:
        self._session = session
        self._identity = identity
        self.peer = session.peer
        self.title = title
        self.validator = holding.validator
        self.files = tuple(SourceFile(name, size_bytes, "") for name, size_bytes in holding.files)
        self.holds: Sequence[Span] | None = holding.spans

    @property
    def rtt_s(self) -> float | None:
        """See `RangeSource`."""
        return self._session.rtt_s

    async def read(
        self, file_index: int, start: int, stop: int, into: Callable[[memoryview], None]
    ) -> None:
        """See `RangeSource`."""
        async with accompanied_by(self._end_when_silent):
            while start < stop:
                end = min(stop, start + MAX_READ_BYTES)
                await self._read(ReadRequest(self._identity, file_index, start, end), into)
                start = end

    async def _end_when_silent(self) -> None:
        """Its streams would wait for it for minutes, and others may have the same bytes."""
        while True:
            left_s = LEFT_AFTER_S - self._session.silence_s
            if left_s <= 0:
                break
            await trio.sleep(left_s)
        raise SourceGone(f"nothing has been heard of {self.title} for {LEFT_AFTER_S:g} s")

    async def _read(self, request: ReadRequest, into: Callable[[memoryview], None]) -> None:
        try:
            async with await self._session.open(STORE_SERVICE) as stream:
                messages = MessageStream(stream)
                left = request.stop - request.start
                with trio.fail_after(STALL_S):
                    await messages.send(request.to_message())
                    answer = await messages.receive_untrusted()
                refusal = parse_read_answer_untrusted(answer, left)
                if refusal is not None:
                    raise SourceError(f"{self.title} does not give what it had: {refusal}")
                taking = _Taking(messages.rest(), left, into)
                async with as_socket(stream) as end:
                    await in_thread(end, partial(taking.run, end))
        except TooLittle as error:
            raise SourceFault(f"{self.title}: {error}") from None
        except (trio.TooSlowError, TimeoutError):
            raise SourceFault(f"{self.title} has sent nothing for {STALL_S:g} s") from None
        except (TunnelError, BadMessage, PeerGone) as error:
            # One that comes back does so with a session of its own, and is found by the next look.
            is_over = self._session.closed.is_set()
            kind = SourceGone if is_over else SourceFault
            raise kind(f"{self.title} went away: {error}") from error


class _Taking:
    """Bytes from a stream to a disk, in a thread: an event loop in between costs as much again."""

    def __init__(self, first: bytes, size_bytes: int, into: Callable[[memoryview], None]) -> None:
        self._first = first
        self._left_bytes = size_bytes
        self._into = into

    def run(self, end: BlockingEnd) -> None:
        """Raises `PeerGone`, `TimeoutError` (`TooLittle`), and what `into` raises."""
        end.socket.settimeout(STALL_S)
        self._hand_over(memoryview(self._first)[: self._left_bytes])
        room = memoryview(bytearray(min(PIECE_BYTES, self._left_bytes)))
        patience = Patience(STALL_S)
        while self._left_bytes:
            asked_at = time.monotonic()
            count = end.socket.recv_into(room[: self._left_bytes])
            waited_s = time.monotonic() - asked_at
            if not count:
                raise PeerGone("it closed the conversation before it was through")
            self._hand_over(room[:count])
            patience.note(count, waited_s)

    def _hand_over(self, piece: memoryview) -> None:
        if piece:
            self._into(piece)
            self._left_bytes -= len(piece)


class Holders:
    """I find the members that hold something of a model."""

    def __init__(
        self, sessions: Callable[[], Sequence[Session]], name_of: Callable[[Session], str]
    ) -> None:
        self._sessions = sessions
        self._name_of = name_of

    async def find(self, identity: str) -> list[PeerSource]:
        """The nearest first. Nobody is waited for long."""
        found: list[PeerSource] = []

        async def ask(session: Session) -> None:
            source = await self._ask(session, identity)
            if source is not None:
                found.append(source)

        async with trio.open_nursery() as nursery:
            for session in self._sessions():
                if not session.suspected:
                    nursery.start_soon(ask, session)
        return sorted(found, key=lambda source: distance_s(source.rtt_s))

    async def ask(self, peer: PeerId, identity: str) -> PeerSource | None:
        """One member alone; None where it has nothing of it, or is not there any more."""
        for session in self._sessions():
            if session.peer == peer and not session.suspected:
                return await self._ask(session, identity)
        return None

    async def _ask(self, session: Session, identity: str) -> PeerSource | None:
        name = self._name_of(session)
        try:
            with trio.fail_after(ANSWER_WITHIN_S):
                async with await session.open(STORE_SERVICE) as stream:
                    messages = MessageStream(stream)
                    await messages.send(HoldsRequest(identity).to_message())
                    answer = await messages.receive_untrusted(HOLDING_BYTES)
            holding = parse_holding_untrusted(answer)
        except (TunnelError, MeshError, trio.TooSlowError) as error:
            log.info("%s does not say what it holds: %s", name, error)
            return None
        return PeerSource(session, name, identity, holding) if holding.spans else None
