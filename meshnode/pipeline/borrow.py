"""The orchestrator's side of a worker: its facts, and leases on its memory."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import trio

from meshnode.crash_points import reached
from meshnode.errors import BadMessage, MeshError, NetworkError, ResourceError
from meshnode.messages import MANIFEST_MESSAGE_BYTES, SMALL_MESSAGE_BYTES, MessageStream
from meshnode.models.shelf import MAX_DIGESTED, PROGRESS_STEP_BYTES
from meshnode.nurseries import accompanied_by
from meshnode.pipeline.protocol import (
    End,
    Granted,
    LeaseRequest,
    Progress,
    PushFrom,
    PushNews,
    PushTo,
    WorkerFacts,
    parse_granted_untrusted,
    parse_progress_untrusted,
    parse_push_news_untrusted,
    parse_reason_untrusted,
    parse_worker_facts_untrusted,
)
from tunnels import Session, StreamError, TunnelError

FACTS_TIMEOUT_S = 10.0
FACTS_BYTES = 1024 * 1024
GOODBYE_S = 1.0
ASK_TIMEOUT_S = 30.0
"""For a worker to take the request, 16 MiB at most: it waits no longer for us."""
SILENCE_S = 120.0
"""Until the worker is further with a lease: a slow disk's progress, a GPU waking up."""
GRANT_TIMEOUT_S = 6 * 3600.0
"""For all of it: a terabyte from a slow disk. Words that tell of progress cost nothing."""
MAX_BEGUN_AGAIN = 32
"""Parts of a pull that a worker tells of from nothing on, at most."""


class LeaseRefused(ResourceError):
    """The worker said no; its sentence."""


class LeaseLost(NetworkError):
    """A granted lease ended before its deployment did."""


class PushRefused(NetworkError):
    """The worker pushes nothing, or takes nothing; its sentence."""


async def ask_facts(session: Session, *, fresh: bool = False) -> WorkerFacts:
    """What the peer lends; fresh: once it has measured what it never has. Raises a `MeshError` when
    it does not answer."""
    try:
        with trio.fail_after(FACTS_TIMEOUT_S):
            async with await session.open("control") as stream:
                messages = MessageStream(stream)
                await messages.send({"op": "facts", "fresh": fresh})
                return parse_worker_facts_untrusted(await messages.receive_untrusted(FACTS_BYTES))
    except (TunnelError, trio.TooSlowError) as error:
        raise NetworkError(f"the peer {session.peer.short} lends nothing: {error}") from None


class PushEnd:
    """What a worker has said of one end of a push: that it stands, or does not, or no more.

    silent: it stands, but the worker has not heard the one at the other end for long. changed: set,
    and another one made, with each word.
    """

    def __init__(self) -> None:
        self.told = trio.Event()
        self.over = trio.Event()
        self.changed = trio.Event()
        self.silent = False
        self.reason = ""

    def hear(self, news: PushNews) -> None:
        """Raises `BadMessage` for what cannot follow on what was said."""
        is_news = news.silent != self.silent if self.told.is_set() else not news.silent
        if self.over.is_set() or (news.stands and not is_news):
            raise BadMessage("the worker says of a push what cannot be")
        self.told.set()
        self.silent = news.silent
        self.changed.set()
        self.changed = trio.Event()
        if not news.stands:
            self.reason = news.reason
            self.over.set()


class Borrowed:
    """A lease in force. `ended` is set, and `reason` says why, when the worker's side ended it."""

    def __init__(self, granted: Granted, messages: MessageStream) -> None:
        self.granted = granted
        self.ended = trio.Event()
        self.reason = ""
        self._messages = messages
        self._ends: dict[End, PushEnd] = {}

    async def order(self, order: PushFrom | PushTo) -> PushEnd:
        """Has the worker take pushes or make them; returns once that stands. Only for one whose
        grant says that it knows the ring, and once each. Raises `PushRefused`, `TunnelError`."""
        end = self._ends[End.FROM if isinstance(order, PushFrom) else End.TO] = PushEnd()
        await self._messages.send(order.to_message())
        await end.told.wait()
        if end.over.is_set():
            raise PushRefused(end.reason)
        return end

    def _hear(self, news: PushNews) -> None:
        end = self._ends.get(news.end)
        if end is None:
            raise BadMessage("the worker tells of a push that nobody asked for")
        end.hear(news)

    def _end(self, reason: str) -> None:
        self.reason = reason
        self.ended.set()

    async def _follow(self) -> None:
        """What the worker says from the grant on, to the lease's end."""
        reason = "the worker ended the lease"
        try:
            while (message := await self._messages.receive_or_end_untrusted()) is not None:
                match message.get("event"):
                    case "push":
                        self._hear(parse_push_news_untrusted(message))
                        continue
                    case "ended":
                        reason = parse_reason_untrusted(message)
                break
        except (StreamError, MeshError) as error:
            reason = str(error)
        self._end(reason)


