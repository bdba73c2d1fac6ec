"""The benchmark's delay line: what it holds back and for how long, what it counts."""

from __future__ import annotations

import math
import socket
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.bench.delay_line import Link, delay_line
from tests.bench.link_shaper import BACKLOG_S, PIECE_BYTES, Pipe, Shaper, Way
from tests.bench.rpc_meter import Conversation, Counts, Meter, Tally

HELLO, SET_TENSOR, GET_TENSOR, UNKNOWN = 14, 6, 8, 250


def request(command: int, payload: bytes = b"") -> bytes:
    return struct.pack("<BQ", command, len(payload)) + payload


def reply(payload: bytes = b"") -> bytes:
    return struct.pack("<Q", len(payload)) + payload


def arrivals(pipe: Pipe) -> list[tuple[float, bytes]]:
    """Everything that comes out, each piece at its own moment."""
    found = []
    while (moment := pipe.next_s()) < math.inf:
        assert pipe.due(moment - 1e-9) is None
        piece = pipe.due(moment)
        assert piece is not None
        found.append((moment, bytes(piece)))
        pipe.drop(len(piece))
    return found


def test_a_byte_travels_for_the_delay() -> None:
    pipe = Pipe(Shaper(Way(delay_s=0.010)))
    pipe.put(b"one", now=1.0)
    pipe.put(b"two", now=1.5)
    assert arrivals(pipe) == [(1.010, b"one"), (1.510, b"two")]


def test_the_rate_comes_before_the_way() -> None:
    pipe = Pipe(Shaper(Way(delay_s=0.1, rate=PIECE_BYTES / 2)))
    pipe.put(bytes(2 * PIECE_BYTES), now=0.0)
    assert [moment for moment, _ in arrivals(pipe)] == pytest.approx([2.1, 4.1])


def test_a_link_that_was_idle_has_saved_nothing_up() -> None:
    pipe = Pipe(Shaper(Way(rate=1000.0)))
    pipe.put(bytes(1000), now=0.0)
    pipe.put(bytes(1000), now=5.0)
    assert [moment for moment, _ in arrivals(pipe)] == pytest.approx([1.0, 6.0])


def test_connections_share_the_rate_of_their_link_and_keep_their_own_order() -> None:
    shaper = Shaper(Way(rate=1000.0))
    one, other = Pipe(shaper), Pipe(shaper)
    one.put(b"a" * 1000, now=0.0)
    other.put(b"b" * 1000, now=0.0)
    one.put(b"c" * 1000, now=0.0)
    assert [(moment, data[:1]) for moment, data in arrivals(one)] == [(1.0, b"a"), (3.0, b"c")]
    assert [moment for moment, _ in arrivals(other)] == [2.0]


def test_a_full_link_takes_more_only_when_its_wire_is_nearly_free() -> None:
    pipe = Pipe(Shaper(Way(delay_s=10.0, rate=1000.0)))
    assert pipe.takes(0.0)
    pipe.put(bytes(1000), now=0.0)
    assert not pipe.takes(0.9)
    assert pipe.takes(1.0 - BACKLOG_S)


def test_what_a_full_socket_did_not_take_is_offered_again() -> None:
    pipe = Pipe(Shaper(Way()))
    pipe.put(b"abcdef", now=0.0)
    pipe.drop(4)
    assert arrivals(pipe) == [(0.0, b"ef")]


# --- counting ------------------------------------------------------------------------------


def test_messages_and_bytes_are_counted_by_command_however_the_stream_is_cut() -> None:
    up = request(HELLO, bytes(24)) + request(SET_TENSOR, bytes(100)) + request(GET_TENSOR, b"x")
    down = reply(bytes(28)) + reply(bytes(1000))
    for step in (1, 7, len(up) + len(down)):
        meter = Meter()
        talk = Conversation(meter)
        for start in range(0, len(up), step):
            talk.sent(up[start : start + step])
        for start in range(0, len(down), step):
            talk.given(down[start : start + step])
        assert meter.counts().commands == {
            "HELLO": Tally(requests=1, replies=1, up_bytes=33, down_bytes=36),
            "SET_TENSOR": Tally(requests=1, replies=0, up_bytes=109, down_bytes=0),
            "GET_TENSOR": Tally(requests=1, replies=1, up_bytes=10, down_bytes=1008),
        }


