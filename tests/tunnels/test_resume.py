"""A stream's two ends, joined by channels that die at every possible place."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest

from tunnels.credit import ACK_EVERY_BYTES, ReceiveWindow
from tunnels.errors import BadFrame
from tunnels.frames import (
    Ack,
    Data,
    End,
    Ping,
    Record,
    RecordDecoder,
    Reset,
    ResetCode,
    Stop,
)
from tunnels.resume import StreamState

WINDOW = 4096


def end(window_bytes: int = WINDOW) -> StreamState:
    window = ReceiveWindow(window_bytes, window_bytes)
    return StreamState(send_limit=window_bytes, window=window)


def records_of(state: StreamState) -> list[Record]:
    return RecordDecoder().feed_untrusted(b"".join(state.outgoing()))


def deliver(source: StreamState, sink: StreamState) -> None:
    for record in records_of(source):
        sink.receive(record)


def settle(one: StreamState, two: StreamState) -> None:
    for _ in range(10):
        deliver(one, two)
        deliver(two, one)


def rejoin(one: StreamState, two: StreamState) -> None:
    """A new channel: each side learns where the other stands."""
    one.detach()
    two.detach()
    first, second = one.position, two.position
    two.reattach(first)
    one.reattach(second)


@dataclass
class Run:
    """One transfer both ways whose channel is cut once or more."""

    cuts: set[int]
    sent: dict[StreamState, bytearray] = field(default_factory=dict)
    got: dict[StreamState, bytearray] = field(default_factory=dict)
    carried: int = 0

    def play(self, seed: int) -> None:
        dice = random.Random(seed)
        one, two = end(), end()
        self.sent = {one: bytearray(), two: bytearray()}
        self.got = {one: bytearray(), two: bytearray()}
        for _ in range(40):
            for mine, theirs in ((one, two), (two, one)):
                size = min(mine.sendable_bytes, dice.randrange(1, 900))
                if size:
                    data = dice.randbytes(size)
                    mine.send(data)
                    self.sent[mine] += data
                self.carry(mine, theirs)
                self.got[theirs] += theirs.take(dice.randrange(1, 2000))
        one.end()
        two.end()
        for _ in range(12):
            self.carry(one, two)
            self.carry(two, one)
            self.got[one] += one.take(WINDOW)
            self.got[two] += two.take(WINDOW)
        assert self.got[two] == self.sent[one]
        assert self.got[one] == self.sent[two]
        assert one.finished
        assert two.finished
        assert one.at_end
        assert two.at_end
        assert one.kept_bytes == two.kept_bytes == 0

    def carry(self, source: StreamState, sink: StreamState) -> None:
        for record in records_of(source):
            self.carried += 1
            if self.carried in self.cuts:  # this record and all behind it are lost
                rejoin(source, sink)
                return
            sink.receive(record)


def test_a_channel_may_be_cut_at_every_record() -> None:
    whole = Run(cuts=set())
    whole.play(seed=1)
    assert whole.carried > 100
    for cut in range(1, whole.carried + 1):
        Run(cuts={cut}).play(seed=1)


@pytest.mark.parametrize("seed", range(10))
def test_channels_may_be_cut_again_and_again(seed: int) -> None:
    dice = random.Random(seed)
    Run(cuts={dice.randrange(1, 160) for _ in range(12)}).play(seed)


def test_the_window_holds_the_sender_until_the_reader_reads() -> None:
    one, two = end(), end()
    one.send(bytes(WINDOW))
    assert one.sendable_bytes == 0
    with pytest.raises(ValueError, match="window"):
        one.send(b"x")
    settle(one, two)
    assert one.sendable_bytes == 0
    assert two.readable_bytes == WINDOW
    assert two.take(WINDOW // 2) == bytes(WINDOW // 2)
    settle(one, two)
    assert one.sendable_bytes == WINDOW // 2
    assert one.kept_bytes == 0


def test_what_is_sent_while_detached_goes_out_on_the_next_channel() -> None:
    one, two = end(), end()
    one.detach()
    one.send(b"hello")
    one.end()
    assert one.outgoing() == []
    rejoin(one, two)
    settle(one, two)
    assert two.take(99) == b"hello"
    assert two.at_end
    assert one.end_acked


def test_a_replay_starts_inside_a_record_when_half_of_it_arrived() -> None:
    one, two = end(), end()
    one.send(b"abcdef")
    one.outgoing()
    two.receive(Data(0, b"abc"))
    rejoin(one, two)
    assert Data(3, b"def") in records_of(one)


def test_ending_twice_is_ending_once() -> None:
    one, two = end(), end()
    one.end()
    one.end()
    assert records_of(one) == [End(0)]
    assert one.sendable_bytes == 0
    assert not one.finished
    two.receive(End(0))
    assert two.at_end
    assert two.peer_ended


def test_stop_makes_the_other_side_end_and_both_finish() -> None:
    one, two = end(), end()
    one.send(b"unwanted")
    two.stop()
    two.stop()
    two.end()
    settle(one, two)
    assert one.stopped_by_peer
    assert one.ended
    assert one.kept_bytes == 0
    assert two.readable_bytes == 0
    assert one.finished
    assert two.finished


def test_stop_after_the_end_needs_no_word() -> None:
    one, two = end(), end()
    one.send(b"all")
    one.end()
    deliver(one, two)
    two.outgoing()
    two.stop()
    assert two.outgoing() == []
    assert two.at_end


def test_stop_is_repeated_on_a_new_channel_and_answered_across_the_gap() -> None:
    one, two = end(), end()
    one.send(b"lost on the way")
    one.outgoing()
    two.stop()
    two.outgoing()  # lost too
    rejoin(one, two)
    assert Stop() in records_of(two)
    one.receive(Stop())
    assert End(15) in records_of(one)
    two.receive(End(15))  # beyond what arrived: nobody reads it
    assert two.peer_ended


def test_bytes_that_arrive_after_stop_are_dropped() -> None:
    one, two = end(), end()
    two.stop()
    one.send(b"still under way")
    deliver(one, two)
    assert two.readable_bytes == 0


def test_a_reset_fails_both_sides_once() -> None:
    one, two = end(), end()
    one.send(b"data")
    one.reset(ResetCode.FAILED, "because")
    one.reset(ResetCode.FAILED, "second thoughts")
    one.stop()
    one.end()
    settle(one, two)
    assert one.failure is not None
    assert two.failure is not None
    assert (one.failure.by_peer, two.failure.by_peer) == (False, True)
    assert one.failure.reason == two.failure.reason == "because"
    assert one.finished
    assert two.finished
    two.receive(Data(99, b"ignored"))
    assert two.sendable_bytes == 0


def test_a_reset_that_was_lost_is_told_on_the_next_channel() -> None:
    one, two = end(), end()
    one.reset(ResetCode.FAILED, "because")
    one.outgoing()
    one.detach()
    two.detach()
    one.reattach(two.position)
    assert records_of(one) == [Reset(ResetCode.FAILED, "because")]


def test_a_finished_stream_is_not_reset() -> None:
    one, two = end(), end()
    one.end()
    two.end()
    settle(one, two)
    one.reset(ResetCode.FAILED, "too late")
    assert one.failure is None


@pytest.mark.parametrize(
    "records",
    [
        pytest.param([Data(1, b"x")], id="a gap"),
        pytest.param([Data(0, b"x"), Data(0, b"x")], id="the same bytes twice"),
        pytest.param([Data(0, bytes(WINDOW + 1))], id="beyond the window"),
        pytest.param([End(1)], id="an end beyond the bytes"),
        pytest.param([End(0), End(0)], id="two ends"),
        pytest.param([End(0), Data(0, b"x")], id="bytes after the end"),
        pytest.param([Ack(1, WINDOW)], id="an ACK for nothing sent"),
        pytest.param([Ping(1)], id="a control record"),
    ],
)
def test_broken_rules_are_bad_frames(records: list[Record]) -> None:
    state = end()
    for record in records[:-1]:
        state.receive(record)
    with pytest.raises(BadFrame):
        state.receive(records[-1])


def test_a_peer_may_not_lose_what_it_acknowledged() -> None:
    one, two = end(), end()
    one.send(b"hello")
    deliver(one, two)
    one.receive(Ack(5, WINDOW))
    one.detach()
    with pytest.raises(BadFrame, match="lost bytes"):
        one.reattach(Ack(3, WINDOW))


def test_a_position_taken_after_the_end_counts_it() -> None:
    one, two = end(), end()
    one.send(b"all of it")
    one.end()
    deliver(one, two)
    assert two.position.received == len(b"all of it") + 1
    two.outgoing()  # the ACK is lost with its channel
    rejoin(one, two)
    assert one.end_acked
    assert End(9) not in records_of(one)


def test_much_unacknowledged_is_acknowledged_before_anyone_reads() -> None:
    one, two = end(1 << 20), end(1 << 20)
    for _ in range(4):
        one.send(bytes(ACK_EVERY_BYTES // 4))
    deliver(one, two)
    assert records_of(two) == [Ack(ACK_EVERY_BYTES, 1 << 20)]


def test_an_owner_may_write_what_is_kept_and_take_what_arrives_by_itself() -> None:
    one, two = end(), end()
    pieces: list[bytes] = []
    two.sink = lambda piece: pieces.append(bytes(piece))
    data = bytearray(b"first")
    head = one.keep(memoryview(data))
    assert one.outgoing() == []
    for record in RecordDecoder().feed_untrusted(head + data):
        two.receive(record)
    assert pieces == [b"first"]
    assert two.readable_bytes == 0
    before = two.position.limit
    two.consumed(len(data))
    assert two.position.limit == before + len(data)
    rejoin(one, two)
    settle(one, two)
    assert (one.sent_bytes, one.acked_bytes) == (5, 5)
    two.sink = None
    one.send(b"second")
    settle(one, two)
    two.sink = lambda piece: pieces.append(bytes(piece))
    one.send(b"third")
    settle(one, two)
    assert two.take(100) == b"secondthird", "what waits is not overtaken"
    assert pieces == [b"first"]
