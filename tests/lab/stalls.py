"""Peers that stop in the middle, and the passing of time beside real sockets and processes."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from unittest.mock import patch

import cbor2
import trio
import trio.testing

from meshnode.messages import Message, MessageStream
from tunnels import PeerId, Session, Stream
from tunnels.frames import Open, encode, encode_data
from tunnels.link import Channel

_NUMBERS = itertools.count(1 << 20)  # of streams, beyond those that a session gives itself
_REST_S = 0.005
EASY_WINDOW_BYTES = 1 << 20


def framed(message: Message) -> bytes:
    """A message as it goes over a stream."""
    body = cbor2.dumps(dict(message))
    return len(body).to_bytes(4, "big") + body


@dataclass
class Mute:
    """A stream to a peer's service of which nothing is done but what a test says: nothing that
    comes is taken or acknowledged."""

    channel: Channel
    sent_bytes: int = 0

    def say(self, words: bytes) -> None:
        if words:
            self.channel.send(encode_data(self.sent_bytes, words))
            self.sent_bytes += len(words)


async def open_mute(session: Session, service: str, takes_bytes: int = EASY_WINDOW_BYTES) -> Mute:
    """takes_bytes: the window that the peer is given for its answers, never to be widened."""
    link = session.best_link
    assert link is not None
    channel = await link.open_channel()
    channel.send(encode(Open(next(_NUMBERS), takes_bytes, service)))
    return Mute(channel)


@contextmanager
def stalling(peer: PeerId, service: str, after: int, half: bool) -> Iterator[trio.Event]:
    """Whoever of this process answers `peer` at `service` says `after` messages, with `half` also
    the first half of the next, and then nothing for ever. The event: it has come so far."""
    send, stalled = MessageStream.send, trio.Event()
    said = 0

    async def stall(messages: MessageStream, message: Message) -> None:
        nonlocal said
        stream = messages._stream
        assert isinstance(stream, Stream)
        if stream.opened_here or (stream.peer, stream.service) != (peer, service):
            await send(messages, message)
            return
        if said < after:
            said += 1
            await send(messages, message)
            return
        if half:
            words = framed(message)
            await stream.send_all(words[: len(words) // 2])
        stalled.set()
        await trio.sleep_forever()

    with patch.object(MessageStream, "send", stall):
        yield stalled


async def never(_stream: Stream) -> None:
    """A service that takes the stream, and nothing of what it brings."""
    await trio.sleep_forever()


# --- time beside what is real --------------------------------------------------------------


def pushed_clock() -> trio.testing.MockClock:
    """A clock that goes as real sockets and processes need it, and may be pushed ahead. Under
    trio's autojump the time of a node would be over before another process had said a word."""
    return trio.testing.MockClock(rate=1.0)


async def let_pass(clock: trio.testing.MockClock, seconds: float, step_s: float = 0.5) -> None:
    """Pushes the clock ahead step by step, so that whoever answers a ping may do so in time."""
    end_s = trio.current_time() + seconds
    while (left_s := end_s - trio.current_time()) > 0:
        clock.jump(min(step_s, left_s))
        await trio.testing.wait_all_tasks_blocked(_REST_S)


async def until(holds: Callable[[], bool]) -> None:
    """Waits for what sockets and other processes bring about. Raises `trio.TooSlowError`."""
    with trio.fail_after(20):
        while not holds():  # noqa: ASYNC110 - nothing tells
            await trio.sleep(0.01)


def unfinished(session: Session) -> list[str]:
    """The services of the streams that take up room in a session."""
    return [stream.service for stream in session._streams]


def open_at(session: Session, service: str) -> set[Stream]:
    """Those of one service: gossip comes at any time, and a reservation stands while it is held."""
    return {stream for stream in session._streams if stream.service == service}


def halves(words: Sequence[bytes], said: int, half: bool) -> bytes:
    """`said` of these messages and, with `half`, the first half of the next."""
    whole = b"".join(words[:said])
    return whole + (words[said][: len(words[said]) // 2] if half else b"")