def test_requests_that_did_not_wait_are_one_round_trip() -> None:
    meter = Meter()
    talk = Conversation(meter)
    talk.sent(request(GET_TENSOR) * 3)
    talk.given(reply() * 3)
    assert meter.counts().rounds == 1


def test_who_waited_for_another_connection_lies_deeper() -> None:
    meter = Meter()
    one, other = Conversation(meter), Conversation(meter)
    one.sent(request(GET_TENSOR))
    other.sent(request(GET_TENSOR))
    one.given(reply())
    one.sent(request(GET_TENSOR))
    other.given(reply())
    one.given(reply())
    assert meter.counts().rounds == 2


def test_a_reply_counts_when_all_of_it_has_arrived() -> None:
    meter = Meter()
    talk = Conversation(meter)
    talk.sent(request(GET_TENSOR))
    talk.given(reply(bytes(10))[:-1])
    talk.sent(request(GET_TENSOR))
    talk.given(b"\0" + reply())
    assert meter.counts().rounds == 1


def test_unanswered_requests_are_no_round_trips() -> None:
    meter = Meter()
    Conversation(meter).sent(request(SET_TENSOR, bytes(5)) + request(UNKNOWN))
    counts = meter.counts()
    assert counts.rounds == 0
    assert counts.commands["command 250"] == Tally(requests=1, up_bytes=9)


def test_a_token_is_the_difference_of_two_counts_over_their_number() -> None:
    meter = Meter()
    talk = Conversation(meter)
    talk.sent(request(HELLO))
    talk.given(reply())
    before = meter.counts()
    for _ in range(4):
        talk.sent(request(GET_TENSOR))
        talk.given(reply(bytes(2)))
    each = meter.counts().since(before).per(4)
    assert each == Counts({"GET_TENSOR": Tally(1, 1, 9, 10)}, rounds=1)


# --- the process ---------------------------------------------------------------------------


@pytest.fixture
def folder() -> Iterator[Path]:
    """Short: a socket's path has about 100 bytes."""
    with tempfile.TemporaryDirectory(prefix="mesh-", dir="/tmp") as name:
        yield Path(name)


def test_what_goes_in_by_tcp_comes_out_of_a_unix_socket_and_the_end_follows_it(
    folder: Path,
) -> None:
    far_door = socket.socket(socket.AF_UNIX)
    far_door.bind(str(folder / "target"))
    far_door.listen()
    link = Link("127.0.0.1:0", f"unix:{folder}/target", Way(delay_s=0.001, rate=50e6))
    payload = bytes(range(256)) * 4096
    with far_door, delay_line(link) as line:
        host, _, port = line.addresses[0].rpartition(":")
        with socket.create_connection((host, int(port))) as near, far_door.accept()[0] as far:
            far.settimeout(10)
            near.sendall(request(GET_TENSOR, payload))
            near.shutdown(socket.SHUT_WR)
            with far.makefile("rb") as stream:
                assert stream.read() == request(GET_TENSOR, payload)
            far.sendall(reply(b"answer"))
            far.close()
            with near.makefile("rb") as stream:
                assert stream.read() == reply(b"answer")
        tally = line.counts().commands["GET_TENSOR"]
    assert tally == Tally(1, 1, len(request(GET_TENSOR, payload)), len(reply(b"answer")))


def test_the_final_count_waits_for_what_is_under_way_when_both_ends_are_gone(folder: Path) -> None:
    far_door = socket.socket(socket.AF_UNIX)
    far_door.bind(str(folder / "target"))
    far_door.listen()
    link = Link(f"unix:{folder}/start", f"unix:{folder}/target", Way(delay_s=0.2))
    with far_door, delay_line(link) as line, socket.socket(socket.AF_UNIX) as near:
        near.connect(f"{folder}/start")
        with far_door.accept()[0] as far:
            near.sendall(request(GET_TENSOR))
            near.shutdown(socket.SHUT_WR)
            far.sendall(reply(b"answer"))
        assert line.final_counts().commands["GET_TENSOR"].replies == 1
