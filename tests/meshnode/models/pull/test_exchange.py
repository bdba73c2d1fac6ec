"""One connection, over a pair of sockets; and the thread that waits on it."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from meshnode.models.pull.exchange import Exchange
from meshnode.models.pull.source import SourceError, SourceFault
from meshnode.models.pull.threads import in_thread
from meshnode.models.pull.url import parse_url

URL = parse_url("http://host/x")
BODY = bytes(range(256)) * 400  # more than is read with a head


@pytest.fixture
def pair() -> Iterator[tuple[Exchange, socket.socket]]:
    ours, theirs = socket.socketpair()
    exchange = Exchange(ours, stall_s=20.0)
    yield exchange, theirs
    exchange.close()
    theirs.close()


def answer(body: bytes, *lines: str, length: int | None = None) -> bytes:
    told = ["HTTP/1.1 206 So", f"Content-Length: {len(body) if length is None else length}", *lines]
    return ("\r\n".join(told) + "\r\n\r\n").encode() + body


def receive(exchange: Exchange, size_bytes: int = len(BODY)) -> bytes:
    taken = bytearray()
    exchange.ask(URL, {})
    exchange.receive(URL, 0, size_bytes, taken.extend)
    return bytes(taken)


def test_a_connection_is_used_again_after_an_answer_that_was_read_to_its_end(
    pair: tuple[Exchange, socket.socket],
) -> None:
    exchange, server = pair
    for _ in range(3):
        server.sendall(answer(BODY))
        assert receive(exchange) == BODY
        assert exchange.is_reusable
        exchange.renew()


def test_bytes_after_an_answer_are_not_taken_for_the_next_one(
    pair: tuple[Exchange, socket.socket],
) -> None:
    exchange, server = pair
    server.sendall(answer(BODY) + b"HTTP/1.1 206 So\r\n")
    assert receive(exchange) == BODY
    assert not exchange.is_reusable


def test_bytes_that_come_with_the_answer_and_are_too_many_are_an_error(
    pair: tuple[Exchange, socket.socket],
) -> None:
    exchange, server = pair
    server.sendall(answer(b"abc") + b"more")
    with pytest.raises(SourceError, match="more bytes than"):
        receive(exchange, 3)
    assert not exchange.is_reusable


@pytest.mark.parametrize("lines", [("Connection: close",), ("Connection: Close",)])
def test_a_connection_that_the_server_gives_up_is_not_used_again(
    pair: tuple[Exchange, socket.socket], lines: tuple[str, ...]
) -> None:
    exchange, server = pair
    server.sendall(answer(BODY, *lines))
    assert receive(exchange) == BODY
    assert not exchange.is_reusable


def test_a_connection_with_a_rest_unread_is_not_used_again(
    pair: tuple[Exchange, socket.socket],
) -> None:
    exchange, server = pair
    server.sendall(answer(BODY))
    exchange.ask(URL, {})
    assert not exchange.is_reusable


def test_what_had_come_before_the_end_was_handed_over(
    pair: tuple[Exchange, socket.socket],
) -> None:
    exchange, server = pair
    server.sendall(answer(BODY, length=10**6))
    server.shutdown(socket.SHUT_WR)
    taken = bytearray()
    exchange.ask(URL, {})
    with pytest.raises(SourceFault, match="ended early"):
        exchange.receive(URL, 0, 10**6, taken.extend)
    assert taken == BODY


LINES = st.sampled_from(
    [
        b"HTTP/1.1 206 So\r\n",
        b"HTTP/1.1 200 So\r\n",
        b"HTTP/1.0 206 So\r\n",
        b"HTTP/1.1 100 On\r\n",
        b"HTTP/1.1 204 No\r\n",
        b"Content-Length: 5\r\n",
        b"Content-Length: 7\r\n",
        b"\r\n",
        b"Transfer-Encoding: chunked\r\n",
        b"Transfer-Encoding: gzip, chunked\r\n",
        b"5\r\n",
        b"abcde",
        b"\r\n0\r\n\r\n",
        b"3;x=y\r\n",
        b"Connection: close\r\n",
        b"\x00",
        b"\n",
    ]
)


@given(st.lists(LINES | st.binary(max_size=20), max_size=12), st.integers(0, 3))
def test_whatever_a_server_sends_ends_in_the_bytes_asked_for_or_in_a_sentence(
    said: list[bytes], skip_bytes: int
) -> None:
    ours, server = socket.socketpair()
    exchange = Exchange(ours, stall_s=20.0)
    taken = bytearray()
    with ours, server:
        server.sendall(b"".join(said))
        server.shutdown(socket.SHUT_WR)
        try:
            exchange.ask(URL, {})
            exchange.receive(URL, skip_bytes, 5, taken.extend)
        except (SourceFault, SourceError):
            assert len(taken) <= 5
        else:
            assert len(taken) == 5


@given(st.lists(LINES | st.binary(max_size=20), max_size=12))
def test_whatever_a_server_sends_a_document_is_bounded(said: list[bytes]) -> None:
    ours, server = socket.socketpair()
    exchange = Exchange(ours, stall_s=20.0)
    with ours, server, suppress(SourceFault, SourceError):
        server.sendall(b"".join(said))
        server.shutdown(socket.SHUT_WR)
        exchange.ask(URL, {})
        assert len(exchange.body(URL, 6)) <= 6


async def test_who_is_cancelled_hears_of_that_and_not_of_the_broken_connection() -> None:
    ours, theirs = socket.socketpair()
    exchange = Exchange(ours, stall_s=20.0)
    waiting = threading.Event()

    def work() -> None:
        waiting.set()
        exchange.ask(URL, {})

    async with trio.open_nursery() as nursery:
        scope = trio.CancelScope()

        async def cancel() -> None:
            await trio.to_thread.run_sync(waiting.wait)
            scope.cancel()

        nursery.start_soon(cancel)
        with scope:
            await in_thread(exchange, work)
    assert scope.cancelled_caught
    exchange.close()
    theirs.close()


INTERRUPTED = """
import os, signal, socket, threading, time, trio
from meshnode.models.pull.exchange import Exchange
from meshnode.models.pull.threads import in_thread
from meshnode.models.pull.url import parse_url

ours, theirs = socket.socketpair()
exchange = Exchange(ours, stall_s=20.0)

def interrupt():
    theirs.recv(1)  # it is being asked, and will not answer
    os.kill(os.getpid(), signal.SIGINT)

threading.Thread(target=interrupt, daemon=True).start()
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a shell's background
began = time.monotonic()
try:
    trio.run(in_thread, exchange, lambda: exchange.ask(parse_url("http://host/x"), {}))
except* KeyboardInterrupt:
    print("after", "long" if time.monotonic() - began > 10 else "a moment")
"""


def test_ctrl_c_waits_for_no_server() -> None:
    ended = subprocess.run(
        [sys.executable, "-c", INTERRUPTED], capture_output=True, text=True, timeout=60, check=False
    )
    assert ended.stdout == "after a moment\n", ended.stderr