@asynccontextmanager
async def borrow(
    session: Session, request: LeaseRequest, on_progress: Callable[[Progress], None]
) -> AsyncIterator[Borrowed]:
    """Holds a lease while the body runs. `on_progress`: how far the worker is until it grants.

    Raises `LeaseRefused`, or `LeaseLost` when the worker goes away before it answers. However it
    ends, also while the worker is still thinking, the stream is closed and the lease with it.
    """
    try:
        stream = await session.open("control")
    except TunnelError as error:
        raise _gone(error) from None
    messages = MessageStream(stream)
    try:
        try:
            with trio.fail_after(ASK_TIMEOUT_S):
                await messages.send(request.to_message())
            reached("lease.asked")
            # With an order come digests, of each tensor that was pulled.
            limit_bytes = MANIFEST_MESSAGE_BYTES if request.order else SMALL_MESSAGE_BYTES
            granted = await _await_grant(messages, on_progress, limit_bytes)
            borrowed = Borrowed(granted, messages)
            reached("lease.granted")
        except trio.TooSlowError:
            raise LeaseLost(
                f"the worker did not take the request for a lease in {ASK_TIMEOUT_S:.0f} s"
            ) from None
        except TunnelError as error:
            raise _gone(error) from None

        async with accompanied_by(borrowed._follow):
            yield borrowed
    finally:
        with trio.move_on_after(GOODBYE_S, shield=True):
            await stream.aclose()


def _gone(error: TunnelError) -> LeaseLost:
    return LeaseLost(f"the worker went away before it granted the lease: {error}")


class _Advance:
    """I tell whether a worker gets on with its digests or its pull, whatever it says, and how
    often."""

    def __init__(self) -> None:
        self._done_bytes = 0
        self._files = 0
        self._pulled_bytes = 0
        self._begun_again = 0

    def is_further(self, progress: Progress) -> bool:
        """A step as `shelf.Progress` makes them, a file's end, or the next file, of a few. A pull
        may be slow, and every byte of it counts."""
        if progress.pulls:
            return self._is_pulled_further(progress.done_bytes)
        done_bytes, total_bytes = progress.done_bytes, progress.total_bytes
        if done_bytes >= self._done_bytes + PROGRESS_STEP_BYTES:
            self._done_bytes = done_bytes
            return True
        if total_bytes <= done_bytes or done_bytes < self._done_bytes:
            self._done_bytes = 0
            self._files += 1
            return self._files <= 2 * MAX_DIGESTED
        return False

    def _is_pulled_further(self, done_bytes: int) -> bool:
        """It begins at nothing again where what a kill left was read, where members gave what they
        have, where the check begins, and for each that had its turn before."""
        if done_bytes < self._pulled_bytes and self._begun_again < MAX_BEGUN_AGAIN:
            self._begun_again += 1
            self._pulled_bytes = done_bytes
            return True
        is_more = done_bytes > self._pulled_bytes
        self._pulled_bytes = max(done_bytes, self._pulled_bytes)
        return is_more


async def _await_grant(
    messages: MessageStream, on_progress: Callable[[Progress], None], limit_bytes: int
) -> Granted:
    ends_s = trio.current_time() + GRANT_TIMEOUT_S
    advance, further_s = _Advance(), trio.current_time()
    while True:
        limit_s = min(further_s + SILENCE_S, ends_s)
        with trio.move_on_at(limit_s):
            message = await messages.receive_untrusted(limit_bytes)
        # By the clock: a worker that never pauses is never cancelled in the middle of a wait.
        if trio.current_time() >= ends_s:
            raise LeaseLost(f"the worker granted no lease in {GRANT_TIMEOUT_S / 3600:.0f} h")
        if trio.current_time() >= limit_s:
            raise LeaseLost(f"the worker got no further with the lease for {SILENCE_S:.0f} s")
        match message.get("event"):
            case "progress":
                progress = parse_progress_untrusted(message)
                if advance.is_further(progress):
                    further_s = trio.current_time()
                on_progress(progress)
            case "granted":
                return parse_granted_untrusted(message)
            case "refused":
                raise LeaseRefused(parse_reason_untrusted(message))
            case _:
                raise BadMessage("the worker answered with a message this version does not know")
